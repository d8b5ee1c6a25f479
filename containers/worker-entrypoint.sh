#!/bin/sh
# From root to the user ccrun, for good. What is kept of root's rights is what it takes to give rooms to another user, run agents
# as that user, end them and clear away after them; the worker starts agents without any of it.
#   setuid setgid setpcap      become the agent's user, and give up these rights on the way
#   kill                       end its processes
#   chown dac_override fowner  give it files, read and remove what it made
set -eu
if [ "$(id -u)" != 0 ]; then
  echo "The worker's container must start as root: agents run as a user of their own." >&2
  exit 1
fi
kept=-all,+setuid,+setgid,+setpcap,+kill,+chown,+dac_override,+fowner
export HOME=/home/ccrun
exec setpriv --reuid=ccrun --regid=ccrun --init-groups \
  --inh-caps="$kept" --ambient-caps="$kept" --bounding-set="$kept" -- "$@"

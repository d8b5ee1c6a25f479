#!/bin/sh
# Switch permanently from root to the user ccrun. The worker retains the capabilities that it needs to give directories to another
# user, run agents as that user, kill their processes and delete their files. It starts agents without any capability.
#   setuid setgid setpcap      become the agent's user, and drop these capabilities
#   kill                       kill the agent's processes
#   chown dac_override fowner  give files to the agent; read and delete the agent's files
set -eu
if [ "$(id -u)" != 0 ]; then
  echo "The worker's container must start as root: it runs agents as another user." >&2
  exit 1
fi
capabilities=-all,+setuid,+setgid,+setpcap,+kill,+chown,+dac_override,+fowner
export HOME=/home/ccrun
exec setpriv --reuid=ccrun --regid=ccrun --init-groups \
  --inh-caps="$capabilities" --ambient-caps="$capabilities" --bounding-set="$capabilities" -- "$@"

#!/usr/bin/env bash
# Shows ccrun at work on this machine, after installing it into .venv where that is needed:
#   scripts/demo.sh
#   scripts/demo.sh --prompt "What is in this folder?"    (with ANTHROPIC_API_KEY set)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$root/scripts/lib.sh"

(
  cd "$root"
  prepare
)
# From where the user is: the commands that it ends with can be typed there.
exec "$root/.venv/bin/ccrun" demo "$@"

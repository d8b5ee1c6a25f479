#!/usr/bin/env bash
# Runs a demonstration of ccrun on this machine. Installs ccrun into .venv first if needed.
#   scripts/demo.sh
#   scripts/demo.sh --prompt "What is in this directory?"    (with ANTHROPIC_API_KEY set)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$root/scripts/lib.sh"

(
  cd "$root"
  prepare
)
# In the user's working directory, so that the commands that the demonstration prints work there.
exec "$root/.venv/bin/ccrun" demo "$@"

#!/usr/bin/env bash
# Shows ccrun at work on this machine, after installing it into .venv where that is needed:
#   scripts/demo.sh
#   scripts/demo.sh --prompt "What is in this folder?"    (with ANTHROPIC_API_KEY set)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

prepare
exec "$VENV/bin/ccrun" demo "$@"

#!/usr/bin/env bash
# Runs the whole test suite, after installing ccrun into .venv where that is needed. Arguments go to pytest:
#   scripts/test.sh -k webhook
#   scripts/test.sh -n 0 -x tests/test_wire.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

prepare

missing() {
  command -v "$1" >/dev/null || say "There is no $1 here: tests that need it are skipped ($2)."
}
missing node "receivers and JSON as JavaScript has them"
missing npm "the receiver that runs under Express"

# One process a core.
exec "$VENV/bin/python" -P -m pytest -n logical "$@"

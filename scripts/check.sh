#!/usr/bin/env bash
# Checks a change in seconds: lint, format, types, import contracts, changed shell scripts and the tests of the changed
# files, concurrently.
#   scripts/check.sh                what changed since the merge base with the upstream branch; without one, since HEAD
#   scripts/check.sh REVISION       what changed since the merge base with this revision
# Uncommitted and untracked files count as changed. The tests of a changed file are:
#   ccrun/x/y.py           tests/x/test_y.py; if there is no such file, the test files in tests/x
#   tests/x/test_y.py      itself
#   tests/x/conftest.py    the test files in tests/x
#   another tests/**.py    the test files that import it
#   scripts/y.sh           tests/scripts/test_y.py, if there is such a file
# No tests are run for other files. scripts/test.sh runs the whole suite, .ci/run everything that a change must pass.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

# Prints the commit that the changes are counted from.
base_commit() {
  local upstream
  if [ -n "${1:-}" ]; then
    git merge-base HEAD "$1" || fail "There is no common commit of HEAD and $1."
  elif upstream=$(git rev-parse --verify --quiet '@{upstream}'); then
    git merge-base HEAD "$upstream"
  else
    git rev-parse HEAD
  fi
}

# Prints the files that changed since a commit and still exist, one on each line.
changed_since() {
  git -c core.quotePath=false diff --name-only --no-renames --diff-filter=d "$1" --
  git -c core.quotePath=false ls-files --others --exclude-standard
}

# Prints the test files in a directory, not in its subdirectories. If there are none, those in its parent.
tests_in() {
  local directory=$1 file found=""
  for file in "$directory"/test_*.py; do
    [ -e "$file" ] || continue
    say "$file"
    found=yes
  done
  [ -n "$found" ] || [ "$directory" = tests ] || tests_in "$(dirname "$directory")"
}

# Prints the test files of a changed file.
tests_of() {
  local file=$1 name directory test
  name=$(basename "${file%.*}")
  directory=$(dirname "$file")
  case $file in
    tests/test_*.py | tests/*/test_*.py)
      say "$file"
      ;;
    tests/conftest.py | tests/*/conftest.py)
      tests_in "$directory"
      ;;
    tests/*.py)
      grep -rlE --include='test_*.py' "^ *(from|import) (.*[ .])?$name( |,|\$)" tests || true
      ;;
    ccrun/*.py)
      directory=tests${directory#ccrun}
      test=$directory/test_$name.py
      if [ -e "$test" ]; then
        say "$test"
      else
        tests_in "$directory"
      fi
      ;;
    scripts/*.sh)
      test=tests/scripts/test_$name.py
      [ ! -e "$test" ] || say "$test"
      ;;
  esac
}

tests() {
  local code=0
  "$VENV/bin/python" -P -m pytest -n logical --dist worksteal "$@" || code=$?
  # Exit status 5: the files have slow tests only.
  [ "$code" = 0 ] || [ "$code" = 5 ]
}

base=$(base_commit "$@")
changed=$(changed_since "$base")
prepare

selected=() untested=() shell=()
while IFS= read -r file; do
  [ -n "$file" ] || continue
  case $file in
    *.sh | .ci/run) shell+=("$file") ;;
  esac
  found=$(tests_of "$file")
  if [ -z "$found" ]; then
    untested+=("$file")
  fi
  while IFS= read -r test; do
    case " ${selected[*]:-} " in
      *" $test "*) ;;
      *) [ -z "$test" ] || selected+=("$test") ;;
    esac
  done <<<"$found"
done <<<"$changed"

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
names=() pids=() failed=0

# Starts a check in the background.
start() {
  local name=$1
  shift
  "$@" >"$logs/$name" 2>&1 &
  names+=("$name")
  pids+=($!)
}

start lint "$VENV/bin/ruff" check
start format "$VENV/bin/ruff" format --check
start imports "$VENV/bin/lint-imports"
start types "$VENV/bin/mypy"
if [ ${#shell[@]} -gt 0 ]; then
  start shell "$VENV/bin/shellcheck" --external-sources "${shell[@]}"
fi

if [ ${#untested[@]} -gt 0 ]; then
  say "Without tests here: ${untested[*]}"
fi
if [ ${#selected[@]} -gt 0 ]; then
  say "Tests: ${selected[*]}"
  tests "${selected[@]}" || failed=1
else
  say "No changed file has tests."
fi

for i in "${!pids[@]}"; do
  if wait "${pids[$i]}"; then
    say "${names[$i]}: passed"
  else
    failed=1
    cat "$logs/${names[$i]}"
    say "${names[$i]}: FAILED"
  fi
done
exit "$failed"

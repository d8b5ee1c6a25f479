# shellcheck shell=bash
# For scripts that need ccrun installed: `prepare` makes .venv, or brings it up to date, as requirements*.txt beside this file
# say. To be sourced with the project's root as the current folder. Runs under the bash 3.2 of macOS too.

VENV=.venv
# Written when all is installed: where and from what. While it fits, nothing is installed again.
STAMP=$VENV/installed-from
INSTALL_LOG=$VENV/install.log

# What belongs to another Python must not meet ours.
unset PYTHONPATH PYTHONHOME

say() { printf '%s\n' "$*"; }

fail() {
  printf '%s\n' "$@" >&2
  exit 1
}

prepare() {
  venv_works && [ "$(installed_from)" = "$(cat "$STAMP" 2>/dev/null)" ] && return
  if ! venv_works; then
    local python
    python=$(find_python)
    say "Making .venv with $("$python" -I --version)."
    "$python" -I -m venv --clear "$VENV"
  fi
  say "Installing what ccrun needs into .venv: about a minute, once."
  : >"$INSTALL_LOG"
  # First what builds packages, since what is built (ccrun itself, and packages that come as source) may fetch nothing else.
  pip_install --require-hashes -r scripts/requirements-build.txt
  pip_install --require-hashes --no-build-isolation --use-pep517 -r scripts/requirements.txt
  pip_install --no-deps --no-build-isolation --editable .
  installed_from >"$STAMP"
  say "Installed."
}

# A virtual environment does not survive being moved: the scripts in it name its folder.
venv_works() {
  "$VENV/bin/python" -I -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
    { [ ! -e "$STAMP" ] || [ "$(head -n 1 "$STAMP")" = "$(pwd -P)" ]; }
}

installed_from() {
  pwd -P
  cat pyproject.toml scripts/requirements*.txt | cksum
}

# Prints the newest Python that ccrun is tested with, else a newer one.
find_python() {
  local name version incomplete="" old=""
  for name in python3.13 python3.12 python3.11 python3; do
    # A name may be there without a Python behind it, as with version managers.
    version=$("$name" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if ! "$name" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      old="; $name is $version"
    elif ! "$name" -I -c 'import ensurepip, venv' 2>/dev/null; then
      incomplete=${incomplete:-$version}
    else
      say "$name"
      return
    fi
  done
  if [ -n "$incomplete" ]; then
    fail "Python $incomplete is here without its venv module, which ccrun is installed with." \
      "On Debian and Ubuntu: apt-get install python$incomplete-venv"
  fi
  fail "ccrun needs Python 3.11 or newer on the PATH, as python3 or python3.11 to python3.13$old."
}

pip_install() {
  if ! "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" 2>&1 |
    tee -a "$INSTALL_LOG" | show_progress; then
    tail -n 20 "$INSTALL_LOG" >&2
    fail "" "ccrun could not be installed; the end of what pip said is above, all of it in $INSTALL_LOG."
  fi
}

# One line that changes, for who watches; nothing for a log.
show_progress() {
  [ -t 1 ] || exec cat >/dev/null
  local line
  while IFS= read -r line; do
    printf '\r\033[K  %.70s' "${line%% (from *}"
  done
  printf '\r\033[K'
}

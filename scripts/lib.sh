# shellcheck shell=bash
# Sourced by scripts that need ccrun installed, with the root of the project as the working directory. `prepare` creates .venv, or
# updates it, from requirements*.txt in this directory. Compatible with bash 3.2, which macOS has.

VENV=.venv
# Written after the installation: its directory, and a checksum of the requirements. While both match, nothing is installed again.
STAMP=$VENV/installed-from
INSTALL_LOG=$VENV/install.log

# These variables would add modules of another Python.
# Some machines forbid compiled modules, which would be compiled again by each process that a test starts.
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

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
    say "Creating .venv with $("$python" -I --version)."
    "$python" -I -m venv --clear "$VENV"
  fi
  say "Installing ccrun into .venv. This takes about a minute, once."
  : >"$INSTALL_LOG"
  # Build tools come first, because source packages and ccrun itself are built without build isolation, so that nothing
  # unpinned is downloaded.
  pip_install --require-hashes -r scripts/requirements-build.txt
  pip_install --require-hashes --no-build-isolation --use-pep517 -r scripts/requirements.txt
  pip_install --no-deps --no-build-isolation --editable .
  installed_from >"$STAMP"
  say "Installed."
}

# A virtual environment cannot be moved: its scripts contain its path.
venv_works() {
  "$VENV/bin/python" -I -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
    { [ ! -e "$STAMP" ] || [ "$(head -n 1 "$STAMP")" = "$(pwd -P)" ]; }
}

installed_from() {
  pwd -P
  cat pyproject.toml scripts/requirements*.txt | cksum
}

# Prints the newest Python that ccrun is tested with, or `python3` if that is a newer one.
find_python() {
  local name version incomplete="" old=""
  for name in python3.13 python3.12 python3.11 python3; do
    # Version managers install commands for versions that are not installed.
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
    fail "Python $incomplete has no venv module, which the installation of ccrun needs." \
      "On Debian and Ubuntu: apt-get install python$incomplete-venv"
  fi
  fail "ccrun needs Python 3.11 or newer on the PATH, as python3 or python3.11 to python3.13$old."
}

pip_install() {
  if ! "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" 2>&1 |
    tee -a "$INSTALL_LOG" | show_progress; then
    tail -n 20 "$INSTALL_LOG" >&2
    fail "" "ccrun could not be installed. The end of pip's output is above, the whole output is in $INSTALL_LOG."
  fi
}

# Shows the last line of pip's output on a terminal, and nothing elsewhere.
show_progress() {
  [ -t 1 ] || exec cat >/dev/null
  local line
  while IFS= read -r line; do
    printf '\r\033[K  %.70s' "${line%% (from *}"
  done
  printf '\r\033[K'
}

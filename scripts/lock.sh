#!/usr/bin/env bash
# Pins again what scripts/test.sh and the images in containers/ install, after pyproject.toml changed: every package with its
# version and hashes, for Python from 3.11 on, on Linux and macOS. With --upgrade, to the newest versions. Needs uv (pip install uv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pin() {
  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$@"
}

# What is needed to install packages that come as source, ccrun itself among them. It is pinned too, so that nothing is
# fetched that is not.
build=scripts/requirements-build.txt
pin --output-file "$build" "$@" - <<'END'
editables
hatchling
setuptools
END

# cryptography 49 was the first without wheels for Macs with an Intel processor.
pin --output-file scripts/requirements.txt --constraint "$build" --extra claude --extra gcp --group dev "$@" pyproject.toml - <<'END'
cryptography<49 ; sys_platform == "darwin" and platform_machine == "x86_64"
cryptography>=49 ; sys_platform != "darwin" or platform_machine != "x86_64"
END

# What each image needs of it: the same versions, since the tests ran with them. The API runs no CLI.
all=scripts/requirements.txt
pin --output-file containers/requirements-api.txt --constraint "$all" --extra gcp pyproject.toml
pin --output-file containers/requirements-worker.txt --constraint "$all" --extra gcp --extra claude pyproject.toml

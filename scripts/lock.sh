#!/usr/bin/env bash
# Updates the pinned requirements of scripts/test.sh and of the images in containers/ after pyproject.toml changed: every package with
# version and hashes, for Python 3.11 or newer on Linux and macOS. With --upgrade, pins the newest versions. Needs uv (pip install uv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pin() {
  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$@"
}

# The build tools for ccrun itself and for packages without wheels. They are pinned too, so that nothing unpinned is downloaded.
build=scripts/requirements-build.txt
pin --output-file "$build" "$@" - <<'END'
editables
hatchling
setuptools
END

# cryptography has no wheels for Macs with an Intel processor since version 49.
pin --output-file scripts/requirements.txt --constraint "$build" --extra claude --extra gcp --group dev "$@" pyproject.toml - <<'END'
cryptography<49 ; sys_platform == "darwin" and platform_machine == "x86_64"
cryptography>=49 ; sys_platform != "darwin" or platform_machine != "x86_64"
END

# The requirements of each image, with the versions that the tests run with. The API does not need the CLI.
all=scripts/requirements.txt
pin --output-file containers/requirements-api.txt --constraint "$all" --extra gcp pyproject.toml
pin --output-file containers/requirements-worker.txt --constraint "$all" --extra gcp --extra claude pyproject.toml

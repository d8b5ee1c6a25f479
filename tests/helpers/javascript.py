"""JavaScript that tests run: Node, and the packages of `tests/receivers/package.json`, which are installed on first use."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

RECEIVERS: Final = Path(__file__).parents[1] / "receivers"


def node_with_packages() -> str:
    """Return the path of Node, for scripts in `RECEIVERS`. Skips the test where Node or a package is not to be had."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed: what is written in JavaScript cannot run")
    # One at a time, since tests may run in several processes.
    with (RECEIVERS / "package.json").open() as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)
        names = json.load(manifest)["dependencies"]
        if not all((RECEIVERS / "node_modules" / name).is_dir() for name in names):
            installed = subprocess.run(
                [npm, "ci", "--no-audit", "--no-fund"], cwd=RECEIVERS, capture_output=True, text=True, check=False
            )
            if installed.returncode != 0:
                pytest.skip(f"npm could not install {', '.join(names)}: {installed.stderr.strip()[:200]}")
    return node

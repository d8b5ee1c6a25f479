from __future__ import annotations

import re
import subprocess

import pytest
from helpers.deploy import ALL_SCRIPTS, ROOT


def test_shellcheck_finds_nothing() -> None:
    """All shell scripts pass shellcheck."""
    shellcheck = ROOT / ".venv" / "bin" / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed")
    scripts = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
    result = subprocess.run(
        [shellcheck, "--external-sources", *scripts], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (0, "") == (result.returncode, result.stdout)


def test_scripts_run_under_bash_3_2() -> None:
    """No script uses features that the bash of macOS lacks, or `eval`; every deployment script stops on errors."""
    forbidden = r"declare -[An]|local -[An]|mapfile|readarray|\$\{\w+[,^]|\|&|&>>|\beval\b|\bcoproc\b"
    texts = {path.name: path.read_text() for path in (ROOT / "scripts").glob("*.sh")}
    assert {} == {name: found for name, text in texts.items() if (found := re.findall(forbidden, text))}
    assert [] == [name for name in texts if name in ALL_SCRIPTS and "set -euo pipefail" not in texts[name]]

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from ccrun.claude_cli import find_cli
from ccrun.errors import CcrunError


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory with the executables `claude` and `other`, and `plain`, which is not executable."""
    for name in ("claude", "other", "plain"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o644 if name == "plain" else 0o755)
    return tmp_path


def test_configured_cli_is_used(programs: Path) -> None:
    """It may be a path or the name of a program on the PATH."""
    assert find_cli(str(programs / "other"), str(programs)) == programs / "other"
    assert find_cli("other", str(programs)) == programs / "other"


@pytest.mark.parametrize("configured", ["missing", "plain"])
def test_configured_cli_that_is_not_executable_is_an_error(programs: Path, configured: str) -> None:
    """No other CLI is used instead, and the error has no local path."""
    with pytest.raises(CcrunError, match=r"^CLAUDE_CLI does not name a program that can be run\.$"):
        find_cli(str(programs / configured), str(programs))


def test_cli_on_path_is_preferred_to_the_bundled_cli(programs: Path, tmp_path: Path) -> None:
    """Without `claude` on the PATH, the CLI of the SDK package is used, and the package is not imported."""
    assert find_cli(None, f"/nowhere:{programs}") == programs / "claude"
    assert find_cli(None, "/nowhere").parts[-3:] == ("claude_agent_sdk", "_bundled", "claude")
    assert "claude_agent_sdk" not in sys.modules


def test_error_for_a_missing_cli_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names all three remedies."""
    # With None, importing the package fails.
    monkeypatch.setitem(sys.modules, "claude_agent_sdk", None)
    message = "The Claude CLI was not found: set CLAUDE_CLI, put `claude` on PATH or install ccrun[claude]."
    with pytest.raises(CcrunError, match=re.escape(message)):
        find_cli(None, "/nowhere")

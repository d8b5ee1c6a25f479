"""The sandbox as the settings describe it, and the command that checks it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ccrun import config
from ccrun.agent_sandbox import agent_sandbox, isolation_here, sentence_about
from ccrun.process.sandbox import Sandbox
from ccrun.results import AgentNetwork, Isolation, IsolationLevel


def check(**settings: str) -> subprocess.CompletedProcess[str]:
    """Run `ccrun check sandbox`."""
    command = [sys.executable, "-P", "-m", "ccrun", "check", "sandbox"]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)


def test_private_directories_are_hidden(tmp_path: Path) -> None:
    """The data directory is hidden wherever it is, also in the directory of a program; homes and temporary files are too."""
    (tmp_path / "opt" / "app" / "bin").mkdir(parents=True)
    (tmp_path / "opt" / "app" / "data").mkdir()
    cli = tmp_path / "opt" / "app" / "package.json"
    cli.write_text("{}")
    cli.chmod(0o755)
    settings = config.load({"CCRUN_DATA_DIR": str(tmp_path / "opt" / "app" / "data"), "CLAUDE_CLI": str(cli)})
    found = agent_sandbox(settings, {"PATH": os.environ["PATH"]}, None)
    if not isinstance(found, Sandbox):
        pytest.skip(found)
    # The package of the CLI is visible.
    assert tmp_path / "opt" / "app" in found.readable
    assert tmp_path / "opt" / "app" / "data" in found.hidden


def test_missing_cli_is_no_reason(tmp_path: Path) -> None:
    """The task reports it when it starts the CLI."""
    settings = config.load({"CCRUN_DATA_DIR": str(tmp_path), "CLAUDE_CLI": str(tmp_path / "missing")})
    found = agent_sandbox(settings, {"PATH": os.environ["PATH"]}, None)
    assert isinstance(found, Sandbox) or found.startswith("bubblewrap")


def test_sandbox_that_is_off_is_not_tried(tmp_path: Path) -> None:
    """The level is that of the user, and the reason is the setting."""
    settings = config.load({"CCRUN_DATA_DIR": str(tmp_path), "CCRUN_SANDBOX": "off"})
    isolation = isolation_here(settings, {"PATH": ""})
    process = Isolation(level=IsolationLevel.PROCESS, network=AgentNetwork.HOST, reasons=("CCRUN_SANDBOX is off.",))
    assert process == isolation
    assert "Agents run at level process, with the network host. CCRUN_SANDBOX is off." == sentence_about(isolation)


def test_check_tells_the_level() -> None:
    """The exit status is 0 in a sandbox, and 1 elsewhere."""
    ran = check(AGENT_NETWORK="none")
    if ran.returncode == 0:
        assert "Agents run at level sandbox, with the network none.\n" == ran.stdout
    else:
        assert ran.stdout.startswith("Agents run at level process, with the network host. bubblewrap"), ran
    off = check(CCRUN_SANDBOX="off")
    assert (1, "Agents run at level process, with the network host. CCRUN_SANDBOX is off.\n") == (
        off.returncode,
        off.stdout,
    )


def test_check_reports_invalid_settings() -> None:
    """The sentence is on stderr."""
    ran = check(CCRUN_SANDBOX="maybe")
    assert ("", 'CCRUN_SANDBOX must be one of auto, required, off, not "maybe".\n') == (ran.stdout, ran.stderr)
    assert 1 != ran.returncode

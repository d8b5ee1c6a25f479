"""The sandbox of agents on this machine, as the settings describe it."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ccrun.claude_cli import find_cli
from ccrun.config import Config, SandboxMode
from ccrun.errors import CcrunError
from ccrun.process.sandbox import Sandbox, find_sandbox
from ccrun.process.user import User, find_user
from ccrun.results import AgentNetwork, Isolation, IsolationLevel


def agent_sandbox(config: Config, inherited: Mapping[str, str], user: User | None) -> Sandbox | str:
    """Return the sandbox after a trial, or a sentence that says why there is none. Blocks.

    Args:
        inherited: The environment of the worker.
        user: The user of the agent's processes.
    """
    if config.sandbox is SandboxMode.OFF:
        return "CCRUN_SANDBOX is off."
    path = inherited.get("PATH", os.defpath)
    try:
        cli = [find_cli(str(config.claude_cli) if config.claude_cli else None, path)]
    except CcrunError:
        # The task fails with this error when it starts the CLI.
        cli = []
    # Wherever these are, also inside the directory of a program.
    hidden = (config.data_dir, Path(tempfile.gettempdir()), Path(pwd.getpwuid(os.geteuid()).pw_dir))
    return find_sandbox(path=path, programs=cli, hidden=hidden, user=user)


def isolation_of(found: Sandbox | str, *, network: AgentNetwork, has_user: bool) -> Isolation:
    """Return the isolation that agents have with this result of `agent_sandbox`.

    Args:
        network: Their network in a sandbox.
        has_user: Whether they have a user of their own.
    """
    if isinstance(found, Sandbox):
        return Isolation(level=IsolationLevel.SANDBOX, network=network)
    level = IsolationLevel.USER if has_user else IsolationLevel.PROCESS
    return Isolation(level=level, network=AgentNetwork.HOST, reasons=(found,))


def isolation_here(config: Config, inherited: Mapping[str, str]) -> Isolation:
    """Return the isolation that agents have on this machine. Blocks.

    Args:
        inherited: The environment of the workers.

    Raises:
        ConfigError: This process may not start others as `CCRUN_AGENT_USER`.
    """
    name = config.agent_user if config.agent_users is None else str(config.agent_users[0])
    user = find_user(name, os.defpath) if name else None
    found = agent_sandbox(config, inherited, user)
    return isolation_of(found, network=config.agent_network, has_user=user is not None)


def sentence_about(isolation: Isolation) -> str:
    """Return a sentence about an isolation, with its reasons."""
    return " ".join(
        (f"Agents run at level {isolation.level}, with the network {isolation.network}.", *isolation.reasons)
    )

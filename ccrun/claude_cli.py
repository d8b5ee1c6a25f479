"""Finding the Claude CLI on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from ccrun.errors import CcrunError


def find_cli(configured: str | None, path: str) -> Path:
    """Return the path of the CLI: the configured one, else `claude` on the PATH, else the one that claude-agent-sdk ships.

    Reads the disk, so it blocks.

    Args:
        configured: A path or a program name. When it is given, no other program is considered.
        path: The PATH to search.

    Raises:
        CcrunError: No CLI was found.
    """
    if configured:
        if found := shutil.which(configured, path=path):
            return Path(found).absolute()
        raise CcrunError("CLAUDE_CLI does not name a program that can be run.")
    if found := shutil.which("claude", path=path):
        return Path(found).absolute()
    # Not imported: the import takes a second.
    package = importlib.util.find_spec("claude_agent_sdk")
    for folder in (package and package.submodule_search_locations) or ():
        bundled = Path(folder, "_bundled", "claude")
        if os.access(bundled, os.X_OK):
            return bundled
    raise CcrunError("The Claude CLI was not found: set CLAUDE_CLI, put `claude` on PATH or install ccrun[claude].")

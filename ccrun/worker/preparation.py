"""Prepares the workspace for the agent: writes its variables to `.env` and checks its settings."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from ccrun.errors import CcrunError
from ccrun.process.capture import capture
from ccrun.spec import TaskSpec
from ccrun.task import Secret
from ccrun.worker import claude, dotenv
from ccrun.worker.git.changes import DOTENV
from ccrun.worker.git.checkout import Checkout
from ccrun.worker.git.run import Git
from ccrun.worker.lines import worker_line
from ccrun.worker.workspace import Workspace

#: Seconds in which the CLI checks settings. It takes about one.
SETTINGS_CHECK_SECONDS: Final = 60.0
#: Bytes that the CLI prints about settings: a line for each invalid one.
MAX_SETTINGS_CHECK_BYTES: Final = 1024 * 1024
#: Characters of an error about settings, which becomes part of the record.
MAX_SETTINGS_ERROR_CHARS: Final = 1000
#: Bytes of a `.env` of the repository that are preserved at most.
MAX_DOTENV_BYTES: Final = 1024 * 1024

LogLine = Callable[[bytes | bytearray], Awaitable[None]]


class PreparationFailed(CcrunError):
    """A step before the start of the agent failed."""


# --- .env ------------------------------------------------------------------------------------------------------------


async def prepare_dotenv(
    secrets: Mapping[str, Secret], workspace: Workspace, checkout: Checkout | None, *, log_line: LogLine
) -> None:
    """Write the variables to `.env`, and log which of them could not be written there.

    Raises:
        PreparationFailed: The file cannot be written.
        GitError: git failed.
    """
    if not secrets:
        return
    git = None
    if checkout is not None and checkout.origin is not None:
        git = checkout.worker_git(workspace.root).at(workspace.repository)
    left_out = await write_dotenv(workspace, secrets, git)
    if left_out:
        names = ", ".join(left_out)
        await log_line(
            worker_line(
                "dotenv",
                content=f"Not written to .env, because not all of its readers would read the exact values: {names}.",
            )
        )


async def write_dotenv(workspace: Workspace, secrets: Mapping[str, Secret], git: Git | None) -> tuple[str, ...]:
    """Write the variables to `.env` in the repository, with mode 0600, and hide it from git.

    If the repository has a `.env`, the variables are appended to its lines.

    Args:
        git: git in the cloned repository, None if nothing was cloned.

    Returns:
        The variables that are not in the file, because its readers would not all read their values exactly.

    Raises:
        PreparationFailed: The file cannot be written.
    """
    values = {name: secret.reveal() for name, secret in secrets.items()}
    try:
        existed, left_out = await asyncio.to_thread(_write, workspace.repository / DOTENV, values)
        if git is not None:
            await asyncio.to_thread(_exclude, workspace.repository / ".git" / "info")
            if existed and (await git.run("ls-files", "--error-unmatch", "--", DOTENV)).exit.ok:
                # The agent's git shows the file as unchanged. ccrun itself never commits it.
                await git("update-index", "--skip-worktree", "--", DOTENV)
    except OSError as error:
        raise PreparationFailed(f"{DOTENV} cannot be written: {error.strerror}.") from error
    return left_out


def _write(path: Path, values: Mapping[str, str]) -> tuple[bool, tuple[str, ...]]:
    """Replace the file. Return whether it existed, and the variables that were left out."""
    existing, existed = b"", os.path.lexists(path)
    if existed:
        if not stat.S_ISREG(path.lstat().st_mode):
            # A link may lead out of the repository, and a directory has no lines to preserve.
            raise PreparationFailed(
                f"The repository has a {DOTENV} that is not a regular file, so the variables cannot be written to it."
            )
        with path.open("rb") as file:
            existing = file.read(MAX_DOTENV_BYTES)
        path.unlink()
    rendered = dotenv.render(values, existing=existing)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(rendered.content)
    return existed, rendered.left_out


def _exclude(info: Path) -> None:
    info.mkdir(exist_ok=True)
    with (info / "exclude").open("a", encoding="utf-8") as file:
        file.write(f"/{DOTENV}\n")


# --- settings --------------------------------------------------------------------------------------------------------


async def check_settings(
    spec: TaskSpec, workspace: Workspace, *, cli: Callable[[], Path], environment: Mapping[str, str]
) -> None:
    """Let the CLI check the settings of the request.

    Args:
        cli: Returns the path of the CLI.
        environment: The environment variables of the agent.

    Raises:
        PreparationFailed: A setting is not valid, or they could not be checked.
    """
    if spec.settings is None:
        return
    directory = workspace.config / claude.SETTINGS_CHECK_DIRECTORY
    # Without its credential the CLI sends no request.
    variables = {name: value for name, value in environment.items() if name not in claude.ROUTING_VARIABLES}
    try:
        ran = await capture(
            [str(await asyncio.to_thread(cli)), "doctor"],
            env={**variables, "CLAUDE_CONFIG_DIR": str(directory)},
            cwd=directory,
            confinement=workspace.confinement,
            seconds=SETTINGS_CHECK_SECONDS,
            max_bytes=MAX_SETTINGS_CHECK_BYTES,
        )
    except CcrunError as error:
        raise PreparationFailed(f"The Claude CLI could not check settings: {error.message}") from error
    if not ran.exit.ok:
        raise PreparationFailed("The Claude CLI could not check settings: `claude doctor` failed.")
    errors = claude.settings_errors(ran.stdout.decode(errors="replace"))
    if errors:
        listed = "; ".join(errors)
        if len(listed) > MAX_SETTINGS_ERROR_CHARS:
            listed = f"{listed[:MAX_SETTINGS_ERROR_CHARS]}…"
        raise PreparationFailed(f"settings is not valid for the Claude CLI: {listed}.")

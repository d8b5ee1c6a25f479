"""What comes before the agent: its variables in `.env`, and the commands of the request."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from ccrun.errors import CcrunError
from ccrun.process.child import spawn
from ccrun.task import Secret
from ccrun.worker import dotenv
from ccrun.worker.git.changes import DOTENV
from ccrun.worker.git.run import SYSTEM_PATH, Git
from ccrun.worker.lines import text_line, worker_line
from ccrun.worker.workspace import Workspace

#: Of a command's output, for the error: what a terminal shows of the end.
TAIL_BYTES: Final = 1000
#: A `.env` that a repository brings and that is larger than this is none.
MAX_DOTENV_BYTES: Final = 1024 * 1024

Say = Callable[[bytes | bytearray], Awaitable[None]]


class PreparationFailed(CcrunError):
    """A command of the request, or something else before the agent, failed."""


# --- .env ------------------------------------------------------------------------------------------------------------


async def write_dotenv(workspace: Workspace, secrets: Mapping[str, Secret], git: Git | None) -> tuple[str, ...]:
    """Write the variables to `.env` at the top of the workspace, for the agent's eyes only; hide it from git.

    A `.env` of the repository's own keeps its lines, with ours after them.

    Args:
        git: In the repository that was cloned; None where there is none.

    Returns:
        The variables for which there is no spelling that a shell and the readers of such files share.

    Raises:
        PreparationFailed: It cannot be written.
    """
    values = {name: secret.reveal() for name, secret in secrets.items()}
    try:
        is_there, left_out = await asyncio.to_thread(_write, workspace.repository / DOTENV, values)
        if git is not None:
            await asyncio.to_thread(_exclude, workspace.repository / ".git" / "info")
            if is_there and (await git.run("ls-files", "--error-unmatch", "--", DOTENV)).exit.ok:
                # For the agent's own use of git: as if nothing had changed. What ccrun commits never has it.
                await git("update-index", "--skip-worktree", "--", DOTENV)
    except OSError as error:
        raise PreparationFailed(f"{DOTENV} cannot be written: {error.strerror}.") from error
    return left_out


def _write(path: Path, values: Mapping[str, str]) -> tuple[bool, tuple[str, ...]]:
    """Write a new file in the place of what is there; return whether there was something, and the variables left out."""
    spelled, is_there = dotenv.spell(values), os.path.lexists(path)
    if is_there:
        if not stat.S_ISREG(path.lstat().st_mode):
            # A link would lead somewhere else; a folder of that name is no file of variables.
            raise PreparationFailed(
                f"The repository has a {DOTENV} that is no file, so the variables cannot be kept there."
            )
        with path.open("rb") as file:
            spelled = dotenv.append(file.read(MAX_DOTENV_BYTES), values)
        path.unlink()
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(spelled.content)
    return is_there, spelled.left_out


def _exclude(info: Path) -> None:
    info.mkdir(exist_ok=True)
    with (info / "exclude").open("a", encoding="utf-8") as file:
        file.write(f"/{DOTENV}\n")


# --- commands --------------------------------------------------------------------------------------------------------


async def run_commands(
    commands: Sequence[str], workspace: Workspace, *, environment: Mapping[str, str], say: Say, seconds: float
) -> None:
    """Run the commands one after the other, each in a shell and a process group of its own, and put what they print into the log.

    Args:
        environment: The agent's.
        say: Takes a line for the log.
        seconds: What each of them has.

    Raises:
        PreparationFailed: One failed, or was not done in time; those that follow it are not run.
    """
    shell = await asyncio.to_thread(shutil.which, "bash", path=SYSTEM_PATH) or "/bin/sh"
    for index, command in enumerate(commands, start=1):
        await say(worker_line("command", event="began", index=index, command=command))
        # In a file: an argument would stand in the list of processes, with whatever secret is in it.
        script = workspace.inputs / f"command-{index}"
        which = f"Pre-execution command {index} of {len(commands)}"
        tail = bytearray()
        async with spawn(
            [shell, str(script)], env=environment, cwd=workspace.repository, user=workspace.agent, joins_stderr=True
        ) as child:
            try:
                async with asyncio.timeout(seconds):
                    async for line in child.lines():
                        tail += line[-TAIL_BYTES:] + b"\n"
                        del tail[:-TAIL_BYTES]
                        await say(text_line(line, type="worker", step="command", event="output", index=index))
                    ended = await child.wait()
            except TimeoutError:
                bound = f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} s"
                raise PreparationFailed(f"{which} was not done within {bound}{_end_of(tail)}") from None
        await say(worker_line("command", event="ended", index=index, exitCode=ended.code))
        if not ended.ok:
            how = f"was killed by signal {ended.signal}" if ended.signal else f"failed with exit code {ended.code}"
            raise PreparationFailed(f"{which} {how}{_end_of(tail)}")


def command_files(commands: Sequence[str]) -> dict[str, bytes]:
    """Return the files that `run_commands` expects among the inputs."""
    return {f"command-{index}": f"{command}\n".encode() for index, command in enumerate(commands, start=1)}


def _end_of(tail: bytes | bytearray) -> str:
    words = tail.decode(errors="replace").strip()
    return f"; the end of its output: {words}" if words else "; it printed nothing."

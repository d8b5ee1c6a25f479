"""git in an environment that is independent of this machine, for tests and for the stand-in git servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs
import psutil

#: The timeout of a git command, long enough for a busy machine.
GIT_SECONDS: Final = 60.0
CHUNK_BYTES: Final = 64 * 1024
#: A fixed time, so that equal commits have equal IDs.
DATE: Final = "1700000000 +0000"


class GitFailed(AssertionError):
    """A git command that should have succeeded failed."""


@attrs.frozen(kw_only=True)
class Result:
    """The result of a git command."""

    code: int
    stdout: bytes
    stderr: str


def environment(**more: str) -> dict[str, str]:
    """Return an environment for git with its default configuration and a fixed identity."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": os.environ["HOME"],
        "LC_ALL": "C.UTF-8",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_AUTHOR_NAME": "A Test",
        "GIT_AUTHOR_EMAIL": "test@example.com",
        "GIT_AUTHOR_DATE": DATE,
        "GIT_COMMITTER_NAME": "A Test",
        "GIT_COMMITTER_EMAIL": "test@example.com",
        "GIT_COMMITTER_DATE": DATE,
        **more,
    }


async def run_git(
    *args: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    seconds: float = GIT_SECONDS,
) -> Result:
    """Run git and return its result, also if it fails."""
    async with asyncio.timeout(seconds), backend(["git", *map(str, args)], cwd=cwd, env=env or environment()) as git:
        feeding = asyncio.create_task(feed(git, stdin))
        stdout, stderr, _ = await asyncio.gather(_out(git).read(), _err(git).read(), feeding)
        return Result(code=await git.wait(), stdout=stdout, stderr=stderr.decode(errors="replace"))


async def git(
    *args: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    seconds: float = GIT_SECONDS,
) -> str:
    """Run git and return its output without the last newline.

    Raises:
        GitFailed: The exit code is not 0.
    """
    result = await run_git(*args, cwd=cwd, env=env, stdin=stdin, seconds=seconds)
    if result.code != 0:
        raise GitFailed(f"git {' '.join(map(str, args))} exited with {result.code}: {result.stderr}")
    return result.stdout.decode().removesuffix("\n")


@contextlib.asynccontextmanager
async def backend(
    argv: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program with pipes, and kill its process group on exit."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        cwd=cwd,
        env=dict(env),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # The group may exist although its leader has exited.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        waiting = asyncio.create_task(_wait(process))
        # A server that closes may cancel its handlers a second time.
        while not waiting.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(waiting)


async def _wait(process: asyncio.subprocess.Process) -> None:
    # `wait` alone does not return until the pipes are read to their ends.
    await asyncio.gather(process.wait(), _out(process).read(), _err(process).read())


async def feed(process: asyncio.subprocess.Process, content: bytes) -> None:
    """Write the input to a process. A process that does not read it is not an error."""
    stdin = _in(process)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stdin.write(content)
        await stdin.drain()
    stdin.close()


async def pump(reader: asyncio.StreamReader, write: Callable[[bytes], Awaitable[None]]) -> None:
    """Pass the data of a pipe on as it arrives, until its end."""
    while data := await reader.read(CHUNK_BYTES):
        await write(data)


def _in(process: asyncio.subprocess.Process) -> asyncio.StreamWriter:
    assert process.stdin is not None
    return process.stdin


def _out(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    assert process.stdout is not None
    return process.stdout


def _err(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    assert process.stderr is not None
    return process.stderr


def descendants() -> set[psutil.Process]:
    """Return the running descendants of this process."""
    return {process for process in psutil.Process().children(recursive=True) if _command(process)}


def is_running(argument: str) -> bool:
    """Return whether a descendant of this process has an argument, such as `upload-pack`."""
    return any(argument in _command(process) for process in descendants())


def _command(process: psutil.Process) -> list[str]:
    # A zombie has no command line.
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []

"""A running child process: its pipes, its lines of any length, SIGTERM then SIGKILL.

`spawn` is the only way to start one. No child outlives its `async with`, whatever it has started, and a child that a signal killed
never counts as a success. Nothing here knows the programs that it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from ccrun.errors import CcrunError
from ccrun.process.exit import Exit, exit_from_returncode
from ccrun.process.tree import (
    KILL_SECONDS,
    MARKER_VARIABLE,
    TREE_POLL_SECONDS,
    ProcessTree,
    open_children,
    signal_group,
)
from ccrun.process.user import User

#: The default capacity of a pipe on Linux: one read empties it.
PIPE_READ_BYTES: Final = 64 * 1024
#: Enough for the last words of any program; the rest of a flood is dropped so that memory stays bounded.
STDERR_TAIL_BYTES: Final = 64 * 1024
#: What a child may take to end by itself: the platform gives the worker 10 s in all.
TERM_GRACE_SECONDS: Final = 5.0
#: How long a pipe that outlives its child (a grandchild holds it) may be silent in all before it counts as ended.
DRAIN_SECONDS: Final = 1.0
#: A pipe holds at most 1 MiB (`/proc/sys/fs/pipe-max-size`), so whatever comes after that is not the child's own.
DRAIN_BYTES: Final = 2 * 1024 * 1024


# --- a running child -------------------------------------------------------------------------------------------------


class Child:
    """A running process; made by `spawn` alone.

    Its pipes are our own and not asyncio's, whose `Process.wait` returns only when every pipe is closed: for hours, when a
    grandchild holds one.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        stdout: asyncio.StreamReader,
        stderr: asyncio.StreamReader,
        *,
        marker: str | None,
        term_grace_seconds: float,
    ) -> None:
        self.pid = process.pid
        self._process = process
        self._stdout = stdout
        self._family = ProcessTree(process.pid, marker)
        self._grace = term_grace_seconds
        self._gone = asyncio.Event()
        self._gone_at = 0.0
        self._reading: asyncio.Timeout | None = None
        self._drain_seconds = DRAIN_SECONDS
        self._drain_bytes = DRAIN_BYTES
        self._tail = bytearray()
        self._tailing = asyncio.create_task(self._keep_tail(stderr))
        self._exiting = asyncio.create_task(self._watch())
        self._ending: asyncio.Task[None] | None = None
        self._shutdown = asyncio.Event()

    @property
    def stderr_tail(self) -> bytes:
        """The last `STDERR_TAIL_BYTES` bytes of stderr. Complete once `wait` has returned."""
        return bytes(self._tail)

    async def wait(self) -> Exit:
        """Wait until the process itself has ended, whoever still holds its pipes."""
        return await asyncio.shield(self._exiting)

    def terminate(self) -> None:
        """Begin to end the process and all that it has started: SIGTERM, the grace, SIGKILL. Doing it twice is harmless."""
        self._begin_ending()

    def _begin_ending(self) -> asyncio.Task[None]:
        self._ending = self._ending or asyncio.create_task(self._end())
        return self._ending

    def kill(self) -> None:
        """End the process and all that it has started without a grace, or what is left of one."""
        self._shutdown.set()
        self.terminate()

    async def lines(self) -> AsyncIterator[bytes | bytearray]:
        """Yield the lines of stdout without their newline, however long, and the last one also without a newline.

        Nothing is read while the caller is busy, so a slow caller slows the child and memory stays near one line. It ends
        with the pipe, or soon after the process when a grandchild keeps the pipe open. To be used once.
        """
        begun = bytearray()
        while chunk := await self._read():
            start = 0
            while (end := chunk.find(b"\n", start)) >= 0:
                line: bytes | bytearray = chunk[start:end]
                if begun:
                    begun += line
                    line, begun = begun, bytearray()
                yield line
                # What was handed over must not live on here while the next line grows.
                del line
                start = end + 1
            begun += memoryview(chunk)[start:]
        if begun:
            yield begun

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield what stdout has, as it comes. As `lines` otherwise."""
        while chunk := await self._read():
            yield chunk

    async def _read(self) -> bytes:
        """Return what stdout has next, or nothing at its end: its real end or, when the process is gone, the drain's."""
        if self._drain_bytes <= 0:
            return b""
        loop = asyncio.get_running_loop()
        began = loop.time()
        bound = began + self._drain_seconds if self._gone.is_set() else None
        try:
            async with asyncio.timeout_at(bound) as self._reading:
                chunk = await self._stdout.read(PIPE_READ_BYTES)
        except TimeoutError:
            return b""
        finally:
            self._reading = None
        if self._gone.is_set():
            self._drain_seconds -= loop.time() - max(began, self._gone_at)
            self._drain_bytes -= len(chunk)
        return chunk

    async def _keep_tail(self, stderr: asyncio.StreamReader) -> None:
        while chunk := await stderr.read(PIPE_READ_BYTES):
            self._tail += chunk
            del self._tail[:-STDERR_TAIL_BYTES]

    async def _watch(self) -> Exit:
        returncode = await self._process.wait()
        self._gone_at = asyncio.get_running_loop().time()
        self._gone.set()
        if self._reading is not None:
            self._reading.reschedule(self._gone_at + DRAIN_SECONDS)
        await asyncio.wait({self._tailing}, timeout=DRAIN_SECONDS)
        return exit_from_returncode(returncode)

    async def _end(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._grace
        # Who descends from the child is known before the child ends: an orphan tells no more where it comes from.
        await asyncio.to_thread(self._family.living)
        signal_group(self.pid, signal.SIGTERM)
        while not (self._gone.is_set() and await self._group_is_empty()) and not self._shutdown.is_set():
            policy = until - loop.time()
            if policy <= 0:
                break
            with contextlib.suppress(TimeoutError):
                waiting = self._shutdown if self._gone.is_set() else self._gone
                await asyncio.wait_for(waiting.wait(), min(policy, TREE_POLL_SECONDS))
        signal_group(self.pid, signal.SIGKILL)
        await asyncio.to_thread(self._family.kill, KILL_SECONDS)
        await asyncio.wait({self._exiting}, timeout=KILL_SECONDS)

    async def _group_is_empty(self) -> bool:
        if sys.platform != "linux":
            return not signal_group(self.pid, 0)
        return all(process.group != self.pid for process in await asyncio.to_thread(self._family.living))

    async def _close(self) -> None:
        """End all of it. A cancellation ends the grace, not the killing; it is raised when all is over."""
        ending, cancelled = self._begin_ending(), None
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError as error:
                cancelled = error
                self._shutdown.set()
        self._tailing.cancel()
        self._exiting.cancel()
        if cancelled is not None:
            raise cancelled
        ending.result()


@contextlib.asynccontextmanager
async def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    stdin: bytes = b"",
    term_grace_seconds: float = TERM_GRACE_SECONDS,
    user: User | None = None,
    joins_stderr: bool = False,
) -> AsyncIterator[Child]:
    """Run a program in a session and process group of its own, and end all of it on the way out.

    On the way out, for whatever reason, the group gets SIGTERM; what is left of it after the grace, and whatever else the
    child has started, gets SIGKILL. A cancellation meanwhile ends the grace at once. A `CCRUN_MARK` in `env` marks the
    child and its descendants, which then are found even when nothing else ties them to the child.

    Args:
        argv: The program, looked up on the PATH of `env`, and its arguments.
        env: All of its environment.
        stdin: Written in the background; a child that does not read it is no error.
        term_grace_seconds: What the group has between SIGTERM and SIGKILL.
        user: Whom it runs as, where that is not us.
        joins_stderr: Its stderr comes with its stdout, in the order in which it was written.

    Raises:
        CcrunError: The program cannot be started.
    """
    async with contextlib.AsyncExitStack() as stack:
        (child_in, to_child), (from_child, child_out), (errors, child_err) = [_pipe(stack) for _ in range(3)]
        # Our ends first: once the child runs, nothing may be awaited before there is somebody to end it.
        feed, _ = await asyncio.get_running_loop().connect_write_pipe(asyncio.BaseProtocol, to_child)
        stack.callback(_close_feed, feed)
        stdout, stderr = await _reader(stack, from_child), await _reader(stack, errors)
        try:
            process = await asyncio.create_subprocess_exec(
                *(argv if user is None else user.argv(argv)),
                env=dict(env),
                cwd=cwd,
                stdin=child_in,
                stdout=child_out,
                stderr=child_out if joins_stderr else child_err,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise CcrunError(start_error(argv[0], cwd, error)) from None
        open_children.add(process.pid)
        stack.callback(open_children.discard, process.pid)
        child = Child(process, stdout, stderr, marker=env.get(MARKER_VARIABLE), term_grace_seconds=term_grace_seconds)
        stack.push_async_callback(child._close)  # noqa: SLF001  # a child and its context are one thing
        for end in (child_in, child_out, child_err):
            end.close()
        feed.write(stdin)
        feed.close()
        yield child


def _pipe(stack: contextlib.AsyncExitStack) -> tuple[IO[bytes], IO[bytes]]:
    reading, writing = os.pipe()
    return stack.enter_context(os.fdopen(reading, "rb", 0)), stack.enter_context(os.fdopen(writing, "wb", 0))


def _close_feed(feed: asyncio.WriteTransport) -> None:
    """Close the transport without waiting for a child that has not read all; it may be closed already."""
    if feed.get_write_buffer_size():
        feed.abort()
    else:
        feed.close()


async def _reader(stack: contextlib.AsyncExitStack, pipe: IO[bytes]) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=PIPE_READ_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    stack.callback(transport.close)
    return reader


def start_error(program: str, cwd: Path, error: OSError | ValueError) -> str:
    name = Path(program).name
    if not isinstance(error, OSError):
        return f"{name} cannot be started: an argument or a variable holds what the system does not allow."
    if error.filename is not None and os.fspath(error.filename) == os.fspath(cwd):
        return f"{name} cannot be started: the folder that it should start in does not exist or may not be entered."
    match error.errno:
        case errno.ENOENT:
            return f"The program {name} was not found."
        case errno.EACCES:
            return f"The program {name} may not be executed."
        case errno.E2BIG:
            return f"{name} cannot be started: its arguments or its environment are too large for the system."
        case _:
            return f"{name} cannot be started: {error.strerror}."

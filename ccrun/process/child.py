"""A running child process: its pipes, its lines of any length, and how it is stopped.

`spawn` is the only way to start one. Neither a child nor anything that it starts outlives its `async with`, and a child that a
signal killed never counts as a success.
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
from ccrun.process.confinement import Confinement, SandboxNotStarted
from ccrun.process.exit import Exit, exit_from_returncode
from ccrun.process.tree import (
    KILL_SECONDS,
    MARKER_VARIABLE,
    TREE_POLL_SECONDS,
    ProcessTree,
    open_children,
    signal_group,
)

#: Bytes of one read: the default capacity of a pipe on Linux.
PIPE_READ_BYTES: Final = 64 * 1024
#: Bytes of stderr that are retained, for error messages.
STDERR_TAIL_BYTES: Final = 64 * 1024
#: Seconds between SIGTERM and SIGKILL. The platform gives the worker 10 s in all.
TERM_GRACE_SECONDS: Final = 5.0
#: Seconds of silence, in all, after which a pipe that a grandchild keeps open counts as closed.
DRAIN_SECONDS: Final = 1.0
#: Bytes read after the child has exited. A pipe has at most 1 MiB (`/proc/sys/fs/pipe-max-size`); more comes from another
#: process.
DRAIN_BYTES: Final = 2 * 1024 * 1024


class CutLine(bytearray):
    """The bytes of a line, up to a limit."""

    #: How many bytes followed.
    omitted_bytes = 0

    def append(self, content: bytes | bytearray, max_bytes: int | None) -> None:  # type: ignore[override]
        """Add content as far as the limit allows."""
        allowed = len(content) if max_bytes is None else max(0, max_bytes - len(self))
        self += content[:allowed]
        self.omitted_bytes += max(0, len(content) - allowed)


class Child:
    """A running process, created by `spawn`.

    It does not use the pipes of asyncio, whose `Process.wait` returns only when all pipes are closed, which a grandchild can
    delay for hours.
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
        self._tree = ProcessTree(process.pid, marker)
        self._grace = term_grace_seconds
        self._exited = asyncio.Event()
        self._exited_at = 0.0
        self._reading: asyncio.Timeout | None = None
        self._drain_seconds = DRAIN_SECONDS
        self._drain_bytes = DRAIN_BYTES
        self._tail = bytearray()
        self._tail_is_cut = False
        self._tailing = asyncio.create_task(self._keep_tail(stderr))
        self._exiting = asyncio.create_task(self._watch())
        self._stopping: asyncio.Task[None] | None = None
        self._must_kill = asyncio.Event()

    @property
    def stderr_tail(self) -> bytes:
        """The last `STDERR_TAIL_BYTES` bytes of stderr, after `…` if there were more. Complete once `wait` has returned."""
        return ("…".encode() if self._tail_is_cut else b"") + self._tail

    async def wait(self) -> Exit:
        """Wait until the process has exited, even if another process keeps its pipes open."""
        return await asyncio.shield(self._exiting)

    def terminate(self) -> None:
        """Stop the process and everything that it has started: SIGTERM, the grace period, SIGKILL. Idempotent."""
        self._begin_stop()

    def _begin_stop(self) -> asyncio.Task[None]:
        self._stopping = self._stopping or asyncio.create_task(self._stop())
        return self._stopping

    def kill(self) -> None:
        """Kill the process and everything that it has started. A grace period that has begun is cut short."""
        self._must_kill.set()
        self.terminate()

    async def lines(self, max_bytes: int | None = None) -> AsyncIterator[bytes | bytearray]:
        """Yield the lines of stdout without their newline. The last line may lack one.

        Nothing is read while the caller is busy, so that a slow caller slows the child, and memory stays near one line. The
        iteration ends with the pipe, or soon after the process when a grandchild keeps the pipe open. Use it once.

        Args:
            max_bytes: At least `PIPE_READ_BYTES`. Of a longer line, these first bytes are yielded as a `CutLine`. By default,
                lines may have any length.
        """
        partial = CutLine()
        while chunk := await self._read():
            start = 0
            while (end := chunk.find(b"\n", start)) >= 0:
                line: bytes | bytearray = chunk[start:end]
                if partial:
                    partial.append(line, max_bytes)
                    line, partial = partial, CutLine()
                yield line
                # Release the line before the next one grows.
                del line
                start = end + 1
            partial.append(chunk[start:], max_bytes)
        if partial:
            yield partial

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the bytes of stdout as they arrive. Apart from that, it behaves as `lines`."""
        while chunk := await self._read():
            yield chunk

    async def _read(self) -> bytes:
        """Return the next bytes of stdout, none at its end. After the exit of the process, a timeout counts as its end."""
        if self._drain_bytes <= 0:
            return b""
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        deadline = started_at + self._drain_seconds if self._exited.is_set() else None
        try:
            async with asyncio.timeout_at(deadline) as self._reading:
                chunk = await self._stdout.read(PIPE_READ_BYTES)
        except TimeoutError:
            return b""
        finally:
            self._reading = None
        if self._exited.is_set():
            self._drain_seconds -= loop.time() - max(started_at, self._exited_at)
            self._drain_bytes -= len(chunk)
        return chunk

    async def _keep_tail(self, stderr: asyncio.StreamReader) -> None:
        while chunk := await stderr.read(PIPE_READ_BYTES):
            self._tail += chunk
            if len(self._tail) > STDERR_TAIL_BYTES:
                del self._tail[:-STDERR_TAIL_BYTES]
                self._tail_is_cut = True

    async def _watch(self) -> Exit:
        returncode = await self._process.wait()
        self._exited_at = asyncio.get_running_loop().time()
        self._exited.set()
        if self._reading is not None:
            self._reading.reschedule(self._exited_at + DRAIN_SECONDS)
        await asyncio.wait({self._tailing}, timeout=DRAIN_SECONDS)
        return exit_from_returncode(returncode)

    async def _stop(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._grace
        has_exited = self._exited.is_set()
        # Also finds the descendants before the child exits: an orphan no longer shows its parent.
        is_stopped = await self._group_is_empty() and has_exited
        signal_group(self.pid, signal.SIGTERM)
        while not is_stopped and not self._must_kill.is_set():
            left = deadline - loop.time()
            if left <= 0:
                break
            with contextlib.suppress(TimeoutError):
                waiting = self._must_kill if self._exited.is_set() else self._exited
                await asyncio.wait_for(waiting.wait(), min(left, TREE_POLL_SECONDS))
            is_stopped = self._exited.is_set() and await self._group_is_empty()
        signal_group(self.pid, signal.SIGKILL)
        await asyncio.to_thread(self._tree.kill, KILL_SECONDS)
        await asyncio.wait({self._exiting}, timeout=KILL_SECONDS)

    async def _group_is_empty(self) -> bool:
        if sys.platform != "linux":
            return not signal_group(self.pid, 0)
        return all(process.group != self.pid for process in await asyncio.to_thread(self._tree.living))

    async def _close(self) -> None:
        """Stop everything. A cancellation cuts the grace period short, and is raised after all processes are killed."""
        stopping, cancelled = self._begin_stop(), None
        while not stopping.done():
            try:
                await asyncio.shield(stopping)
            except asyncio.CancelledError as error:
                cancelled = error
                self._must_kill.set()
        self._tailing.cancel()
        self._exiting.cancel()
        if cancelled is not None:
            raise cancelled
        stopping.result()


@contextlib.asynccontextmanager
async def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    stdin: bytes = b"",
    term_grace_seconds: float = TERM_GRACE_SECONDS,
    confinement: Confinement | None = None,
    joins_stderr: bool = False,
) -> AsyncIterator[Child]:
    """Run a program in its own session and process group, and stop all of it when the context is left.

    To stop it, the group gets SIGTERM. After the grace period, which a cancellation cuts short, the remaining processes of the
    group and everything else that the child has started get SIGKILL. A `CCRUN_MARK` in `env` marks the child and its
    descendants, so that they are found even after their parents have exited.

    Args:
        argv: The program, searched on the PATH of `env`, and its arguments.
        env: The complete environment.
        stdin: Written in the background. A child may leave it unread.
        term_grace_seconds: The time between SIGTERM and SIGKILL.
        confinement: How the process is kept apart from the rest of the machine. By default, not at all.
        joins_stderr: Whether stderr is part of stdout.

    Raises:
        CcrunError: The program cannot be started.
    """
    async with contextlib.AsyncExitStack() as stack:
        (child_in, to_child), (from_child, child_out), (errors, child_err) = [_pipe(stack) for _ in range(3)]
        # Our ends of the pipes come first: once the child runs, nothing may be awaited before its context is entered.
        feed, _ = await asyncio.get_running_loop().connect_write_pipe(asyncio.BaseProtocol, to_child)
        stack.callback(_close_feed, feed)
        stdout, stderr = await _reader(stack, from_child), await _reader(stack, errors)
        servers = await stack.enter_async_context(contextlib.AsyncExitStack())
        start = stack.enter_context((confinement or Confinement()).start(argv, cwd))
        try:
            process = await asyncio.create_subprocess_exec(
                *start.argv,
                pass_fds=start.inherited,
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
        stack.push_async_callback(child._close)  # noqa: SLF001 - `spawn` is the constructor
        for end in (child_in, child_out, child_err):
            end.close()
        feed.write(stdin)
        feed.close()
        try:
            await start.serve(servers)
        except SandboxNotStarted as error:
            await child.wait()
            raise CcrunError(f"{error.message} {child.stderr_tail.decode(errors='replace').strip()}".strip()) from None
        yield child


def _pipe(stack: contextlib.AsyncExitStack) -> tuple[IO[bytes], IO[bytes]]:
    reading, writing = os.pipe()
    return stack.enter_context(os.fdopen(reading, "rb", 0)), stack.enter_context(os.fdopen(writing, "wb", 0))


def _close_feed(feed: asyncio.WriteTransport) -> None:
    """Close the transport, which may be closed already, without waiting for the child to read."""
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
    """Return the sentence that explains why a program cannot be started."""
    name = Path(program).name
    if not isinstance(error, OSError):
        return (
            f"{name} cannot be started: an argument or a variable contains a character that the system does not allow."
        )
    if error.filename is not None and os.fspath(error.filename) == os.fspath(cwd):
        return f"{name} cannot be started: its working directory does not exist or may not be entered."
    match error.errno:
        case errno.ENOENT:
            return f"The program {name} was not found."
        case errno.EACCES:
            return f"The program {name} may not be executed."
        case errno.E2BIG:
            return f"{name} cannot be started: its arguments or its environment are too large for the system."
        case _:
            return f"{name} cannot be started: {error.strerror}."

"""Children: a process group of their own, lines of any length, TERM then KILL, what an exit means.

The only module that starts processes. It promises that no child outlives its `async with`, whatever the child has started,
and that a child which a signal has killed never counts as a success. It knows nothing of the programs it runs.

On Linux everything that descends from a child is found and ended, also what has left its process group (fully so in a process
that has called `become_subreaper`). On other systems the process group is all that can be ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

import attrs

from ccrun.errors import CcrunError, ConfigError

#: The default capacity of a pipe on Linux: one read empties it.
CHUNK_BYTES: Final = 64 * 1024
#: Enough for the last words of any program; the rest of a flood is dropped so that memory stays bounded.
STDERR_TAIL_BYTES: Final = 64 * 1024
#: What a child may take to end by itself: the platform gives the worker 10 s in all.
TERM_GRACE_SECONDS: Final = 5.0
#: How long a pipe that outlives its child (a grandchild holds it) may be silent in all before it counts as ended.
DRAIN_SECONDS: Final = 1.0
#: A pipe holds at most 1 MiB (`/proc/sys/fs/pipe-max-size`), so whatever comes after that is not the child's own.
DRAIN_BYTES: Final = 2 * 1024 * 1024
#: How long survivors are hunted. Processes that nothing can end (stuck in the kernel) must not hold the worker for ever.
KILL_SECONDS: Final = 2.0
#: Long enough to cost nothing, short enough that nobody notices.
POLL_SECONDS: Final = 0.02

#: What `capture` keeps in memory: a list of some hundred thousand paths.
CAPTURED_BYTES: Final = 64 * 1024 * 1024
#: A program whose output nobody reads any more has nothing to finish.
CAPTURED_GRACE_SECONDS: Final = 1.0

#: Between two looks at a process that may outlive us; its end is waited for by nobody who counts milliseconds.
DETACHED_POLL_SECONDS: Final = 0.05

#: `(uid_t) -1` and above mean "no user".
MAX_USER_ID: Final = 2**32 - 2

#: The variable that marks a task's processes, so that they are found even when all that tied them to us is gone.
MARKER: Final = "CCRUN_MARK"

# <linux/prctl.h>
_PR_SET_DUMPABLE: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37

#: The children whose `spawn` is still open: nobody else may signal or reap them.
_open: Final[set[int]] = set()


# --- what an exit means ----------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Exit:
    """How a process ended. `code` is a shell's: 128 + n after signal n."""

    code: int
    signal: int | None = None

    @property
    def ok(self) -> bool:
        """Whether the process says that it succeeded. One that a signal has killed never does."""
        return self.code == 0 and self.signal is None


def exit_of(returncode: int) -> Exit:
    """Return what a return code of the `subprocess` module means: it is -n after signal n."""
    return Exit(code=returncode) if returncode >= 0 else Exit(code=128 - returncode, signal=-returncode)


# --- who runs --------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class User:
    """Another user of this machine whom processes are started as, and the program that makes them so (setpriv(1))."""

    uid: int
    gid: int
    setpriv: Path

    def argv(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs this one as that user: without its caller's groups and capabilities, and for good."""
        dropped = ("--clear-groups", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs")
        return [str(self.setpriv), f"--reuid={self.uid}", f"--regid={self.gid}", *dropped, "--", *argv]


def find_user(name: str, path: str) -> User:
    """Return the user of that name or number. Blocks while it looks at the disk.

    Args:
        name: As in passwd(5), or a whole number, which is the group's too where passwd does not know it.
        path: A PATH, on which setpriv is.

    Raises:
        ConfigError: There is no such user, it is root, or this process may not start others as it.
    """
    setpriv = shutil.which("setpriv", path=path)
    if setpriv is None:
        raise ConfigError("CCRUN_AGENT_USER needs the program setpriv, which is not on the PATH.")
    try:
        known = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
        uid, gid = known.pw_uid, known.pw_gid
    except (KeyError, OverflowError):
        if not name.isdecimal() or int(name) > MAX_USER_ID:
            raise ConfigError(f"CCRUN_AGENT_USER must name a user of this machine, not {name}.") from None
        uid = gid = int(name)
    if 0 in (uid, gid):
        raise ConfigError("CCRUN_AGENT_USER may not be root, from whom nothing can be kept.")
    user = User(uid=uid, gid=gid, setpriv=Path(setpriv).absolute())
    if subprocess.run(user.argv(["true"]), env={"PATH": path}, capture_output=True, check=False).returncode != 0:
        raise ConfigError(f"CCRUN_AGENT_USER is {name}, but this process may not start others as that user.")
    return user


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
        self._family = _Family(process.pid, marker)
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
        self._hurry = asyncio.Event()

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
        self._hurry.set()
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
                chunk = await self._stdout.read(CHUNK_BYTES)
        except TimeoutError:
            return b""
        finally:
            self._reading = None
        if self._gone.is_set():
            self._drain_seconds -= loop.time() - max(began, self._gone_at)
            self._drain_bytes -= len(chunk)
        return chunk

    async def _keep_tail(self, stderr: asyncio.StreamReader) -> None:
        while chunk := await stderr.read(CHUNK_BYTES):
            self._tail += chunk
            del self._tail[:-STDERR_TAIL_BYTES]

    async def _watch(self) -> Exit:
        returncode = await self._process.wait()
        self._gone_at = asyncio.get_running_loop().time()
        self._gone.set()
        if self._reading is not None:
            self._reading.reschedule(self._gone_at + DRAIN_SECONDS)
        await asyncio.wait({self._tailing}, timeout=DRAIN_SECONDS)
        return exit_of(returncode)

    async def _end(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._grace
        # Who descends from the child is known before the child ends: an orphan tells no more where it comes from.
        await asyncio.to_thread(self._family.living)
        _signal_group(self.pid, signal.SIGTERM)
        while not (self._gone.is_set() and await self._group_is_empty()) and not self._hurry.is_set():
            patience = until - loop.time()
            if patience <= 0:
                break
            with contextlib.suppress(TimeoutError):
                waiting = self._hurry if self._gone.is_set() else self._gone
                await asyncio.wait_for(waiting.wait(), min(patience, POLL_SECONDS))
        _signal_group(self.pid, signal.SIGKILL)
        await asyncio.to_thread(self._family.kill, KILL_SECONDS)
        await asyncio.wait({self._exiting}, timeout=KILL_SECONDS)

    async def _group_is_empty(self) -> bool:
        if sys.platform != "linux":
            return not _signal_group(self.pid, 0)
        return all(process.group != self.pid for process in await asyncio.to_thread(self._family.living))

    async def _close(self) -> None:
        """End all of it. A cancellation ends the grace, not the killing; it is raised when all is over."""
        ending, cancelled = self._begin_ending(), None
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError as error:
                cancelled = error
                self._hurry.set()
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
        stack.callback(_drop, feed)
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
            raise CcrunError(_why_not_started(argv[0], cwd, error)) from None
        _open.add(process.pid)
        stack.callback(_open.discard, process.pid)
        child = Child(process, stdout, stderr, marker=env.get(MARKER), term_grace_seconds=term_grace_seconds)
        stack.push_async_callback(child._close)  # noqa: SLF001  # a child and its context are one thing
        for end in (child_in, child_out, child_err):
            end.close()
        feed.write(stdin)
        feed.close()
        yield child


def _pipe(stack: contextlib.AsyncExitStack) -> tuple[IO[bytes], IO[bytes]]:
    reading, writing = os.pipe()
    return stack.enter_context(os.fdopen(reading, "rb", 0)), stack.enter_context(os.fdopen(writing, "wb", 0))


def _drop(feed: asyncio.WriteTransport) -> None:
    """Close the transport without waiting for a child that has not read all; it may be closed already."""
    if feed.get_write_buffer_size():
        feed.abort()
    else:
        feed.close()


async def _reader(stack: contextlib.AsyncExitStack, pipe: IO[bytes]) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=CHUNK_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    stack.callback(transport.close)
    return reader


def _why_not_started(program: str, cwd: Path, error: OSError | ValueError) -> str:
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


@attrs.frozen(kw_only=True)
class Ran:
    """A program that has run to its end: how it ended, and what it printed."""

    exit: Exit
    stdout: bytes = attrs.field(repr=False)
    stderr: bytes = attrs.field(repr=False)


class TookTooLong(CcrunError):
    """A program was not done in its time, and was ended."""


class PrintedTooMuch(CcrunError):
    """A program printed more than it may, and was ended."""


async def capture(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    seconds: float | None,
    stdin: bytes = b"",
    max_bytes: int = CAPTURED_BYTES,
    user: User | None = None,
) -> Ran:
    """Run a program to its end; return what it printed. See `spawn` for the rest.

    Args:
        seconds: What it has; None where the caller bounds its time.
        max_bytes: What it may print.

    Raises:
        TookTooLong: It was not done in time.
        PrintedTooMuch: It went on printing.
        CcrunError: It cannot be started.
    """
    printed = bytearray()
    async with spawn(
        argv, env=env, cwd=cwd, stdin=stdin, user=user, term_grace_seconds=CAPTURED_GRACE_SECONDS
    ) as child:
        try:
            async with asyncio.timeout(seconds):
                async for chunk in child.chunks():
                    printed += chunk
                    if len(printed) > max_bytes:
                        raise PrintedTooMuch
                ended = await child.wait()
        except TimeoutError:
            raise TookTooLong from None
        return Ran(exit=ended, stdout=bytes(printed), stderr=child.stderr_tail)


# --- children that live on ---------------------------------------------------------------------------------------------


class Detached:
    """A process that may outlive us, made by `start_detached` alone; asyncio's own would kill it on the way out."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process

    async def wait(self) -> Exit:
        """Wait until it has ended. A cancellation leaves it alone."""
        # The system tells a parent of a child's end by a signal alone, and that belongs to asyncio's own children.
        while (returncode := self._process.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(DETACHED_POLL_SECONDS)
        return exit_of(returncode)

    def let_go(self) -> None:
        """Forget it while it runs; whoever becomes its parent reaps it."""
        # What subprocess itself sets when there is nothing to wait for; without, it warns of a child that still runs.
        self._process.returncode = self._process.returncode or 0


async def start_detached(argv: Sequence[str], *, env: Mapping[str, str]) -> Detached:
    """Start a program in a session of its own that ends neither with us nor with our terminal; it has our stdout and stderr.

    Raises:
        CcrunError: The program cannot be started.
    """

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(argv, env=dict(env), stdin=subprocess.DEVNULL, start_new_session=True)

    starting = asyncio.create_task(asyncio.to_thread(start))
    try:
        return Detached(await asyncio.shield(starting))
    except (OSError, ValueError) as error:
        raise CcrunError(_why_not_started(argv[0], Path(), error)) from None
    except asyncio.CancelledError:
        # It starts all the same; nobody is left to wait for it.
        with contextlib.suppress(OSError, ValueError):
            Detached(await starting).let_go()
        raise


# --- what the worker does for itself ---------------------------------------------------------------------------------


def become_subreaper() -> bool:
    """Have orphaned descendants become our children, so that `spawn` finds what has cut every tie to its parent.

    For a process that starts nothing but through `spawn`: children of other makers that lead a session of their own would
    count as such orphans. See PR_SET_CHILD_SUBREAPER in prctl(2).

    Returns:
        Whether the system can do it (Linux).
    """
    return _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))


def harden() -> bool:
    """Keep other processes of the same user, such as our children, out of our memory and `/proc/PID/environ`.

    See PR_SET_DUMPABLE in prctl(2). Nothing keeps out root.

    Returns:
        Whether the system can do it (Linux).
    """
    return _prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0))


def _is_subreaper() -> bool:
    answer = ctypes.c_int(0)
    return _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(answer)) and answer.value == 1


def _prctl(option: int, argument: object) -> bool:
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).prctl(option, argument, *(ctypes.c_ulong(0),) * 3) == 0)


# --- finding and ending what is left ---------------------------------------------------------------------------------


async def kill_marked(marker: str, *, seconds: float = KILL_SECONDS) -> bool:
    """Kill every process that carries this marker, and all that descends from one; for after a worker's death.

    Args:
        seconds: How long to try.

    Returns:
        Whether none is left. Always true where there is no /proc to look in.
    """
    return await asyncio.to_thread(_Family(None, marker).kill, seconds)


@attrs.frozen
class _Process:
    pid: int
    parent: int
    group: int
    session: int
    #: In clock ticks since boot; with the ID it tells a process from a later one of the same ID.
    started: int
    is_dead: bool


def _table() -> dict[int, _Process]:
    """Return every process of the system, nothing where there is no /proc as Linux has it. See proc_pid_stat(5)."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):  # noqa: PTH208  # many times faster than Path.iterdir
            if name.isdecimal():
                with contextlib.suppress(OSError):
                    # The name, in parentheses, may hold anything, parentheses and spaces included.
                    stat = Path(f"/proc/{name}/stat").read_bytes()
                    state, parent, group, session, *rest = stat[stat.rindex(b")") + 2 :].split()
                    # A zombie with several threads is a process of which only the first thread has ended.
                    is_dead = state in b"ZX" and int(rest[13]) <= 1
                    pid = int(name)
                    found[pid] = _Process(pid, int(parent), int(group), int(session), int(rest[15]), is_dead)
    return found


class _Family:
    """A child and all that it has started, or all that carries a marker. Blocks: to be used in a thread."""

    def __init__(self, root: int | None, marker: str | None) -> None:
        self._root = root
        self._mark = None if marker is None else f"{MARKER}={marker}".encode()
        # Who was found once stays found, also when the process that tied it to us is gone.
        self._known: set[tuple[int, int]] = set()
        self._me = os.getpid()
        self._session = os.getsid(0)

    def living(self) -> list[_Process]:
        """Find the members that live, and reap the orphans that fell to us and are dead."""
        table = _table()
        children: dict[int, list[_Process]] = {}
        for process in table.values():
            children.setdefault(process.parent, []).append(process)

        def descent(ancestors: Iterable[_Process], but_not: Container[int]) -> set[int]:
            found: set[int] = set()
            reached = list(ancestors)
            while reached:
                process = reached.pop()
                if process.pid not in found and process.pid not in but_not:
                    found.add(process.pid)
                    reached += children.get(process.pid, ())
            return found

        others = descent((table[pid] for pid in _open - {self._root} if pid in table), {self._me})
        seeds = [process for process in table.values() if self._is_member(process)]
        members = [table[pid] for pid in descent(seeds, {self._me, *others})]
        self._known |= {(process.pid, process.started) for process in members}
        for process in members:
            # Without a child of our own nobody fell to us on its account: then it is for somebody else to reap.
            if process.is_dead and process.parent == self._me and self._root not in (None, process.pid):
                _reap(process.pid)
        return [process for process in members if not process.is_dead]

    def _is_member(self, process: _Process) -> bool:
        return (
            self._root in (process.pid, process.group, process.session)
            or (process.pid, process.started) in self._known
            or (process.parent == self._me and process.session != self._session and self._claims_orphans())
            or (self._mark is not None and self._is_marked(process.pid))
        )

    def _claims_orphans(self) -> bool:
        """Whether orphans that fall to us can only be of this family. Those of several children end with the last one."""
        return self._root is not None and not _open - {self._root} and _is_subreaper()

    def _is_marked(self, pid: int) -> bool:
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def kill(self, seconds: float) -> bool:
        """Kill all members, each stopped first so that none forks while we look. Return whether none is left."""
        until = time.monotonic() + seconds
        while True:
            self._strike_orphans(until)
            stopped: set[int] = set()
            while fresh := {process.pid for process in self.living()} - stopped:
                for pid in fresh:
                    _signal(pid, signal.SIGSTOP)
                stopped |= fresh
                if time.monotonic() > until:
                    break
            for pid in stopped:
                _signal(pid, signal.SIGKILL)
            if not stopped or time.monotonic() > until:
                return not stopped
            time.sleep(POLL_SECONDS / 10)

    def _strike_orphans(self, until: float) -> None:
        """Kill the orphans that have fallen to us, as long as there are new ones.

        A process that forks and ends, again and again, is gone before a look at all processes is over. As an orphan it is a
        child of ours each time, and to look at these takes microseconds.
        """
        while self._claims_orphans() and time.monotonic() < until:
            orphans = [pid for pid in _own_children() if pid not in _open and self._is_of_another_session(pid)]
            if not orphans:
                return
            for pid in orphans:
                _signal(pid, signal.SIGKILL)
                _reap(pid)

    def _is_of_another_session(self, pid: int) -> bool:
        try:
            return os.getsid(pid) != self._session
        except ProcessLookupError:
            return False


def _own_children() -> list[int]:
    """Return the IDs of our children; nothing where the kernel does not list them. See proc_tid_children(5)."""
    return [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_bytes().split()]


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group, if there is one."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)

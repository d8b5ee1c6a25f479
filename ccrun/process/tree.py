"""Finding and killing everything that descends from a child.

On Linux all descendants are found, also those that left the process group of the child (without exception in a process that has
called `become_subreaper`). On other systems only the process group can be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from ccrun.process.linux import is_subreaper

#: Seconds for killing a process tree. Processes that are stuck in the kernel cannot be killed.
KILL_SECONDS: Final = 2.0
#: Seconds between two searches.
TREE_POLL_SECONDS: Final = 0.02
#: Bytes of one read in /proc: more than most environments have.
READ_BYTES: Final = 16 * 1024

#: The variable that marks the processes of a task, so that they are found even when their parents have exited.
MARKER_VARIABLE: Final = "CCRUN_MARK"

#: The children of open `spawn` contexts, which alone may signal or reap them.
open_children: Final[set[int]] = set()


async def kill_marked(marker: str, *, seconds: float = KILL_SECONDS) -> bool:
    """Kill all processes with this marker and their descendants, when their worker is lost.

    Args:
        seconds: The timeout.

    Returns:
        Whether none is left. Always true on systems without /proc.
    """
    return await asyncio.to_thread(ProcessTree(None, marker).kill, seconds)


def kill_orphans(known: Container[int], *, seconds: float = KILL_SECONDS) -> None:
    """Kill all children of this process in other sessions, and their descendants, which become its children one after the other.

    They are what lost workers have left, even if they cleared their environment. Does nothing in a process that has not called
    `become_subreaper`. Blocks.

    Args:
        known: The children that this process has started itself.
        seconds: The timeout.
    """
    until = time.monotonic() + seconds
    while is_subreaper() and time.monotonic() < until:
        orphans = [pid for pid in _own_children() if pid not in known and _is_of_another_session(pid)]
        if not orphans:
            return
        for pid in orphans:
            _signal(pid, signal.SIGKILL)
            _reap(pid)


class ProcessEntry(NamedTuple):
    """A process in /proc. A named tuple, because a search creates one for each process of the system."""

    pid: int
    parent: int
    group: int
    session: int
    #: In clock ticks since boot. Distinguishes the process from a later one with the same ID.
    started: int
    is_dead: bool


def _process_table() -> dict[int, ProcessEntry]:
    """Return all processes of the system, none on systems without /proc. See proc_pid_stat(5)."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):  # noqa: PTH208  # many times faster than Path.iterdir
            if name.isdecimal():
                with contextlib.suppress(OSError):
                    stat = _read(f"/proc/{name}/stat")
                    # The name, in parentheses, may contain parentheses and spaces.
                    state, parent, group, session, *rest = stat[stat.rindex(b")") + 2 :].split()
                    # In a zombie with several threads, only the first thread has exited.
                    is_dead = state in b"ZX" and int(rest[13]) <= 1
                    pid = int(name)
                    found[pid] = ProcessEntry(pid, int(parent), int(group), int(session), int(rest[15]), is_dead)
    return found


def _has_variable(pid: int, assignment: bytes) -> bool:
    try:
        environment = _read(f"/proc/{pid}/environ")
    except OSError:
        return False
    return assignment in environment and assignment in environment.split(b"\0")


def _read(path: str) -> bytes:
    """Return the content of a file. Faster than `Path.read_bytes`: a search reads two files of each process of the system."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(descriptor, READ_BYTES):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)


class ProcessTree:
    """A child and everything that it has started, or all processes with a marker. Blocks; use it in a thread."""

    def __init__(self, root: int | None, marker: str | None) -> None:
        self._root = root
        self._mark = None if marker is None else f"{MARKER_VARIABLE}={marker}".encode()
        # A process that was found once is remembered, even when its parent has exited.
        self._known: set[tuple[int, int]] = set()
        self._me = os.getpid()
        self._session = os.getsid(0)

    def living(self) -> list[ProcessEntry]:
        """Find the running members, and reap orphans that have exited."""
        table = _process_table()
        children: dict[int, list[ProcessEntry]] = {}
        for process in table.values():
            children.setdefault(process.parent, []).append(process)

        def descent(ancestors: Iterable[ProcessEntry], but_not: Container[int]) -> set[int]:
            found: set[int] = set()
            reached = list(ancestors)
            while reached:
                process = reached.pop()
                if process.pid not in found and process.pid not in but_not:
                    found.add(process.pid)
                    reached += children.get(process.pid, ())
            return found

        others = descent((table[pid] for pid in open_children - {self._root} if pid in table), {self._me})
        seeds = [process for process in table.values() if self._is_member(process)]
        members = [table[pid] for pid in descent(seeds, {self._me, *others})]
        self._known |= {(process.pid, process.started) for process in members}
        for process in members:
            # Without a child there are no orphans of this tree to reap.
            if process.is_dead and process.parent == self._me and self._root not in (None, process.pid):
                _reap(process.pid)
        return [process for process in members if not process.is_dead]

    def _is_member(self, process: ProcessEntry) -> bool:
        return (
            self._root in (process.pid, process.group, process.session)
            or (process.pid, process.started) in self._known
            or (process.parent == self._me and process.session != self._session and self._claims_orphans())
            or (self._mark is not None and _has_variable(process.pid, self._mark))
        )

    def _claims_orphans(self) -> bool:
        """Whether all orphans belong to this tree. Those of several open children are killed with the last one."""
        return self._root is not None and not open_children - {self._root} and is_subreaper()

    def kill(self, seconds: float) -> bool:
        """Kill all members; each is stopped first so that it cannot fork meanwhile. Return whether none is left."""
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
            time.sleep(TREE_POLL_SECONDS / 10)

    def _strike_orphans(self, until: float) -> None:
        """Kill orphans as long as there are new ones.

        A process that forks and exits in a loop is faster than a search of all processes. As an orphan it is a child of this
        process, and listing these takes microseconds.
        """
        if self._claims_orphans():
            kill_orphans(open_children, seconds=until - time.monotonic())


def lists_children() -> bool:
    """Return whether the kernel lists the children of a process. See proc_tid_children(5)."""
    return Path("/proc/self/task", str(os.getpid()), "children").exists()


def _own_children() -> list[int]:
    """Return the IDs of this process's children, none where the kernel does not list them. See proc_tid_children(5)."""
    return [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_bytes().split()]


def _is_of_another_session(pid: int) -> bool:
    try:
        return os.getsid(pid) != os.getsid(0)
    except ProcessLookupError:
        return False


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def signal_group(group: int, number: int) -> bool:
    """Signal a process group, if there is one."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)

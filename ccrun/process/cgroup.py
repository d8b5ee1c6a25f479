"""The control group of a task (cgroup v2): it holds all of its processes, whatever they do to their environment and session.

Only where this process may create groups, which root and the user services of systemd may; elsewhere nothing happens here.
A process that may write to the file system of the groups can leave its group. Blocks; use it in a thread.
See cgroups(7), and `cgroup.kill` in https://docs.kernel.org/admin-guide/cgroup-v2.html.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ccrun.process.tree import KILL_SECONDS, TREE_POLL_SECONDS


@contextlib.contextmanager
def joined(marker: str) -> Iterator[None]:
    """Put this process, and so its later children, into the group of a task. On exit, leave it and kill what is still in it."""
    parent = _own_group()
    if parent is None:
        yield
        return
    group = parent / _name(marker)
    try:
        group.mkdir(exist_ok=True)
        _move(os.getpid(), group)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _move(os.getpid(), parent)
        _kill(group, KILL_SECONDS)


def kill_group(marker: str) -> None:
    """Kill all processes in the group of a task, and remove the group.

    The group is searched for: after a restart, the service may be in another group than the lost worker was.
    """
    mount = _mount()
    if mount is not None:
        for directory, _, _ in os.walk(mount):
            if Path(directory).name == _name(marker):
                _kill(Path(directory), KILL_SECONDS)


def _name(marker: str) -> str:
    return f"ccrun-{hashlib.sha256(marker.encode()).hexdigest()[:16]}"


def _mount() -> Path | None:
    """Return where the file system of the groups is mounted. See /proc/pid/mountinfo in proc(5)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, kind = line.partition(" - ")
            if kind.startswith("cgroup2 "):
                return Path(fields.split()[4])
    return None


def _own_group() -> Path | None:
    mount = _mount()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if mount is not None and line.startswith("0::/"):
                return mount / line.removeprefix("0::/")
    return None


def _move(pid: int, group: Path) -> None:
    (group / "cgroup.procs").write_text(str(pid))


def _kill(group: Path, seconds: float) -> None:
    until = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        (group / "cgroup.kill").write_text("1")
        # The group stays while a killed process is not reaped.
        while "populated 1" in (group / "cgroup.events").read_text() and time.monotonic() < until:
            time.sleep(TREE_POLL_SECONDS)
        group.rmdir()

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.process import is_alive, pid_in, until

from ccrun.process import cgroup

#: Unique to this process: a group is killed as a whole.
MARKER = f"test-of-cgroups-{os.getpid()}"
#: Joins the group of the marker, and starts a process that nothing but the group connects with it.
WORKER = """
import subprocess, sys, time
from ccrun.process import cgroup
with cgroup.joined(sys.argv[1]):
    subprocess.run(["bash", "-c", "env -i setsid sleep 1000 & echo $! > pid"], check=True)
    if sys.argv[2] == "hang":
        time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def no_group_is_left() -> Iterator[None]:
    """Skip a test where this process may not create control groups. Afterwards, the group of the test does not exist."""
    with cgroup.joined(MARKER):
        if not group_exists():
            pytest.skip("this process may not create control groups")
    assert not group_exists()
    yield
    assert not group_exists()


def group_exists() -> bool:
    """Return whether there is a group with the marker of the tests."""
    groups = list(Path("/sys/fs/cgroup").rglob(cgroup._name(MARKER)))
    return bool(groups)


def start_worker(tmp_path: Path, mode: str) -> subprocess.Popen[bytes]:
    """Start a process in a group."""
    return subprocess.Popen([sys.executable, "-c", WORKER, MARKER, mode], cwd=tmp_path)


async def test_processes_of_a_killed_worker_are_found(tmp_path: Path) -> None:
    """`kill_group` kills a process that has cleared its environment and left its session, after its worker was killed."""
    with start_worker(tmp_path, "hang") as worker:
        pid = await pid_in(tmp_path / "pid")
        worker.kill()
    assert is_alive(pid)
    await asyncio.to_thread(cgroup.kill_group, "another-marker")
    assert is_alive(pid)
    await asyncio.to_thread(cgroup.kill_group, MARKER)
    await until(lambda: not is_alive(pid))


async def test_no_process_outlives_the_context(tmp_path: Path) -> None:
    """Leaving the group kills all other processes in it."""
    with start_worker(tmp_path, "exit") as worker:
        assert 0 == worker.wait(60)
    pid = await pid_in(tmp_path / "pid")
    await until(lambda: not is_alive(pid))

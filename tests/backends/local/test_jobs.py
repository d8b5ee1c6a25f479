"""Workers as processes. `tests/test_jobs.py` tests what every adapter that runs workers must do."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from helpers.jobs import A, B, C, MakeJobs, stopped_workers, until_state, until_written
from helpers.service import WAIT_SECONDS

from ccrun.backends.local.jobs import SubprocessJobs
from ccrun.errors import Busy
from ccrun.jobs import ExecutionState
from ccrun.process import tree


@pytest.fixture
async def make_jobs(tmp_path: Path) -> AsyncIterator[MakeJobs]:
    """Return a function that creates a `SubprocessJobs`. Its workers are stopped after the test."""
    async with stopped_workers(tmp_path) as make:
        yield make


async def test_running_workers_are_limited(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """Tasks above the limit are queued and start in their order when a worker exits."""
    async with make_jobs(max_running=1) as jobs:
        for task_id in (A, B, C):
            await jobs.launch(task_id)
        await until_written(tmp_path / A)
        assert [ExecutionState.RUNNING, ExecutionState.QUEUED, ExecutionState.QUEUED] == [
            await jobs.state(task_id, None) for task_id in (A, B, C)
        ]
        assert [None, 1, 2] == [jobs.queue_position(task_id) for task_id in (A, B, C)]
        (tmp_path / A).unlink()
        await until_written(tmp_path / B)
        assert [ExecutionState.FINISHED, ExecutionState.RUNNING, ExecutionState.QUEUED] == [
            await jobs.state(task_id, None) for task_id in (A, B, C)
        ]
        assert [None, None, 1] == [jobs.queue_position(task_id) for task_id in (A, B, C)]
        await jobs.cancel(C, None)
        assert jobs.queue_position(C) is None


async def test_launching_twice_starts_one_worker(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """A task that is queued or running is not launched again."""
    async with make_jobs(max_running=1) as jobs:
        await jobs.launch(A)
        await jobs.launch(A)
        await until_written(tmp_path / A)
        (tmp_path / A).unlink()
        await until_state(jobs, A, ExecutionState.FINISHED)
        assert not (tmp_path / A).exists()


async def test_cancelled_task_leaves_the_queue(make_jobs: MakeJobs) -> None:
    """A queued task that is cancelled never starts."""
    async with make_jobs(max_running=1) as jobs:
        await jobs.launch(A)
        await jobs.launch(B)
        await jobs.cancel(B, None)
        assert ExecutionState.UNKNOWN == await jobs.state(B, None)


async def test_running_worker_is_cancelled_by_sigterm(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """A cancel sends SIGTERM, so that the worker can clean up."""
    async with make_jobs() as jobs:
        await jobs.launch(A)
        await until_written(tmp_path / A)
        await jobs.cancel(A, None)
        await until_state(jobs, A, ExecutionState.FINISHED)


async def test_workers_keep_running_when_the_service_stops(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """Another service on the same data directory sees the workers of the first one and can cancel them."""
    async with make_jobs() as first:
        await first.launch(A)
        await until_written(tmp_path / A)
    async with make_jobs() as second:
        assert ExecutionState.RUNNING == await second.state(A, None)
        await second.cancel(A, None)
        assert ExecutionState.UNKNOWN == await until_state(second, A, ExecutionState.UNKNOWN, ExecutionState.FINISHED)


async def test_worker_that_cannot_be_started_is_finished(make_jobs: MakeJobs) -> None:
    """If the process cannot be started, the state is `FINISHED`, so that the task is settled."""
    async with make_jobs(command=("/no/such/program",)) as jobs:
        await jobs.launch(A)
        await until_state(jobs, A, ExecutionState.FINISHED)


async def test_exit_of_a_worker_is_reported(tmp_path: Path) -> None:
    """`on_worker_exit` is called when a worker exits."""
    exited = asyncio.Event()
    async with SubprocessJobs(
        command=(sys.executable, "-c", ""),
        environment=dict(os.environ),
        pid_files=tmp_path,
        services=tmp_path / ".services",
        marker=lambda task_id: f"{tmp_path}/{task_id}",
        max_running=1,
        on_worker_exit=exited.set,
    ) as jobs:
        await jobs.launch(A)
        async with asyncio.timeout(WAIT_SECONDS):
            await exited.wait()


async def test_queue_is_limited(make_jobs: MakeJobs) -> None:
    """When the queue is full, a launch raises `Busy`."""
    async with make_jobs(max_running=1, max_queued=1) as jobs:
        await jobs.launch(A)
        await jobs.launch(B)
        with pytest.raises(Busy, match=r"1 tasks are already queued\."):
            await jobs.launch(C)
        await jobs.cancel(B, None)


async def test_clear_removes_processes_and_files_of_one_task(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """`clear` kills the processes and removes the directories of its task, not those of a task with a similar ID."""
    temporary = Path(tempfile.gettempdir())
    first, second, other_task = (temporary / name for name in (f"ws-{A}", f"ws-{A}.0f", f"ws-{A}-2"))
    for directory in (first, second, other_task):
        directory.mkdir()
    try:
        with subprocess.Popen(["sleep", "600"], env={**os.environ, tree.MARKER_VARIABLE: f"{tmp_path}/{A}"}) as process:
            async with make_jobs() as jobs:
                await jobs.clear(A)
            assert -9 == process.wait(WAIT_SECONDS)
        assert [False, False, True] == [directory.exists() for directory in (first, second, other_task)]
    finally:
        other_task.rmdir()


async def test_leftovers_are_the_tasks_of_lost_workers(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """A PID file that no worker holds names a task with leftovers until `clear` is done. A running worker has none."""
    async with make_jobs() as jobs:
        assert [] == await jobs.leftovers()
        await jobs.launch(A)
        await until_written(tmp_path / A)
        (tmp_path / "pids").mkdir(exist_ok=True)
        for task_id in (A, B):
            (tmp_path / "pids" / task_id).write_text("1")
        assert [B] == await jobs.leftovers()
        await jobs.clear(B)
        assert [] == await jobs.leftovers()
        await jobs.cancel(A, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory to another user")
async def test_clear_removes_the_directory_of_another_user(make_jobs: MakeJobs) -> None:
    """The workspace of a lost worker belongs to the user of its agent."""
    workspace = Path(tempfile.gettempdir()) / f"ws-{A}"
    workspace.mkdir()
    os.chown(workspace, 61234, 61234)
    async with make_jobs() as jobs:
        await jobs.clear(A)
    assert not workspace.exists()


async def test_other_services_know_what_is_queued(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """A task that one service has queued or is starting is not unknown to another; it is when the service has exited."""
    async with make_jobs() as second:
        async with make_jobs(max_running=1) as first:
            await first.launch(A)
            assert ExecutionState.UNKNOWN != await second.state(A, None)
            await first.launch(B)
            expected = {B: ExecutionState.QUEUED, C: ExecutionState.UNKNOWN}
            assert expected == await second.launched_states([B, C])
            await until_written(tmp_path / A)
            await first.cancel(B, None)
            assert ExecutionState.UNKNOWN == await second.state(B, None)
            await first.launch(B)
        assert ExecutionState.UNKNOWN == await second.state(B, None)


async def test_finished_task_is_forgotten(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """When the worker has exited, the task no longer counts as launched by its service."""
    async with make_jobs() as first, make_jobs() as second:
        await first.launch(A)
        await until_written(tmp_path / A)
        (tmp_path / A).unlink()
        await until_state(first, A, ExecutionState.FINISHED)
        await until_state(second, A, ExecutionState.UNKNOWN)


async def test_directories_of_killed_services_are_removed(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """A service that was killed leaves its directory behind, which the next service removes."""
    left = tmp_path / "services" / "killed"
    left.mkdir(parents=True)
    (left / A).touch()
    async with make_jobs() as jobs:
        assert ExecutionState.UNKNOWN == await jobs.state(A, None)
    os.utime(left, (0, 0))
    async with make_jobs():
        assert not left.exists()
    assert [] == list((tmp_path / "services").iterdir())


async def test_unusable_directory_of_services_is_harmless(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """Tasks start although what is queued cannot be recorded."""
    (tmp_path / "services").write_text("not a directory")
    async with make_jobs() as jobs:
        await jobs.launch(A)
        await until_written(tmp_path / A)
        assert ExecutionState.RUNNING == await jobs.state(A, None)
        assert ExecutionState.UNKNOWN == await jobs.state(B, None)
        await jobs.cancel(A, None)

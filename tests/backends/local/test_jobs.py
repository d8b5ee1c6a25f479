"""Workers as processes: here small Python programs that do what a worker does to its surroundings."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from helpers.service import PATIENCE
from standins.cloudrun import JOB, PROJECT, REGION, CloudRun

from ccrun.backends.gcp.jobs import open_cloud_run
from ccrun.backends.local.jobs import MAX_QUEUED, SubprocessJobs
from ccrun.errors import Busy
from ccrun.jobs import ExecutionState, Jobs
from ccrun.process import tree
from ccrun.task import TaskId

A, B, C = TaskId("task-a"), TaskId("task-b"), TaskId("task-c")

#: Shows that it lives, writes down its environment, and ends when its file is removed or it is told to.
WORKER = """
import os, pathlib, sys, time
from ccrun.backends.local import pidfile
room = pathlib.Path(sys.argv[1])
task = os.environ["TASK_ID"]
with pidfile.hold(room / "signs" / task):
    (room / task).write_text(os.environ["ENCRYPTED_PAYLOAD_PATH"])
    while (room / task).exists() and not (room / "over").exists():
        time.sleep(0.01)
"""

MakeJobs = Callable[..., SubprocessJobs]


@pytest.fixture
async def make_jobs(tmp_path: Path) -> AsyncIterator[MakeJobs]:
    """Return what makes a place for workers; those that still run at the end are told to end."""

    def make(
        max_running: int = 2, max_queued: int = MAX_QUEUED, command: tuple[str, ...] | None = None
    ) -> SubprocessJobs:
        return SubprocessJobs(
            command=command or (sys.executable, "-c", WORKER, str(tmp_path)),
            environment=dict(os.environ),
            pid_file=lambda task_id: tmp_path / "signs" / task_id,
            marker=lambda task_id: f"{tmp_path}/{task_id}",
            max_running=max_running,
            max_queued=max_queued,
        )

    yield make
    # Also for one that is only about to begin.
    (tmp_path / "over").touch()


@pytest.fixture(params=["processes", "cloud_run"])
async def place(request: pytest.FixtureRequest, make_jobs: MakeJobs, tmp_path: Path) -> AsyncIterator[Jobs]:
    """Each place that runs workers in turn."""
    match request.param:
        case "processes":
            async with make_jobs() as jobs:
                yield jobs
        case "cloud_run":
            command = (sys.executable, "-c", WORKER, str(tmp_path))
            async with (
                CloudRun(command=command, environment=dict(os.environ)) as server,
                open_cloud_run(project=PROJECT, region=REGION, job=JOB, emulator=server.host) as cloud_run,
            ):
                yield cloud_run
        case _:
            raise AssertionError


async def until_state(jobs: Jobs, task_id: TaskId, *states: ExecutionState, name: str | None = None) -> ExecutionState:
    """Wait until the worker of a task is in one of these states."""
    async with asyncio.timeout(PATIENCE):
        while (state := await jobs.state(task_id, name)) not in states:
            await asyncio.sleep(0.01)
    return state


async def until_exists(path: Path) -> str:
    """Wait until a worker has written its file, and return what it wrote."""
    async with asyncio.timeout(PATIENCE):
        while not path.exists() or not path.read_text():
            await asyncio.sleep(0.01)
    return path.read_text()


# --- every place ---------------------------------------------------------------------------------------------------------


async def test_a_worker_is_told_its_task_and_where_the_payload_is(place: Jobs, tmp_path: Path) -> None:
    """The task's ID and the payload's name are all that a worker gets besides the environment."""
    await place.launch(A)
    assert f"sessions/{A}/encrypted-payload.bin" == await until_exists(tmp_path / A)


async def test_a_worker_is_seen_to_run_and_to_end(place: Jobs, tmp_path: Path) -> None:
    """From the launch on a worker is known, until it ends by itself; then its end is."""
    name = await place.launch(A)
    assert ExecutionState.RUNNING == await place.state(A, name)
    await until_exists(tmp_path / A)
    assert ExecutionState.RUNNING == await place.state(A, name)
    (tmp_path / A).unlink()
    await until_state(place, A, ExecutionState.FINISHED, name=name)


async def test_a_running_worker_is_cancelled(place: Jobs, tmp_path: Path) -> None:
    """A cancel ends the worker of that task alone, and can be repeated."""
    name, others_name = await place.launch(A), await place.launch(B)
    await until_exists(tmp_path / A)
    await until_exists(tmp_path / B)
    for _ in range(2):
        await place.cancel(A, name)
    await until_state(place, A, ExecutionState.FINISHED, ExecutionState.CANCELLED, name=name)
    await place.cancel(A, name)
    assert ExecutionState.RUNNING == await place.state(B, others_name)


async def test_of_a_task_that_was_never_launched_nothing_is_known(place: Jobs) -> None:
    """To look at such a task, to cancel it or to clear up after it is no error."""
    assert ExecutionState.UNKNOWN == await place.state(A, None)
    await place.cancel(A, None)
    await place.clear(A)


# --- processes of this machine -------------------------------------------------------------------------------------------


async def test_no_more_workers_run_than_there_are_places(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """The surplus waits in the order in which it came, and starts when a place is free."""
    async with make_jobs(max_running=1) as jobs:
        for task_id in (A, B, C):
            await jobs.launch(task_id)
        await until_exists(tmp_path / A)
        assert [ExecutionState.RUNNING, ExecutionState.QUEUED, ExecutionState.QUEUED] == [
            await jobs.state(task_id, None) for task_id in (A, B, C)
        ]
        (tmp_path / A).unlink()
        await until_exists(tmp_path / B)
        assert [ExecutionState.FINISHED, ExecutionState.RUNNING, ExecutionState.QUEUED] == [
            await jobs.state(task_id, None) for task_id in (A, B, C)
        ]
        await jobs.cancel(C, None)


async def test_launching_twice_starts_one_worker(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """A task that is queued or running is not launched again."""
    async with make_jobs(max_running=1) as jobs:
        await jobs.launch(A)
        await jobs.launch(A)
        await until_exists(tmp_path / A)
        (tmp_path / A).unlink()
        await until_state(jobs, A, ExecutionState.FINISHED)
        assert not (tmp_path / A).exists()


async def test_a_cancelled_task_in_the_queue_never_starts(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """Cancelling takes a task out of the queue."""
    async with make_jobs(max_running=1) as jobs:
        await jobs.launch(A)
        await jobs.launch(B)
        await jobs.cancel(B, None)
        assert ExecutionState.UNKNOWN == await jobs.state(B, None)


async def test_a_running_worker_is_cancelled_by_sigterm(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """The worker gets the chance to end by itself."""
    async with make_jobs() as jobs:
        await jobs.launch(A)
        await until_exists(tmp_path / A)
        await jobs.cancel(A, None)
        await until_state(jobs, A, ExecutionState.FINISHED)


async def test_workers_live_on_and_another_service_sees_and_cancels_them(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """A service that ends leaves its workers to finish, and the next one knows of them and reaches them."""
    async with make_jobs() as first:
        await first.launch(A)
        await until_exists(tmp_path / A)
    async with make_jobs() as second:
        assert ExecutionState.RUNNING == await second.state(A, None)
        await second.cancel(A, None)
        assert ExecutionState.UNKNOWN == await until_state(second, A, ExecutionState.UNKNOWN, ExecutionState.FINISHED)


async def test_a_worker_that_cannot_be_started_has_ended(make_jobs: MakeJobs) -> None:
    """A fault of the machine is seen as an end, so that the task can be settled."""
    async with make_jobs(command=("/no/such/program",)) as jobs:
        await jobs.launch(A)
        await until_state(jobs, A, ExecutionState.FINISHED)


async def test_every_end_is_told(tmp_path: Path) -> None:
    """Whoever settles tasks learns at once that there is one."""
    told = asyncio.Event()
    async with SubprocessJobs(
        command=(sys.executable, "-c", ""),
        environment=dict(os.environ),
        pid_file=lambda task_id: tmp_path / task_id,
        marker=lambda task_id: f"{tmp_path}/{task_id}",
        max_running=1,
        on_worker_exit=told.set,
    ) as jobs:
        await jobs.launch(A)
        async with asyncio.timeout(PATIENCE):
            await told.wait()


async def test_queue_is_limited(make_jobs: MakeJobs) -> None:
    """When the queue is full, a launch fails and the caller is asked to retry."""
    async with make_jobs(max_running=1, max_queued=1) as jobs:
        await jobs.launch(A)
        await jobs.launch(B)
        with pytest.raises(Busy, match=r"1 tasks are already queued\."):
            await jobs.launch(C)
        await jobs.cancel(B, None)


async def test_clearing_up_removes_processes_and_files_of_that_task_alone(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """What a worker that died left behind goes; what another task of a similar name has stays."""
    temporary = Path(tempfile.gettempdir())
    mine, second, others = (temporary / name for name in (f"ws-{A}", f"ws-{A}.0f", f"ws-{A}-2"))
    for folder in (mine, second, others):
        folder.mkdir()
    try:
        with subprocess.Popen(["sleep", "600"], env={**os.environ, tree.MARKER_VARIABLE: f"{tmp_path}/{A}"}) as left:
            async with make_jobs() as jobs:
                await jobs.clear(A)
            assert -9 == left.wait(PATIENCE)
        assert [False, False, True] == [folder.exists() for folder in (mine, second, others)]
    finally:
        others.rmdir()

"""What every adapter that runs workers must do."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from helpers.jobs import A, B, stopped_workers, until_state, until_written, worker_command
from standins.cloudrun import CloudRun
from standins.execution import JOB, PROJECT, REGION

from ccrun.backends.gcp.jobs import open_cloud_run
from ccrun.jobs import ExecutionState, Jobs


@pytest.fixture(params=["processes", "cloud_run"])
async def jobs(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Jobs]:
    """Return each adapter."""
    match request.param:
        case "processes":
            async with stopped_workers(tmp_path) as make_jobs, make_jobs() as processes:
                yield processes
        case "cloud_run":
            async with (
                CloudRun(command=worker_command(tmp_path), environment=dict(os.environ)) as server,
                open_cloud_run(project=PROJECT, region=REGION, job=JOB, emulator=server.host) as cloud_run,
            ):
                yield cloud_run
        case _:
            raise AssertionError


async def test_worker_gets_the_task_and_the_payload_name(jobs: Jobs, tmp_path: Path) -> None:
    """The worker's environment contains the task ID and the payload's name."""
    await jobs.launch(A)
    assert f"sessions/{A}/encrypted-payload.bin" == await until_written(tmp_path / A)


async def test_worker_is_seen_to_run_and_finish(jobs: Jobs, tmp_path: Path) -> None:
    """An execution is `RUNNING` from the launch until the worker exits, and then `FINISHED`."""
    name = await jobs.launch(A)
    assert ExecutionState.RUNNING == await jobs.state(A, name)
    await until_written(tmp_path / A)
    assert ExecutionState.RUNNING == await jobs.state(A, name)
    (tmp_path / A).unlink()
    await until_state(jobs, A, ExecutionState.FINISHED, name=name)


async def test_running_worker_is_cancelled(jobs: Jobs, tmp_path: Path) -> None:
    """A cancel stops only the worker of its task, and can be repeated."""
    name, name_of_b = await jobs.launch(A), await jobs.launch(B)
    await until_written(tmp_path / A)
    await until_written(tmp_path / B)
    for _ in range(2):
        await jobs.cancel(A, name)
    await until_state(jobs, A, ExecutionState.FINISHED, ExecutionState.CANCELLED, name=name)
    await jobs.cancel(A, name)
    assert ExecutionState.RUNNING == await jobs.state(B, name_of_b)


async def test_task_that_was_never_launched_is_unknown(jobs: Jobs) -> None:
    """The state of such a task is `UNKNOWN`, and to cancel it or to clear up after it is not an error."""
    assert ExecutionState.UNKNOWN == await jobs.state(A, None)
    await jobs.cancel(A, None)
    await jobs.clear(A)

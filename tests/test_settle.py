from __future__ import annotations

import asyncio
import datetime as dt
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs
import pytest

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.errors import BlobNotFound
from ccrun.jobs import ExecutionState
from ccrun.lifecycle import finish, request_cancel, start
from ccrun.seal import Sealed
from ccrun.settle import lost_outcome, settle
from ccrun.store import Store
from ccrun.task import CallbackInfo, Outcome, Reason, Status, TaskId, TaskRecord, TaskType

TASK = TaskId("t-1")
NOW = dt.datetime(2025, 3, 4, 5, 6, 7, tzinfo=dt.UTC)
SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0)


class KnownJobs:
    """A place that runs workers, whose knowledge of them a test decides."""

    max_running: int | None = None
    start_timeout: dt.timedelta | None = None

    def __init__(self, state: ExecutionState) -> None:
        self.known = state
        self.looks = 0
        self.cleared: list[TaskId] = []
        self.while_looking: Callable[[], Awaitable[object]] | None = None

    def check_capacity(self) -> None: ...

    async def launch(self, task_id: TaskId) -> str | None:
        raise AssertionError

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        raise AssertionError

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        self.looks += 1
        if self.while_looking is not None:
            await self.while_looking()
        return self.known

    async def clear(self, task_id: TaskId) -> None:
        self.cleared.append(task_id)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The store of a test."""
    return Store(DirectoryBlobs(tmp_path))


PENDING = TaskRecord(
    task_id=TASK,
    type=TaskType.ASYNC,
    status=Status.PENDING,
    created_at=NOW,
    logs_path="file:///sessions/t-1/",
    webhook=CallbackInfo(),
)
RUNNING = start(PENDING, at=NOW)


async def born(store: Store, record: TaskRecord) -> TaskRecord:
    """Store a task with all that belongs to it."""
    await store.mark_active(TASK)
    await store.add_payload(TASK, Sealed(b""))
    await store.add(record)
    return record


OVER = (ExecutionState.FINISHED, ExecutionState.OUT_OF_MEMORY, ExecutionState.TIMED_OUT, ExecutionState.CANCELLED)
VERDICTS = {
    **{(Status.PENDING, state): (Reason.LAUNCH_FAILED, 1) for state in OVER},
    (Status.RUNNING, ExecutionState.FINISHED): (Reason.WORKER_LOST, 1),
    (Status.RUNNING, ExecutionState.UNKNOWN): (Reason.WORKER_LOST, 1),
    (Status.RUNNING, ExecutionState.OUT_OF_MEMORY): (Reason.OUT_OF_MEMORY, 137),
    (Status.RUNNING, ExecutionState.TIMED_OUT): (Reason.TIMEOUT, 124),
    (Status.RUNNING, ExecutionState.CANCELLED): (Reason.KILLED, 137),
}


@pytest.mark.parametrize(("status", "state"), list(itertools.product(Status, ExecutionState)))
def test_verdict(status: Status, state: ExecutionState) -> None:
    """Only a task that is not over and whose execution is, or is known to nobody once it ran, can end no more by itself."""
    outcome = lost_outcome(status, state)
    assert VERDICTS.get((status, state)) == (outcome and (outcome.reason, outcome.exit_code))
    assert outcome is None or outcome.status is Status.FAILED


async def test_task_whose_worker_is_lost_ends(store: Store) -> None:
    """A running task whose execution is over is failed: its record says so, its callback is owed, what is left is cleared."""
    jobs = KnownJobs(ExecutionState.FINISHED)
    settled = await settle(store, jobs, await born(store, RUNNING))
    assert (Status.FAILED, Reason.WORKER_LOST, True) == (settled.status, settled.reason, settled.owes_callback)
    assert settled == await store.record(TASK)
    with pytest.raises(BlobNotFound):
        await store.payload(TASK)
    assert [TASK] == jobs.cleared == [mark.task_id for mark in await store.active()]


async def test_cancelled_task_whose_worker_is_lost_is_cancelled(store: Store) -> None:
    """When the worker died of a cancel before it could write that down, the task ends as cancelled."""
    record = await born(store, request_cancel(RUNNING, at=NOW))
    settled = await settle(store, KnownJobs(ExecutionState.UNKNOWN), record)
    assert (Status.CANCELLED, Reason.CANCELLED) == (settled.status, settled.reason)


@pytest.mark.parametrize("state", [ExecutionState.QUEUED, ExecutionState.RUNNING, ExecutionState.UNREACHABLE])
async def test_living_task_is_left_alone(store: Store, state: ExecutionState) -> None:
    """A task whose execution is not over stays as it is, and nothing of it is cleared away."""
    jobs = KnownJobs(state)
    record = await born(store, RUNNING)
    assert record == await settle(store, jobs, record)
    assert record == await store.record(TASK)
    assert await store.payload(TASK) == b""
    assert jobs.cleared == []


async def test_task_that_is_over_costs_nothing(store: Store) -> None:
    """Nobody asks for the execution of a task that has its final record."""
    jobs = KnownJobs(ExecutionState.UNKNOWN)
    record = finish(RUNNING, SUCCESS, at=NOW)
    assert record == await settle(store, jobs, record)
    assert jobs.looks == 0


async def test_end_that_the_worker_wrote_meanwhile_stands(store: Store) -> None:
    """When the worker ends its task between the look at the record and the look at the execution, that end counts."""
    jobs = KnownJobs(ExecutionState.FINISHED)
    record = await born(store, RUNNING)
    jobs.while_looking = lambda: store.update(TASK, lambda present: finish(present, SUCCESS, at=NOW))
    settled = await settle(store, jobs, record)
    assert (Status.COMPLETED, Reason.COMPLETED) == (settled.status, settled.reason)


async def test_many_who_settle_agree(store: Store) -> None:
    """Of ten who settle one task at once one writes the end, and all return it."""
    record = await born(store, RUNNING)
    settled = await asyncio.gather(*(settle(store, KnownJobs(ExecutionState.FINISHED), record) for _ in range(10)))
    assert [await store.record(TASK)] * 10 == settled


async def test_task_without_callback_is_done_with(store: Store) -> None:
    """A task that is settled and owes nothing is no longer looked at."""
    record = await born(store, attrs.evolve(RUNNING, webhook=None))
    await settle(store, KnownJobs(ExecutionState.FINISHED), record)
    assert await store.active() == []

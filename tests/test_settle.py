from __future__ import annotations

import asyncio
import datetime as dt
import itertools
from collections.abc import Awaitable, Callable, Collection, Mapping
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


class FakeJobs:
    """An adapter that runs no workers, and reports the state that the test sets."""

    max_running: int | None = None
    start_timeout: dt.timedelta | None = None
    launch_time: dt.timedelta = dt.timedelta(0)

    def __init__(self, state: ExecutionState) -> None:
        self.execution_state = state
        self.state_calls = 0
        self.cleared: list[TaskId] = []
        self.during_state: Callable[[], Awaitable[object]] | None = None

    def check_capacity(self) -> None: ...

    def queue_position(self, task_id: TaskId) -> int | None:
        raise AssertionError

    async def launch(self, task_id: TaskId) -> str | None:
        raise AssertionError

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        raise AssertionError

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        self.state_calls += 1
        if self.during_state is not None:
            await self.during_state()
        return self.execution_state

    async def launched_states(self, task_ids: Collection[TaskId]) -> Mapping[TaskId, ExecutionState]:
        return {task_id: await self.state(task_id, None) for task_id in task_ids}

    async def clear(self, task_id: TaskId) -> None:
        self.cleared.append(task_id)

    async def leftovers(self) -> list[TaskId]:
        return []


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return an empty store."""
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


async def add_task(store: Store, record: TaskRecord) -> TaskRecord:
    """Store a task with its mark and its payload."""
    await store.mark_active(TASK)
    await store.add_payload(TASK, Sealed(b""))
    await store.add(record)
    return record


FINAL_STATES = (
    ExecutionState.FINISHED,
    ExecutionState.OUT_OF_MEMORY,
    ExecutionState.TIMED_OUT,
    ExecutionState.CANCELLED,
)
LOST_OUTCOMES = {
    **{(Status.PENDING, state): (Reason.LAUNCH_FAILED, 1) for state in FINAL_STATES},
    (Status.RUNNING, ExecutionState.FINISHED): (Reason.WORKER_LOST, 1),
    (Status.RUNNING, ExecutionState.UNKNOWN): (Reason.WORKER_LOST, 1),
    (Status.RUNNING, ExecutionState.OUT_OF_MEMORY): (Reason.OUT_OF_MEMORY, 137),
    (Status.RUNNING, ExecutionState.TIMED_OUT): (Reason.TIMEOUT, 124),
    (Status.RUNNING, ExecutionState.CANCELLED): (Reason.KILLED, 137),
}


@pytest.mark.parametrize(("status", "state"), list(itertools.product(Status, ExecutionState)))
def test_outcome_of_a_lost_task(status: Status, state: ExecutionState) -> None:
    """A task is lost if it is not final, and its execution has ended, or is unknown although the task was running."""
    outcome = lost_outcome(status, state)
    assert LOST_OUTCOMES.get((status, state)) == (outcome and (outcome.reason, outcome.exit_code))
    assert outcome is None or outcome.status is Status.FAILED


async def test_lost_task_is_settled(store: Store) -> None:
    """A lost task fails, its callback is owed, and its payload and the leftovers of its worker are deleted."""
    jobs = FakeJobs(ExecutionState.FINISHED)
    settled = await settle(store, jobs, await add_task(store, RUNNING))
    assert (Status.FAILED, Reason.WORKER_LOST, True) == (settled.status, settled.reason, settled.owes_callback)
    assert settled == await store.record(TASK)
    with pytest.raises(BlobNotFound):
        await store.payload(TASK)
    assert [TASK] == jobs.cleared == [mark.task_id for mark in await store.active()]


async def test_lost_task_that_was_cancelling_is_cancelled(store: Store) -> None:
    """When the worker is lost after a cancellation was requested, the task becomes cancelled."""
    record = await add_task(store, request_cancel(RUNNING, at=NOW))
    settled = await settle(store, FakeJobs(ExecutionState.UNKNOWN), record)
    assert (Status.CANCELLED, Reason.CANCELLED) == (settled.status, settled.reason)


@pytest.mark.parametrize("state", [ExecutionState.QUEUED, ExecutionState.RUNNING, ExecutionState.UNREACHABLE])
async def test_task_that_is_not_lost_is_not_changed(store: Store, state: ExecutionState) -> None:
    """The record and the payload of a task whose execution may still run are not changed."""
    jobs = FakeJobs(state)
    record = await add_task(store, RUNNING)
    assert record == await settle(store, jobs, record)
    assert record == await store.record(TASK)
    assert await store.payload(TASK) == b""
    assert jobs.cleared == []


async def test_execution_of_a_final_task_is_not_checked(store: Store) -> None:
    """Settling a final task makes no call to the platform."""
    jobs = FakeJobs(ExecutionState.UNKNOWN)
    record = finish(RUNNING, SUCCESS, at=NOW)
    assert record == await settle(store, jobs, record)
    assert jobs.state_calls == 0


async def test_outcome_of_the_worker_is_not_replaced(store: Store) -> None:
    """When the worker records an outcome while the execution is checked, that outcome remains."""
    jobs = FakeJobs(ExecutionState.FINISHED)
    record = await add_task(store, RUNNING)
    jobs.during_state = lambda: store.update(TASK, lambda present: finish(present, SUCCESS, at=NOW))
    settled = await settle(store, jobs, record)
    assert (Status.COMPLETED, Reason.COMPLETED) == (settled.status, settled.reason)


async def test_concurrent_settles_return_the_same_record(store: Store) -> None:
    """Of ten concurrent calls, one writes the final record, and all return it."""
    record = await add_task(store, RUNNING)
    settled = await asyncio.gather(*(settle(store, FakeJobs(ExecutionState.FINISHED), record) for _ in range(10)))
    assert [await store.record(TASK)] * 10 == settled


async def test_settled_task_without_callback_is_not_active(store: Store) -> None:
    """A settled task that owes no callback has no mark."""
    record = await add_task(store, attrs.evolve(RUNNING, webhook=None))
    await settle(store, FakeJobs(ExecutionState.FINISHED), record)
    assert await store.active() == []

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.backends.local.key import LocalKey
from ccrun.blobs import BlobInfo
from ccrun.callbacks import deliver, guard
from ccrun.callbacks.owed import OwedCallbacks
from ccrun.errors import Busy, StorageError
from ccrun.jobs import ExecutionState
from ccrun.lifecycle import CALLBACK_RETRY_PERIOD, claim_callback, finish, start
from ccrun.seal import Purpose, Sealed, new_data_key
from ccrun.store import Store
from ccrun.sweep import Sweeper, SweepReport
from ccrun.task import CallbackInfo, CallbackState, Outcome, Reason, Secret, Status, TaskId, TaskRecord, TaskType

TASK = TaskId("t-1")
NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0)
HOUR = dt.timedelta(hours=1)


class FakeJobs:
    """An adapter that runs no workers, and reports the states that the test sets."""

    max_running: int | None = None
    start_timeout: dt.timedelta | None = None
    launch_time: dt.timedelta = dt.timedelta(0)

    def __init__(self) -> None:
        self.states: dict[TaskId, ExecutionState | Exception] = {}
        self.launched: list[TaskId] = []
        self.launch_error: Exception | None = None
        self.with_leftovers: list[TaskId] = []
        self.cleared: list[TaskId] = []

    def check_capacity(self) -> None: ...

    async def launch(self, task_id: TaskId) -> str | None:
        if self.launch_error is not None:
            raise self.launch_error
        self.launched.append(task_id)
        self.states[task_id] = ExecutionState.QUEUED
        return None

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        raise AssertionError

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        state = self.states.get(task_id, ExecutionState.UNKNOWN)
        if isinstance(state, Exception):
            raise state
        return state

    async def launched_states(self, task_ids: Collection[TaskId]) -> Mapping[TaskId, ExecutionState]:
        return {task_id: await self.state(task_id, None) for task_id in task_ids}

    async def clear(self, task_id: TaskId) -> None:
        self.cleared.append(task_id)

    async def leftovers(self) -> list[TaskId]:
        return self.with_leftovers


class Receiver:
    """Records callbacks, and responds with a status that the test sets; for tasks in `hanging`, not before `released` is set."""

    def __init__(self) -> None:
        self.task_ids: list[str] = []
        self.status = 200
        self.hanging: set[str] = set()
        self.released = asyncio.Event()
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        """Record the ID of the task, and respond."""
        task_id = (await request.json())["taskId"]
        self.task_ids.append(task_id)
        if task_id in self.hanging:
            await self.released.wait()
        return web.Response(status=self.status)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """Start a receiver on loopback."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.handle)
    async with TestServer(app) as server:
        receiver.url = str(server.make_url("/hook"))
        yield receiver
        receiver.released.set()


@pytest.fixture
def jobs() -> FakeJobs:
    """Return the adapter that reports the states of workers."""
    return FakeJobs()


@pytest.fixture
def make_sweeper(tmp_path: Path, jobs: FakeJobs) -> Callable[[], Sweeper]:
    """Return a function that creates a sweeper, as a separate process would."""

    def make() -> Sweeper:
        store = Store(DirectoryBlobs(tmp_path / "blobs"))
        callbacks = OwedCallbacks(
            store=store,
            wrapper=LocalKey(tmp_path / "sealing.key"),
            secret=Secret("made-up secret"),
            guard=guard.CallbackGuard(everywhere=True),
            policy=deliver.RetryPolicy(attempt_seconds=10, attempts=1, total_seconds=10),
        )
        return Sweeper(store=store, jobs=jobs, callbacks=callbacks, launches_pending=True)

    return make


@pytest.fixture
def sweeper(make_sweeper: Callable[[], Sweeper]) -> Sweeper:
    """Return a sweeper."""
    return make_sweeper()


async def pending(sweeper: Sweeper, task_id: str = "t-1", url: str = "", created_at: dt.datetime = NOW) -> TaskRecord:
    """Return the record of a new task, with a callback if there is a URL."""
    sealed_url = None
    if url:
        key = await new_data_key(sweeper.callbacks.wrapper)
        sealed_url = await key.seal(url.encode(), task_id=TaskId(task_id), purpose=Purpose.CALLBACK_URL)
    return TaskRecord(
        task_id=TaskId(task_id),
        type=TaskType.ASYNC,
        status=Status.PENDING,
        created_at=created_at,
        logs_path=f"file:///sessions/{task_id}/",
        webhook=CallbackInfo() if url else None,
        sealed_callback_url=sealed_url,
    )


async def add_task(sweeper: Sweeper, record: TaskRecord) -> TaskRecord:
    """Store a task; write its mark last, because a sweep may be running. Only a pending task has a payload."""
    if record.status is Status.PENDING:
        await sweeper.store.add_payload(record.task_id, Sealed(b""))
    await sweeper.store.add(record)
    await sweeper.store.mark_active(record.task_id)
    return record


async def add_pending(sweeper: Sweeper, task_id: str = "t-1", created_at: dt.datetime = NOW) -> TaskRecord:
    """Store a pending task."""
    return await add_task(sweeper, await pending(sweeper, task_id, created_at=created_at))


async def add_running(sweeper: Sweeper, task_id: str = "t-1", url: str = "") -> TaskRecord:
    """Store a running task."""
    return await add_task(sweeper, start(await pending(sweeper, task_id, url), at=NOW))


async def add_finished(
    sweeper: Sweeper, task_id: str = "t-1", url: str = "", *, lease_until: dt.datetime | None = None
) -> TaskRecord:
    """Store a finished task whose callback, if it has one, is owed or under a lease."""
    running = start(await pending(sweeper, task_id, url), at=NOW)
    return await add_task(sweeper, finish(running, SUCCESS, at=NOW, lease_until=lease_until))


async def other_objects(sweeper: Sweeper) -> set[str]:
    """Return the names of all objects except records and index entries."""
    names = {entry.name for entry in await sweeper.store._blobs.entries("", limit=1000)}
    return {name for name in names if not name.startswith("index/") and not name.endswith("metadata.json")}


def state_of(record: TaskRecord) -> CallbackState:
    """Return the state of the callback."""
    assert record.webhook is not None
    return record.webhook.state


# --- settling --------------------------------------------------------------------------------------------------------


async def test_sweep_without_tasks_reports_nothing(sweeper: Sweeper) -> None:
    """The report of a sweep without tasks is empty."""
    assert SweepReport() == await sweeper.sweep()


async def test_lost_task_is_settled_and_its_callback_delivered(
    sweeper: Sweeper, jobs: FakeJobs, receiver: Receiver
) -> None:
    """One sweep settles a lost task and delivers its callback."""
    await add_running(sweeper, url=receiver.url)
    jobs.states[TASK] = ExecutionState.FINISHED
    assert SweepReport(settled=1, delivered=1) == await sweeper.sweep()
    record = await sweeper.store.record(TASK)
    assert (Reason.WORKER_LOST, CallbackState.DELIVERED, ["t-1"]) == (
        record.reason,
        state_of(record),
        receiver.task_ids,
    )
    assert await other_objects(sweeper) == set()
    assert SweepReport() == await sweeper.sweep()


@pytest.mark.parametrize("state", [ExecutionState.QUEUED, ExecutionState.RUNNING])
async def test_task_that_is_not_lost_is_not_changed(sweeper: Sweeper, jobs: FakeJobs, state: ExecutionState) -> None:
    """A sweep does not change a task whose execution is queued or running."""
    record = await add_running(sweeper)
    jobs.states[TASK] = state
    assert SweepReport() == await sweeper.sweep()
    assert record == await sweeper.store.record(TASK)


async def test_leftovers_of_a_finished_task_are_deleted(sweeper: Sweeper) -> None:
    """A sweep deletes the mark and the payload of a finished task whose worker was killed before it deleted them."""
    record = await add_finished(sweeper)
    await sweeper.store.mark_active(record.task_id)
    await sweeper.store.add_payload(record.task_id, Sealed(b""))
    assert SweepReport() == await sweeper.sweep()
    assert await other_objects(sweeper) == set()
    assert record == await sweeper.store.record(TASK)


async def test_incomplete_task_is_deleted_when_it_is_old(sweeper: Sweeper) -> None:
    """The mark and the payload of a task without a record are deleted after `incomplete_age`, and not before."""
    await sweeper.store.mark_active(TASK)
    await sweeper.store.add_payload(TASK, Sealed(b""))
    before = await other_objects(sweeper)
    assert SweepReport() == await sweeper.sweep()
    assert before == await other_objects(sweeper)
    assert SweepReport() == await attrs.evolve(sweeper, incomplete_age=dt.timedelta(0)).sweep()
    assert await other_objects(sweeper) == set()


# --- restarting --------------------------------------------------------------------------------------------------


async def test_pending_tasks_are_launched_oldest_first(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """The queued tasks of a service that was killed are launched in the order of their creation."""
    for task_id, hours in (("b", 2), ("c", 3), ("a", 1), ("d", 4)):
        await add_pending(sweeper, task_id, created_at=NOW + hours * HOUR)
    assert SweepReport(started=4) == await sweeper.sweep()
    assert ["a", "b", "c", "d"] == jobs.launched
    assert SweepReport() == await sweeper.sweep()


async def test_pending_tasks_are_not_launched_without_restarts(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """A sweep without `launches_pending` does not launch or change pending tasks."""
    record = await add_pending(sweeper)
    assert SweepReport() == await attrs.evolve(sweeper, launches_pending=False).sweep()
    assert ([], record) == (jobs.launched, await sweeper.store.record(TASK))


async def test_new_pending_task_is_left_to_its_service(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """A task within its launch time is not launched, although the backend has no execution of it: its service may do it."""
    jobs.launch_time = HOUR
    record = await add_pending(sweeper)
    assert SweepReport(new=1) == await sweeper.sweep()
    assert ([], record) == (jobs.launched, await sweeper.store.record(TASK))


async def test_complete_sweep_waits_for_new_tasks(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """`sweep_completely` launches a task that was too new for its first sweep."""
    jobs.launch_time = dt.timedelta(seconds=1)
    await add_pending(sweeper, created_at=dt.datetime.now(dt.UTC))
    assert SweepReport(started=1) == await sweeper.sweep_completely()
    assert [TASK] == jobs.launched


async def test_pending_task_whose_execution_has_finished_is_settled(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """A task whose worker exited before it started the task fails in the next sweep, and is not launched again."""
    await add_pending(sweeper)
    jobs.states[TASK] = ExecutionState.FINISHED
    assert SweepReport(settled=1) == await sweeper.sweep()
    assert ([], Reason.LAUNCH_FAILED) == (jobs.launched, (await sweeper.store.record(TASK)).reason)


@pytest.mark.parametrize("state", [ExecutionState.RUNNING, ExecutionState.UNREACHABLE])
async def test_pending_task_with_an_execution_is_not_launched(
    sweeper: Sweeper, jobs: FakeJobs, state: ExecutionState
) -> None:
    """A task whose execution has not finished, or whose execution the backend cannot report now, is left as it is."""
    record = await add_pending(sweeper)
    jobs.states[TASK] = state
    assert SweepReport() == await sweeper.sweep()
    assert ([], record) == (jobs.launched, await sweeper.store.record(TASK))


async def test_failed_launch_is_retried(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """A task that cannot be launched stays pending, and the next sweep launches it."""
    await add_pending(sweeper)
    jobs.launch_error = Busy("It is full.")
    assert SweepReport(failed=1) == await sweeper.sweep()
    jobs.launch_error = None
    assert SweepReport(started=1) == await sweeper.sweep()


# --- delivering ------------------------------------------------------------------------------------------------------


async def test_concurrent_sweeps_deliver_each_callback_once(
    make_sweeper: Callable[[], Sweeper], jobs: FakeJobs, receiver: Receiver
) -> None:
    """Concurrent sweeps settle each lost task once and deliver each callback once."""
    sweepers = [make_sweeper() for _ in range(4)]
    task_ids = [f"t-{number}" for number in range(12)]
    for number, task_id in enumerate(task_ids):
        make_task = add_finished if number % 2 else add_running
        await make_task(sweepers[0], task_id, receiver.url)
    reports = await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers))
    assert sorted(task_ids) == sorted(receiver.task_ids)
    total = sum(reports, SweepReport())
    assert (12, 0, 0) == (total.delivered, total.undelivered, total.failed)
    assert await other_objects(sweepers[0]) == set()


async def test_cancelled_sweep_releases_its_callbacks(
    make_sweeper: Callable[[], Sweeper], jobs: FakeJobs, receiver: Receiver
) -> None:
    """A callback whose delivery a shutdown interrupts is delivered by the next sweep, which does not wait for the lease."""
    receiver.hanging.add(TASK)
    await add_finished(make_sweeper(), url=receiver.url)
    sweeping = asyncio.create_task(make_sweeper().sweep())
    async with asyncio.timeout(5):
        while not receiver.task_ids:
            await asyncio.sleep(0.01)
    sweeping.cancel()
    await asyncio.wait([sweeping])
    assert sweeping.cancelled()
    receiver.hanging.clear()
    assert SweepReport(delivered=1) == await make_sweeper().sweep()


async def test_callback_under_a_lease_is_not_delivered(sweeper: Sweeper, receiver: Receiver) -> None:
    """A sweep delivers a callback that a worker has claimed only after the lease has expired."""
    await add_finished(sweeper, url=receiver.url, lease_until=dt.datetime.now(dt.UTC) + sweeper.callbacks.lease)
    assert SweepReport() == await sweeper.sweep()
    await sweeper.store.update(TASK, lambda record: claim_callback(record, lease_until=NOW))
    assert SweepReport(delivered=1) == await sweeper.sweep()
    assert ["t-1"] == receiver.task_ids


async def test_failed_callback_is_not_retried_immediately(sweeper: Sweeper, receiver: Receiver) -> None:
    """The sweep after a failed delivery does not retry it yet, and the task stays active."""
    await add_finished(sweeper, url=receiver.url)
    receiver.status = 500
    assert SweepReport(undelivered=1) == await sweeper.sweep()
    assert SweepReport() == await sweeper.sweep()
    assert (["t-1"], {"active/t-1"}) == (receiver.task_ids, await other_objects(sweeper))


async def test_abandoned_callback_is_reported_as_undelivered(sweeper: Sweeper, receiver: Receiver) -> None:
    """After the last failed delivery within the retry period, the callback is abandoned and the task is not active."""
    record = await add_finished(sweeper, url=receiver.url)
    long_ago = NOW - CALLBACK_RETRY_PERIOD - HOUR
    await sweeper.store.update(record.task_id, lambda present: attrs.evolve(present, completed_at=long_ago))
    receiver.status = 500
    assert SweepReport(undelivered=1) == await sweeper.sweep()
    assert (CallbackState.ABANDONED, set()) == (
        state_of(await sweeper.store.record(TASK)),
        await other_objects(sweeper),
    )


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [StorageError("It does not respond."), OSError("unexpected")])
async def test_error_of_one_task_does_not_stop_the_sweep(
    sweeper: Sweeper, jobs: FakeJobs, receiver: Receiver, fault: Exception
) -> None:
    """A task that raises any error is counted as failed, and all other tasks are processed."""
    for task_id in ("t-0", "t-1", "t-2"):
        await add_running(sweeper, task_id, receiver.url)
        jobs.states[TaskId(task_id)] = ExecutionState.FINISHED
    jobs.states[TASK] = fault
    assert SweepReport(settled=2, delivered=2, failed=1) == await sweeper.sweep()
    assert ["t-0", "t-2"] == sorted(receiver.task_ids)


async def test_callbacks_of_a_cancelled_sweep_are_delivered_later(
    make_sweeper: Callable[[], Sweeper], receiver: Receiver
) -> None:
    """When a sweep is cancelled during deliveries, another sweep delivers its callbacks, at the latest after their leases."""
    first = make_sweeper()
    task_ids = [f"t-{number:02}" for number in range(30)]
    for task_id in task_ids:
        await add_finished(first, task_id, receiver.url)
    receiver.hanging = set(task_ids)
    sweeping = asyncio.create_task(first.sweep())
    await until(lambda: len(receiver.task_ids) >= 5)
    sweeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sweeping
    receiver.released.set()
    records = [await first.store.record(TaskId(task_id)) for task_id in task_ids]
    assert {state_of(record) for record in records} <= {CallbackState.DELIVERING, CallbackState.OWED}
    for record in records:
        await first.store.update(record.task_id, lambda present: claim_callback(present, lease_until=NOW))
    assert SweepReport(delivered=30) == await make_sweeper().sweep()


# --- repeated sweeps ----------------------------------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def sweeping(sweeper: Sweeper, every_seconds: float = 3600) -> AsyncIterator[asyncio.Event]:
    """Run sweeps in the background; yield the event that requests the next sweep."""
    sooner = asyncio.Event()
    task = asyncio.create_task(sweeper.run_forever(every_seconds=every_seconds, sooner=sooner))
    try:
        yield sooner
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()


async def test_sweeps_are_repeated(sweeper: Sweeper, receiver: Receiver) -> None:
    """A callback that becomes owed after one sweep is delivered by a later one."""
    async with sweeping(sweeper, every_seconds=0.01):
        for number in range(3):
            await add_finished(sweeper, f"t-{number}", receiver.url)
            await until(lambda number=number: f"t-{number}" in receiver.task_ids)  # type: ignore[misc]


async def test_sweep_runs_when_it_is_requested(sweeper: Sweeper, receiver: Receiver) -> None:
    """A request starts a sweep immediately, independent of the interval."""
    async with sweeping(sweeper) as sooner:
        for number in range(3):
            await add_finished(sweeper, f"t-{number}", receiver.url)
            sooner.set()
            await until(lambda number=number: f"t-{number}" in receiver.task_ids)  # type: ignore[misc]


async def test_one_request_starts_one_sweep(sweeper: Sweeper, receiver: Receiver) -> None:
    """The event is cleared when the requested sweep starts, so that no further sweep follows."""
    await add_finished(sweeper, "t-0", receiver.url)
    receiver.status = 500
    async with sweeping(sweeper) as sooner:
        await until(lambda: "t-0" in receiver.task_ids)
        sooner.set()
        await until(lambda: not sooner.is_set())


async def test_hanging_receiver_does_not_delay_others(sweeper: Sweeper, receiver: Receiver) -> None:
    """While one delivery hangs, later sweeps deliver other callbacks and do not repeat that one."""
    receiver.hanging = {"t-0"}
    async with sweeping(sweeper) as sooner:
        for number in range(4):
            await add_finished(sweeper, f"t-{number}", receiver.url)
            sooner.set()
            await until(lambda number=number: f"t-{number}" in receiver.task_ids)  # type: ignore[misc]
    assert ["t-0", "t-1", "t-2", "t-3"] == receiver.task_ids


class BrokenBlobs(DirectoryBlobs):
    """A storage whose first listings fail."""

    def __init__(self, root: Path, errors: list[Exception]) -> None:
        super().__init__(root)
        self.errors = errors

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        if self.errors:
            raise self.errors.pop()
        return await super().entries(prefix, after=after, before=before, limit=limit)


async def test_sweep_runs_after_one_that_failed(sweeper: Sweeper, receiver: Receiver, tmp_path: Path) -> None:
    """When a whole sweep fails with any error, the next one runs."""
    await add_finished(sweeper, url=receiver.url)
    blobs = BrokenBlobs(tmp_path / "blobs", [StorageError("It does not respond."), OSError("unexpected")])
    async with sweeping(attrs.evolve(sweeper, store=Store(blobs)), every_seconds=0.01):
        await until(lambda: receiver.task_ids == ["t-1"])


async def test_leftovers_of_final_and_unknown_tasks_are_cleared(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """What a lost worker has left is removed although its task is final; what a task still needs is not."""
    final, waiting = TaskId("t-final"), TaskId("t-pending")
    record = await pending(sweeper, final)
    await sweeper.store.add(finish(start(record, at=NOW), SUCCESS, at=NOW))
    await add_task(sweeper, await pending(sweeper, waiting))
    jobs.states[waiting] = ExecutionState.QUEUED
    jobs.with_leftovers = [final, waiting, TaskId("t-unknown")]
    await sweeper.sweep()
    assert [final, TaskId("t-unknown")] == jobs.cleared

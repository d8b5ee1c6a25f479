from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Callable
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


class KnownJobs:
    """A place that runs workers, whose knowledge of them a test decides."""

    max_running: int | None = None
    start_timeout: dt.timedelta | None = None

    def __init__(self) -> None:
        self.states: dict[TaskId, ExecutionState | Exception] = {}
        self.launched: list[TaskId] = []
        self.launch_fault: Exception | None = None

    def check_capacity(self) -> None: ...

    async def launch(self, task_id: TaskId) -> str | None:
        if self.launch_fault is not None:
            raise self.launch_fault
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

    async def clear(self, task_id: TaskId) -> None:
        pass


class Receiver:
    """Takes callbacks and answers as a test wants; one that was told to hang answers when it is let go."""

    def __init__(self) -> None:
        self.got: list[str] = []
        self.status = 200
        self.hanging: set[str] = set()
        self.let_go = asyncio.Event()
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        """Note the task."""
        task_id = (await request.json())["taskId"]
        self.got.append(task_id)
        if task_id in self.hanging:
            await self.let_go.wait()
        return web.Response(status=self.status)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver on loopback."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.take)
    async with TestServer(app) as server:
        receiver.url = str(server.make_url("/hook"))
        yield receiver
        receiver.let_go.set()


@pytest.fixture
def jobs() -> KnownJobs:
    """What is known of workers."""
    return KnownJobs()


@pytest.fixture
def make_sweeper(tmp_path: Path, jobs: KnownJobs) -> Callable[[], Sweeper]:
    """Return what makes a sweep, each as another process would."""

    def make() -> Sweeper:
        store = Store(DirectoryBlobs(tmp_path / "blobs"))
        callbacks = OwedCallbacks(
            store=store,
            wrapper=LocalKey(tmp_path / "sealing.key"),
            secret=Secret("made-up secret"),
            guard=guard.CallbackGuard(everywhere=True),
            policy=deliver.RetryPolicy(attempt_seconds=10, attempts=1, total_seconds=10),
        )
        return Sweeper(store=store, jobs=jobs, callbacks=callbacks, restarts_pending=True)

    return make


@pytest.fixture
def sweeper(make_sweeper: Callable[[], Sweeper]) -> Sweeper:
    """A sweep."""
    return make_sweeper()


async def pending(sweeper: Sweeper, task_id: str = "t-1", url: str = "", created_at: dt.datetime = NOW) -> TaskRecord:
    """Return the record of a task that has just been asked for, with a callback to that URL if there is one."""
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


async def stored(sweeper: Sweeper, record: TaskRecord) -> TaskRecord:
    """Store a task in one act, since a sweep may be looking; only one that has not begun has its payload yet."""
    if record.status is Status.PENDING:
        await sweeper.store.add_payload(record.task_id, Sealed(b""))
    await sweeper.store.add(record)
    await sweeper.store.mark_active(record.task_id)
    return record


async def born(sweeper: Sweeper, task_id: str = "t-1", created_at: dt.datetime = NOW) -> TaskRecord:
    """Store a pending task."""
    return await stored(sweeper, await pending(sweeper, task_id, created_at=created_at))


async def began(sweeper: Sweeper, task_id: str = "t-1", url: str = "") -> TaskRecord:
    """Store a task that a worker has taken up."""
    return await stored(sweeper, start(await pending(sweeper, task_id, url), at=NOW))


async def ended(
    sweeper: Sweeper, task_id: str = "t-1", url: str = "", *, lease_until: dt.datetime | None = None
) -> TaskRecord:
    """Store a task that is over; its callback is owed, or under a lease."""
    running = start(await pending(sweeper, task_id, url), at=NOW)
    return await stored(sweeper, finish(running, SUCCESS, at=NOW, lease_until=lease_until))


async def objects(sweeper: Sweeper) -> set[str]:
    """Return what is left of tasks beside their records."""
    names = {entry.name for entry in await sweeper.store._blobs.entries("", limit=1000)}
    return {name for name in names if not name.startswith("index/") and not name.endswith("metadata.json")}


def state_of(record: TaskRecord) -> CallbackState:
    """Return what became of the callback."""
    assert record.webhook is not None
    return record.webhook.state


# --- settling --------------------------------------------------------------------------------------------------------


async def test_nothing_to_do_is_done_at_once(sweeper: Sweeper) -> None:
    """A sweep without tasks reports nothing."""
    assert SweepReport() == await sweeper.sweep()


async def test_dead_task_is_settled_and_its_callback_delivered(
    sweeper: Sweeper, jobs: KnownJobs, receiver: Receiver
) -> None:
    """One sweep ends a task whose worker is gone, and tells its receiver."""
    await began(sweeper, url=receiver.url)
    jobs.states[TASK] = ExecutionState.FINISHED
    assert SweepReport(settled=1, delivered=1) == await sweeper.sweep()
    record = await sweeper.store.record(TASK)
    assert (Reason.WORKER_LOST, CallbackState.DELIVERED, ["t-1"]) == (record.reason, state_of(record), receiver.got)
    assert await objects(sweeper) == set()
    assert SweepReport() == await sweeper.sweep()


@pytest.mark.parametrize("state", [ExecutionState.QUEUED, ExecutionState.RUNNING])
async def test_living_task_is_left_alone(sweeper: Sweeper, jobs: KnownJobs, state: ExecutionState) -> None:
    """A task whose worker lives or waits for a place is not touched."""
    record = await began(sweeper)
    jobs.states[TASK] = state
    assert SweepReport() == await sweeper.sweep()
    assert record == await sweeper.store.record(TASK)


async def test_task_whose_worker_died_last_of_all_is_tidied_up(sweeper: Sweeper) -> None:
    """When only the mark and the payload of a finished task are left, they are removed."""
    record = await ended(sweeper)
    await sweeper.store.mark_active(record.task_id)
    await sweeper.store.add_payload(record.task_id, Sealed(b""))
    assert SweepReport() == await sweeper.sweep()
    assert await objects(sweeper) == set()
    assert record == await sweeper.store.record(TASK)


async def test_half_born_task_is_cleared_when_it_is_old(sweeper: Sweeper) -> None:
    """What a submission left that died before its record was there goes after a bound, and not before."""
    await sweeper.store.mark_active(TASK)
    await sweeper.store.add_payload(TASK, Sealed(b""))
    before = await objects(sweeper)
    assert SweepReport() == await sweeper.sweep()
    assert before == await objects(sweeper)
    assert SweepReport() == await attrs.evolve(sweeper, incomplete_age=dt.timedelta(0)).sweep()
    assert await objects(sweeper) == set()


# --- starting again --------------------------------------------------------------------------------------------------


async def test_forgotten_tasks_are_started_oldest_first(sweeper: Sweeper, jobs: KnownJobs) -> None:
    """Tasks that waited in the queue of a service that is gone are started in the order in which they came."""
    for task_id, hours in (("b", 2), ("c", 3), ("a", 1), ("d", 4)):
        await born(sweeper, task_id, created_at=NOW + hours * HOUR)
    assert SweepReport(started=4) == await sweeper.sweep()
    assert ["a", "b", "c", "d"] == jobs.launched
    assert SweepReport() == await sweeper.sweep()


async def test_where_nobody_keeps_the_queue_nothing_is_started(sweeper: Sweeper, jobs: KnownJobs) -> None:
    """A sweep that may not start workers leaves pending tasks as they are."""
    record = await born(sweeper)
    assert SweepReport() == await attrs.evolve(sweeper, restarts_pending=False).sweep()
    assert ([], record) == (jobs.launched, await sweeper.store.record(TASK))


async def test_start_that_fails_is_tried_again(sweeper: Sweeper, jobs: KnownJobs) -> None:
    """A forgotten task for which there is no room stays pending, until there is."""
    await born(sweeper)
    jobs.launch_fault = Busy("It is full.")
    assert SweepReport(failed=1) == await sweeper.sweep()
    jobs.launch_fault = None
    assert SweepReport(started=1) == await sweeper.sweep()


# --- delivering ------------------------------------------------------------------------------------------------------


async def test_two_sweeps_at_once_deliver_once(
    make_sweeper: Callable[[], Sweeper], jobs: KnownJobs, receiver: Receiver
) -> None:
    """However many sweeps run at once, each dead task has one end and each receiver one callback."""
    sweepers = [make_sweeper() for _ in range(4)]
    task_ids = [f"t-{number}" for number in range(12)]
    for number, task_id in enumerate(task_ids):
        make_task = ended if number % 2 else began
        await make_task(sweepers[0], task_id, receiver.url)
    reports = await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers))
    assert sorted(task_ids) == sorted(receiver.got)
    total = sum(reports, SweepReport())
    assert (12, 0, 0) == (total.delivered, total.undelivered, total.failed)
    assert await objects(sweepers[0]) == set()


async def test_callback_under_a_lease_is_left_to_its_holder(sweeper: Sweeper, receiver: Receiver) -> None:
    """While a worker delivers, a sweep does not; when its lease has run out, it does."""
    await ended(sweeper, url=receiver.url, lease_until=dt.datetime.now(dt.UTC) + HOUR)
    assert SweepReport() == await sweeper.sweep()
    await sweeper.store.update(TASK, lambda record: claim_callback(record, lease_until=NOW))
    assert SweepReport(delivered=1) == await sweeper.sweep()
    assert ["t-1"] == receiver.got


async def test_callback_that_fails_waits_for_its_pause(sweeper: Sweeper, receiver: Receiver) -> None:
    """After a failure the next sweep leaves the receiver alone, and the task stays marked."""
    await ended(sweeper, url=receiver.url)
    receiver.status = 500
    assert SweepReport(undelivered=1) == await sweeper.sweep()
    assert SweepReport() == await sweeper.sweep()
    assert (["t-1"], {"active/t-1"}) == (receiver.got, await objects(sweeper))


async def test_callback_that_is_given_up_is_not_reported_as_delivered(sweeper: Sweeper, receiver: Receiver) -> None:
    """The last try for a receiver that stayed away too long fails like the others, and then the task is done with."""
    record = await ended(sweeper, url=receiver.url)
    long_ago = NOW - CALLBACK_RETRY_PERIOD - HOUR
    await sweeper.store.update(record.task_id, lambda present: attrs.evolve(present, completed_at=long_ago))
    receiver.status = 500
    assert SweepReport(undelivered=1) == await sweeper.sweep()
    assert (CallbackState.ABANDONED, set()) == (
        state_of(await sweeper.store.record(TASK)),
        await objects(sweeper),
    )


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [StorageError("It does not answer."), OSError("unforeseen")])
async def test_one_bad_task_does_not_keep_the_others(
    sweeper: Sweeper, jobs: KnownJobs, receiver: Receiver, fault: Exception
) -> None:
    """A task that cannot be looked at, for whatever reason, is counted, and all others are swept."""
    for task_id in ("t-0", "t-1", "t-2"):
        await began(sweeper, task_id, receiver.url)
        jobs.states[TaskId(task_id)] = ExecutionState.FINISHED
    jobs.states[TASK] = fault
    assert SweepReport(settled=2, delivered=2, failed=1) == await sweeper.sweep()
    assert ["t-0", "t-2"] == sorted(receiver.got)


async def test_sweep_that_is_cancelled_leaves_a_debt_that_another_takes_up(
    make_sweeper: Callable[[], Sweeper], receiver: Receiver
) -> None:
    """A sweep may be stopped in the middle of many deliveries; what it had taken up is due after the lease."""
    first = make_sweeper()
    task_ids = [f"t-{number:02}" for number in range(30)]
    for task_id in task_ids:
        await ended(first, task_id, receiver.url)
    receiver.hanging = set(task_ids)
    sweeping = asyncio.create_task(first.sweep())
    await until(lambda: len(receiver.got) >= 5)
    sweeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sweeping
    receiver.let_go.set()
    records = [await first.store.record(TaskId(task_id)) for task_id in task_ids]
    assert {CallbackState.DELIVERING, CallbackState.OWED} == {state_of(record) for record in records}
    for record in records:
        await first.store.update(record.task_id, lambda present: claim_callback(present, lease_until=NOW))
    assert SweepReport(delivered=30) == await make_sweeper().sweep()


# --- sweeping on and on ----------------------------------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so, within a bound."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def sweeping(sweeper: Sweeper, every_seconds: float = 3600) -> AsyncIterator[asyncio.Event]:
    """Sweep on the side; gives what makes the next sweep come sooner."""
    sooner = asyncio.Event()
    task = asyncio.create_task(sweeper.run_forever(every_seconds=every_seconds, sooner=sooner))
    try:
        yield sooner
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()


async def test_sweeps_come_again_and_again(sweeper: Sweeper, receiver: Receiver) -> None:
    """What becomes owed after one sweep is delivered by a later one."""
    async with sweeping(sweeper, every_seconds=0.01):
        for number in range(3):
            await ended(sweeper, f"t-{number}", receiver.url)
            await until(lambda number=number: f"t-{number}" in receiver.got)  # type: ignore[misc]


async def test_sweep_comes_sooner_when_it_is_asked_for(sweeper: Sweeper, receiver: Receiver) -> None:
    """A wish is followed by a sweep at once, however long the pause is."""
    async with sweeping(sweeper) as sooner:
        for number in range(3):
            await ended(sweeper, f"t-{number}", receiver.url)
            sooner.set()
            await until(lambda number=number: f"t-{number}" in receiver.got)  # type: ignore[misc]


async def test_one_wish_is_one_sweep(sweeper: Sweeper, receiver: Receiver) -> None:
    """A wish that was followed is used up: the sweep does not run on and on."""
    await ended(sweeper, "t-0", receiver.url)
    receiver.status = 500
    async with sweeping(sweeper) as sooner:
        await until(lambda: "t-0" in receiver.got)
        sooner.set()
        await until(lambda: not sooner.is_set())


async def test_receiver_that_hangs_holds_up_nobody(sweeper: Sweeper, receiver: Receiver) -> None:
    """While one receiver does not answer, further sweeps deliver to the others, and leave that one alone."""
    receiver.hanging = {"t-0"}
    async with sweeping(sweeper) as sooner:
        for number in range(4):
            await ended(sweeper, f"t-{number}", receiver.url)
            sooner.set()
            await until(lambda number=number: f"t-{number}" in receiver.got)  # type: ignore[misc]
    assert ["t-0", "t-1", "t-2", "t-3"] == receiver.got


class BrokenBlobs(DirectoryBlobs):
    """A folder whose first listings fail."""

    def __init__(self, root: Path, errors: list[Exception]) -> None:
        super().__init__(root)
        self.errors = errors

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        if self.errors:
            raise self.errors.pop()
        return await super().entries(prefix, after=after, before=before, limit=limit)


async def test_sweep_that_breaks_is_followed_by_another(sweeper: Sweeper, receiver: Receiver, tmp_path: Path) -> None:
    """When the storage, or anything else, fails a whole sweep, the next one comes all the same."""
    await ended(sweeper, url=receiver.url)
    blobs = BrokenBlobs(tmp_path / "blobs", [StorageError("It does not answer."), OSError("unforeseen")])
    async with sweeping(attrs.evolve(sweeper, store=Store(blobs)), every_seconds=0.01):
        await until(lambda: receiver.got == ["t-1"])

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import attrs
import pytest

from ccrun import codec, lifecycle
from ccrun.api.dispatch import Dispatcher, Idempotency, Submitted, redacted_url
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.backends.local.key import LocalKey
from ccrun.blobs import Blob
from ccrun.errors import (
    BlobNotFound,
    Busy,
    CcrunError,
    IllegalTransition,
    LaunchFailed,
    NotRedeliverable,
    TaskAlreadyFinished,
    TaskExists,
    TaskNotFound,
)
from ccrun.jobs import ExecutionState
from ccrun.lifecycle import finish, record_delivery, start
from ccrun.names import active_name, payload_name, record_name
from ccrun.seal import Purpose
from ccrun.store import Store
from ccrun.task import (
    TASK_ID_PATTERN,
    CallbackState,
    Outcome,
    Reason,
    Secret,
    Status,
    TaskId,
    TaskRecord,
    TaskSpec,
    TaskType,
)
from ccrun.unseal import unseal

TASK = TaskId("t-1")
NOW = dt.datetime(2025, 3, 4, 5, 6, 7, tzinfo=dt.UTC)
SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0)
URL = "https://user:made-up-password@example.com:8443/hook?token=made-up-token"


class WatchedBlobs(DirectoryBlobs):
    """A folder that lets a test act before a record is written, or hold a new one back."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.before_replace: Callable[[], object] | None = None
        self.records = asyncio.Event()
        self.records.set()

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        if name.endswith("metadata.json"):
            await self.records.wait()
        return await super().create(name, content)

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        if self.before_replace is not None:
            run, self.before_replace = self.before_replace, None
            await asyncio.to_thread(run)
        return await super().replace(name, content, generation=generation)


class NotedJobs:
    """A place that runs workers, of which only the wishes are noted."""

    max_running: int | None = None
    start_timeout: dt.timedelta | None = None

    def __init__(self) -> None:
        self.launched: list[TaskId] = []
        self.cancelled: list[TaskId] = []
        self.fault: CcrunError | None = None
        self.at_launch: Callable[[], object] | None = None

    def check_capacity(self) -> None: ...

    async def launch(self, task_id: TaskId) -> str | None:
        if self.at_launch is not None:
            await asyncio.to_thread(self.at_launch)
        if self.fault is not None:
            raise self.fault
        self.launched.append(task_id)
        return f"executions/{task_id}"

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        self.cancelled.append(task_id)

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        return ExecutionState.UNKNOWN

    async def clear(self, task_id: TaskId) -> None:
        pass


@pytest.fixture
def blobs(tmp_path: Path) -> WatchedBlobs:
    """Where the objects of a test are."""
    return WatchedBlobs(tmp_path / "blobs")


@pytest.fixture
def store(blobs: WatchedBlobs) -> Store:
    """The store of a test."""
    return Store(blobs)


@pytest.fixture
def other(tmp_path: Path) -> Store:
    """The same tasks as another process sees them."""
    return Store(DirectoryBlobs(tmp_path / "blobs"))


@pytest.fixture
def wrapper(tmp_path: Path) -> LocalKey:
    """The key service of a test."""
    return LocalKey(tmp_path / "sealing.key")


@pytest.fixture
def jobs() -> NotedJobs:
    """The workers that were wished for."""
    return NotedJobs()


@pytest.fixture
def owed() -> list[str]:
    """One entry each time that a callback became due."""
    return []


@pytest.fixture
def dispatcher(store: Store, jobs: NotedJobs, wrapper: LocalKey, owed: list[str]) -> Dispatcher:
    """The use cases."""
    return Dispatcher(
        store=store, jobs=jobs, wrapper=wrapper, callback_owed=lambda: owed.append("owed"), creation_wait_seconds=0.2
    )


def spec(task_id: str = "t-1", *, prompt: str = "made-up prompt", callback_url: str | None = None) -> TaskSpec:
    """Return a request as it comes from `wire`."""
    return TaskSpec(
        task_id=TaskId(task_id),
        type=TaskType.ASYNC,
        prompt=prompt,
        timeout_minutes=5,
        anthropic_api_key=Secret("made-up-key"),
        callback_url=Secret(callback_url) if callback_url else None,
        environment_secrets={"TOKEN": Secret("made-up-secret")},
        metadata={"order": 7},
    )


async def everything(blobs: DirectoryBlobs) -> dict[str, bytes]:
    """Return all objects."""
    return {entry.name: (await blobs.read(entry.name)).content for entry in await blobs.entries("", limit=1000)}


async def run_to_the_end(store: Store, outcome: Outcome = SUCCESS) -> TaskRecord:
    """Do with the store what a worker does."""
    await store.update(TASK, lambda record: start(record, at=NOW))
    await store.delete_payload(TASK)
    return await store.update(TASK, lambda record: finish(record, outcome, at=NOW))


# --- submitting ------------------------------------------------------------------------------------------------------


async def test_task_is_stored_and_launched(dispatcher: Dispatcher, store: Store, jobs: NotedJobs) -> None:
    """A submitted task has a pending record, just as it was answered, a place in the list, a mark and an execution."""
    submitted = await dispatcher.submit(spec())
    stored = await store.record(TASK)
    assert Submitted(record=attrs.evolve(stored, execution_name="executions/t-1"), is_replay=False) == submitted
    assert (Status.PENDING, {"order": 7}, store.logs_path(TASK)) == (stored.status, stored.metadata, stored.logs_path)
    assert [TASK] == [record.task_id for record in (await store.page(limit=5)).tasks] == jobs.launched
    assert [TASK] == [mark.task_id for mark in await store.active()]


async def test_payload_is_the_request(dispatcher: Dispatcher, store: Store, wrapper: LocalKey) -> None:
    """What the worker opens is the whole request."""
    await dispatcher.submit(spec(callback_url=URL))
    content = await unseal(wrapper, await store.payload(TASK), task_id=TASK, purpose=Purpose.PAYLOAD)
    assert spec(callback_url=URL) == codec.spec_from_bytes(content)


async def test_nothing_secret_is_stored_unsealed(dispatcher: Dispatcher, blobs: WatchedBlobs, tmp_path: Path) -> None:
    """Neither a credential, nor the prompt, nor the secret parts of the callback URL stand anywhere in the storage."""
    await dispatcher.submit(spec(callback_url=URL))
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    secrets = [b"made-up-key", b"made-up-secret", b"made-up prompt", b"made-up-password", b"made-up-token"]
    assert [] == [secret for secret in secrets for content in files if secret in content]


async def test_callback_url_is_kept_sealed_and_shown_in_part(
    dispatcher: Dispatcher, store: Store, wrapper: LocalKey
) -> None:
    """The record shows where the callback goes, and holds the whole URL for whoever may open it."""
    await dispatcher.submit(spec(callback_url=URL))
    record = await store.record(TASK)
    assert record.callback_url == "https://example.com:8443/hook"
    assert record.sealed_callback_url is not None
    whole = await unseal(wrapper, record.sealed_callback_url, task_id=TASK, purpose=Purpose.CALLBACK_URL)
    assert URL == whole.decode()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://example.com", "https://example.com"),
        ("https://u:p@example.com/a/b?c=d#e", "https://example.com/a/b"),
        ("https://u@p@example.com/", "https://example.com/"),
        ("http://[::1]:80/x?", "http://[::1]:80/x"),
        ("https://u:p@[2001:db8::1]:8443", "https://[2001:db8::1]:8443"),
        ("https://example.com/a;b=c", "https://example.com/a;b=c"),
    ],
)
def test_shown_url_has_no_secret_parts(url: str, shown: str) -> None:
    """User, password, query and fragment of a callback URL are not shown."""
    assert shown == redacted_url(url)


async def test_everything_is_stored_before_the_launch(dispatcher: Dispatcher, jobs: NotedJobs, tmp_path: Path) -> None:
    """When the worker is started, all that it and a sweep need is there, whatever dies next."""
    there: list[set[str]] = []
    jobs.at_launch = lambda: there.append(
        {entry.name for entry in asyncio.run(DirectoryBlobs(tmp_path / "blobs").entries("", limit=10))}
    )
    await dispatcher.submit(spec())
    assert {active_name(TASK), payload_name(TASK), record_name(TASK)} < there[0]


async def test_what_is_half_born_is_marked(dispatcher: Dispatcher, blobs: WatchedBlobs) -> None:
    """A payload never stands without a mark, so a sweep finds what a submission that died has left."""
    blobs.records.clear()
    submitting = asyncio.create_task(dispatcher.submit(spec()))
    async with asyncio.timeout(10):
        while payload_name(TASK) not in await everything(blobs):
            await asyncio.sleep(0.001)
    assert active_name(TASK) in await everything(blobs)
    submitting.cancel()
    await asyncio.wait([submitting])


async def test_one_of_many_with_an_id_wins(
    dispatcher: Dispatcher, store: Store, jobs: NotedJobs, wrapper: LocalKey, blobs: WatchedBlobs
) -> None:
    """Of twenty requests at once with one task ID one is taken, nineteen are refused, and nothing of it is mixed."""
    outcomes = await asyncio.gather(
        *(dispatcher.submit(spec(prompt=f"prompt {number}")) for number in range(20)), return_exceptions=True
    )
    winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, Submitted)]
    assert (1, 19) == (len(winners), sum(isinstance(outcome, TaskExists) for outcome in outcomes))
    content = await unseal(wrapper, await store.payload(TASK), task_id=TASK, purpose=Purpose.PAYLOAD)
    assert f"prompt {winners[0]}" == codec.spec_from_bytes(content).prompt
    assert [TASK] == jobs.launched
    assert len(await everything(blobs)) == 4


async def test_taken_id_changes_nothing(dispatcher: Dispatcher, blobs: WatchedBlobs, jobs: NotedJobs) -> None:
    """A request with the ID of a task that waits, or runs and has its payload opened, leaves no trace."""
    await dispatcher.submit(spec())
    store = Store(blobs)
    for step in (lambda: store.update(TASK, lambda record: start(record, at=NOW)), lambda: store.delete_payload(TASK)):
        before = await everything(blobs)
        with pytest.raises(TaskExists, match="The task ID t-1 is in use"):
            await dispatcher.submit(spec(prompt="another"))
        assert before == await everything(blobs)
        await step()
    before = await everything(blobs)
    with pytest.raises(TaskExists):
        await dispatcher.submit(spec(prompt="another"))
    assert before == await everything(blobs)
    assert [TASK] == jobs.launched


async def test_id_of_a_task_that_is_over_stays_taken(dispatcher: Dispatcher, store: Store, jobs: NotedJobs) -> None:
    """The ID of a finished task is not used again; its record stays as it was, and no payload is left."""
    await dispatcher.submit(spec())
    ended = await run_to_the_end(store)
    with pytest.raises(TaskExists):
        await dispatcher.submit(spec())
    assert ended == await store.record(TASK)
    with pytest.raises(BlobNotFound):
        await store.payload(TASK)
    assert [TASK] == jobs.launched


@pytest.mark.parametrize("fault", [LaunchFailed("No image."), Busy("It is full.", retry_after=7)])
async def test_launch_that_fails_leaves_a_failed_record(
    dispatcher: Dispatcher, store: Store, jobs: NotedJobs, blobs: WatchedBlobs, fault: CcrunError
) -> None:
    """A task that cannot be launched is kept as failed, with the reason, without payload, mark or debt."""
    jobs.fault = fault
    with pytest.raises(type(fault)) as caught:
        await dispatcher.submit(spec(callback_url=URL))
    assert fault is caught.value
    record = await store.record(TASK)
    assert (Status.FAILED, Reason.LAUNCH_FAILED, 1, fault.message, False) == (
        record.status,
        record.reason,
        record.exit_code,
        record.error,
        record.owes_callback,
    )
    assert {payload_name(TASK), active_name(TASK)}.isdisjoint(await everything(blobs))


async def test_launch_whose_answer_is_lost_is_no_failure(
    dispatcher: Dispatcher, store: Store, jobs: NotedJobs, blobs: WatchedBlobs
) -> None:
    """A worker that has begun although the launch seemed to fail keeps its task, and its payload."""

    def begin() -> None:
        asyncio.run(store.update(TASK, lambda record: lifecycle.start(record, at=dt.datetime.now(dt.UTC))))

    jobs.at_launch, jobs.fault = begin, LaunchFailed("Cloud Run did not confirm the launch.")
    submitted = await dispatcher.submit(spec())
    assert Status.RUNNING == submitted.record.status == (await store.record(TASK)).status
    assert payload_name(TASK) in await everything(blobs)


# --- idempotency -----------------------------------------------------------------------------------------------------


def test_key_names_the_task() -> None:
    """One key of one caller always gives one task ID, other keys and other callers others."""
    keys = [Idempotency(key=key, caller=caller) for caller in ("one", "two") for key in ("a", "b")]
    assert len({key.task_id for key in keys}) == 4
    assert Idempotency(key="a", caller="one").task_id == keys[0].task_id
    assert all(TASK_ID_PATTERN.fullmatch(key.task_id) for key in keys)


def test_digest_tells_bodies_apart() -> None:
    """The digest is that of this body under this key of this caller."""
    digests = {
        Idempotency(key=key, caller=caller).digest(body)
        for key, caller, body in itertools.product(("a", "b"), ("one", "two"), (b"1", b"2"))
    }
    assert len(digests) == 8
    assert Idempotency(key="a", caller="one").digest(b"1") in digests


async def test_repeat_gets_the_same_task(dispatcher: Dispatcher, store: Store, jobs: NotedJobs) -> None:
    """The same request again answers with the same task, also when that is long over, and starts nothing."""
    first = await dispatcher.submit(spec(), idempotency_digest="d")
    again = await dispatcher.submit(spec(), idempotency_digest="d")
    assert (False, True) == (first.is_replay, again.is_replay)
    assert await store.record(TASK) == again.record
    ended = await run_to_the_end(store)
    assert Submitted(record=ended, is_replay=True) == await dispatcher.submit(spec(), idempotency_digest="d")
    with pytest.raises(BlobNotFound):
        await store.payload(TASK)
    assert [TASK] == jobs.launched


@pytest.mark.parametrize("first_digest", ["other", None])
async def test_other_request_under_the_key_is_refused(dispatcher: Dispatcher, first_digest: str | None) -> None:
    """Another body under the same key, or a task that no key made, is no replay."""
    await dispatcher.submit(spec(), idempotency_digest=first_digest)
    with pytest.raises(TaskExists, match="This Idempotency-Key was used with another request"):
        await dispatcher.submit(spec(), idempotency_digest="d")


async def test_many_repeats_at_once_make_one_task(dispatcher: Dispatcher, jobs: NotedJobs) -> None:
    """Of twenty equal requests at once one starts the task, and all get it."""
    outcomes = await asyncio.gather(*(dispatcher.submit(spec(), idempotency_digest="d") for _ in range(20)))
    assert [False] + [True] * 19 == sorted(outcome.is_replay for outcome in outcomes)
    assert [TASK] == jobs.launched
    assert {TASK} == {outcome.record.task_id for outcome in outcomes}


async def test_repeat_waits_for_the_first(dispatcher: Dispatcher, blobs: WatchedBlobs) -> None:
    """A repeat that comes while the first request is on its way gets its task."""
    blobs.records.clear()
    first = asyncio.create_task(dispatcher.submit(spec(), idempotency_digest="d"))
    async with asyncio.timeout(10):
        while payload_name(TASK) not in await everything(blobs):
            await asyncio.sleep(0.001)
    second = asyncio.create_task(dispatcher.submit(spec(), idempotency_digest="d"))
    blobs.records.set()
    assert (False, True) == ((await first).is_replay, (await second).is_replay)


async def test_repeat_of_a_request_that_died_is_asked_to_come_back(dispatcher: Dispatcher, store: Store) -> None:
    """When the first request never gets its record, a repeat is told when it makes sense to try again."""
    half = await dispatcher.wrapper.wrap(b"")
    await store.add_payload(TASK, half)  # type: ignore[arg-type]
    with pytest.raises(Busy) as caught:
        await dispatcher.submit(spec(), idempotency_digest="d")
    assert caught.value.retry_after == 300


# --- cancelling ------------------------------------------------------------------------------------------------------


async def test_pending_task_is_cancelled_at_once(
    dispatcher: Dispatcher, store: Store, jobs: NotedJobs, blobs: WatchedBlobs, owed: list[str]
) -> None:
    """A task that has not begun is over with its cancel: no payload, its execution ended, its callback due."""
    await dispatcher.submit(spec(callback_url=URL))
    cancelled = await dispatcher.cancel(TASK)
    assert (Status.CANCELLED, False) == (cancelled.record.status, cancelled.was_already_requested)
    assert cancelled.record.owes_callback
    assert ([TASK], ["owed"]) == (jobs.cancelled, owed)
    assert payload_name(TASK) not in await everything(blobs)
    assert [TASK] == [mark.task_id for mark in await store.active()]


async def test_cancelled_task_without_callback_is_done_with(
    dispatcher: Dispatcher, store: Store, owed: list[str]
) -> None:
    """A task that is cancelled before it begins and has no callback needs no sweep."""
    await dispatcher.submit(spec())
    await dispatcher.cancel(TASK)
    assert ([], []) == (await store.active(), owed)


async def test_running_task_is_left_to_its_worker(
    dispatcher: Dispatcher, store: Store, jobs: NotedJobs, owed: list[str]
) -> None:
    """A task that runs is marked, and its worker asked to end it; asking again is told apart and harmless."""
    await dispatcher.submit(spec(callback_url=URL))
    await store.update(TASK, lambda record: start(record, at=NOW))
    first, second = await dispatcher.cancel(TASK), await dispatcher.cancel(TASK)
    assert (False, True) == (first.was_already_requested, second.was_already_requested)
    assert (Status.RUNNING, first.record.cancelled_at) == (second.record.status, second.record.cancelled_at)
    assert ([TASK, TASK], []) == (jobs.cancelled, owed)


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
async def test_task_that_is_over_is_not_cancelled(
    dispatcher: Dispatcher, store: Store, jobs: NotedJobs, status: Status
) -> None:
    """A cancel that comes too late says how the task ended, and changes nothing."""
    await dispatcher.submit(spec())
    ended = await run_to_the_end(store, attrs.evolve(SUCCESS, status=status))
    with pytest.raises(TaskAlreadyFinished, match=f"Task t-1 is already {status}"):
        await dispatcher.cancel(TASK)
    assert (ended, []) == (await store.record(TASK), jobs.cancelled)


async def test_unknown_task_is_not_cancelled(dispatcher: Dispatcher) -> None:
    """A cancel of what is not there says so."""
    with pytest.raises(TaskNotFound):
        await dispatcher.cancel(TASK)


class Turns:
    """Who may call the storage next, as long as the order says it; then everybody may."""

    def __init__(self, order: Sequence[str]) -> None:
        self._order = deque(order)
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def turn(self, party: str) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._order or self._order[0] == party)
            yield
            if self._order:
                self._order.popleft()
            self._changed.notify_all()

    async def leave(self, party: str) -> None:
        async with self._changed:
            self._order = deque(other for other in self._order if other != party)
            self._changed.notify_all()


class OrderedBlobs(DirectoryBlobs):
    """A folder as one party uses it, each call of the record in its turn."""

    def __init__(self, root: Path, party: str, turns: Turns) -> None:
        super().__init__(root)
        self._party, self._turns = party, turns

    async def read(self, name: str) -> Blob:
        async with self._turns.turn(self._party):
            return await super().read(name)

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        async with self._turns.turn(self._party):
            return await super().replace(name, content, generation=generation)


@pytest.mark.parametrize("order", ["".join(order) for order in itertools.product("cw", repeat=5)])
@pytest.mark.parametrize("begun", [False, True])
async def test_cancel_and_worker_agree_in_every_order(
    dispatcher: Dispatcher, store: Store, tmp_path: Path, order: str, begun: bool
) -> None:
    """However the steps of a cancel and of a worker fall between each other, there is one end that fits both answers."""
    await dispatcher.submit(spec())
    if begun:
        await store.update(TASK, lambda record: start(record, at=NOW))
    turns = Turns(order)

    async def cancel() -> bool:
        blobs = OrderedBlobs(tmp_path / "blobs", "c", turns)
        try:
            await attrs.evolve(dispatcher, store=Store(blobs)).cancel(TASK)
        except TaskAlreadyFinished:
            return False
        finally:
            await turns.leave("c")
        return True

    async def work() -> TaskRecord | None:
        mine = Store(OrderedBlobs(tmp_path / "blobs", "w", turns))
        try:
            if not begun:
                await mine.update(TASK, lambda record: start(record, at=NOW))
            return await mine.update(TASK, lambda record: finish(record, SUCCESS, at=NOW))
        except IllegalTransition:
            return None
        finally:
            await turns.leave("w")

    was_cancelled, ended = await asyncio.gather(cancel(), work())
    record = await store.record(TASK)
    assert record.status is (Status.CANCELLED if was_cancelled else Status.COMPLETED)
    assert ended in (None, record)
    assert (ended is None) <= (was_cancelled and not begun)


# --- delivering again ------------------------------------------------------------------------------------------------


async def deliver(store: Store) -> None:
    """Note a delivery as a courier does."""
    await store.update(TASK, lambda record: record_delivery(record, delivered=True, attempts=1, error=None, at=NOW))


async def test_delivered_callback_becomes_due_again(dispatcher: Dispatcher, store: Store, owed: list[str]) -> None:
    """A caller's wish makes the callback due now, and sweeps look at the task again."""
    await dispatcher.submit(spec(callback_url=URL))
    await run_to_the_end(store)
    await deliver(store)
    assert await store.active() == []
    await dispatcher.redeliver(TASK)
    record = await store.record(TASK)
    assert record.webhook is not None
    assert (CallbackState.OWED, ["owed"]) == (record.webhook.state, owed)
    assert [TASK] == [mark.task_id for mark in await store.active()]


async def test_task_without_a_due_callback_is_not_delivered_again(dispatcher: Dispatcher, store: Store) -> None:
    """There is nothing to deliver of a task that is unknown, not over, or named no callback, and no mark is made."""
    with pytest.raises(TaskNotFound):
        await dispatcher.redeliver(TASK)
    await dispatcher.submit(spec())
    with pytest.raises(NotRedeliverable, match="has not finished yet"):
        await dispatcher.redeliver(TASK)
    await run_to_the_end(store)
    with pytest.raises(NotRedeliverable, match="has no callback"):
        await dispatcher.redeliver(TASK)
    assert await store.active() == []


async def test_wish_is_not_forgotten_when_a_sweep_is_just_done(
    dispatcher: Dispatcher, store: Store, blobs: WatchedBlobs, other: Store
) -> None:
    """When a sweep that saw the task as settled takes its mark away in the middle of the wish, the mark comes back."""
    await dispatcher.submit(spec(callback_url=URL))
    await run_to_the_end(store)
    await deliver(store)
    blobs.before_replace = lambda: asyncio.run(other.unmark_active(TASK))
    await dispatcher.redeliver(TASK)
    assert [TASK] == [mark.task_id for mark in await store.active()]

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import attrs
import pytest
from helpers.dispatch import (
    NOW,
    SUCCESS,
    TASK,
    URL,
    RecordingJobs,
    WatchedBlobs,
    all_objects,
    blobs,
    dispatcher,
    finish_task,
    jobs,
    other_store,
    owed,
    spec,
    store,
    wrapper,
)

from ccrun import codec, lifecycle
from ccrun.api.dispatch import Dispatcher, Submitted, redacted_url
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
from ccrun.lifecycle import finish, record_delivery, start
from ccrun.names import active_name, payload_name, record_name
from ccrun.seal import Purpose
from ccrun.store import Store
from ccrun.task import CallbackState, Reason, Status, TaskRecord
from ccrun.unseal import unseal

__all__ = ["blobs", "dispatcher", "jobs", "other_store", "owed", "store", "wrapper"]

# --- submitting ------------------------------------------------------------------------------------------------------


async def test_task_is_stored_and_launched(dispatcher: Dispatcher, store: Store, jobs: RecordingJobs) -> None:
    """A submitted task has a pending record equal to the response, a place in the list, a mark and an execution."""
    submitted = await dispatcher.submit(spec())
    stored = await store.record(TASK)
    assert Submitted(record=attrs.evolve(stored, execution_name="executions/t-1"), is_replay=False) == submitted
    assert (Status.PENDING, {"order": 7}, store.logs_path(TASK)) == (stored.status, stored.metadata, stored.logs_path)
    assert [TASK] == [record.task_id for record in (await store.page(limit=5)).tasks] == jobs.launched
    assert [TASK] == [mark.task_id for mark in await store.active()]


async def test_payload_is_the_whole_request(dispatcher: Dispatcher, store: Store, wrapper: LocalKey) -> None:
    """The worker opens exactly the request that was submitted."""
    await dispatcher.submit(spec(callback_url=URL))
    content = await unseal(wrapper, await store.payload(TASK), task_id=TASK, purpose=Purpose.PAYLOAD)
    assert spec(callback_url=URL) == codec.spec_from_bytes(content)


async def test_secrets_are_stored_only_sealed(dispatcher: Dispatcher, blobs: WatchedBlobs, tmp_path: Path) -> None:
    """No object contains a credential, the prompt or the secret parts of the callback URL in plain text."""
    await dispatcher.submit(spec(callback_url=URL))
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    secrets = [b"made-up-key", b"made-up-secret", b"made-up prompt", b"made-up-password", b"made-up-token"]
    assert [] == [secret for secret in secrets for content in files if secret in content]


async def test_record_has_the_callback_url_sealed_and_redacted(
    dispatcher: Dispatcher, store: Store, wrapper: LocalKey
) -> None:
    """The record has the callback URL without its secret parts, and sealed in full."""
    await dispatcher.submit(spec(callback_url=URL))
    record = await store.record(TASK)
    assert record.callback_url == "https://example.com:8443/hook"
    assert record.sealed_callback_url is not None
    whole = await unseal(wrapper, record.sealed_callback_url, task_id=TASK, purpose=Purpose.CALLBACK_URL)
    assert URL == whole.decode()


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        ("https://example.com", "https://example.com"),
        ("https://u:p@example.com/a/b?c=d#e", "https://example.com/a/b"),
        ("https://u@p@example.com/", "https://example.com/"),
        ("http://[::1]:80/x?", "http://[::1]:80/x"),
        ("https://u:p@[2001:db8::1]:8443", "https://[2001:db8::1]:8443"),
        ("https://example.com/a;b=c", "https://example.com/a;b=c"),
    ],
)
def test_redacted_url_has_no_secret_parts(url: str, redacted: str) -> None:
    """User, password, query and fragment are removed."""
    assert redacted == redacted_url(url)


async def test_task_is_stored_before_the_launch(dispatcher: Dispatcher, jobs: RecordingJobs, tmp_path: Path) -> None:
    """When the worker starts, mark, payload and record exist, so that a killed process leaves nothing that a sweep misses."""
    stored: list[set[str]] = []
    jobs.before_launch = lambda: stored.append(
        {entry.name for entry in asyncio.run(DirectoryBlobs(tmp_path / "blobs").entries("", limit=10))}
    )
    await dispatcher.submit(spec())
    assert {active_name(TASK), payload_name(TASK), record_name(TASK)} < stored[0]


async def test_incomplete_task_is_marked(dispatcher: Dispatcher, blobs: WatchedBlobs) -> None:
    """A payload never exists without a mark, so a sweep finds what a killed process left."""
    blobs.may_store_records.clear()
    submitting = asyncio.create_task(dispatcher.submit(spec()))
    async with asyncio.timeout(10):
        while payload_name(TASK) not in await all_objects(blobs):
            await asyncio.sleep(0.001)
    assert active_name(TASK) in await all_objects(blobs)
    submitting.cancel()
    await asyncio.wait([submitting])


async def test_one_of_several_requests_with_an_id_is_accepted(
    dispatcher: Dispatcher, store: Store, jobs: RecordingJobs, wrapper: LocalKey, blobs: WatchedBlobs
) -> None:
    """Of twenty concurrent requests with one task ID, one is accepted and the others leave nothing behind."""
    outcomes = await asyncio.gather(
        *(dispatcher.submit(spec(prompt=f"prompt {number}")) for number in range(20)), return_exceptions=True
    )
    accepted = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, Submitted)]
    assert (1, 19) == (len(accepted), sum(isinstance(outcome, TaskExists) for outcome in outcomes))
    content = await unseal(wrapper, await store.payload(TASK), task_id=TASK, purpose=Purpose.PAYLOAD)
    assert f"prompt {accepted[0]}" == codec.spec_from_bytes(content).prompt
    assert [TASK] == jobs.launched
    assert len(await all_objects(blobs)) == 4


async def test_rejected_request_changes_nothing(
    dispatcher: Dispatcher, blobs: WatchedBlobs, jobs: RecordingJobs
) -> None:
    """A request with the ID of a pending or running task changes no object, whether the payload still exists or not."""
    await dispatcher.submit(spec())
    store = Store(blobs)
    for step in (lambda: store.update(TASK, lambda record: start(record, at=NOW)), lambda: store.delete_payload(TASK)):
        before = await all_objects(blobs)
        with pytest.raises(TaskExists, match="The task ID t-1 is in use"):
            await dispatcher.submit(spec(prompt="another"))
        assert before == await all_objects(blobs)
        await step()
    before = await all_objects(blobs)
    with pytest.raises(TaskExists):
        await dispatcher.submit(spec(prompt="another"))
    assert before == await all_objects(blobs)
    assert [TASK] == jobs.launched


async def test_id_of_a_finished_task_cannot_be_reused(
    dispatcher: Dispatcher, store: Store, jobs: RecordingJobs
) -> None:
    """A request with the ID of a finished task changes neither its record nor leaves a payload."""
    await dispatcher.submit(spec())
    finished = await finish_task(store)
    with pytest.raises(TaskExists):
        await dispatcher.submit(spec())
    assert finished == await store.record(TASK)
    with pytest.raises(BlobNotFound):
        await store.payload(TASK)
    assert [TASK] == jobs.launched


@pytest.mark.parametrize("error", [LaunchFailed("No image."), Busy("It is full.", retry_after=7)])
async def test_launch_that_fails_leaves_a_failed_record(
    dispatcher: Dispatcher, store: Store, jobs: RecordingJobs, blobs: WatchedBlobs, error: CcrunError
) -> None:
    """A task that cannot be launched is stored as failed with the error, without payload, mark or owed callback."""
    jobs.error = error
    with pytest.raises(type(error)) as caught:
        await dispatcher.submit(spec(callback_url=URL))
    assert error is caught.value
    record = await store.record(TASK)
    assert (Status.FAILED, Reason.LAUNCH_FAILED, 1, error.message, False) == (
        record.status,
        record.reason,
        record.exit_code,
        record.error,
        record.owes_callback,
    )
    assert {payload_name(TASK), active_name(TASK)}.isdisjoint(await all_objects(blobs))


async def test_task_is_not_failed_if_its_worker_started(
    dispatcher: Dispatcher, store: Store, jobs: RecordingJobs, blobs: WatchedBlobs
) -> None:
    """If a worker has started the task although the launch seemed to fail, the task and its payload remain."""

    def start_task() -> None:
        asyncio.run(store.update(TASK, lambda record: lifecycle.start(record, at=dt.datetime.now(dt.UTC))))

    jobs.before_launch, jobs.error = start_task, LaunchFailed("Cloud Run did not confirm the launch.")
    submitted = await dispatcher.submit(spec())
    assert Status.RUNNING == submitted.record.status == (await store.record(TASK)).status
    assert payload_name(TASK) in await all_objects(blobs)


# --- cancelling ------------------------------------------------------------------------------------------------------


async def test_pending_task_is_cancelled_immediately(
    dispatcher: Dispatcher, store: Store, jobs: RecordingJobs, blobs: WatchedBlobs, owed: list[str]
) -> None:
    """A cancelled pending task is final: its payload is deleted, its execution cancelled and its callback due."""
    await dispatcher.submit(spec(callback_url=URL))
    cancelled = await dispatcher.cancel(TASK)
    assert (Status.CANCELLED, False) == (cancelled.record.status, cancelled.was_already_requested)
    assert cancelled.record.owes_callback
    assert ([TASK], ["owed"]) == (jobs.cancelled, owed)
    assert payload_name(TASK) not in await all_objects(blobs)
    assert [TASK] == [mark.task_id for mark in await store.active()]


async def test_cancelled_task_without_callback_has_no_mark(
    dispatcher: Dispatcher, store: Store, owed: list[str]
) -> None:
    """A pending task without a callback needs no sweep after it was cancelled."""
    await dispatcher.submit(spec())
    await dispatcher.cancel(TASK)
    assert ([], []) == (await store.active(), owed)


async def test_running_task_is_cancelled_by_its_worker(
    dispatcher: Dispatcher, store: Store, jobs: RecordingJobs, owed: list[str]
) -> None:
    """For a running task, the cancellation is recorded and its worker asked to stop; a second request is reported as such."""
    await dispatcher.submit(spec(callback_url=URL))
    await store.update(TASK, lambda record: start(record, at=NOW))
    first, second = await dispatcher.cancel(TASK), await dispatcher.cancel(TASK)
    assert (False, True) == (first.was_already_requested, second.was_already_requested)
    assert (Status.RUNNING, first.record.cancelled_at) == (second.record.status, second.record.cancelled_at)
    assert ([TASK, TASK], []) == (jobs.cancelled, owed)


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
async def test_finished_task_cannot_be_cancelled(
    dispatcher: Dispatcher, store: Store, jobs: RecordingJobs, status: Status
) -> None:
    """Cancelling a finished task fails with its status, and changes nothing."""
    await dispatcher.submit(spec())
    finished = await finish_task(store, attrs.evolve(SUCCESS, status=status))
    with pytest.raises(TaskAlreadyFinished, match=f"Task t-1 is already {status}"):
        await dispatcher.cancel(TASK)
    assert (finished, []) == (await store.record(TASK), jobs.cancelled)


async def test_unknown_task_cannot_be_cancelled(dispatcher: Dispatcher) -> None:
    """Cancelling a task that does not exist fails."""
    with pytest.raises(TaskNotFound):
        await dispatcher.cancel(TASK)


class Turns:
    """Decides which party may use the storage next. When the order is exhausted, both may."""

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
    """A directory that one party uses only in its turn."""

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
@pytest.mark.parametrize("is_running", [False, True])
async def test_cancel_and_worker_agree_in_every_order(
    dispatcher: Dispatcher, store: Store, tmp_path: Path, order: str, is_running: bool
) -> None:
    """In every order of the steps of a cancellation and of a worker, the final status agrees with both results."""
    await dispatcher.submit(spec())
    if is_running:
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
            if not is_running:
                await mine.update(TASK, lambda record: start(record, at=NOW))
            return await mine.update(TASK, lambda record: finish(record, SUCCESS, at=NOW))
        except IllegalTransition:
            return None
        finally:
            await turns.leave("w")

    was_cancelled, finished = await asyncio.gather(cancel(), work())
    record = await store.record(TASK)
    assert record.status is (Status.CANCELLED if was_cancelled else Status.COMPLETED)
    assert finished in (None, record)
    assert (finished is None) <= (was_cancelled and not is_running)


# --- delivering again ------------------------------------------------------------------------------------------------


async def record_successful_delivery(store: Store) -> None:
    """Record a delivery as the worker does."""
    await store.update(TASK, lambda record: record_delivery(record, delivered=True, attempts=1, error=None, at=NOW))


async def test_delivered_callback_becomes_due_again(dispatcher: Dispatcher, store: Store, owed: list[str]) -> None:
    """After `redeliver`, a delivered callback is due and the task is marked for sweeps."""
    await dispatcher.submit(spec(callback_url=URL))
    await finish_task(store)
    await record_successful_delivery(store)
    assert await store.active() == []
    await dispatcher.redeliver(TASK)
    record = await store.record(TASK)
    assert record.webhook is not None
    assert (CallbackState.OWED, ["owed"]) == (record.webhook.state, owed)
    assert [TASK] == [mark.task_id for mark in await store.active()]


async def test_task_without_a_callback_to_deliver_is_rejected(dispatcher: Dispatcher, store: Store) -> None:
    """A task that does not exist, is not final or has no callback is rejected, and gets no mark."""
    with pytest.raises(TaskNotFound):
        await dispatcher.redeliver(TASK)
    await dispatcher.submit(spec())
    with pytest.raises(NotRedeliverable, match="has not finished yet"):
        await dispatcher.redeliver(TASK)
    await finish_task(store)
    with pytest.raises(NotRedeliverable, match="has no callback"):
        await dispatcher.redeliver(TASK)
    assert await store.active() == []


async def test_mark_survives_a_concurrent_sweep(
    dispatcher: Dispatcher, store: Store, blobs: WatchedBlobs, other_store: Store
) -> None:
    """When a sweep that has read the old record deletes the mark during `redeliver`, the mark is written again."""
    await dispatcher.submit(spec(callback_url=URL))
    await finish_task(store)
    await record_successful_delivery(store)
    blobs.before_replace = lambda: asyncio.run(other_store.unmark_active(TASK))
    await dispatcher.redeliver(TASK)
    assert [TASK] == [mark.task_id for mark in await store.active()]

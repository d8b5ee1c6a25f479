from __future__ import annotations

import asyncio
import datetime as dt
from pathlib import Path

import attrs
import pytest
from helpers.store import NOW, SUCCESS, TASK, WatchedBlobs, begin, pending

from ccrun import codec, names
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.errors import (
    BlobNotFound,
    IllegalTransition,
    StorageError,
    TaskExists,
    TaskNotFound,
)
from ccrun.lifecycle import finish, owe_callback, record_delivery, request_cancel, start
from ccrun.seal import Sealed
from ccrun.store import UPDATE_ATTEMPTS, Store
from ccrun.task import CallbackInfo, CallbackState, TaskId, TaskRecord


@pytest.fixture
def blobs(tmp_path: Path) -> WatchedBlobs:
    """Where the store of a test keeps its objects."""
    return WatchedBlobs(tmp_path / "blobs")


@pytest.fixture
def store(blobs: WatchedBlobs) -> Store:
    """The store of a test."""
    return Store(blobs)


@pytest.fixture
def other(tmp_path: Path) -> Store:
    """The same tasks as another process sees them."""
    return Store(DirectoryBlobs(tmp_path / "blobs"))


async def everything(blobs: DirectoryBlobs) -> list[str]:
    """Return the names of all objects."""
    return [entry.name for entry in await blobs.entries("", limit=10_000)]


# --- creation --------------------------------------------------------------------------------------------------------


async def test_task_is_kept(store: Store) -> None:
    """What was added is read back, and listed."""
    await store.add(pending())
    assert pending() == await store.record(TASK)
    assert [pending()] == (await store.page(limit=10)).tasks


async def test_second_task_of_an_id_leaves_no_trace(store: Store, blobs: WatchedBlobs) -> None:
    """An ID that is in use is refused, and nothing was written when it is."""
    await store.add(pending())
    before = await everything(blobs)
    with pytest.raises(TaskExists):
        await store.add(pending(created_at=NOW + dt.timedelta(hours=1)))
    assert before == await everything(blobs)


async def test_unknown_task_is_told(store: Store) -> None:
    """Reading or changing a task that is not there says so."""
    with pytest.raises(TaskNotFound):
        await store.record(TASK)
    with pytest.raises(TaskNotFound):
        await store.update(TASK, begin)


async def test_payload_is_kept_until_it_is_deleted(store: Store) -> None:
    """The sealed request is read back, cannot be overwritten, and is gone once deleted."""
    await store.add_payload(TASK, Sealed(b"sealed"))
    with pytest.raises(TaskExists):
        await store.add_payload(TASK, Sealed(b"another"))
    assert await store.payload(TASK) == b"sealed"
    await store.delete_payload(TASK)
    await store.delete_payload(TASK)
    with pytest.raises(BlobNotFound):
        await store.payload(TASK)


# --- changes of the record -------------------------------------------------------------------------------------------


async def test_change_is_written_and_returned(store: Store) -> None:
    """`update` returns the record as all others read it, where times are in milliseconds."""
    await store.add(pending())
    updated = await store.update(TASK, lambda record: start(record, at=NOW + dt.timedelta(microseconds=1234)))
    assert attrs.evolve(begin(pending()), started_at=NOW + dt.timedelta(milliseconds=1)) == updated
    assert updated == await store.record(TASK)


@pytest.mark.parametrize(
    ("webhook", "delete_payload", "expected"),
    [
        (None, True, [names.payload_name(TASK), names.active_name(TASK)]),
        (None, False, [names.active_name(TASK)]),
        (CallbackInfo(), True, [names.payload_name(TASK)]),
        (CallbackInfo(), False, []),
    ],
)
async def test_payload_is_deleted_once_when_a_task_becomes_final(
    store: Store, blobs: WatchedBlobs, webhook: CallbackInfo | None, *, delete_payload: bool, expected: list[str]
) -> None:
    """The final write deletes the payload, unless the caller has; the mark stays while the callback is owed."""
    await store.add(begin(pending(webhook=webhook)))
    final = await store.update(TASK, lambda record: finish(record, SUCCESS, at=NOW), delete_payload=delete_payload)
    assert expected == blobs.deleted
    if webhook is None:
        return
    blobs.deleted.clear()
    assert final.webhook is not None
    delivered = attrs.evolve(final.webhook, state=CallbackState.DELIVERED, next_attempt_at=None)
    await store.update(TASK, lambda record: attrs.evolve(record, webhook=delivered))
    assert [names.active_name(TASK)] == blobs.deleted


async def test_change_that_changes_nothing_writes_nothing(store: Store, blobs: WatchedBlobs) -> None:
    """A change that gives the same record back costs no write."""
    await store.add(pending())
    assert pending() == await store.update(TASK, lambda record: record)
    assert blobs.replacements == 0


async def test_change_that_raises_leaves_the_record(store: Store, blobs: WatchedBlobs) -> None:
    """What a change raises comes out, and nothing is written."""
    await store.add(begin(pending()))
    with pytest.raises(IllegalTransition):
        await store.update(TASK, begin)
    assert blobs.replacements == 0


async def test_change_is_made_again_on_what_somebody_else_wrote(
    store: Store, blobs: WatchedBlobs, other: Store
) -> None:
    """A write that came in between is not lost: the change is made on top of it."""
    await store.add(pending())
    blobs.before_replace = lambda: asyncio.run(other.update(TASK, begin))
    later = NOW + dt.timedelta(seconds=1)
    updated = await store.update(TASK, lambda record: request_cancel(record, at=later))
    assert attrs.evolve(begin(pending()), cancelled_at=later) == updated


async def test_no_change_of_many_at_once_is_lost(store: Store) -> None:
    """Ten who change a record at the same time all have their change in it."""
    await store.add(pending(webhook=CallbackInfo()))

    def count(record: TaskRecord) -> TaskRecord:
        assert record.webhook is not None
        return attrs.evolve(record, webhook=attrs.evolve(record.webhook, attempts=record.webhook.attempts + 1))

    await asyncio.gather(*(store.update(TASK, count) for _ in range(10)))
    assert pending(webhook=CallbackInfo(attempts=10)) == await store.record(TASK)


async def test_own_write_is_known_though_its_answer_was_lost(store: Store, blobs: WatchedBlobs) -> None:
    """A change that was written is not made a second time when the storage says that it was not."""
    await store.add(pending())
    blobs.replies_to_lose = 1
    assert begin(pending()) == await store.update(TASK, begin)
    assert blobs.replacements == 1


async def test_same_write_of_another_is_not_taken_for_the_own(store: Store, blobs: WatchedBlobs, other: Store) -> None:
    """Of two who claim a task in the same millisecond and so write the same words, one loses."""
    await store.add(pending())
    blobs.before_replace = lambda: asyncio.run(other.update(TASK, begin))
    with pytest.raises(IllegalTransition):
        await store.update(TASK, begin)


async def test_swap_that_is_always_lost_is_given_up(store: Store, blobs: WatchedBlobs, other: Store) -> None:
    """A record that somebody else changes before each try ends in an error, not in a loop."""
    await store.add(pending(webhook=CallbackInfo()))

    def meddle() -> None:
        asyncio.run(other.update(TASK, lambda record: owe_callback(record, at=dt.datetime.now(dt.UTC))))
        blobs.before_replace = meddle

    blobs.before_replace = meddle
    with pytest.raises(StorageError, match="changed by other processes too often"):
        await store.update(TASK, begin)
    assert blobs.replacements == UPDATE_ATTEMPTS


async def test_who_wrote_a_record_is_nobody_elses_business(store: Store) -> None:
    """The name of a write is not shown to callers."""
    await store.add(pending())
    shown = codec.record_to_public(await store.update(TASK, begin))
    assert "writeId" not in shown


# --- marks -----------------------------------------------------------------------------------------------------------


async def marked(store: Store) -> list[TaskId]:
    """Return the tasks that a sweep would look at."""
    return [mark.task_id for mark in await store.active()]


async def test_mark_tells_since_when(store: Store) -> None:
    """A mark has the time at which it was first made; marking again changes nothing."""
    await store.mark_active(TASK)
    (first,) = await store.active()
    await store.mark_active(TASK)
    assert [first] == await store.active()
    assert abs(first.since - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)


async def test_end_of_a_task_without_callback_takes_its_mark(store: Store) -> None:
    """Nobody looks at a task any more that is over and owes nothing."""
    await store.mark_active(TASK)
    await store.add(pending())
    await store.update(TASK, begin)
    assert [TASK] == await marked(store)
    await store.update(TASK, lambda record: finish(record, SUCCESS, at=NOW))
    assert await marked(store) == []


async def test_mark_stays_until_the_callback_is_delivered(store: Store) -> None:
    """A task that is over is looked at for as long as it owes its callback."""
    await store.mark_active(TASK)
    await store.add(begin(pending(webhook=CallbackInfo())))
    await store.update(TASK, lambda record: finish(record, SUCCESS, at=NOW))
    assert [TASK] == await marked(store)
    await store.update(TASK, lambda record: record_delivery(record, delivered=True, attempts=1, error=None, at=NOW))
    assert await marked(store) == []


async def test_debt_made_while_the_mark_is_removed_is_not_forgotten(
    store: Store, blobs: WatchedBlobs, other: Store
) -> None:
    """When a callback is wished again just as the task's mark goes, the mark comes back."""
    await store.add(finish(begin(pending(webhook=CallbackInfo(state=CallbackState.DELIVERED))), SUCCESS, at=NOW))
    await store.mark_active(TASK)
    blobs.after_delete = lambda: asyncio.run(
        other.update(TASK, lambda record: owe_callback(record, at=NOW + dt.timedelta(seconds=1)))
    )
    await store.unmark_active(TASK)
    assert [TASK] == await marked(store)

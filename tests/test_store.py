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
    """Return an empty storage."""
    return WatchedBlobs(tmp_path / "blobs")


@pytest.fixture
def store(blobs: WatchedBlobs) -> Store:
    """Return a store in the storage."""
    return Store(blobs)


@pytest.fixture
def other(tmp_path: Path) -> Store:
    """Return a store for the same storage, as another process has it."""
    return Store(DirectoryBlobs(tmp_path / "blobs"))


async def object_names(blobs: DirectoryBlobs) -> list[str]:
    """Return the names of all objects."""
    return [entry.name for entry in await blobs.entries("", limit=10_000)]


# --- creation --------------------------------------------------------------------------------------------------------


async def test_added_task_is_read_and_listed(store: Store) -> None:
    """The record of an added task can be read, and is on the first page."""
    await store.add(pending())
    assert pending() == await store.record(TASK)
    assert [pending()] == (await store.page(limit=10)).tasks


async def test_second_task_with_an_id_is_rejected(store: Store, blobs: WatchedBlobs) -> None:
    """Adding a task with an existing ID raises `TaskExists` and writes nothing."""
    await store.add(pending())
    before = await object_names(blobs)
    with pytest.raises(TaskExists):
        await store.add(pending(created_at=NOW + dt.timedelta(hours=1)))
    assert before == await object_names(blobs)


async def test_unknown_task_is_an_error(store: Store) -> None:
    """Reading or updating a task that does not exist raises `TaskNotFound`."""
    with pytest.raises(TaskNotFound):
        await store.record(TASK)
    with pytest.raises(TaskNotFound):
        await store.update(TASK, begin)


async def test_payload_is_stored_until_it_is_deleted(store: Store) -> None:
    """A payload can be read, cannot be overwritten, and can be deleted more than once."""
    await store.add_payload(TASK, Sealed(b"sealed"))
    with pytest.raises(TaskExists):
        await store.add_payload(TASK, Sealed(b"another"))
    assert await store.payload(TASK) == b"sealed"
    await store.delete_payload(TASK)
    await store.delete_payload(TASK)
    with pytest.raises(BlobNotFound):
        await store.payload(TASK)


# --- changes of the record -------------------------------------------------------------------------------------------


async def test_update_returns_the_stored_record(store: Store) -> None:
    """`update` returns the record that later reads return, with times in milliseconds."""
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
async def test_payload_is_deleted_when_a_task_becomes_final(
    store: Store, blobs: WatchedBlobs, webhook: CallbackInfo | None, *, delete_payload: bool, expected: list[str]
) -> None:
    """The final update deletes the payload unless the caller does, and the mark unless the callback is owed."""
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


async def test_equal_record_is_not_written(store: Store, blobs: WatchedBlobs) -> None:
    """When the change returns an equal record, nothing is written."""
    await store.add(pending())
    assert pending() == await store.update(TASK, lambda record: record)
    assert blobs.replacements == 0


async def test_exception_of_a_change_prevents_the_write(store: Store, blobs: WatchedBlobs) -> None:
    """An exception of the change is passed on, and nothing is written."""
    await store.add(begin(pending()))
    with pytest.raises(IllegalTransition):
        await store.update(TASK, begin)
    assert blobs.replacements == 0


async def test_change_is_repeated_after_a_concurrent_write(store: Store, blobs: WatchedBlobs, other: Store) -> None:
    """When another process has changed the record, the change is applied to the new record."""
    await store.add(pending())
    blobs.before_replace = lambda: asyncio.run(other.update(TASK, begin))
    later = NOW + dt.timedelta(seconds=1)
    updated = await store.update(TASK, lambda record: request_cancel(record, at=later))
    assert attrs.evolve(begin(pending()), cancelled_at=later) == updated


async def test_concurrent_updates_are_all_applied(store: Store) -> None:
    """The record has the changes of ten concurrent updates."""
    await store.add(pending(webhook=CallbackInfo()))

    def count(record: TaskRecord) -> TaskRecord:
        assert record.webhook is not None
        return attrs.evolve(record, webhook=attrs.evolve(record.webhook, attempts=record.webhook.attempts + 1))

    await asyncio.gather(*(store.update(TASK, count) for _ in range(10)))
    assert pending(webhook=CallbackInfo(attempts=10)) == await store.record(TASK)


async def test_update_recognizes_its_own_write(store: Store, blobs: WatchedBlobs) -> None:
    """A change that was stored although its response was lost is not applied a second time."""
    await store.add(pending())
    blobs.responses_to_lose = 1
    assert begin(pending()) == await store.update(TASK, begin)
    assert blobs.replacements == 1


async def test_equal_write_of_another_process_is_recognized(store: Store, blobs: WatchedBlobs, other: Store) -> None:
    """Of two workers that start a task in the same millisecond, and so write equal records, one fails."""
    await store.add(pending())
    blobs.before_replace = lambda: asyncio.run(other.update(TASK, begin))
    with pytest.raises(IllegalTransition):
        await store.update(TASK, begin)


async def test_number_of_update_attempts_is_bounded(store: Store, blobs: WatchedBlobs, other: Store) -> None:
    """When another process changes the record before each attempt, the update fails."""
    await store.add(pending(webhook=CallbackInfo()))

    def change_first() -> None:
        asyncio.run(other.update(TASK, lambda record: owe_callback(record, at=dt.datetime.now(dt.UTC))))
        blobs.before_replace = change_first

    blobs.before_replace = change_first
    with pytest.raises(StorageError, match="changed by other processes too often"):
        await store.update(TASK, begin)
    assert blobs.replacements == UPDATE_ATTEMPTS


async def test_write_id_is_not_public(store: Store) -> None:
    """The ID of a write is not in the public record."""
    await store.add(pending())
    public = codec.record_to_public(await store.update(TASK, begin))
    assert "writeId" not in public


# --- marks -----------------------------------------------------------------------------------------------------------


async def active_ids(store: Store) -> list[TaskId]:
    """Return the IDs of the active tasks."""
    return [mark.task_id for mark in await store.active()]


async def test_mark_has_the_time_of_its_creation(store: Store) -> None:
    """A mark has the time at which it was created; marking again does not change it."""
    await store.mark_active(TASK)
    (first,) = await store.active()
    await store.mark_active(TASK)
    assert [first] == await store.active()
    assert abs(first.since - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)


async def test_mark_of_a_final_task_is_deleted(store: Store) -> None:
    """A final task that owes no callback is not active."""
    await store.mark_active(TASK)
    await store.add(pending())
    await store.update(TASK, begin)
    assert [TASK] == await active_ids(store)
    await store.update(TASK, lambda record: finish(record, SUCCESS, at=NOW))
    assert await active_ids(store) == []


async def test_task_is_active_until_its_callback_is_delivered(store: Store) -> None:
    """A final task is active while it owes its callback."""
    await store.mark_active(TASK)
    await store.add(begin(pending(webhook=CallbackInfo())))
    await store.update(TASK, lambda record: finish(record, SUCCESS, at=NOW))
    assert [TASK] == await active_ids(store)
    await store.update(TASK, lambda record: record_delivery(record, delivered=True, attempts=1, error=None, at=NOW))
    assert await active_ids(store) == []


async def test_mark_is_restored_if_the_task_becomes_active(store: Store, blobs: WatchedBlobs, other: Store) -> None:
    """When a callback becomes owed while the mark is being deleted, the mark is written again."""
    await store.add(finish(begin(pending(webhook=CallbackInfo(state=CallbackState.DELIVERED))), SUCCESS, at=NOW))
    await store.mark_active(TASK)
    blobs.after_delete = lambda: asyncio.run(
        other.update(TASK, lambda record: owe_callback(record, at=NOW + dt.timedelta(seconds=1)))
    )
    await store.unmark_active(TASK)
    assert [TASK] == await active_ids(store)

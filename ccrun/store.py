"""Task records, payloads, uploads and logs in object storage.

Records change only by compare-and-swap, in `Store.update`. Log chunks are gapless and their names sort in time order. Nothing
here opens a payload.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import re
import secrets
from collections.abc import Callable, Sequence
from typing import BinaryIO, Final

import attrs

from ccrun import codec
from ccrun.blobs import Blobs
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, StorageError, TaskExists, TaskNotFound
from ccrun.names import (
    CHUNK_NAME,
    active_name,
    before_chunk,
    chunk_name,
    chunk_number,
    index_name,
    payload_name,
    record_name,
    task_prefix,
    upload_name,
)
from ccrun.seal import Sealed
from ccrun.task import TASK_ID_PATTERN, Status, TaskId, TaskRecord

# --- facts -----------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class ChunkRef:
    """A log chunk as a listing shows it."""

    number: int
    name: str


@attrs.frozen(kw_only=True)
class ChunkListing:
    """What one look at a task shows: its chunks from some number on, and the generation of its record.

    `record_generation` is None when more chunks follow than one listing shows.
    """

    chunks: Sequence[ChunkRef]
    record_generation: int | None


@attrs.frozen(kw_only=True)
class TaskPage:
    """Some of the tasks, newest first. `next_cursor` asks for those that follow."""

    tasks: Sequence[TaskRecord]
    next_cursor: str | None


@attrs.frozen(kw_only=True)
class ActiveTask:
    """That a task is not over or owes its callback, and when that began."""

    task_id: TaskId
    since: dt.datetime


@attrs.frozen(kw_only=True)
class VersionedRecord:
    """A record and the generation that it was read at."""

    record: TaskRecord
    generation: int


# --- the store -------------------------------------------------------------------------------------------------------

#: Names in one listing: what Cloud Storage gives at once.
LISTING_NAMES: Final = 1000
#: Records that one page of `GET /tasks` may read while it looks for those of one status.
MAX_PAGE_READS: Final = 500
#: Records read side by side for a page.
PARALLEL_READS: Final = 20
#: Tries at a swap. Few parties ever write one record (API, worker, sweep), so losing this often means that something is wrong.
UPDATE_ATTEMPTS: Final = 20
#: The name of a write. Two parties may write the same words in the same millisecond; only one of them may believe that it won.
WRITE_ID_BYTES: Final = 8
#: Active tasks that one listing shows; see `Store.active`.
MAX_ACTIVE: Final = 20_000


class Store:
    """Tasks in a place that keeps blobs."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    async def check(self) -> None:
        """Raise `StorageError` when the storage does not work now."""
        await self._blobs.check()

    def logs_path(self, task_id: TaskId) -> str:
        """Return where the objects of a task are found from outside."""
        return self._blobs.url(task_prefix(task_id))

    # Birth. `add_payload` and `mark_active` come first, `add` makes it a task.

    async def add_payload(self, task_id: TaskId, sealed: Sealed) -> None:
        """Keep the sealed request. Raises `TaskExists` when there is one under this ID."""
        try:
            await self._blobs.create(payload_name(task_id), sealed)
        except BlobExists:
            raise TaskExists(f"The task ID {task_id} is in use.") from None

    async def mark_active(self, task_id: TaskId) -> None:
        """Make sure that sweeps look at this task."""
        with contextlib.suppress(BlobExists):
            await self._blobs.create(active_name(task_id), b"")

    async def unmark_active(self, task_id: TaskId) -> None:
        """Tell sweeps that there is nothing left to do for this task, unless there is again meanwhile."""
        await self._blobs.delete(active_name(task_id))
        with contextlib.suppress(TaskNotFound):
            record = await self.record(task_id)
            if record.owes_callback or not record.status.is_final:
                await self.mark_active(task_id)

    async def add(self, record: TaskRecord) -> None:
        """Keep a new record, and its place in the list of tasks. Raises `TaskExists`, and then leaves no trace."""
        listed = index_name(record.task_id, record.created_at)
        record_added, index_added = await asyncio.gather(
            self._blobs.create(record_name(record.task_id), codec.record_to_bytes(record)),
            self._blobs.create(listed, b""),
            return_exceptions=True,
        )
        if isinstance(record_added, BaseException) and not isinstance(index_added, BaseException):
            await self._blobs.delete(listed)
        if isinstance(record_added, BlobExists):
            raise TaskExists(f"The task ID {record.task_id} is in use.")
        for failure in (record_added, index_added):
            if isinstance(failure, BaseException):
                raise failure

    # The payload.

    async def payload(self, task_id: TaskId) -> bytes:
        """Return the sealed request. Raises `BlobNotFound` when it was opened before."""
        return (await self._blobs.read(payload_name(task_id))).content

    async def delete_payload(self, task_id: TaskId) -> None:
        """Remove the sealed request; that there is none is no error."""
        await self._blobs.delete(payload_name(task_id))

    # The record.

    async def record(self, task_id: TaskId) -> TaskRecord:
        """Return the record. Raises `TaskNotFound`."""
        return (await self.read_versioned(task_id)).record

    async def read_versioned(self, task_id: TaskId) -> VersionedRecord:
        """Return the record with its generation. Raises `TaskNotFound`."""
        try:
            blob = await self._blobs.read(record_name(task_id))
        except BlobNotFound:
            raise TaskNotFound(f"There is no task {task_id}.") from None
        return VersionedRecord(record=codec.record_from_bytes(blob.content), generation=blob.generation)

    async def update(
        self, task_id: TaskId, change: Callable[[TaskRecord], TaskRecord], *, delete_payload: bool = True
    ) -> TaskRecord:
        """Replace the record by what `change` returns for it; the only function that changes the state of a task.

        The write succeeds only while the record is the one that `change` saw. When another process has changed it, `change`
        is called again with the new record. It may raise an exception to leave the record as it is, and nothing is
        written when it returns an equal record.

        The payload is deleted when the task becomes final. The mark is deleted when the task is final and its callback is
        not owed, unless the payload could not be deleted: a sweep then retries both.

        Args:
            delete_payload: False when the caller has deleted the payload, or deletes it before the mark is deleted.

        Raises:
            TaskNotFound: There is no such task.
            StorageError: The storage failed, or other processes changed the record at every attempt.
        """
        write_id = secrets.token_hex(WRITE_ID_BYTES)
        becomes_final = False
        for _ in range(UPDATE_ATTEMPTS):
            present = await self.read_versioned(task_id)
            if present.record.write_id == write_id:
                # An earlier attempt was stored, although its response was lost.
                written = present.record
                break
            changed = change(present.record)
            if changed == present.record:
                return present.record
            becomes_final = changed.status.is_final and not present.record.status.is_final
            content = codec.record_to_bytes(attrs.evolve(changed, write_id=write_id))
            try:
                await self._blobs.replace(record_name(task_id), content, generation=present.generation)
            except BlobChanged:
                continue
            # Parsed again, so that it equals what other readers get: stored times have milliseconds.
            written = codec.record_from_bytes(content)
            break
        else:
            raise StorageError("The task record is being changed too often.")
        # The record is written, so a failure from here on is no failure of the update.
        with contextlib.suppress(StorageError):
            if becomes_final and delete_payload:
                await self.delete_payload(task_id)
            if written.status.is_final and not written.owes_callback:
                await self.unmark_active(task_id)
        return written

    async def delete_incomplete(self, task_id: TaskId) -> None:
        """Remove what only a task with something left to do needs: its payload, then its mark."""
        await self.delete_payload(task_id)
        await self.unmark_active(task_id)

    # Lists.

    async def active(self) -> list[ActiveTask]:
        """Return the marks of the tasks that are not over or owe a callback, at most `MAX_ACTIVE` of them."""
        entries = await self._blobs.entries("active/", limit=MAX_ACTIVE)
        return [
            ActiveTask(task_id=TaskId(entry.name.removeprefix("active/")), since=entry.updated) for entry in entries
        ]

    async def records(self, task_ids: Sequence[TaskId]) -> list[TaskRecord | None]:
        """Return the records of these tasks in this order, None for one that is not there."""
        gate = asyncio.Semaphore(PARALLEL_READS)

        async def read(task_id: TaskId) -> TaskRecord | None:
            async with gate:
                try:
                    return await self.record(task_id)
                except TaskNotFound:
                    return None

        return await asyncio.gather(*(read(task_id) for task_id in task_ids))

    async def page(self, *, limit: int, cursor: str | None = None, status: Status | None = None) -> TaskPage:
        """Return the newest tasks after the cursor.

        With `status` a page may hold fewer than `limit` and still have a `next_cursor`: it reads at most `MAX_PAGE_READS`
        records, so that no call grows with the number of tasks.

        Raises:
            ValueError: That is no cursor of ours.
        """
        after = f"index/{_check_cursor(cursor)}" if cursor else ""
        tasks: list[TaskRecord] = []
        reads = 0
        while reads < MAX_PAGE_READS:
            entries = await self._blobs.entries("index/", after=after, limit=limit + 1)
            more, names = len(entries) > limit, [entry.name for entry in entries[:limit]]
            reads += len(names)
            found = await self.records([TaskId(name.partition("-")[2]) for name in names])
            for name, record in zip(names, found, strict=True):
                after = name
                if record is not None and status in (None, record.status):
                    tasks.append(record)
                    if len(tasks) == limit:
                        more = more or name != names[-1]
                        return TaskPage(tasks=tasks, next_cursor=after.removeprefix("index/") if more else None)
            if not more:
                return TaskPage(tasks=tasks, next_cursor=None)
        return TaskPage(tasks=tasks, next_cursor=after.removeprefix("index/"))

    # Uploads.

    async def add_upload(self, task_id: TaskId, path: str, file: BinaryIO, *, size: int) -> str:
        """Keep what a file holds under a path among the uploads, and return where it is found from outside.

        Args:
            task_id: The task that left the file.
            path: In the place for uploads of the task.
            file: Opened for reading bytes, with a buffer; it is free again when this returns.
            size: Its bytes.

        Raises:
            BlobExists: There is one of that path.
            FileUnreadable: The file cannot be read, or has another size than that.
            StorageError: The storage does not take it.
            ValueError: The path leads out of that place, or is no name of an object.
        """
        name = upload_name(task_id, path)
        await self._blobs.create_from(name, file, size=size)
        return self._blobs.url(name)

    # The log, for readers.

    async def listing(self, task_id: TaskId, *, first: int) -> ChunkListing:
        """Look at a task once: its chunks from number `first` on, and whether its record changed."""
        last = record_name(task_id)
        entries = await self._blobs.entries(
            task_prefix(task_id), after=before_chunk(task_id, first), before=last + "\x00", limit=LISTING_NAMES
        )
        chunks = [
            ChunkRef(number=chunk_number(match[1]), name=entry.name)
            for entry in entries
            if (match := CHUNK_NAME.fullmatch(entry.name.removeprefix(task_prefix(task_id))))
        ]
        generation = entries[-1].generation if entries and entries[-1].name == last else None
        return ChunkListing(chunks=chunks, record_generation=generation)

    async def read_chunk(self, chunk: ChunkRef) -> bytes:
        """Return the lines of a chunk, each with its newline. Raises `BlobNotFound`."""
        return (await self._blobs.read(chunk.name)).content

    # The log, for its one writer.

    async def add_chunk(
        self, task_id: TaskId, number: int, lines: Sequence[bytes | bytearray], at: dt.datetime
    ) -> None:
        """Write a chunk; that this very chunk is there already is no error. Raises `BlobExists` for another one."""
        name = chunk_name(task_id, number, at)
        content: list[bytes | bytearray] = []
        for line in lines:
            content += (line, b"\n")
        try:
            await self._blobs.create(name, content)
        except BlobExists:
            # The answer to an earlier try was lost, not the chunk.
            if (await self._blobs.read(name)).content != b"".join(content):
                raise


def _check_cursor(cursor: str) -> str:
    time, _, task_id = cursor.partition("-")
    if not re.fullmatch(r"[0-9]{5}/[0-9]{3}/[0-9]{5}", time) or not TASK_ID_PATTERN.fullmatch(task_id):
        raise ValueError("cursor must be the nextCursor of an earlier answer")
    return cursor

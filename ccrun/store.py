"""Task records, payloads and uploads in object storage.

Records change only by compare-and-swap, in `Store.update`. Nothing here opens a payload.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hmac
import secrets
from collections.abc import Callable, Sequence
from typing import BinaryIO, Final

import attrs

from ccrun import codec
from ccrun.blobs import Blobs
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, StorageError, TaskExists, TaskNotFound
from ccrun.leases import Leases
from ccrun.names import (
    active_name,
    index_name,
    index_name_at,
    payload_name,
    record_name,
    task_prefix,
    upload_name,
)
from ccrun.seal import Sealed
from ccrun.task import TaskId, TaskRecord
from ccrun.task_logs import TaskLogs


@attrs.frozen(kw_only=True)
class TaskPage:
    """Some of the tasks, newest first. `next_cursor` is the cursor of the next page."""

    tasks: Sequence[TaskRecord]
    next_cursor: str | None


@attrs.frozen(kw_only=True)
class ActiveTask:
    """The mark of a task that is not final or owes its callback, and when the mark was written."""

    task_id: TaskId
    since: dt.datetime


@attrs.frozen(kw_only=True)
class VersionedRecord:
    """A record and its generation."""

    record: TaskRecord
    generation: int


# --- the store -------------------------------------------------------------------------------------------------------

#: Records that one page of `GET /tasks` reads at most when it filters by status.
MAX_PAGE_READS: Final = 500
#: Records that are read concurrently.
PARALLEL_READS: Final = 20
#: Attempts of a compare-and-swap. Only the API, the worker and a sweep write a record, so more conflicts mean a defect.
UPDATE_ATTEMPTS: Final = 20
#: Random bytes of `TaskRecord.write_id`. It tells apart equal records that two processes write in the same millisecond.
WRITE_ID_BYTES: Final = 8
#: Marks that `Store.active` returns at most.
MAX_ACTIVE: Final = 20_000


class Store:
    """All tasks in one object storage."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self.leases = Leases(blobs)
        self.logs = TaskLogs(blobs)

    async def check(self) -> None:
        """Check that the storage works.

        Raises:
            StorageError: It does not.
        """
        await self._blobs.check()

    def logs_path(self, task_id: TaskId) -> str:
        """Return the URL of the objects of a task."""
        return self._blobs.url(task_prefix(task_id))

    # Creation: first `mark_active` and `add_payload`, then `add`, which makes it a task.

    async def add_payload(self, task_id: TaskId, sealed: Sealed) -> int:
        """Store the sealed request, and return the generation of its object.

        Raises:
            TaskExists: There is one with this ID.
            StorageError: The storage failed.
        """
        try:
            return await self._blobs.create(payload_name(task_id), sealed)
        except BlobExists:
            raise TaskExists(f"The task ID {task_id} is in use.") from None

    async def take_over_payload(self, task_id: TaskId, sealed: Sealed, *, request_digest: str) -> bool:
        """Replace the payload of an incomplete task, which another process began to store for the same request.

        Returns:
            Whether it was replaced; not if the task is complete, was stored for another request, or has changed.

        Raises:
            StorageError: The storage failed.
        """
        with contextlib.suppress(TaskNotFound):
            await self.record(task_id)
            return False
        try:
            present = await self._blobs.read(payload_name(task_id))
            mark = await self._blobs.read(active_name(task_id))
            if hmac.compare_digest(mark.content, request_digest.encode()):
                await self._blobs.replace(payload_name(task_id), sealed, generation=present.generation)
                return True
        except (BlobNotFound, BlobChanged):
            pass
        return False

    async def mark_active(self, task_id: TaskId, *, request_digest: str | None = None) -> bool:
        """Write the mark that makes sweeps process this task. Return False if there is one.

        Args:
            request_digest: Identifies the request whose task is being stored (`take_over_payload`).
        """
        try:
            await self._blobs.create(active_name(task_id), (request_digest or "").encode())
        except BlobExists:
            return False
        return True

    async def unmark_active(self, task_id: TaskId) -> None:
        """Delete the mark of a task, and write it again if the task has become active meanwhile."""
        await self._blobs.delete(active_name(task_id))
        with contextlib.suppress(TaskNotFound):
            record = await self.record(task_id)
            if record.owes_callback or not record.status.is_final:
                await self.mark_active(task_id)

    async def add(self, record: TaskRecord) -> None:
        """Store a new record and its index entry.

        Raises:
            TaskExists: There is a task with this ID. Nothing was stored.
            StorageError: The storage failed.
        """
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

    async def remove_interrupted_writes(self) -> None:
        """Remove what the storage holds of writes that were interrupted, and what no object refers to."""
        await self._blobs.remove_interrupted_writes()

    async def payload(self, task_id: TaskId) -> bytes:
        """Return the sealed request.

        Raises:
            BlobNotFound: It was deleted.
            StorageError: The storage failed.
        """
        return (await self._blobs.read(payload_name(task_id))).content

    async def delete_payload(self, task_id: TaskId, *, generation: int | None = None) -> None:
        """Delete the sealed request, if it exists and has this generation; None stands for any."""
        await self._blobs.delete(payload_name(task_id), generation=generation)

    async def record(self, task_id: TaskId) -> TaskRecord:
        """Return the record.

        Raises:
            TaskNotFound: There is no such task.
            StorageError: The storage failed.
        """
        return (await self.read_versioned(task_id)).record

    async def read_versioned(self, task_id: TaskId) -> VersionedRecord:
        """Return the record with its generation.

        Raises:
            TaskNotFound: There is no such task.
            StorageError: The storage failed.
        """
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
            raise StorageError("The task record was changed by other processes too often.")
        # The record is written, so a failure from here on is no failure of the update.
        with contextlib.suppress(StorageError):
            if becomes_final and delete_payload:
                await self.delete_payload(task_id)
            if written.status.is_final and not written.owes_callback:
                await self.unmark_active(task_id)
        return written

    async def delete_leftovers(self, task_id: TaskId) -> None:
        """Delete the payload and then the mark of a task."""
        await self.delete_payload(task_id)
        await self.unmark_active(task_id)

    # Lists.

    async def active(self) -> list[ActiveTask]:
        """Return the tasks that are not final or owe their callback, at most `MAX_ACTIVE` of them."""
        entries = await self._blobs.entries("active/", limit=MAX_ACTIVE)
        return [
            ActiveTask(task_id=TaskId(entry.name.removeprefix("active/")), since=entry.updated) for entry in entries
        ]

    async def records(self, task_ids: Sequence[TaskId]) -> list[TaskRecord | None]:
        """Return the records of these tasks in this order, None for each that does not exist."""
        gate = asyncio.Semaphore(PARALLEL_READS)

        async def read(task_id: TaskId) -> TaskRecord | None:
            async with gate:
                try:
                    return await self.record(task_id)
                except TaskNotFound:
                    return None

        return await asyncio.gather(*(read(task_id) for task_id in task_ids))

    async def page(
        self,
        *,
        limit: int,
        cursor: str | None = None,
        wanted: Callable[[TaskRecord], bool] = lambda record: True,
    ) -> TaskPage:
        """Return the newest wanted tasks after the cursor.

        With `wanted`, a page may have fewer than `limit` tasks although more follow: a call reads at most `MAX_PAGE_READS`
        records, so that its cost does not grow with the number of tasks.

        Raises:
            ValueError: The cursor is not the `next_cursor` of a page.
        """
        after = index_name_at(cursor) if cursor else ""
        tasks: list[TaskRecord] = []
        reads = 0
        while reads < MAX_PAGE_READS:
            entries = await self._blobs.entries("index/", after=after, limit=limit + 1)
            more, names = len(entries) > limit, [entry.name for entry in entries[:limit]]
            reads += len(names)
            found = await self.records([TaskId(name.partition("-")[2]) for name in names])
            for name, record in zip(names, found, strict=True):
                after = name
                if record is not None and wanted(record):
                    tasks.append(record)
                    if len(tasks) == limit:
                        more = more or name != names[-1]
                        return TaskPage(tasks=tasks, next_cursor=after.removeprefix("index/") if more else None)
            if not more:
                return TaskPage(tasks=tasks, next_cursor=None)
        return TaskPage(tasks=tasks, next_cursor=after.removeprefix("index/"))

    async def add_upload(self, task_id: TaskId, path: str, file: BinaryIO, *, size: int) -> str:
        """Upload the content of a file, and return its URL.

        Args:
            path: The path below the uploads of the task.
            file: Open for reading, binary and buffered. It is no longer used when this returns.
            size: The size in bytes.

        Raises:
            BlobExists: There is an upload with this path.
            FileUnreadable: The file cannot be read, or has another size.
            StorageError: The storage failed.
            ValueError: The path leads out of the uploads, or is not a valid object name.
        """
        name = upload_name(task_id, path)
        await self._blobs.create_from(name, file, size=size)
        return self._blobs.url(name)

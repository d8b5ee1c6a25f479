"""A storage that records its calls, and records of tasks."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable
from pathlib import Path

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.blobs import Blob, BlobInfo
from ccrun.errors import BlobChanged
from ccrun.lifecycle import start
from ccrun.task import CallbackInfo, Outcome, Reason, Status, TaskId, TaskRecord, TaskType

TASK = TaskId("t-1")
NOW = dt.datetime(2025, 3, 4, 5, 6, 7, tzinfo=dt.UTC)
SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0)


class WatchedBlobs(DirectoryBlobs):
    """A storage that records its calls, and calls a function of the test before or after one."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.listings = 0
        self.reads: list[str] = []
        self.replacements = 0
        self.before_replace: Callable[[], object] | None = None
        self.after_delete: Callable[[], object] | None = None
        self.responses_to_lose = 0
        self.deleted: list[str] = []

    async def read(self, name: str) -> Blob:
        self.reads.append(name)
        return await super().read(name)

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        self.listings += 1
        return await super().entries(prefix, after=after, before=before, limit=limit)

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        self.replacements += 1
        if self.before_replace is not None:
            act, self.before_replace = self.before_replace, None
            await asyncio.to_thread(act)
        written = await super().replace(name, content, generation=generation)
        if self.responses_to_lose:
            self.responses_to_lose -= 1
            raise BlobChanged
        return written

    async def delete(self, name: str, *, generation: int | None = None) -> None:
        self.deleted.append(name)
        await super().delete(name, generation=generation)
        if self.after_delete is not None:
            act, self.after_delete = self.after_delete, None
            await asyncio.to_thread(act)


def pending(task_id: str = "t-1", created_at: dt.datetime = NOW, webhook: CallbackInfo | None = None) -> TaskRecord:
    """Return the record of a new task."""
    return TaskRecord(
        task_id=TaskId(task_id),
        type=TaskType.ASYNC,
        status=Status.PENDING,
        created_at=created_at,
        logs_path=f"file:///sessions/{task_id}/",
        webhook=webhook,
    )


def begin(record: TaskRecord) -> TaskRecord:
    """Start the task of a record, as its worker does."""
    return start(record, at=NOW)

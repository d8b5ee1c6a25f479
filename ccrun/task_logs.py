"""The logs of tasks in object storage, in chunks of lines.

The numbers of the chunks of a task have no gaps, and their names sort in order.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Final

import attrs

from ccrun.blobs import Blobs
from ccrun.errors import BlobExists
from ccrun.names import CHUNK_NAME, before_chunk, chunk_name, chunk_number, lease_name, record_name, task_prefix
from ccrun.task import TaskId

#: Names in one listing: the page size of Cloud Storage.
LISTING_NAMES: Final = 1000


@attrs.frozen(kw_only=True)
class ChunkRef:
    """A log chunk in a listing. `size` is in bytes."""

    number: int
    name: str
    size: int


@attrs.frozen(kw_only=True)
class ChunkListing:
    """The chunks of a task from some number on, and the generations of its record and of its lease.

    `record_generation` is None when there are more chunks than one listing holds, `lease_generation` also when there is no lease.
    """

    chunks: Sequence[ChunkRef]
    record_generation: int | None
    lease_generation: int | None


class TaskLogs:
    """All logs in one object storage."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    async def listing(self, task_id: TaskId, *, first: int) -> ChunkListing:
        """Return the chunks of a task from number `first` on, and both generations, in one call to the storage."""
        last = record_name(task_id)
        entries = await self._blobs.entries(
            task_prefix(task_id), after=before_chunk(task_id, first), before=last + "\x00", limit=LISTING_NAMES
        )
        chunks = [
            ChunkRef(number=chunk_number(match[1]), name=entry.name, size=entry.size)
            for entry in entries
            if (match := CHUNK_NAME.fullmatch(entry.name.removeprefix(task_prefix(task_id))))
        ]
        generations = {entry.name: entry.generation for entry in entries[-2:]}
        return ChunkListing(
            chunks=chunks,
            record_generation=generations.get(last),
            lease_generation=generations.get(lease_name(task_id)) if last in generations else None,
        )

    async def read_chunk(self, chunk: ChunkRef) -> bytes:
        """Return the lines of a chunk, each with its newline.

        Raises:
            BlobNotFound: There is no such chunk.
            StorageError: The storage failed.
        """
        return (await self._blobs.read(chunk.name)).content

    async def add_chunk(
        self, task_id: TaskId, number: int, lines: Sequence[bytes | bytearray], at: dt.datetime
    ) -> None:
        """Store a chunk, as the single writer of the log. When the same chunk is there already, do nothing.

        Raises:
            BlobExists: There is another chunk with this number and time.
            StorageError: The storage failed.
        """
        name = chunk_name(task_id, number, at)
        content: list[bytes | bytearray] = []
        for line in lines:
            content += (line, b"\n")
        try:
            await self._blobs.create(name, content)
        except BlobExists:
            # An earlier attempt may have been stored, although its response was lost.
            if (await self._blobs.read(name)).content != b"".join(content):
                raise

"""The leases on `POST /run` tasks whose clients have left; see `ccrun.api.abandoned`."""

from __future__ import annotations

import datetime as dt

import attrs

from ccrun.blobs import Blobs
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound
from ccrun.names import lease_name
from ccrun.task import TaskId


@attrs.frozen(kw_only=True)
class Lease:
    """When the lease on a task was written or renewed."""

    generation: int
    renewed_at: dt.datetime


class Leases:
    """All leases in one object storage. Each call raises `StorageError` when the storage fails."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    async def get(self, task_id: TaskId) -> Lease | None:
        """Return the lease on a task, None if there is none."""
        try:
            blob = await self._blobs.read(lease_name(task_id))
        except BlobNotFound:
            return None
        return Lease(generation=blob.generation, renewed_at=dt.datetime.fromisoformat(blob.content.decode()))

    async def write(self, task_id: TaskId, *, at: dt.datetime) -> int | None:
        """Create or renew a lease; return its generation, None if another process has renewed it at the same time."""
        try:
            return await self._blobs.create(lease_name(task_id), _content(at))
        except BlobExists:
            present = await self.get(task_id)
            return await self.renew(task_id, generation=present.generation, at=at) if present else None

    async def renew(self, task_id: TaskId, *, generation: int, at: dt.datetime) -> int | None:
        """Renew the lease that has this generation; return the new generation, None if there is no such lease."""
        try:
            return await self._blobs.replace(lease_name(task_id), _content(at), generation=generation)
        except BlobChanged:
            return None

    async def delete(self, task_id: TaskId) -> None:
        """Delete the lease on a task, if there is one."""
        await self._blobs.delete(lease_name(task_id))


def _content(at: dt.datetime) -> bytes:
    return at.isoformat().encode()

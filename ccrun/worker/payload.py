"""The sealed request of a task."""

from __future__ import annotations

import attrs

from ccrun import codec
from ccrun.errors import BlobNotFound, SealError
from ccrun.seal import KeyWrapper, Purpose
from ccrun.spec import TaskSpec
from ccrun.store import Store
from ccrun.task import TaskId
from ccrun.unseal import unseal


@attrs.define
class Payload:
    """The sealed request, which is read once and then deleted, even when it cannot be opened."""

    store: Store
    wrapper: KeyWrapper
    task_id: TaskId
    is_deleted: bool = attrs.field(default=False, init=False)

    async def open(self) -> TaskSpec:
        """Return the request.

        Raises:
            SealError: There is no payload, or it cannot be opened.
            KeyServiceError: The key service failed.
            StorageError: The payload could not be read or deleted.
        """
        try:
            sealed = await self.store.payload(self.task_id)
        except BlobNotFound:
            self.is_deleted = True
            raise SealError("The sealed payload has been deleted.") from None
        try:
            content = await unseal(self.wrapper, sealed, task_id=self.task_id, purpose=Purpose.PAYLOAD)
        finally:
            await self.store.delete_payload(self.task_id)
            self.is_deleted = True
        return codec.spec_from_bytes(content)

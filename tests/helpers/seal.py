"""Key services and envelopes, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from standins.kms import Kms, open_key

from ccrun.backends.local.key import LocalKey
from ccrun.errors import KeyServiceError
from ccrun.seal import KeyWrapper, Purpose, Sealed, new_data_key
from ccrun.task import TaskId

TASK: Final = TaskId("t-1")
PLAINTEXT: Final = '{"prompt": "ünïcödé", "anthropicApiKey": "made-up-key"}'.encode()
#: The names that `open_wrapper` accepts.
KEY_SERVICES: Final = ("local", "kms")


class UnavailableKeyService:
    """A key service that does not respond."""

    async def wrap(self, key: bytes) -> bytes:
        raise KeyServiceError

    async def unwrap(self, wrapped: bytes) -> bytes:
        raise KeyServiceError

    async def check(self) -> None:
        raise KeyServiceError


@contextlib.asynccontextmanager
async def open_wrapper(name: str, tmp_path: Path) -> AsyncIterator[KeyWrapper]:
    """Open one of the key services."""
    match name:
        case "local":
            yield LocalKey(tmp_path / "keys" / "sealing.key")
        case "kms":
            async with Kms() as server, open_key(server) as key:
                yield key
        case _:
            raise AssertionError


async def sealed_by(wrapper: KeyWrapper, plaintext: bytes = PLAINTEXT, purpose: Purpose = Purpose.PAYLOAD) -> Sealed:
    """Seal a plaintext for `TASK` with a new data key."""
    return await (await new_data_key(wrapper)).seal(plaintext, task_id=TASK, purpose=purpose)

"""Envelope encryption: sealing, and the port to a key service. `ccrun.unseal` opens envelopes.

Each task has a fresh 256-bit data key, wrapped by a key service. AES-256-GCM under that key has the task's ID and the purpose as
associated data, so that an envelope copied to another task, or to another place of the same task, does not open.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
from typing import Final, NewType, Protocol

import attrs
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ccrun.task import TaskId

#: The first bytes of every envelope: the format's name and its version.
MAGIC: Final = b"ccrun\x01"
KEY_BYTES: Final = 32
#: NIST SP 800-38D, 5.2.1.1: 96 bits is the length of choice. Random nonces are safe for far more than a key's two seals.
NONCE_BYTES: Final = 12
#: A wrapped key's length stands in two bytes; what Cloud KMS returns for 32 bytes is near 120.
LENGTH_BYTES: Final = 2

#: An envelope: `MAGIC`, the wrapped key's length, the wrapped key, the nonce, the ciphertext with its tag.
Sealed = NewType("Sealed", bytes)


class Purpose(enum.StrEnum):
    """What is sealed; part of the associated data."""

    PAYLOAD = "payload"
    CALLBACK_URL = "callback-url"


class KeyWrapper(Protocol):
    """What sealing needs of a key service.

    An adapter owes: `unwrap(wrap(key)) == key`; what was not wrapped by the same key, or was changed, raises `SealError`;
    a service that does not answer raises `KeyServiceError` after a bounded time.
    """

    async def wrap(self, key: bytes) -> bytes:
        """Return the data key, encrypted."""
        ...

    async def unwrap(self, wrapped: bytes) -> bytes:
        """Return the data key."""
        ...

    async def check(self) -> None:
        """Raise `KeyServiceError` when keys cannot be wrapped now."""
        ...


@attrs.frozen(kw_only=True)
class DataKey:
    """A task's own key, in the clear and wrapped. Lives as long as the request that it was made for."""

    plain: bytes = attrs.field(repr=False)
    wrapped: bytes = attrs.field(repr=False)

    async def seal(self, plaintext: bytes, *, task_id: TaskId, purpose: Purpose) -> Sealed:
        """Return the envelope that only `unseal` with the same task ID and purpose opens."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        ciphertext = await asyncio.to_thread(
            AESGCM(self.plain).encrypt, nonce, plaintext, associated_data(task_id, purpose)
        )
        length = len(self.wrapped).to_bytes(LENGTH_BYTES, "big")
        return Sealed(b"".join((MAGIC, length, self.wrapped, nonce, ciphertext)))


async def new_data_key(wrapper: KeyWrapper) -> DataKey:
    """Make a fresh key, with one call of the key service."""
    plain = AESGCM.generate_key(KEY_BYTES * 8)
    return DataKey(plain=plain, wrapped=await wrapper.wrap(plain))


def associated_data(task_id: TaskId, purpose: Purpose) -> bytes:
    # A task ID has no slash, so no two pairs give the same bytes.
    return f"{task_id}/{purpose}".encode()

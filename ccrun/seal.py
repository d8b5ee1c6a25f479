"""Envelope encryption: sealing, and the port to a key service. `ccrun.unseal` opens envelopes.

Each task has its own 256-bit data key, wrapped by a key service. AES-256-GCM with that key has the task ID and the purpose as
associated data, so that an envelope does not open for another task or another purpose.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
from typing import Final, NewType, Protocol

import attrs
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ccrun.task import TaskId

#: The first bytes of an envelope: the name and the version of the format.
MAGIC: Final = b"ccrun\x01"
KEY_BYTES: Final = 32
#: 96 bits, as NIST SP 800-38D, 5.2.1.1 recommends. Each key seals two texts; random nonces are safe for far more.
NONCE_BYTES: Final = 12
#: The length of the wrapped key takes two bytes. Cloud KMS returns about 120 bytes for 32.
LENGTH_BYTES: Final = 2

#: An envelope: `MAGIC`, the wrapped key's length, the wrapped key, the nonce, the ciphertext with its tag.
Sealed = NewType("Sealed", bytes)


class Purpose(enum.StrEnum):
    """What an envelope is for; part of the associated data."""

    PAYLOAD = "payload"
    CALLBACK_URL = "callback-url"


class KeyWrapper(Protocol):
    """A key service.

    An adapter must guarantee:

    - `unwrap(wrap(key)) == key`.
    - `unwrap` raises `SealError` for bytes that were changed or wrapped by another key.
    - When the service fails, a call raises `KeyServiceError` within a bounded time.
    """

    async def wrap(self, key: bytes) -> bytes:
        """Return a data key, encrypted."""
        ...

    async def unwrap(self, wrapped: bytes) -> bytes:
        """Return a data key that `wrap` has encrypted."""
        ...

    async def check(self) -> None:
        """Check that keys can be wrapped.

        Raises:
            KeyServiceError: They cannot.
        """
        ...


@attrs.frozen(kw_only=True)
class DataKey:
    """The data key of a task, in plain text and wrapped."""

    plain: bytes = attrs.field(repr=False)
    wrapped: bytes = attrs.field(repr=False)

    async def seal(self, plaintext: bytes, *, task_id: TaskId, purpose: Purpose) -> Sealed:
        """Return an envelope that opens only for this task and purpose."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        ciphertext = await asyncio.to_thread(
            AESGCM(self.plain).encrypt, nonce, plaintext, associated_data(task_id, purpose)
        )
        length = len(self.wrapped).to_bytes(LENGTH_BYTES, "big")
        return Sealed(b"".join((MAGIC, length, self.wrapped, nonce, ciphertext)))


async def new_data_key(wrapper: KeyWrapper) -> DataKey:
    """Return a new data key, with one call of the key service."""
    plain = AESGCM.generate_key(KEY_BYTES * 8)
    return DataKey(plain=plain, wrapped=await wrapper.wrap(plain))


def associated_data(task_id: TaskId, purpose: Purpose) -> bytes:
    """Return the associated data of an envelope."""
    # A task ID has no slash, so different pairs give different bytes.
    return f"{task_id}/{purpose}".encode()

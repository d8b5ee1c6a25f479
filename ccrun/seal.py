"""Envelope encryption: sealing, and the port to a key service. `ccrun.unseal` opens envelopes.

Each task has a new 256-bit data key, which a key service wraps (encrypts). The data key encrypts with AES-256-GCM. The task ID
and the purpose are the associated data, so an envelope that is copied to another task or used for another purpose does not
open.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
from typing import Final, NewType, Protocol

import attrs
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ccrun.task import TaskId

#: The first bytes of every envelope: the name and version of the format.
MAGIC: Final = b"ccrun\x01"
KEY_BYTES: Final = 32
#: NIST SP 800-38D, 5.2.1.1, recommends 96 bits. A data key encrypts only twice, so random nonces do not collide.
NONCE_BYTES: Final = 12
#: The size of the field with the wrapped key's length. Cloud KMS wraps 32 bytes into about 120.
LENGTH_BYTES: Final = 2

#: An envelope: `MAGIC`, the length of the wrapped key (big-endian), the wrapped key, the nonce, the ciphertext with its tag.
Sealed = NewType("Sealed", bytes)


class Purpose(enum.StrEnum):
    """What an envelope contains; part of the associated data."""

    PAYLOAD = "payload"
    CALLBACK_URL = "callback-url"


class KeyWrapper(Protocol):
    """A key service, which encrypts data keys.

    An adapter must:

    - Return the original key from `unwrap(wrap(key))`, in every process that uses the same key service.
    - Raise `SealError` from `unwrap` for bytes that were changed or that another key wrapped.
    - Raise `KeyServiceError` within a bounded time when the key service is unavailable.
    """

    async def wrap(self, key: bytes) -> bytes:
        """Return a data key in encrypted form, at most 65535 bytes long.

        Raises:
            KeyServiceError: The key service is unavailable.
        """
        ...

    async def unwrap(self, wrapped: bytes) -> bytes:
        """Return the data key that `wrap` encrypted.

        Raises:
            SealError: The bytes were changed, or another key wrapped them.
            KeyServiceError: The key service is unavailable.
        """
        ...

    async def check(self) -> None:
        """Check that keys can be wrapped now.

        Raises:
            KeyServiceError: They cannot.
        """
        ...


@attrs.frozen(kw_only=True)
class DataKey:
    """The key of one task, in plain and in wrapped form. It is kept in memory only while the request is handled."""

    plain: bytes = attrs.field(repr=False)
    wrapped: bytes = attrs.field(repr=False)

    async def seal(self, plaintext: bytes, *, task_id: TaskId, purpose: Purpose) -> Sealed:
        """Return an envelope, which `unseal` opens only for the same task ID and purpose."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        ciphertext = await asyncio.to_thread(
            AESGCM(self.plain).encrypt, nonce, plaintext, associated_data(task_id, purpose)
        )
        length = len(self.wrapped).to_bytes(LENGTH_BYTES, "big")
        return Sealed(b"".join((MAGIC, length, self.wrapped, nonce, ciphertext)))


async def new_data_key(wrapper: KeyWrapper) -> DataKey:
    """Create a data key. Calls the key service once.

    Raises:
        KeyServiceError: The key service is unavailable.
    """
    plain = AESGCM.generate_key(KEY_BYTES * 8)
    return DataKey(plain=plain, wrapped=await wrapper.wrap(plain))


def associated_data(task_id: TaskId, purpose: Purpose) -> bytes:
    """Return the associated data of an envelope, which differs for every pair of task ID and purpose."""
    # A task ID contains no slash, so the result is unambiguous.
    return f"{task_id}/{purpose}".encode()

"""Opens sealed envelopes. The API must not import this module: only workers and sweeps open envelopes."""

from __future__ import annotations

import asyncio

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ccrun.errors import SealError
from ccrun.seal import LENGTH_BYTES, MAGIC, NONCE_BYTES, KeyWrapper, Purpose, associated_data
from ccrun.task import TaskId


async def unseal(wrapper: KeyWrapper, sealed: bytes, *, task_id: TaskId, purpose: Purpose) -> bytes:
    """Return the plaintext of an envelope. Calls the key service once.

    Raises:
        SealError: The bytes are not an envelope of this version, were changed, or belong to another task or purpose.
        KeyServiceError: The key service is unavailable.
    """
    wrapped, nonce, ciphertext = _split(sealed)
    key = await wrapper.unwrap(wrapped)
    try:
        return await asyncio.to_thread(AESGCM(key).decrypt, nonce, ciphertext, associated_data(task_id, purpose))
    except (InvalidTag, ValueError):
        raise SealError("The sealed payload was changed, or belongs to another task.") from None


def _split(sealed: bytes) -> tuple[bytes, bytes, bytes]:
    if not sealed.startswith(MAGIC):
        raise SealError("The sealed payload is not an envelope that this version of ccrun can read.")
    start = len(MAGIC) + LENGTH_BYTES
    end = start + int.from_bytes(sealed[len(MAGIC) : start], "big")
    if len(sealed) < end + NONCE_BYTES:
        raise SealError("The sealed payload is truncated.")
    return sealed[start:end], sealed[end : end + NONCE_BYTES], sealed[end + NONCE_BYTES :]

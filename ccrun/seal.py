"""Envelope encryption: the only maker and opener of sealed bytes.

A fresh 256-bit data key a task, wrapped by a key service; under it AES-256-GCM with the task's ID and the purpose as
associated data, so that what is copied to another task, or put in another place of the same one, does not open.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final, NewType, Protocol

import attrs
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ccrun.errors import KeyServiceError, SealError
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
            AESGCM(self.plain).encrypt, nonce, plaintext, _associated(task_id, purpose)
        )
        length = len(self.wrapped).to_bytes(LENGTH_BYTES, "big")
        return Sealed(b"".join((MAGIC, length, self.wrapped, nonce, ciphertext)))


async def new_data_key(wrapper: KeyWrapper) -> DataKey:
    """Make a fresh key, with one call of the key service."""
    plain = AESGCM.generate_key(KEY_BYTES * 8)
    return DataKey(plain=plain, wrapped=await wrapper.wrap(plain))


async def unseal(wrapper: KeyWrapper, sealed: bytes, *, task_id: TaskId, purpose: Purpose) -> bytes:
    """Return what was sealed, with one call of the key service.

    Raises:
        SealError: The bytes are no envelope of this version, were changed, or belong to another task or purpose.
        KeyServiceError: The key service does not answer.
    """
    wrapped, nonce, ciphertext = _split(sealed)
    key = await wrapper.unwrap(wrapped)
    try:
        return await asyncio.to_thread(AESGCM(key).decrypt, nonce, ciphertext, _associated(task_id, purpose))
    except (InvalidTag, ValueError):
        raise SealError("The sealed payload was changed, or belongs to another task.") from None


def _associated(task_id: TaskId, purpose: Purpose) -> bytes:
    # A task ID has no slash, so no two pairs give the same bytes.
    return f"{task_id}/{purpose}".encode()


def _split(sealed: bytes) -> tuple[bytes, bytes, bytes]:
    if not sealed.startswith(MAGIC):
        raise SealError("The sealed payload is not an envelope that this version of ccrun can read.")
    start = len(MAGIC) + LENGTH_BYTES
    end = start + int.from_bytes(sealed[len(MAGIC) : start], "big")
    if len(sealed) < end + NONCE_BYTES:
        raise SealError("The sealed payload is cut short.")
    return sealed[start:end], sealed[end : end + NONCE_BYTES], sealed[end + NONCE_BYTES :]


class LocalKey:
    """The key service of the local backend: a key file of mode 0600, made on first use."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def wrap(self, key: bytes) -> bytes:
        wrapping = await asyncio.to_thread(self._key)
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + AESGCM(wrapping).encrypt(nonce, key, MAGIC)

    async def unwrap(self, wrapped: bytes) -> bytes:
        wrapping = await asyncio.to_thread(self._key)
        try:
            return AESGCM(wrapping).decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], MAGIC)
        except (InvalidTag, ValueError):
            raise SealError("The sealed payload was not sealed under this key.") from None

    async def check(self) -> None:
        await asyncio.to_thread(self._key)

    def _key(self) -> bytes:
        key = kept_secret(self._path, lambda: secrets.token_bytes(KEY_BYTES))
        if len(key) != KEY_BYTES:
            raise KeyServiceError("The key file is damaged: it must hold 32 bytes.")
        return key


def kept_secret(path: Path, make: Callable[[], bytes]) -> bytes:
    """Return the content of a file that only its owner can read; where there is none, keep what `make` returns.

    Any number of processes may ask at once: all get the same bytes. Blocks: call it in a thread.

    Raises:
        KeyServiceError: The file can be neither read nor made.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            return path.read_bytes()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(make())
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        return path.read_bytes()
    except OSError as error:
        raise KeyServiceError(f"The key file can be neither read nor made: {error.strerror}.") from error

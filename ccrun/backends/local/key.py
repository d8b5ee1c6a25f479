"""A key file as the key service of the local backend, and the creation of secret files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ccrun.errors import KeyServiceError, SealError
from ccrun.seal import KEY_BYTES, MAGIC, NONCE_BYTES


class LocalKey:
    """Wraps data keys with AES-256-GCM, under a key that is stored in a file.

    Args:
        path: The key file. It is created with mode 0600 on first use.
    """

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
        key = load_or_create_secret(self._path, lambda: secrets.token_bytes(KEY_BYTES))
        if len(key) != KEY_BYTES:
            raise KeyServiceError("The key file is damaged: it must have 32 bytes.")
        return key


def load_or_create_secret(path: Path, generate: Callable[[], bytes]) -> bytes:
    """Return the content of a secret file. If there is none, create it so that only its owner can read it.

    When several processes call this function concurrently, all get the same bytes. Blocks: call it in a thread.

    Args:
        path: The file.
        generate: Returns the content of a new file.

    Raises:
        KeyServiceError: The file can be neither read nor created.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            return path.read_bytes()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(generate())
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        return path.read_bytes()
    except OSError as error:
        raise KeyServiceError(f"The key file can be neither read nor created: {error.strerror}.") from error

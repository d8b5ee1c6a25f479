"""The adapters that a `Config` names, open for as long as they are used.

What lies above (API, worker, feed, callbacks) is the same code on every backend.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import attrs

from ccrun import seal, webhook
from ccrun.blobs import DirectoryBlobs
from ccrun.config import Config
from ccrun.courier import Courier
from ccrun.errors import ConfigError
from ccrun.seal import KeyWrapper, LocalKey
from ccrun.store import Store
from ccrun.task import Secret, TaskId

#: Bytes: the strength of HMAC-SHA-256 ends at the length of its output.
CALLBACK_SECRET_BYTES: Final = 32
#: What a worker gives a receiver when it takes up a place that others wait for.
ONE_TRY: Final = webhook.Patience(attempts=1, try_seconds=5.0, total_seconds=5.0)


@attrs.frozen(kw_only=True)
class Backend:
    """Where tasks are kept, who wraps their keys, and what signs their callbacks (None: callbacks cannot be signed)."""

    store: Store
    wrapper: KeyWrapper
    callback_secret: Secret | None
    guard: webhook.Guard

    def courier(self, *, hands_over: bool = False) -> Courier | None:
        """Return who delivers callbacks, None when they cannot be signed.

        Args:
            hands_over: It tries once, and leaves what is not delivered to a sweep that runs all the time.
        """
        if self.callback_secret is None:
            return None
        return Courier(
            store=self.store,
            wrapper=self.wrapper,
            secret=self.callback_secret,
            guard=self.guard,
            patience=ONE_TRY if hands_over else webhook.Patience(),
            hands_over=hands_over,
        )


@contextlib.asynccontextmanager
async def open_backend(config: Config) -> AsyncIterator[Backend]:
    """Open what the config names.

    Raises:
        ConfigError: This version cannot do that, or the folder for the data cannot be made.
        KeyServiceError: A secret can be neither read nor made.
    """
    if not config.is_local:
        raise ConfigError("CCRUN_BACKEND must be local: this version of ccrun has no other backend yet.")
    await asyncio.to_thread(_make_private, config.data_dir)
    yield Backend(
        store=Store(DirectoryBlobs(config.data_dir)),
        wrapper=LocalKey(config.data_dir / ".keys" / "sealing.key"),
        callback_secret=config.callback_secret or await asyncio.to_thread(_kept_callback_secret, config.data_dir),
        guard=webhook.Guard(everywhere=True),
    )


def callback_secret_file(data_dir: Path) -> Path:
    """Return where the local backend keeps the secret that it made for callbacks."""
    return data_dir / ".keys" / "callback.secret"


def sign_of_life(data_dir: Path, task_id: TaskId) -> Path:
    """Return the file that the worker of a task keeps locked on the local backend."""
    return data_dir / ".workers" / task_id


def marker(data_dir: Path, task_id: TaskId) -> str:
    """Return what marks the processes of a task. Another service on this machine may have a task of the same ID."""
    return f"{task_id}.{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]}"


def _make_private(data_dir: Path) -> None:
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"CCRUN_DATA_DIR must name a folder that is there or can be made: {error.strerror}."
        ) from None


def _kept_callback_secret(data_dir: Path) -> Secret:
    content = seal.kept_secret(
        callback_secret_file(data_dir), lambda: secrets.token_hex(CALLBACK_SECRET_BYTES).encode() + b"\n"
    )
    return Secret(content.decode().strip())

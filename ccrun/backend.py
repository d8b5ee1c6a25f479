"""The adapters that a `Config` names, open for as long as they are used.

What lies above (API, worker, feed, callbacks) is the same code on every backend.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import aiohttp
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
        ConfigError: The folder for the data cannot be made, or Google's libraries or credentials are missing.
        KeyServiceError: A secret can be neither read nor made.
    """
    async with _open_local(config) if config.is_local else _open_gcp(config) as backend:
        yield backend


async def load(*modules: str) -> None:
    """Import what speaks to Google, when it is needed: the local backend neither needs its libraries nor waits for them.

    Raises:
        ConfigError: The libraries are not installed.
    """
    for module in modules:
        try:
            # In a thread, for it reads many files.
            await asyncio.to_thread(importlib.import_module, module)
        except ModuleNotFoundError:
            raise ConfigError("CCRUN_BACKEND=gcp needs Google's libraries: install ccrun[gcp].") from None


def why_unavailable(config: Config) -> str | None:
    """Return what is missing for tasks to be taken at all, None when nothing is."""
    if config.is_local:
        return None
    needed = {"GCS_LOGS_BUCKET": config.gcs_logs_bucket, "PROJECT_ID": config.project_id}
    missing = next((name for name, value in needed.items() if value is None), None)
    return f"Async task support not configured (missing {missing})" if missing else None


@contextlib.asynccontextmanager
async def _open_local(config: Config) -> AsyncIterator[Backend]:
    await asyncio.to_thread(_make_private, config.data_dir)
    yield Backend(
        store=Store(DirectoryBlobs(config.data_dir)),
        wrapper=LocalKey(config.data_dir / ".keys" / "sealing.key"),
        callback_secret=config.callback_secret or await asyncio.to_thread(_kept_callback_secret, config.data_dir),
        guard=webhook.Guard(everywhere=True),
    )


@contextlib.asynccontextmanager
async def _open_gcp(config: Config) -> AsyncIterator[Backend]:
    await load("ccrun.gcp.blobs", "ccrun.gcp.key")
    from ccrun.gcp.blobs import open_blobs
    from ccrun.gcp.calls import credentials
    from ccrun.gcp.key import KmsKey

    async with (
        # Without these two no call ever comes this far: `why_unavailable` tells the caller.
        open_blobs(config.gcs_logs_bucket or "", emulator=config.storage_emulator_host) as blobs,
        aiohttp.ClientSession() as session,
    ):
        key = KmsKey(
            project=config.project_id or "",
            location=config.kms_location,
            key_ring=config.kms_key_ring,
            key_name=config.kms_key_name,
            session=session,
            credentials=await credentials(session, emulated=config.kms_emulator_host is not None),
            emulator=config.kms_emulator_host,
        )
        yield Backend(
            store=Store(blobs),
            wrapper=key,
            callback_secret=config.callback_secret,
            guard=webhook.Guard(allowed_hosts=frozenset(config.callback_allowed_hosts)),
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

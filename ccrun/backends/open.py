"""Opening the adapters that a `Config` names. All other code is the same on every backend."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import aiohttp
import attrs

from ccrun.backends.local import key
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.backends.local.key import LocalKey
from ccrun.backends.local.layout import callback_secret_file
from ccrun.callbacks import deliver, guard
from ccrun.callbacks.owed import OwedCallbacks
from ccrun.config import Config
from ccrun.errors import ConfigError
from ccrun.seal import KeyWrapper
from ccrun.store import Store
from ccrun.task import Secret

#: As long as the output of HMAC-SHA-256; a longer key adds no strength.
CALLBACK_SECRET_BYTES: Final = 32
#: The policy of a worker that other tasks wait for.
SINGLE_ATTEMPT: Final = deliver.RetryPolicy(attempts=1, attempt_seconds=5.0, total_seconds=5.0)


@attrs.frozen(kw_only=True)
class OpenBackend:
    """The adapters of a backend.

    Args:
        callback_secret: None when callbacks cannot be signed.
    """

    store: Store
    wrapper: KeyWrapper
    callback_secret: Secret | None
    guard: guard.CallbackGuard

    def callbacks(self, *, single_attempt: bool = False) -> OwedCallbacks | None:
        """Return what delivers callbacks, None when they cannot be signed.

        Args:
            single_attempt: Whether a delivery has one attempt, and leaves the rest to a sweep.
        """
        if self.callback_secret is None:
            return None
        return OwedCallbacks(
            store=self.store,
            wrapper=self.wrapper,
            secret=self.callback_secret,
            guard=self.guard,
            policy=SINGLE_ATTEMPT if single_attempt else deliver.RetryPolicy(),
            single_attempt=single_attempt,
        )


@contextlib.asynccontextmanager
async def open_backend(config: Config) -> AsyncIterator[OpenBackend]:
    """Open the backend that a config names.

    Raises:
        ConfigError: The data directory cannot be created, or Google's libraries or credentials are missing.
        KeyServiceError: A secret can be neither read nor created.
    """
    async with _open_local(config) if config.is_local else _open_gcp(config) as backend:
        yield backend


async def load_modules(*modules: str) -> None:
    """Import modules that use Google's libraries, which the local backend neither needs nor waits for.

    Raises:
        ConfigError: The libraries are not installed.
    """
    for module in modules:
        try:
            # In a thread, since an import reads many files.
            await asyncio.to_thread(importlib.import_module, module)
        except ModuleNotFoundError:
            raise ConfigError("CCRUN_BACKEND=gcp needs Google's libraries: install ccrun[gcp].") from None


def missing_setting(config: Config) -> str | None:
    """Return the error for all requests when a setting is missing, else None."""
    if config.is_local:
        return None
    needed = {"GCS_LOGS_BUCKET": config.gcs_logs_bucket, "PROJECT_ID": config.project_id}
    missing = next((name for name, value in needed.items() if value is None), None)
    return f"Async task support not configured (missing {missing})" if missing else None


@contextlib.asynccontextmanager
async def _open_local(config: Config) -> AsyncIterator[OpenBackend]:
    await asyncio.to_thread(_make_private, config.data_dir)
    yield OpenBackend(
        store=Store(DirectoryBlobs(config.data_dir)),
        wrapper=LocalKey(config.data_dir / ".keys" / "sealing.key"),
        callback_secret=config.callback_secret or await asyncio.to_thread(_callback_secret, config.data_dir),
        guard=guard.CallbackGuard(everywhere=True),
    )


@contextlib.asynccontextmanager
async def _open_gcp(config: Config) -> AsyncIterator[OpenBackend]:
    await load_modules("ccrun.backends.gcp.blobs", "ccrun.backends.gcp.key")
    from ccrun.backends.gcp.blobs import open_blobs
    from ccrun.backends.gcp.calls import credentials
    from ccrun.backends.gcp.key import KmsKey

    async with (
        # When these two are missing, requests are rejected with `missing_setting`.
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
        yield OpenBackend(
            store=Store(blobs),
            wrapper=key,
            callback_secret=config.callback_secret,
            guard=guard.CallbackGuard(allowed_hosts=frozenset(config.callback_allowed_hosts)),
        )


def _make_private(data_dir: Path) -> None:
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"CCRUN_DATA_DIR must name a directory that exists or can be created: {error.strerror}."
        ) from None


def _callback_secret(data_dir: Path) -> Secret:
    content = key.load_or_create_secret(
        callback_secret_file(data_dir), lambda: secrets.token_hex(CALLBACK_SECRET_BYTES).encode() + b"\n"
    )
    return Secret(content.decode().strip())

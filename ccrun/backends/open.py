"""Opens the backend that a `Config` selects.

The API, the worker, the feed and the callbacks are the same code on every backend.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import attrs

from ccrun.backends.local import key
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.backends.local.key import LocalKey
from ccrun.backends.local.layout import callback_secret_file, sealing_key_file
from ccrun.callbacks import deliver, guard
from ccrun.callbacks.oidc import IdentityTokens
from ccrun.callbacks.owed import OwedCallbacks
from ccrun.config import Config
from ccrun.egress import Egress, open_egress
from ccrun.errors import ConfigError
from ccrun.seal import KeyWrapper
from ccrun.store import Store
from ccrun.task import Secret

#: The output size of HMAC-SHA-256. A longer secret adds no strength.
CALLBACK_SECRET_BYTES: Final = 32


@attrs.frozen(kw_only=True)
class OpenBackend:
    """The open adapters of a backend, and what the delivery of callbacks needs."""

    store: Store
    wrapper: KeyWrapper
    #: Signs callbacks. None: the service does not support callbacks.
    callback_secret: Secret | None
    guard: guard.CallbackGuard
    egress: Egress
    #: Seconds for a receiver to respond, in each attempt by any process.
    callback_timeout: float
    tokens: IdentityTokens | None

    def callbacks(self, *, single_attempt: bool = False) -> OwedCallbacks | None:
        """Return what delivers owed callbacks; None if there is no secret to sign them.

        Args:
            single_attempt: Whether to make only one attempt. A sweep that runs continuously makes the others.
        """
        if self.callback_secret is None:
            return None
        timeout = self.callback_timeout
        return OwedCallbacks(
            store=self.store,
            wrapper=self.wrapper,
            secret=self.callback_secret,
            guard=self.guard,
            egress=self.egress,
            tokens=self.tokens,
            policy=deliver.RetryPolicy(attempts=1, attempt_seconds=timeout, total_seconds=timeout)
            if single_attempt
            else deliver.RetryPolicy(attempt_seconds=timeout),
            single_attempt=single_attempt,
        )


def _identity_tokens(config: Config) -> IdentityTokens | None:
    if not config.google_oidc_audience:
        return None
    return IdentityTokens(audiences=dict(config.google_oidc_audience), metadata_host=config.metadata_host)


@contextlib.asynccontextmanager
async def open_backend(config: Config, *, retry_seconds: float | None = None) -> AsyncIterator[OpenBackend]:
    """Open the backend that a config selects, and close it on exit.

    Args:
        config: The config.
        retry_seconds: For how long calls of Google's services are retried, if not for the time that a client would wait.

    Raises:
        ConfigError: The data directory cannot be created, a file of certificates cannot be read, or Google's libraries or
            credentials are missing.
        KeyServiceError: The callback secret can be neither read nor created.
    """
    egress = await asyncio.to_thread(open_egress, config)
    async with _open_local(config, egress) if config.is_local else _open_gcp(config, egress, retry_seconds) as backend:
        yield backend


async def load_modules(*modules: str) -> None:
    """Import modules that import Google's libraries.

    The local backend does not call this function: it works without these libraries, which are slow to load.

    Raises:
        ConfigError: The libraries are not installed.
    """
    for module in modules:
        try:
            # An import reads many files, so it runs in a thread.
            await asyncio.to_thread(importlib.import_module, module)
        except ModuleNotFoundError:
            raise ConfigError("CCRUN_BACKEND=gcp needs Google's libraries: install ccrun[gcp].") from None


def missing_setting(config: Config) -> str | None:
    """Return an error message if a setting is missing that every task needs, otherwise None."""
    if config.is_local:
        return None
    needed = {"GCS_LOGS_BUCKET": config.gcs_logs_bucket, "PROJECT_ID": config.project_id}
    missing = next((name for name, value in needed.items() if value is None), None)
    return f"Async task support not configured (missing {missing})" if missing else None


@contextlib.asynccontextmanager
async def _open_local(config: Config, egress: Egress) -> AsyncIterator[OpenBackend]:
    await asyncio.to_thread(_create_data_dir, config.data_dir)
    yield OpenBackend(
        store=Store(DirectoryBlobs(config.data_dir)),
        wrapper=LocalKey(sealing_key_file(config.data_dir)),
        callback_secret=config.callback_secret or await asyncio.to_thread(_callback_secret, config.data_dir),
        guard=guard.CallbackGuard(everywhere=True),
        egress=egress,
        callback_timeout=config.callback_timeout_seconds,
        tokens=_identity_tokens(config),
    )


@contextlib.asynccontextmanager
async def _open_gcp(config: Config, egress: Egress, retry_seconds: float | None) -> AsyncIterator[OpenBackend]:
    await load_modules("ccrun.backends.gcp.blobs", "ccrun.backends.gcp.key")
    from ccrun.backends.gcp.blobs import open_blobs
    from ccrun.backends.gcp.calls import CallPolicy, credentials, open_session
    from ccrun.backends.gcp.key import KmsKey

    policy = CallPolicy() if retry_seconds is None else CallPolicy(attempts=None, total_seconds=retry_seconds)
    async with (
        # `missing_setting` makes the API reject all tasks when one of the two settings is missing.
        open_blobs(
            config.gcs_logs_bucket or "", emulator=config.storage_emulator_host, policy=policy, tls=egress.tls
        ) as blobs,
        open_session(egress.tls, emulated=config.kms_emulator_host is not None) as session,
    ):
        key = KmsKey(
            project=config.project_id or "",
            location=config.kms_location,
            key_ring=config.kms_key_ring,
            key_name=config.kms_key_name,
            session=session,
            credentials=await credentials(session, emulated=config.kms_emulator_host is not None),
            emulator=config.kms_emulator_host,
            policy=policy,
        )
        yield OpenBackend(
            store=Store(blobs),
            wrapper=key,
            callback_secret=config.callback_secret,
            guard=guard.CallbackGuard(allowed_hosts=frozenset(config.callback_allowed_hosts)),
            egress=egress,
            callback_timeout=config.callback_timeout_seconds,
            tokens=_identity_tokens(config),
        )


def _create_data_dir(data_dir: Path) -> None:
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

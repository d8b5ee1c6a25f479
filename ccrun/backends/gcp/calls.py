"""Calls of Google services over HTTP: timeouts, retries, and error messages for operators. Also finds Google's credentials.

A call may be sent more than once, so only calls that are safe to retry may be made with this module.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import ssl
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final, TypeVar

import aiohttp
import attrs
import stamina
import stamina.instrumentation
import structlog
from gcloud.aio.auth import Token

from ccrun.errors import CcrunError, ConfigError

log = structlog.get_logger()

#: A call normally takes about 50 ms. One that takes this long has lost its connection.
CALL_ATTEMPT_SECONDS: Final = 10.0
#: With the delays between them, six attempts span about ten seconds, which covers short outages.
CALL_ATTEMPTS: Final = 6
#: No attempt starts after this. Readers of a stream, and tasks that finish, wait for calls.
CALL_TOTAL_SECONDS: Final = 30.0
#: The delays are 0.2, 0.4, 0.8 … s, each with up to one second of jitter, so that many callers do not retry in step.
FIRST_CALL_DELAY_SECONDS: Final = 0.2
#: The maximum jitter, as a multiple of the first delay.
JITTER_FACTOR: Final = 5
MAX_CALL_DELAY_SECONDS: Final = 5.0

#: https://cloud.google.com/storage/docs/retry-strategy#retryable
_RETRYABLE_STATUSES: Final = frozenset({408, 429, *range(500, 600)})
#: Covers all services. The roles of the account restrict what it may do.
_SCOPE: Final = "https://www.googleapis.com/auth/cloud-platform"

T = TypeVar("T")


def _log_retry(details: stamina.instrumentation.RetryDetails) -> None:
    log.warning(
        "call_retried", message="Retrying call", error=type(details.caused_by).__name__, attempt=details.retry_num
    )


# Replaces stamina's own hook, which logs the `repr` of the error. With aiohttp that contains the access token.
stamina.instrumentation.set_on_retry_hooks([_log_retry])


@attrs.frozen(kw_only=True)
class CallPolicy:
    """Timeouts and retries of a call."""

    #: For one attempt, from getting the credentials to the last byte of the response.
    attempt_seconds: float = CALL_ATTEMPT_SECONDS
    #: None: only `total_seconds` is a limit.
    attempts: int | None = CALL_ATTEMPTS
    #: No attempt starts after this.
    total_seconds: float = CALL_TOTAL_SECONDS
    first_delay_seconds: float = FIRST_CALL_DELAY_SECONDS


@attrs.frozen(kw_only=True)
class CallTarget:
    """The resource that is called, as error messages name it."""

    #: Google's name of the service, such as `Cloud Storage`.
    service: str
    #: With an article, such as `the bucket logs`.
    resource: str
    #: The settings that identify the resource.
    settings: str
    #: The class of the error that a failed call raises.
    error: type[CcrunError]


class NoCredentials(CcrunError):
    """There are no Google credentials: check the service account, or run `gcloud auth application-default login`."""


async def call(
    attempt: Callable[[], Awaitable[T]],
    *,
    target: CallTarget,
    permission: str,
    policy: CallPolicy,
    expected: Collection[int] = (),
    seconds: float | None = None,
) -> T:
    """Call `attempt` until it succeeds, and return its result.

    Retries after the statuses 408, 429 and 5xx, a lost connection, and a timeout.

    Args:
        attempt: Makes the call. An earlier attempt may have taken effect although its response was lost.
        target: What is called.
        permission: The IAM permission that the call needs, such as `storage.objects.get`.
        policy: Timeouts and retries.
        expected: Error statuses that the caller handles itself.
        seconds: The timeout of one attempt, if not `CallPolicy.attempt_seconds`.

    Raises:
        aiohttp.ClientResponseError: The response has one of the expected statuses.
        CcrunError: The call failed otherwise. The class is `target.error`.
    """
    retries = stamina.retry_context(
        on=_is_retryable,
        attempts=policy.attempts,
        timeout=policy.total_seconds,
        wait_initial=policy.first_delay_seconds,
        wait_jitter=policy.first_delay_seconds * JITTER_FACTOR,
        wait_max=MAX_CALL_DELAY_SECONDS,
    )
    try:
        async for retry in retries:
            with retry:
                async with asyncio.timeout(policy.attempt_seconds if seconds is None else seconds):
                    return await attempt()
    except (aiohttp.ContentTypeError, json.JSONDecodeError, KeyError) as error:
        raise target.error(f"The response is not from {target.service}: check the network.") from error
    except aiohttp.ClientResponseError as error:
        if error.status in expected:
            raise
        raise target.error(_error_message(error.status, target, permission)) from error
    except TimeoutError as error:
        raise target.error(f"{target.service} did not respond in time: check the network.") from error
    except aiohttp.ClientError as error:
        raise target.error(f"{target.service} cannot be reached: check the network.") from error
    except NoCredentials as error:
        raise target.error(error.message) from error
    raise AssertionError("stamina returns or raises")


def _is_retryable(error: BaseException | None) -> bool:
    if isinstance(error, NoCredentials):
        return _is_retryable(error.__cause__)
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in _RETRYABLE_STATUSES
    return isinstance(error, aiohttp.ClientError | TimeoutError)


def _error_message(status: int, target: CallTarget, permission: str) -> str:
    match status:
        case 401:
            return f"{target.service} rejected the credentials: check the service account."
        case 403:
            return (
                f"{target.service} denied access: check that the service account has {permission} on {target.resource}."
            )
        case 404:
            return f"{target.service} cannot find {target.resource}: check {target.settings}."
        case 429:
            return f"{target.service} limits the rate of calls: check the quotas of the project."
        case status if status in _RETRYABLE_STATUSES:
            return f"{target.service} is temporarily unavailable ({status}): try again later."
        case _:
            return f"{target.service} rejected the call ({status}): check {target.resource}."


class Credentials(Token):
    """Google's credentials, which are refreshed once for all concurrent calls.

    In the library, a caller that times out cancels the refresh, which fails all other callers that wait for it.
    """

    #: Without the library's own retries, which take longer than a call may. `call` retries instead.
    acquire_access_token = inspect.unwrap(Token.acquire_access_token)

    async def get(self) -> str | None:
        try:
            return await asyncio.shield(super().get())
        except Exception as error:  # The library may raise any exception.
            raise NoCredentials from error


def open_session(tls: ssl.SSLContext | bool, *, emulated: bool) -> aiohttp.ClientSession:
    """Return a session for calls of Google's services, through the proxies that the environment names.

    Args:
        tls: The trusted certificates; True for those of the system.
        emulated: Whether an emulator is called. If so, no proxy is used.
    """
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls), trust_env=not emulated)


async def credentials(session: aiohttp.ClientSession, *, emulated: bool) -> Credentials:
    """Return the credentials of this process, found in the same way as by Google's libraries.

    Args:
        session: Used to refresh the credentials. It is not closed.
        emulated: Whether an emulator is called. If so, no credentials are looked up or sent.

    Raises:
        ConfigError: The file that `GOOGLE_APPLICATION_CREDENTIALS` names is not usable.
    """
    # The library annotates the parameter with the session type of its synchronous variant.
    shared: Any = session
    if emulated:
        return Credentials(service_file=io.StringIO("{}"), session=shared)
    try:
        # The constructor reads files, so it runs in a thread.
        return await asyncio.to_thread(lambda: Credentials(session=shared, scopes=[_SCOPE]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("GOOGLE_APPLICATION_CREDENTIALS must be the path of a readable credentials file.") from error

"""Calls of Google services over HTTP: timeout, retries, and one sentence when a call fails; and Google's credentials.

Only for calls that may be repeated.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import json
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

#: Seconds for one attempt. A call usually takes 50 ms.
CALL_ATTEMPT_SECONDS: Final = 10.0
#: With the delays between them, six attempts span about ten seconds.
CALL_ATTEMPTS: Final = 6
#: Seconds after which no attempt starts. Readers of a stream and the final record of a task wait for a call.
CALL_TOTAL_SECONDS: Final = 30.0
#: Seconds: delays of 0.2, 0.4, 0.8 … s, each with up to a second more at random, so that concurrent callers spread.
FIRST_CALL_DELAY_SECONDS: Final = 0.2
#: The random part of a delay, as a multiple of the first delay.
JITTER_FACTOR: Final = 5
MAX_CALL_DELAY_SECONDS: Final = 5.0

#: What Google recommends to retry: https://cloud.google.com/storage/docs/retry-strategy#retryable
_TRANSIENT_STATUSES: Final = frozenset({408, 429, *range(500, 600)})
#: The scope of all services. The roles of an account limit what it may do.
_SCOPE: Final = "https://www.googleapis.com/auth/cloud-platform"

T = TypeVar("T")


def _log_retry(details: stamina.instrumentation.RetryDetails) -> None:
    log.warning(
        "call_retried", message="Retrying call", error=type(details.caused_by).__name__, attempt=details.retry_num
    )


# Instead of stamina's own hook, which logs the `repr` of the error: that of aiohttp has the access token.
stamina.instrumentation.set_on_retry_hooks([_log_retry])


@attrs.frozen(kw_only=True)
class CallPolicy:
    """How often and for how long a call is retried, in seconds."""

    #: For one attempt, from getting the credentials to the last byte of the response, unless the call has another timeout.
    attempt_seconds: float = CALL_ATTEMPT_SECONDS
    attempts: int = CALL_ATTEMPTS
    #: After this time no attempt starts.
    total_seconds: float = CALL_TOTAL_SECONDS
    first_delay_seconds: float = FIRST_CALL_DELAY_SECONDS


@attrs.frozen(kw_only=True)
class Target:
    """What is called, in terms that an operator knows."""

    #: The name that Google uses.
    service: str
    #: The resource, with an article: `the bucket logs`.
    resource: str
    #: The settings that name it.
    settings: str
    error: type[CcrunError]


class NoCredentials(CcrunError):
    """Google's credentials cannot be had: check the service account, or run `gcloud auth application-default login`."""


async def call(
    attempt: Callable[[], Awaitable[T]],
    *,
    target: Target,
    permission: str,
    policy: CallPolicy,
    expected: Collection[int] = (),
    seconds: float | None = None,
) -> T:
    """Return what `attempt` returns. Retry after 408, 429, 5xx, a lost connection and a timeout.

    Args:
        attempt: Makes the call. An earlier attempt may have had its effect although its response was lost.
        permission: The IAM permission that the call needs.
        expected: Statuses that the caller handles.
        seconds: The timeout of one attempt; by default that of the policy.

    Raises:
        aiohttp.ClientResponseError: The response has one of the expected statuses.
        CcrunError: The call failed in another way. The class is that of `target`.
    """
    retries = stamina.retry_context(
        on=_is_transient,
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
        raise target.error(f"What answers is not {target.service}: check the network.") from error
    except aiohttp.ClientResponseError as error:
        if error.status in expected:
            raise
        raise target.error(_refusal(error.status, target, permission)) from error
    except TimeoutError as error:
        raise target.error(f"{target.service} does not answer in time: check the network.") from error
    except aiohttp.ClientError as error:
        raise target.error(f"{target.service} cannot be reached: check the network.") from error
    except NoCredentials as error:
        raise target.error(error.message) from error
    raise AssertionError("stamina ends with a result or an error")


def _is_transient(error: BaseException | None) -> bool:
    if isinstance(error, NoCredentials):
        return _is_transient(error.__cause__)
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in _TRANSIENT_STATUSES
    return isinstance(error, aiohttp.ClientError | TimeoutError)


def _refusal(status: int, target: Target, permission: str) -> str:
    match status:
        case 401:
            return f"{target.service} does not accept the credentials: check the service account."
        case 403:
            return f"{target.service} refuses: check that the service account has {permission} on {target.resource}."
        case 404:
            return f"{target.service} does not know {target.resource}: check {target.settings}."
        case 429:
            return f"{target.service} takes no more calls for now: check the quotas of the project."
        case status if status in _TRANSIENT_STATUSES:
            return f"{target.service} is out of order ({status}): try again later."
        case _:
            return f"{target.service} refuses the call ({status}): check {target.resource}."


class Credentials(Token):
    """Google's credentials. All calls share one renewal of the token.

    In the library, a caller that is cancelled cancels the renewal, and with it all other calls that wait for it.
    """

    #: Without the library's own retries, which take longer than a call may.
    acquire_access_token = inspect.unwrap(Token.acquire_access_token)

    async def get(self) -> str | None:
        try:
            return await asyncio.shield(super().get())
        except Exception as error:  # The library raises any exception.
            raise NoCredentials from error


async def credentials(session: aiohttp.ClientSession, *, emulated: bool) -> Credentials:
    """Return the credentials of this process, from where all of Google's libraries get them.

    Args:
        emulated: Whether an emulator is called, which needs no credentials.

    Raises:
        ConfigError: The file that `GOOGLE_APPLICATION_CREDENTIALS` names cannot be used.
    """
    # The annotation is that of the synchronous variant of the library.
    shared: Any = session
    if emulated:
        return Credentials(service_file=io.StringIO("{}"), session=shared)
    try:
        # In a thread, since it reads files.
        return await asyncio.to_thread(lambda: Credentials(session=shared, scopes=[_SCOPE]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("GOOGLE_APPLICATION_CREDENTIALS must name a readable file of credentials.") from error

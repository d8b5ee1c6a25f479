"""One call of a Google service over HTTP: its deadline, its repeats, and one sentence for a person when it fails.

It knows nothing of what is called. Whether a call may be made twice is settled by whoever makes it: what cannot be
repeated must not come here. Also holds how Google's credentials are found.
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

#: A call that is well takes some 50 ms, so this is the time of a lost connection, not that of a slow service.
CALL_ATTEMPT_SECONDS: Final = 10.0
#: With the pauses between them, six tries span about ten seconds: the time that a service takes to mend itself.
CALL_ATTEMPTS: Final = 6
#: No try is begun after this. Readers of a stream and the end of a task wait for a call.
CALL_TOTAL_SECONDS: Final = 30.0
#: Pauses of 0.2, 0.4, 0.8 … s, each with up to a second more at random, so that a crowd of callers spreads.
FIRST_CALL_DELAY_SECONDS: Final = 0.2
#: First pauses.
JITTER_FACTOR: Final = 5
MAX_CALL_DELAY_SECONDS: Final = 5.0

#: What Google asks to repeat: https://cloud.google.com/storage/docs/retry-strategy#retryable
_TRANSIENT_STATUSES: Final = frozenset({408, 429, *range(500, 600)})
#: The scope of all services; what an account may do is settled by its roles.
_SCOPE: Final = "https://www.googleapis.com/auth/cloud-platform"

T = TypeVar("T")


def _log_retry(details: stamina.instrumentation.RetryDetails) -> None:
    log.warning(
        "call_retried", message="Retrying call", error=type(details.caused_by).__name__, attempt=details.retry_num
    )


# In the place of stamina's own hook, which logs the error's `repr`: aiohttp puts the access token into that.
stamina.instrumentation.set_on_retry_hooks([_log_retry])


@attrs.frozen(kw_only=True)
class CallPolicy:
    """How long a call goes on, in seconds and tries."""

    #: One try: from the credentials until the last byte of the answer, unless the call names another time.
    attempt_seconds: float = CALL_ATTEMPT_SECONDS
    attempts: int = CALL_ATTEMPTS
    #: No try is begun after this.
    total_seconds: float = CALL_TOTAL_SECONDS
    first_delay_seconds: float = FIRST_CALL_DELAY_SECONDS


@attrs.frozen(kw_only=True)
class Target:
    """What is called, in the words of whoever operates it."""

    #: As Google spells it.
    service: str
    #: What the calls are about, with its article: `the bucket logs`.
    resource: str
    #: The settings that name the resource.
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
    """Return what `attempt` returns, called again after 408, 429, 5xx, a lost connection and a lost deadline.

    Args:
        attempt: Makes the call. It is called several times, and an earlier call may have had its effect although its
            answer was lost.
        permission: What the call needs, as an IAM role spells it.
        expected: Statuses of an answer that the caller reads by itself.
        seconds: For one try, where `Patience.try_seconds` does not suit.

    Raises:
        aiohttp.ClientResponseError: The answer has one of the expected statuses.
        CcrunError: As `target` says: everything else, after a bounded time.
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
    """Google's credentials, whose renewal serves all calls at once.

    In the library one caller that loses its patience cancels the renewal, and with it every other call that waits for it.
    """

    #: Without the library's own repeats, which take longer than a call may: `call` repeats.
    acquire_access_token = inspect.unwrap(Token.acquire_access_token)

    async def get(self) -> str | None:
        try:
            return await asyncio.shield(super().get())
        except Exception as error:  # The library passes on whatever happens to it.
            raise NoCredentials from error


async def credentials(session: aiohttp.ClientSession, *, emulated: bool) -> Credentials:
    """Return the credentials of this process, which are looked for where all of Google's libraries look for them.

    Args:
        emulated: What is called is an emulator: no credentials are looked for, and none sent.

    Raises:
        ConfigError: The file that `GOOGLE_APPLICATION_CREDENTIALS` names cannot be used.
    """
    # The library annotates what its twin for requests takes.
    shared: Any = session
    if emulated:
        return Credentials(service_file=io.StringIO("{}"), session=shared)
    try:
        # In a thread, for it reads files.
        return await asyncio.to_thread(lambda: Credentials(session=shared, scopes=[_SCOPE]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("GOOGLE_APPLICATION_CREDENTIALS must name a readable file of credentials.") from error

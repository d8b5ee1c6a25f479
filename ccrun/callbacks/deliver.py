"""Delivery of one callback to one receiver, with retries.

Reports what became of the delivery. What the body holds, whether a callback is owed and when the next delivery is due is decided
elsewhere.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import email.utils
import io
import itertools
import random
import time
from typing import Final

import aiohttp
import attrs
import stamina
import stamina.instrumentation
from yarl import URL

from ccrun.callbacks.guard import AddressNotPublic, CallbackGuard, public_socket
from ccrun.callbacks.sign import sign
from ccrun.errors import CcrunError
from ccrun.task import Secret

#: Receivers answer at once and work later; one that needs longer than this is not well.
ATTEMPT_SECONDS: Final = 10.0
#: With the pauses between them, five tries span about half a minute: the time in which a receiver is deployed anew.
MAX_ATTEMPTS: Final = 5
#: The worker waits for its delivery, and a worker costs money. What is not delivered by then, a sweep delivers later.
DELIVERY_SECONDS: Final = 60.0
#: Pauses of about 1, 3, 9 and 27 s.
FIRST_RETRY_DELAY_SECONDS: Final = 1.0
RETRY_DELAY_FACTOR: Final = 3
#: A receiver that wants to be left alone for longer than a day is misconfigured.
MAX_RETRY_AFTER_SECONDS: Final = 24 * 3600.0

#: Server errors, and the few others that pass by themselves: Request Timeout, Too Early, Too Many Requests.
_TRANSIENT_STATUSES: Final = frozenset({408, 425, 429, *range(500, 600)})


# Otherwise stamina would look for its hooks, and import them, when the first retry is due: in the event loop.
stamina.instrumentation.get_on_retry_hooks()


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How long a delivery goes on."""

    #: One try: from the look-up of the name until the status of the answer.
    attempt_seconds: float = ATTEMPT_SECONDS
    attempts: int = MAX_ATTEMPTS
    #: All tries and pauses. A try is begun only when it can have its full time.
    total_seconds: float = DELIVERY_SECONDS
    #: Each further pause is `RETRY_DELAY_FACTOR` times as long; all are shortened by up to half at random.
    first_delay_seconds: float = FIRST_RETRY_DELAY_SECONDS


@attrs.frozen(kw_only=True)
class Delivery:
    """What became of a delivery."""

    delivered: bool
    attempts: int
    #: One sentence about the last try; holds nothing of the URL. None when delivered.
    error: str | None = None
    #: Whether the answer was one that does not change by asking again.
    final: bool = False
    #: How long the receiver itself asked to be left alone.
    retry_after_seconds: float | None = None


async def deliver(
    url: Secret,
    body: bytes,
    *,
    webhook_id: str,
    secret: Secret,
    guard: CallbackGuard,
    policy: RetryPolicy | None = None,
) -> Delivery:
    """POST a body until a receiver takes it or there is no sense in going on. Never raises but when it is cancelled.

    A 2xx is success. No answer, 5xx, 408, 425 and 429 are tried again, each time signed anew, after what `Retry-After`
    asks for and a growing pause; any other answer is final. Redirects are not followed; the body of an answer is not read.

    Args:
        url: http or https; `user:password@` in it becomes Basic authentication.
        webhook_id: See `sign`.
        patience: By default, that of a worker.
    """
    policy = policy or RetryPolicy()
    clock = asyncio.get_running_loop().time
    attempt_seconds = min(policy.attempt_seconds, policy.total_seconds)
    last_start = clock() + policy.total_seconds - attempt_seconds
    pauses = (
        policy.first_delay_seconds * RETRY_DELAY_FACTOR**tries * random.uniform(0.5, 1)  # noqa: S311 - not a secret
        for tries in itertools.count()
    )

    def pause_after(error: Exception) -> float | bool:
        if not isinstance(error, _Undelivered) or error.final:
            return False
        seconds = (error.retry_after_seconds or 0.0) + next(pauses)
        return seconds if clock() + seconds <= last_start else False

    attempts = 0
    try:
        async for attempt in stamina.retry_context(pause_after, attempts=policy.attempts, timeout=None):
            with attempt:
                attempts = attempt.num
                headers = sign(body, webhook_id=webhook_id, secret=secret, timestamp=int(time.time()))
                await _post(url, body, headers, guard, attempt_seconds)
    except _Undelivered as error:
        return Delivery(
            delivered=False,
            attempts=attempts,
            error=error.message,
            final=error.final,
            retry_after_seconds=error.retry_after_seconds,
        )
    return Delivery(delivered=True, attempts=attempts)


class _Undelivered(CcrunError):
    """The receiver did not take the callback."""

    def __init__(self, message: str, *, final: bool = False, retry_after_seconds: float | None = None) -> None:
        self.final = final
        self.retry_after_seconds = retry_after_seconds
        super().__init__(message)


def _session(guard: CallbackGuard, host: str) -> aiohttp.ClientSession:
    """Return a session for one request, which takes nothing from the environment, from before or from elsewhere."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            socket_factory=None if guard.trusts(host) else public_socket, use_dns_cache=False, force_close=True
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        trust_env=False,
    )


async def _post(url: Secret, body: bytes, headers: dict[str, str], guard: CallbackGuard, seconds: float) -> None:
    """Send one request; return if it is answered with a 2xx, else raise `_Undelivered`."""
    try:
        target = URL(url.reveal())
        if target.raw_user or target.raw_password:
            # By hand, since aiohttp takes them as Latin-1.
            credentials = aiohttp.encode_basic_auth(target.user or "", target.password or "")
            headers = {**headers, "Authorization": credentials}
            target = target.with_user(None)
        async with _session(guard, target.raw_host or "") as session:
            async with asyncio.timeout(seconds):
                # As a file, which aiohttp sends piece by piece.
                answer = await session.post(target, data=io.BytesIO(body), headers=headers, allow_redirects=False)
            answer.close()
    except TimeoutError:
        raise _Undelivered(f"The receiver did not answer within {seconds:g} s.") from None
    except (aiohttp.ClientError, ValueError) as error:
        raise _explain(error) from None
    status = answer.status
    if 200 <= status < 300:
        return
    if 300 <= status < 400:
        raise _Undelivered(
            f"The receiver answered {status} to another address; redirects are not followed.", final=True
        )
    raise _Undelivered(
        f"The receiver answered {status}.",
        final=status not in _TRANSIENT_STATUSES,
        retry_after_seconds=_retry_after(answer.headers.get("Retry-After"), dt.datetime.now(dt.UTC)),
    )


def _explain(error: aiohttp.ClientError | ValueError) -> _Undelivered:
    match error:
        case aiohttp.ClientConnectorError(os_error=AddressNotPublic()):
            return _Undelivered("The callback's address is not public.", final=True)
        case aiohttp.ClientConnectorCertificateError():
            return _Undelivered("The receiver's certificate cannot be trusted.")
        case aiohttp.ClientSSLError():
            return _Undelivered("No secure connection to the receiver could be made.")
        case aiohttp.ClientConnectorDNSError():
            return _Undelivered("The receiver's name could not be looked up.")
        case aiohttp.ClientConnectorError():
            return _Undelivered("The receiver could not be connected to.")
        case aiohttp.ClientResponseError():
            return _Undelivered("The receiver's answer is not HTTP.")
        case aiohttp.NonHttpUrlClientError() | ValueError():
            return _Undelivered("The callback's address is not a valid URL.", final=True)
        case _:
            return _Undelivered("The receiver closed the connection without an answer.")


def _retry_after(wish: str | None, now: dt.datetime) -> float | None:
    """Return the seconds that a `Retry-After` asks for (RFC 9110, section 10.2.3): a number of them, or a date."""
    if wish is None:
        return None
    if wish.isascii() and wish.isdigit():
        seconds = float(wish)
    else:
        try:
            date = email.utils.parsedate_to_datetime(wish)
        except (ValueError, OverflowError):
            return None
        # A date without a zone is in UTC like every date of HTTP.
        seconds = (date.replace(tzinfo=date.tzinfo or dt.UTC) - now).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)

"""The delivery of one callback to one receiver, with retries.

Does not decide what the body holds, whether a callback is owed, and when the next delivery is due.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import email.utils
import random
import time
from typing import Final

import attrs
import structlog

from ccrun.callbacks.exchange import ExchangeError, post
from ccrun.callbacks.guard import CallbackGuard
from ccrun.callbacks.oidc import IdentityTokens, NoIdentityToken
from ccrun.callbacks.sign import sign
from ccrun.egress import Egress
from ccrun.errors import CcrunError
from ccrun.task import Secret

log = structlog.get_logger()

#: Seconds for one attempt. A receiver should respond immediately and work later.
ATTEMPT_SECONDS: Final = 10.0
#: With the delays between them, five attempts span about half a minute, the time of a redeployment of the receiver.
MAX_ATTEMPTS: Final = 5
#: Seconds for a delivery. The worker waits for it, and a worker costs money; a sweep retries later.
DELIVERY_SECONDS: Final = 60.0
#: Seconds. Together with the factor, delays of about 1, 3, 9 and 27 s.
FIRST_RETRY_DELAY_SECONDS: Final = 1.0
RETRY_DELAY_FACTOR: Final = 3
#: Seconds. A receiver that asks for more than a day is misconfigured.
MAX_RETRY_AFTER_SECONDS: Final = 24 * 3600.0

#: Server errors, Request Timeout, Too Early and Too Many Requests.
_TRANSIENT_STATUSES: Final = frozenset({408, 425, 429, *range(500, 600)})


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How often and for how long a delivery is attempted."""

    #: For one attempt, from resolving the host name to receiving the status.
    attempt_seconds: float = ATTEMPT_SECONDS
    attempts: int = MAX_ATTEMPTS
    #: For all attempts and delays. An attempt starts only if it can have its full time.
    total_seconds: float = DELIVERY_SECONDS
    #: Each further delay is `RETRY_DELAY_FACTOR` times as long. All are shortened at random, by half at most.
    first_delay_seconds: float = FIRST_RETRY_DELAY_SECONDS


@attrs.frozen(kw_only=True)
class Delivery:
    """The result of a delivery."""

    delivered: bool
    attempts: int
    #: One sentence about the last attempt, without any part of the URL. None when delivered.
    error: str | None = None
    #: Whether a retry would not change the response.
    final: bool = False
    #: How long the receiver wants no retry.
    retry_after_seconds: float | None = None
    #: The status of the last response, None without one.
    status: int | None = None


async def deliver(
    url: Secret,
    body: bytes,
    *,
    webhook_id: str,
    secret: Secret,
    guard: CallbackGuard,
    egress: Egress | None = None,
    tokens: IdentityTokens | None = None,
    policy: RetryPolicy | None = None,
) -> Delivery:
    """POST a body until the receiver accepts it or a retry makes no sense. All errors are in the result.

    A 2xx response is success. No response, 5xx, 408, 425 and 429 are retried, after what `Retry-After` asks for plus a growing
    delay; each attempt is signed anew. Any other response is final. Redirects are not followed, and the body of a response is
    not read.

    Args:
        url: http or https. `user:password@` in it becomes Basic authentication.
        webhook_id: See `sign`.
        egress: By default, direct.
        tokens: By default, no receiver gets an identity token.
        policy: By default, that of a worker.
    """
    policy = policy or RetryPolicy()
    clock = asyncio.get_running_loop().time
    attempt_seconds = min(policy.attempt_seconds, policy.total_seconds)
    last_start = clock() + policy.total_seconds - attempt_seconds
    delay = policy.first_delay_seconds
    attempts = 0
    while True:
        attempts += 1
        headers = sign(body, webhook_id=webhook_id, secret=secret, timestamp=int(time.time()))
        try:
            await _post(url, body, headers, guard, egress or Egress(), tokens, attempt_seconds)
        except _Undelivered as error:
            seconds = (error.retry_after_seconds or 0.0) + delay * random.uniform(0.5, 1)  # noqa: S311 - not a secret
            if error.final or attempts == policy.attempts or clock() + seconds > last_start:
                return Delivery(
                    delivered=False,
                    attempts=attempts,
                    error=error.message,
                    final=error.final,
                    retry_after_seconds=error.retry_after_seconds,
                    status=error.status,
                )
        else:
            return Delivery(delivered=True, attempts=attempts)
        log.warning("callback_retried", message="Retrying callback", attempts=attempts, delaySeconds=round(seconds, 1))
        await asyncio.sleep(seconds)
        delay *= RETRY_DELAY_FACTOR


class _Undelivered(CcrunError):
    """The receiver did not accept the callback."""

    def __init__(
        self, message: str, *, final: bool = False, retry_after_seconds: float | None = None, status: int | None = None
    ) -> None:
        self.final = final
        self.status = status
        self.retry_after_seconds = retry_after_seconds
        super().__init__(message)


async def _post(
    url: Secret,
    body: bytes,
    headers: dict[str, str],
    guard: CallbackGuard,
    egress: Egress,
    tokens: IdentityTokens | None,
    seconds: float,
) -> None:
    """Send one request. Raise `_Undelivered` unless the response is 2xx."""
    try:
        async with asyncio.timeout(seconds):
            if tokens is not None:
                headers = {**headers, **await tokens.headers_for(url.reveal())}
            response = await post(url.reveal(), body, headers, guard=guard, egress=egress)
    except TimeoutError:
        raise _Undelivered(f"The receiver did not respond within {seconds:g} s.") from None
    except ExchangeError as error:
        raise _Undelivered(error.message, final=error.final) from None
    except NoIdentityToken as error:
        raise _Undelivered(error.message) from None
    status = response.status
    if 200 <= status < 300:
        return
    if 300 <= status < 400:
        raise _Undelivered(
            f"The receiver responded with {status} to another address; redirects are not followed.",
            final=True,
            status=status,
        )
    raise _Undelivered(
        f"The receiver responded with {status}.",
        final=status not in _TRANSIENT_STATUSES,
        retry_after_seconds=_retry_after(response.retry_after, dt.datetime.now(dt.UTC)),
        status=status,
    )


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

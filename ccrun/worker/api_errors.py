"""What an error of the model API says: https://docs.anthropic.com/en/api/errors and /rate-limits. Pure."""

from __future__ import annotations

import datetime as dt
import email.utils
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from ccrun.results import ApiError

#: Characters of the message. It becomes part of the record and of the callback.
MAX_MESSAGE_CHARS: Final = 500
#: Characters of the name of an error. The API's own have about twenty.
MAX_TYPE_CHARS: Final = 64
#: The statuses that are worth a retry unless `X-Should-Retry` says otherwise: the rule of Anthropic's SDKs and the CLI.
RETRYABLE: Final = frozenset({408, 409, 429})
#: Limits reset within a month. A later time is an error of the server.
MAX_RESET: Final = dt.timedelta(days=366)


def parse_api_error(
    status: int, body: str, headers: Mapping[str, str], *, now: dt.datetime, mask: Callable[[str], str]
) -> ApiError:
    """Return what an error response of the model API says, also that of a cloud.

    Args:
        status: The HTTP status, at least 400.
        body: The body, of any format.
        headers: The headers; the lookup ignores case.
        now: The current time, to which `Retry-After` is relative.
        mask: Removes the credential from a text.
    """
    try:
        found = json.loads(body)
        # Amazon has the error alone and its type in a header, Google may have it in a list.
        found = found[0] if isinstance(found, list) else found
        error = found.get("error", found)
        kind, message = error.get("type") or error.get("status"), error.get("message")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        kind = message = None
    kind = kind or headers.get("X-Amzn-ErrorType", "").partition(":")[0] or None
    should_retry = headers.get("X-Should-Retry")
    return ApiError(
        status=status,
        type=_text(kind, MAX_TYPE_CHARS, mask),
        message=_text(message, MAX_MESSAGE_CHARS, mask),
        retryable=should_retry == "true" if should_retry is not None else status in RETRYABLE or status >= 500,
        resets_at=_resets_at(headers, now),
    )


def api_error_sentence(error: ApiError) -> str:
    """Return a sentence for people."""
    if error.status is None:
        return error.message or "The model API cannot be reached."
    detail = ": ".join(filter(None, (error.type, error.message)))
    return f"The model API responded with status {error.status}" + (f" ({detail})." if detail else ".")


def _text(value: Any, limit: int, mask: Callable[[str], str]) -> str | None:
    # Masked before it is cut, since a part of the credential would not be found.
    return mask(value.encode(errors="replace").decode())[:limit] if isinstance(value, str) else None


def _resets_at(headers: Mapping[str, str], now: dt.datetime) -> dt.datetime | None:
    """Return the later of the two times that a rate limit may have; `anthropic-ratelimit-unified-reset` is in Unix time."""
    times = [_retry_at(headers.get("Retry-After", ""), now)]
    unified = headers.get("anthropic-ratelimit-unified-reset", "")
    if unified.isascii() and unified.isdigit() and len(unified) < len("10000000000"):
        times.append(dt.datetime.fromtimestamp(int(unified), dt.UTC))
    return max((time for time in times if time is not None and now <= time <= now + MAX_RESET), default=None)


def _retry_at(value: str, now: dt.datetime) -> dt.datetime | None:
    """Return the time of a `Retry-After`: seconds or a date (RFC 9110, section 10.2.3)."""
    try:
        return now + dt.timedelta(seconds=float(value))
    except (ValueError, OverflowError):
        pass
    try:
        time = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return time if time.tzinfo is not None else time.replace(tzinfo=dt.UTC)

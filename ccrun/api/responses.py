"""JSON responses, and the one table that maps exceptions to HTTP statuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import structlog
from aiohttp import web

from ccrun import codec
from ccrun.api import sse
from ccrun.api.checks import MAX_FIELD_ERRORS, printable, unknown_name
from ccrun.errors import (
    Busy,
    CcrunError,
    FieldError,
    InvalidRequest,
    KeyServiceError,
    LaunchFailed,
    NotConfigured,
    NotRedeliverable,
    StorageError,
    TaskAlreadyFinished,
    TaskExists,
    TaskNotFound,
)

log = structlog.get_logger()

#: The HTTP status of each exception. The first class that matches counts; all others are 500.
STATUS: Final[Sequence[tuple[type[CcrunError], int]]] = (
    (InvalidRequest, 400),
    (TaskNotFound, 404),
    (TaskExists, 409),
    (TaskAlreadyFinished, 409),
    (NotRedeliverable, 409),
    (NotConfigured, 500),
    (LaunchFailed, 502),
    (Busy, 503),
    (KeyServiceError, 503),
    (StorageError, 503),
)
#: Seconds after which a client may retry when the storage or the key service does not answer.
RETRY_AFTER_SECONDS: Final = 5


def json_response(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a response whose body is this value as JSON."""
    return web.Response(body=codec.to_json(value), status=status, headers=headers, content_type="application/json")


def error_response(
    status: int, message: str, *, retry_after: int | None = None, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return the response to a request that failed.

    Args:
        retry_after: Seconds, for the header `Retry-After`.
    """
    extra = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return json_response({"error": message}, status=status, headers={**(headers or {}), **extra})


def invalid(field: str, message: str) -> InvalidRequest:
    """Return the exception for one invalid field, query parameter or header."""
    return InvalidRequest([FieldError(field, message)])


def whole_number(text: str, least: int, most: int) -> int | None:
    """Return the number that a query parameter stands for, None if it is not a whole number in this range."""
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(most))
    return int(text) if is_number and least <= int(text) <= most else None


def check_query(request: web.Request, *known: str) -> None:
    """Check that a request has no unknown query parameter, which would have no effect.

    Raises:
        InvalidRequest: It has.
    """
    unknown = [name for name in dict.fromkeys(request.query) if name not in known]
    if unknown:
        raise InvalidRequest(
            [
                FieldError(printable(name), unknown_name("query parameter", name, known))
                for name in unknown[:MAX_FIELD_ERRORS]
            ]
        )


def response_to(error: Exception, request: web.Request, *, max_request_bytes: int) -> web.Response:
    """Return the response to a request whose handler raised this exception: no stack trace, no secret, no local path."""
    match error:
        case InvalidRequest():
            details = [{"field": each.field, "message": each.message} for each in error.errors]
            return json_response({"error": error.message, "details": details}, status=400)
        case CcrunError():
            status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
            if status >= 500:
                log.warning(
                    "request_failed", message="Request failed", path=request.path, status=status, error=error.message
                )
            seconds = _retry_after(error) if status == 503 else None
            if seconds is not None and _is_event_source(request):
                response = _unavailable(error, seconds)
            else:
                response = error_response(status, error.message, retry_after=seconds)
            if isinstance(error, Busy):
                # Its connection may be what the service lacks.
                response.force_close()
            return response
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{request.method} is not allowed here; use {allowed}."
            return error_response(405, message, headers={"Allow": allowed})
        case web.HTTPRequestEntityTooLarge():
            return error_response(413, f"The body is too large: at most {max_request_bytes} bytes are allowed.")
        case web.HTTPNotFound():
            return error_response(404, f"There is no {request.method} {request.path}; GET / lists the endpoints.")
        case web.HTTPException():
            return error_response(error.status, f"{error.reason}.")
        case _:
            log.exception("request_crashed", message="Unexpected error in a request", path=request.path, exc_info=error)
            return error_response(500, "An internal error occurred; the log of the service has the details.")


def _retry_after(error: CcrunError) -> int:
    return error.retry_after if isinstance(error, Busy) else RETRY_AFTER_SECONDS


def _is_event_source(request: web.Request) -> bool:
    """Return whether the client is a browser's EventSource. Only browsers send `Sec-Fetch-Mode`; `fetch` caches by default."""
    headers = request.headers
    return (
        headers.get("Accept") == "text/event-stream"
        and headers.get("Cache-Control") == "no-cache"
        and "Sec-Fetch-Mode" in headers
    )


def _unavailable(error: CcrunError, seconds: int) -> web.Response:
    """Return a stream of one event, after which an EventSource comes back; after any status but 200 it would not."""
    response = web.Response(
        body=sse.retry(seconds) + sse.json_event("unavailable", {"error": error.message, "retryAfter": seconds}),
        content_type="text/event-stream",
        headers={"Cache-Control": "no-cache, no-transform"},
    )
    response.force_close()
    return response

"""What every request passes: the trace in the log, errors as JSON, authorization."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from typing import Final

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from ccrun.api.responses import error_response, response_to
from ccrun.errors import CcrunError, NotConfigured
from ccrun.log import bound, trace_name
from ccrun.task import Secret

log = structlog.get_logger()

#: Paths that need no token: a load balancer polls them.
OPEN_PATHS: Final = frozenset({"/", "/health", "/healthz", "/ready"})
#: Names of a service on loopback. A page of another site can reach it under another name (DNS rebinding), never under these.
LOOPBACK_HOST: Final = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]*)?", re.IGNORECASE)
#: `Sec-Fetch-Site` of requests that a page of the service itself or the user causes (https://www.w3.org/TR/fetch-metadata/).
#: Other pages can send a request whose response they cannot read, which is enough to cancel a task.
OWN_SITES: Final = frozenset({"same-origin", "none"})
#: Headers of every response. No browser shows a response as a page, in a frame, as a script or under another type.
SECURITY_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # By default, it has the versions of Python and aiohttp.
    "Server": "ccrun",
}


async def add_security_headers(_: web.Request, response: web.StreamResponse) -> None:
    """Add `SECURITY_HEADERS` to a response. A handler of `on_response_prepare`."""
    response.headers.update(SECURITY_HEADERS)


def bind_trace(project_id: str | None) -> Middleware:
    """Return a middleware that adds the trace of a request to all of its log lines."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = (request.headers.get("traceparent"), request.headers.get("X-Cloud-Trace-Context"))
        with bound(trace=trace_name(project_id, *headers)):
            return await handler(request)

    return middleware


def handle_errors(max_request_bytes: int) -> Middleware:
    """Return a middleware that turns exceptions into JSON responses, or aborts a response that has already started."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:
            is_gone = request.transport is None or request.transport.is_closing()
            if not is_gone and request.writer.output_size == 0:
                return response_to(error, request, max_request_bytes=max_request_bytes)
            # The response has started, so only an abort can show that it is incomplete. A client that left or stalled is no
            # error; a regular close would wait for it to accept what is buffered.
            if not isinstance(error, ConnectionError | TimeoutError):
                message = error.message if isinstance(error, CcrunError) else type(error).__name__
                log.warning("response_aborted", message="Response aborted", path=request.path, error=message)
            if request.transport is not None:
                request.transport.abort()
            return web.Response()

    return middleware


class Authorization:
    """Decides which requests are accepted.

    Args:
        tokens: The bearer tokens that are accepted. When there are none, the platform authorizes requests.
        loopback_only: Accept only requests to a name of loopback, and none from pages of another origin, also of another port.
        unavailable: The error for all requests, when a setting is missing.
    """

    def __init__(self, tokens: Sequence[Secret], *, loopback_only: bool, unavailable: str | None) -> None:
        self._token_digests = [_digest(token.reveal()) for token in tokens]
        self._loopback_only = loopback_only
        self._unavailable = unavailable

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Pass a request on, or reject it."""
        # Without the header, aiohttp would resolve a name. All browsers send it.
        host = request.headers.get("Host", "localhost")
        if self._loopback_only and not LOOPBACK_HOST.fullmatch(host):
            return error_response(421, "This service answers only to localhost, 127.0.0.1 and [::1].")
        if self._loopback_only and not _is_of_own_page(request, host):
            return error_response(403, "This service without tokens accepts no requests from pages of other origins.")
        if self._token_digests and request.path not in OPEN_PATHS and self.caller(request) is None:
            return error_response(
                401,
                "A valid bearer token is required in the Authorization header.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._unavailable and request.path not in OPEN_PATHS:
            raise NotConfigured(self._unavailable)
        return await handler(request)

    def caller(self, request: web.Request) -> str | None:
        """Return the digest of the request's token, None when the token is missing or unknown."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        given = _digest(token.strip())
        # All are compared, so that the duration reveals nothing.
        known = [digest for digest in self._token_digests if hmac.compare_digest(digest, given)]
        return known[0] if known else None


def _is_of_own_page(request: web.Request, host: str) -> bool:
    """Return whether no page of another origin has sent a request, as far as browsers tell."""
    origin = request.headers.get("Origin")
    return (
        origin is None or origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
    ) and request.headers.get("Sec-Fetch-Site", "none") in OWN_SITES


def _digest(token: str) -> str:
    # Digests have one length, so that comparing them reveals nothing about the tokens. A header may hold any bytes.
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()

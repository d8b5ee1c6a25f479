"""The loopback proxy that adds the credential to the agent's requests to the model API.

The real credential is in the memory of this process and on the connection to the model API, nowhere else: the agent gets a
token that is valid for this proxy only, while it runs. Nothing is logged or stored, since prompts and responses pass through.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import re
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Final, Self

import aiohttp
import attrs
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from ccrun.egress import Egress
from ccrun.results import ApiError
from ccrun.task import Secret
from ccrun.worker.api_errors import parse_api_error
from ccrun.worker.upstream import ModelApi

#: Bytes: the limit of the API for a request to `/v1/messages` (https://docs.anthropic.com/en/api/errors).
MAX_BODY_BYTES: Final = 32 * 1024 * 1024
#: Bytes of an error response, which is in memory while it is redacted. The API sends some hundred, a gateway a few KiB.
MAX_ERROR_BYTES: Final = 64 * 1024
#: Concurrent requests. Each subagent has one; more wait for a connection.
MAX_UPSTREAM_CONNECTIONS: Final = 256
#: Seconds for waiting for a free connection, resolving the name, TCP and TLS. Usually less than one.
CONNECT_SECONDS: Final = 20.0
#: Seconds of silence of the model API. A stream has pings, but a response without streaming may take as long as the CLI waits,
#: 600 s (its `X-Stainless-Timeout`). The whole response has no limit: the timeout of the task ends it.
IDLE_SECONDS: Final = 600.0
#: Seconds that requests have to finish when the context is left. The agent has exited by then.
STOP_SECONDS: Final = 0.1

#: The headers of a response that are not forwarded: those of the connection (RFC 9110, section 7.6.1), and cookies.
_NOT_FORWARDED_TO_AGENT: Final = re.compile(
    r"connection|keep-alive|proxy-(authenticate|authentication-info|connection)|te|trailer|transfer-encoding|upgrade"
    r"|set-cookie",
    re.IGNORECASE,
)


def has_token(headers: Mapping[str, str], token: Secret) -> bool:
    """Return whether a request has the token, as an API key or a bearer token. Compare in constant time."""
    scheme, _, bearer = headers.get("Authorization", "").partition(" ")
    sent = (headers.get("X-Api-Key", ""), bearer.strip() if scheme.lower() == "bearer" else "")
    expected = token.reveal().encode()
    return any(secrets.compare_digest(value.encode("utf-8", "surrogateescape"), expected) for value in sent)


class CredentialProxy:
    """Serves the model API on 127.0.0.1 while its context is open, and forwards the requests to the real one.

    Args:
        upstream: The model API.
        run_token: The token that the agent must send. By default, a new one.
        egress: How to reach it. The environment is not used, since aiohttp would then also read `~/.netrc`, which could have
            another credential.
        connect_seconds: See `CONNECT_SECONDS`.
        idle_seconds: See `IDLE_SECONDS`.
    """

    def __init__(
        self,
        upstream: ModelApi,
        *,
        run_token: Secret | None = None,
        egress: Egress | None = None,
        connect_seconds: float = CONNECT_SECONDS,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        #: The token that the agent sends instead of the credential.
        self.run_token = run_token or Secret(secrets.token_urlsafe(32))
        #: The base URL for the agent, without a trailing slash.
        self.url = ""
        #: The message of the last rejection by the model API: of the credential (401) or of its permissions (403). The latter may
        #: concern a single model, so the caller decides whether the task has failed.
        self.rejected: str | None = None
        #: The last error of the model API with each status that the agent got; that of a connection has status 502.
        self.api_errors: dict[int, ApiError] = {}
        self._upstream = upstream
        self._egress = egress or Egress()
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_seconds, sock_read=idle_seconds)
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as resources:
            self._session = await resources.enter_async_context(
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=MAX_UPSTREAM_CONNECTIONS, ssl=self._egress.tls),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    auto_decompress=False,
                    timeout=self._timeout,
                    trust_env=False,
                )
            )
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", self._handle)
            # Without handler_cancellation, a response would continue, and be billed, after the agent has disconnected.
            runner = web.AppRunner(
                app, access_log=None, auto_decompress=False, handler_cancellation=True, shutdown_timeout=STOP_SECONDS
            )
            resources.push_async_callback(runner.cleanup)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._runner = runner
            self._resources = resources.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._resources.aclose()

    @property
    def port(self) -> int:
        """The port on 127.0.0.1."""
        return int(self._runner.addresses[0][1])

    @contextlib.asynccontextmanager
    async def serve(self, listener: socket.socket) -> AsyncIterator[None]:
        """Serve the connections of another listener too, while the context is open."""
        site = web.SockSite(self._runner, listener)
        await site.start()
        try:
            yield
        finally:
            await site.stop()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = self._authenticated_path(request)
        if path is None:
            return _error(401, "authentication_error", "This is not the token of this task.", retry=False)
        url = self._upstream.target(request.method, path)
        if url is None:
            return _error(404, "not_found_error", "A task may only use the messages and the models of the model API.")
        upload = _Upload(source=request.content)
        if (request.content_length or 0) > MAX_BODY_BYTES:
            return upload.too_large()
        response: web.StreamResponse | None = None
        try:
            body = b"".join([chunk async for chunk in upload]) if self._upstream.signs_body else b""
            async with self._session.request(
                request.method,
                URL(url, encoded=True),
                headers=await self._upstream.headers(request.method, url, request.headers, body),
                data=body or (upload if request.body_exists else None),
                allow_redirects=False,
                proxy=self._egress.proxy_for(url),
            ) as upstream:
                if upstream.status >= 300:
                    return await self._error_response(upstream)
                response = web.StreamResponse(status=upstream.status, headers=self._downstream_headers(upstream))
                await response.prepare(request)
                async for chunk in upstream.content.iter_any():
                    await response.write(chunk)
                return response
        except Exception as error:
            # Every exception, since a logged traceback might show the credential in its frames.
            if response is not None:
                # The connection is aborted so that the agent sees that the response is incomplete.
                if request.transport is not None:
                    request.transport.abort()
                return response
            if upload.is_too_large:
                return upload.too_large()
            fault = "did not respond in time" if isinstance(error, TimeoutError) else "cannot be reached"
            message = f"The model API {fault} ({type(error).__name__})."
            self.api_errors[502] = ApiError(message=message, retryable=True)
            return _error(502, "api_error", message)

    def _authenticated_path(self, request: web.Request) -> str | None:
        """Return the path of a request with the run token, which is in a header or the first part of the path; else None."""
        if has_token(request.headers, self.run_token):
            return request.raw_path
        _, first, *rest = request.raw_path.split("/", 2) if request.raw_path.startswith("/") else ("", "")
        is_token = secrets.compare_digest(first.encode("utf-8", "surrogateescape"), self.run_token.reveal().encode())
        return f"/{rest[0]}" if is_token and rest else None

    async def _error_response(self, upstream: aiohttp.ClientResponse) -> web.Response:
        """Return the response to the agent for a redirect or an error, whose text may quote the credential."""
        if upstream.status < 400:
            # Following it would send the credential to another server.
            return _error(
                502,
                "api_error",
                f"The model API responded with a redirect ({upstream.status}); its base URL must not redirect.",
                retry=False,
            )
        headers = self._downstream_headers(upstream)
        sentence = f"The model API responded with status {upstream.status}."
        text = await _read_error(upstream)
        if text is None:
            text = _error_text("api_error", sentence)
            headers["Content-Type"] = "application/json"
        for name in ("Content-Encoding", "Content-Length"):
            headers.popall(name, None)
        api_error = parse_api_error(upstream.status, text, headers, now=dt.datetime.now(dt.UTC), mask=self._mask)
        is_repeated = upstream.status in (401, 403) and self._upstream.repeats_rejected
        status = 400 if is_repeated else upstream.status
        self.api_errors[status] = api_error
        if upstream.status in (401, 403):
            self.rejected = api_error.message or sentence
            # Otherwise the CLI retries for minutes.
            headers["X-Should-Retry"] = "false"
        return web.Response(body=self._mask(text).encode(), status=status, headers=headers)

    def _downstream_headers(self, upstream: aiohttp.ClientResponse) -> CIMultiDict[str]:
        return CIMultiDict(
            (name, self._mask(value))
            for name, value in upstream.headers.items()
            if not _NOT_FORWARDED_TO_AGENT.fullmatch(name)
        )

    def _mask(self, text: str) -> str:
        for secret in self._upstream.secrets:
            text = text.replace(secret.reveal(), "***")
        return text


@attrs.define(kw_only=True)
class _Upload:
    """Forwards the body of a request in pieces, up to `MAX_BODY_BYTES`."""

    source: aiohttp.StreamReader
    read_bytes: int = 0

    @property
    def is_too_large(self) -> bool:
        return self.read_bytes > MAX_BODY_BYTES

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self.source.iter_any():
            self.read_bytes += len(chunk)
            if self.is_too_large:
                # This aborts the request to the model API; the handler then checks `is_too_large`.
                raise ValueError("The request is too large.")
            yield chunk

    @staticmethod
    def too_large() -> web.Response:
        return _error(413, "request_too_large", f"A request may have at most {MAX_BODY_BYTES} bytes.")


async def _read_error(upstream: aiohttp.ClientResponse) -> str | None:
    """Return the body of an error, None when it cannot be redacted because it is too long or compressed."""
    if upstream.headers.get("Content-Encoding", "identity") != "identity":
        return None
    try:
        await upstream.content.readexactly(MAX_ERROR_BYTES + 1)
    except asyncio.IncompleteReadError as end:
        return end.partial.decode("utf-8", "replace")
    return None


def _error_text(kind: str, message: str) -> str:
    """Return an error in the format of the API (https://docs.anthropic.com/en/api/errors)."""
    return json.dumps({"type": "error", "error": {"type": kind, "message": message}})


def _error(status: int, kind: str, message: str, *, retry: bool = True) -> web.Response:
    headers = {} if retry else {"X-Should-Retry": "false"}
    return web.Response(
        text=_error_text(kind, message), status=status, headers=headers, content_type="application/json"
    )

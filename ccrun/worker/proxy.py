"""The loopback proxy that puts the credential in: what the agent knows as the model API.

The real credential is in this process's memory and on the wire upstream, nowhere else: the agent gets a token that
opens this proxy alone and dies with it. Nothing is logged, for prompts and answers pass through; nothing is stored.
"""

from __future__ import annotations

import asyncio
import enum
import json
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Final, Self

import aiohttp
import attrs
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from ccrun.errors import CredentialUnusable
from ccrun.task import Secret

DEFAULT_UPSTREAM: Final = "https://api.anthropic.com"

#: The API's own limit for a request to `/v1/messages` (https://docs.anthropic.com/en/api/errors); more would be refused
#: there, after it has cost the upload.
MAX_BODY_BYTES: Final = 32 * 1024 * 1024
#: An error of the API is some hundred bytes; a gateway's page is a few KiB. It is held in memory to be masked.
MAX_ERROR_BYTES: Final = 64 * 1024
#: A rejection ends up in the task's `error`, which is one sentence for a person.
MAX_REJECTION_CHARS: Final = 500
#: Each subagent has one request under way, and nobody runs this many; more wait for a free connection.
MAX_UPSTREAM_CONNECTIONS: Final = 256
#: For the name, TCP, TLS and the wait for a free connection. A healthy network needs well under a second.
CONNECT_SECONDS: Final = 20.0
#: Silence upstream. A stream carries pings, but an answer that is not streamed may take as long as the CLI waits for
#: it, which is 600 s (it says so in `X-Stainless-Timeout`). There is no limit on the whole of an answer.
IDLE_SECONDS: Final = 600.0
#: How long requests that are under way may go on when the context is left: the agent is gone by then.
STOP_SECONDS: Final = 0.1

#: Without it the API takes no OAuth token; the CLI names it only when it believes that it has such a token.
OAUTH_BETA: Final = "oauth-2025-04-20"

#: What the agent may ask for, as it stands in the request line. The same host and credential open far more (files,
#: sessions, batches, the administration of the organization), so this is a list of what may, never of what may not.
#: Matched before anything is decoded: `..`, `%2e`, `//` and absolute URIs do not match.
_ALLOWED: Final = re.compile(
    r"(?:POST /v1/messages(?:/count_tokens)?|GET /v1/models(?:/[A-Za-z0-9][A-Za-z0-9._:@-]*)?)(?:\?[!\"$-~]*)?"
)
#: What of the agent's headers goes upstream. Others could turn a gateway against its rules (`X-Original-URL`).
_PASSED_UP: Final = re.compile(
    r"accept|content-(?:type|length|encoding)|user-agent|x-app|x-client-request-id|(anthropic|x-stainless|x-claude)-.+",
    re.IGNORECASE,
)
#: What of the answer's headers stays here: those of the connection (RFC 9110, section 7.6.1), and cookies.
_KEPT_BACK: Final = re.compile(
    r"connection|keep-alive|proxy-(authenticate|authentication-info|connection)|te|trailer|transfer-encoding|upgrade"
    r"|set-cookie",
    re.IGNORECASE,
)
_CREDENTIAL: Final = re.compile(r"[!-~]+")


class CredentialKind(enum.StrEnum):
    """How the credential is presented."""

    API_KEY = "api_key"
    OAUTH = "oauth"


def is_allowed(method: str, target: str) -> bool:
    """Tell whether the agent may ask for this.

    Args:
        target: The request target as it was sent, undecoded, with its query.
    """
    return _ALLOWED.fullmatch(f"{method} {target}") is not None


def presents(headers: Mapping[str, str], token: Secret) -> bool:
    """Tell whether a request carries the token, as an API key or as a bearer, in time that says nothing about it."""
    scheme, _, bearer = headers.get("Authorization", "").partition(" ")
    shown = (headers.get("X-Api-Key", ""), bearer.strip() if scheme.lower() == "bearer" else "")
    known = token.reveal().encode()
    return any(secrets.compare_digest(value.encode("utf-8", "surrogateescape"), known) for value in shown)


def upstream_headers(headers: Mapping[str, str], credential: Secret, kind: CredentialKind) -> CIMultiDict[str]:
    """Return the headers that go upstream: the agent's, with the real credential in place of whatever it sent."""
    passed = CIMultiDict((name, value) for name, value in headers.items() if _PASSED_UP.fullmatch(name))
    # An answer that is not compressed can be masked, and nothing between here and there holds back its pieces.
    passed["Accept-Encoding"] = "identity"
    match kind:
        case CredentialKind.API_KEY:
            passed["X-Api-Key"] = credential.reveal()
        case CredentialKind.OAUTH:
            passed["Authorization"] = f"Bearer {credential.reveal()}"
            if OAUTH_BETA not in ",".join(passed.getall("Anthropic-Beta", [])):
                passed.add("Anthropic-Beta", OAUTH_BETA)
    return passed


class CredentialProxy:
    """Serves the model API on 127.0.0.1 for as long as the context lasts.

    Args:
        credential: The real one.
        kind: How the model API takes it.
        upstream: The base URL of the model API, as in `ANTHROPIC_BASE_URL`.
        run_token: What the agent must present; a fresh one by default.
        egress_proxy: The URL of the HTTP proxy on the way upstream, if there is one. The environment is not asked: that
            would also read `~/.netrc`, which could put another credential in.
        connect_seconds: See `CONNECT_SECONDS`.
        idle_seconds: See `IDLE_SECONDS`.

    Raises:
        CredentialUnusable: The credential cannot stand in a header.
    """

    def __init__(
        self,
        credential: Secret,
        kind: CredentialKind,
        *,
        upstream: str = DEFAULT_UPSTREAM,
        run_token: Secret | None = None,
        egress_proxy: Secret | None = None,
        connect_seconds: float = CONNECT_SECONDS,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        if _CREDENTIAL.fullmatch(credential.reveal()) is None:
            raise CredentialUnusable
        #: What the agent presents in place of the credential.
        self.run_token = run_token or Secret(secrets.token_urlsafe(32))
        #: The base URL for the agent, without a slash at the end.
        self.url = ""
        #: What the model API said when it last refused the credential (401) or its rights (403). The latter may concern
        #: one model alone: whether the task fails is told by how the agent ends.
        self.rejected: str | None = None
        self._credential = credential
        self._kind = kind
        self._upstream = upstream.rstrip("/")
        self._egress_proxy = egress_proxy
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_seconds, sock_read=idle_seconds)
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as resources:
            self._session = await resources.enter_async_context(
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=MAX_UPSTREAM_CONNECTIONS),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    auto_decompress=False,
                    timeout=self._timeout,
                    trust_env=False,
                    proxy=None if self._egress_proxy is None else self._egress_proxy.reveal(),
                )
            )
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", self._answer)
            # Without handler_cancellation an answer would go on, and be paid for, after the agent has left.
            runner = web.AppRunner(
                app, access_log=None, auto_decompress=False, handler_cancellation=True, shutdown_timeout=STOP_SECONDS
            )
            resources.push_async_callback(runner.cleanup)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._resources = resources.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._resources.aclose()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if not presents(request.headers, self.run_token):
            return _error(401, "authentication_error", "This is not the token of this task.", retry=False)
        if not is_allowed(request.method, request.raw_path):
            return _error(404, "not_found_error", "A task may only use the messages and the models of the model API.")
        upload = _Upload(source=request.content)
        if (request.content_length or 0) > MAX_BODY_BYTES:
            return upload.refusal()
        response: web.StreamResponse | None = None
        try:
            async with self._session.request(
                request.method,
                URL(self._upstream + request.raw_path, encoded=True),
                headers=upstream_headers(request.headers, self._credential, self._kind),
                data=upload if request.body_exists else None,
                allow_redirects=False,
            ) as answer:
                if answer.status >= 300:
                    return await self._failure(answer)
                response = web.StreamResponse(status=answer.status, headers=self._downstream_headers(answer))
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                return response
        except Exception as error:
            # Everything, since the frames of the traceback hold the credential and a logger might print them.
            if response is not None:
                # What was cut off must look cut off: with a proper end it would pass for the whole answer.
                if request.transport is not None:
                    request.transport.abort()
                return response
            if upload.is_too_large:
                return upload.refusal()
            fault = "did not answer in time" if isinstance(error, TimeoutError) else "cannot be reached"
            return _error(502, "api_error", f"The model API {fault} ({type(error).__name__}).")

    async def _failure(self, answer: aiohttp.ClientResponse) -> web.Response:
        """Return what the agent is told of a redirect or an error, in which the credential may be quoted."""
        if answer.status < 400:
            # Following it would carry the credential to wherever it points.
            return _error(
                502,
                "api_error",
                f"The model API answered with a redirect ({answer.status}); its base URL must be the final one.",
                retry=False,
            )
        headers = self._downstream_headers(answer)
        sentence = f"The model API answered with status {answer.status}."
        text = await _read_error(answer)
        if text is None:
            text = _error_text("api_error", sentence)
            headers["Content-Type"] = "application/json"
        for name in ("Content-Encoding", "Content-Length"):
            headers.popall(name, None)
        if answer.status in (401, 403):
            self.rejected = self._mask(_message_in(text) or sentence)[:MAX_REJECTION_CHARS]
            # Otherwise the CLI tries again for minutes, and each time gets the same answer.
            headers["X-Should-Retry"] = "false"
        return web.Response(body=self._mask(text).encode(), status=answer.status, headers=headers)

    def _downstream_headers(self, answer: aiohttp.ClientResponse) -> CIMultiDict[str]:
        return CIMultiDict(
            (name, self._mask(value)) for name, value in answer.headers.items() if not _KEPT_BACK.fullmatch(name)
        )

    def _mask(self, text: str) -> str:
        return text.replace(self._credential.reveal(), "***")


@attrs.define(kw_only=True)
class _Upload:
    """The body of a request on its way upstream, piece by piece, up to `MAX_BODY_BYTES`."""

    source: aiohttp.StreamReader
    seen_bytes: int = 0

    @property
    def is_too_large(self) -> bool:
        return self.seen_bytes > MAX_BODY_BYTES

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self.source.iter_any():
            self.seen_bytes += len(chunk)
            if self.is_too_large:
                # Ends the request upstream; `is_too_large` tells the reason to whoever made it.
                raise ValueError("The request is too large.")
            yield chunk

    @staticmethod
    def refusal() -> web.Response:
        return _error(413, "request_too_large", f"A request may have {MAX_BODY_BYTES} bytes at most.")


async def _read_error(answer: aiohttp.ClientResponse) -> str | None:
    """Return the body of an error; None when it is too long or compressed, so that it cannot be masked."""
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        return None
    try:
        await answer.content.readexactly(MAX_ERROR_BYTES + 1)
    except asyncio.IncompleteReadError as end:
        return end.partial.decode("utf-8", "replace")
    return None


def _message_in(body: str) -> str | None:
    """Return the message of an error in the API's shape."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return message if isinstance(message, str) else None


def _error_text(kind: str, message: str) -> str:
    """Return an error in the API's shape (https://docs.anthropic.com/en/api/errors)."""
    return json.dumps({"type": "error", "error": {"type": kind, "message": message}})


def _error(status: int, kind: str, message: str, *, retry: bool = True) -> web.Response:
    headers = {} if retry else {"X-Should-Retry": "false"}
    return web.Response(
        text=_error_text(kind, message), status=status, headers=headers, content_type="application/json"
    )

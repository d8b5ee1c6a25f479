from __future__ import annotations

import asyncio
import datetime as dt
import gzip
import importlib.util
import json
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from multidict import CIMultiDict
from pytest_aiohttp import AiohttpServer

from ccrun.errors import CredentialUnusable
from ccrun.task import Secret
from ccrun.testing.model import Conversation, Fail, Reply, Say, ScriptedModel, UseTool, sequence
from ccrun.worker.proxy import (
    MAX_BODY_BYTES,
    MAX_ERROR_BYTES,
    OAUTH_BETA,
    CredentialKind,
    CredentialProxy,
    is_allowed,
    upstream_headers,
)

CREDENTIAL = "made-up-real-credential"
#: Seconds for a request. On a busy machine it takes one or two, and a run of the CLI a few.
MAX_SECONDS = 20.0
CLI_SECONDS = 60.0

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
Upstream: TypeAlias = Callable[[Handler], Awaitable[str]]
Cli: TypeAlias = Callable[..., Awaitable[tuple[int, list[dict[str, Any]]]]]


@pytest.fixture
def upstream(aiohttp_server: AiohttpServer) -> Upstream:
    """Return a function that serves a handler as the model API and returns its base URL."""

    async def start(handler: Handler) -> str:
        app = web.Application(client_max_size=2 * MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", handler)
        server = await aiohttp_server(app, auto_decompress=False)
        return str(server.make_url("/"))

    return start


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Return a function that runs the real CLI with a proxy and returns its exit code and its output lines."""
    spec = importlib.util.find_spec("claude_agent_sdk")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the claude-agent-sdk package, which contains the CLI, is not installed")
    binary = Path(spec.submodule_search_locations[0], "_bundled", "claude")
    (tmp_path / "work").mkdir()

    async def run(proxy: CredentialProxy, kind: CredentialKind) -> tuple[int, list[dict[str, Any]]]:
        variable = "ANTHROPIC_API_KEY" if kind is CredentialKind.API_KEY else "CLAUDE_CODE_OAUTH_TOKEN"
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "CLAUDE_CONFIG_DIR": str(tmp_path / ".claude"),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
            "ANTHROPIC_BASE_URL": proxy.url,
            variable: proxy.run_token.reveal(),
        }
        process = await asyncio.create_subprocess_exec(
            binary,
            *("-p", "--verbose", "--output-format", "stream-json", "--allowedTools", "Bash"),
            cwd=tmp_path / "work",
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(b"Hello"), CLI_SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, [json.loads(line) for line in output.splitlines()]

    return run


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client, as the agent has one."""
    timeout = aiohttp.ClientTimeout(total=MAX_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:
        yield session


def _proxy(upstream: str, kind: CredentialKind = CredentialKind.API_KEY, **options: Any) -> CredentialProxy:
    return CredentialProxy(Secret(CREDENTIAL), kind, upstream=upstream, **options)


def _token(proxy: CredentialProxy) -> dict[str, str]:
    return {"X-Api-Key": proxy.run_token.reveal()}


async def _send_head(proxy: CredentialProxy, request_line: str) -> tuple[int, bytes]:
    """Send a request line unchanged, with the run token, and return the status and the raw response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    try:
        lines = (
            request_line,
            "Host: x",
            f"X-Api-Key: {proxy.run_token.reveal()}",
            "Connection: close",
            "Content-Length: 0",
        )
        writer.write("\r\n".join((*lines, "", "")).encode())
        response = await asyncio.wait_for(reader.read(), MAX_SECONDS)
    finally:
        writer.close()
        await writer.wait_closed()
    return int(response.split()[1]), response


async def _error_of(response: aiohttp.ClientResponse) -> tuple[int, str, str]:
    """Return status, type and message of an error in the format of the model API."""
    body = await response.json()
    assert body["type"] == "error"
    return response.status, body["error"]["type"], body["error"]["message"]


# --- the real agent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CredentialKind)
async def test_only_the_model_api_gets_the_credential(cli: Cli, kind: CredentialKind) -> None:
    """The real CLI works with the proxy. The model API gets the credential; the tools of the agent cannot read it."""

    def script(conversation: Conversation) -> Reply:
        if conversation.turn == 0:
            return UseTool(
                "Bash", {"command": "env; tr '\\0' '\\n' < /proc/$PPID/environ", "description": "Print the environment"}
            )
        return Say(f"Output: {conversation.last_tool_result}")

    async with ScriptedModel(script) as model, _proxy(model.url, kind) as proxy:
        code, lines = await cli(proxy, kind)
    assert code == 0
    assert proxy.run_token.reveal() in lines[-1]["result"]
    assert CREDENTIAL not in json.dumps(lines)
    assert len(model.requests) >= 2
    for request in model.requests:
        credentials = (request.headers.get("X-Api-Key"), request.headers.get("Authorization"))
        assert credentials == ((CREDENTIAL, None) if kind is CredentialKind.API_KEY else (None, f"Bearer {CREDENTIAL}"))
        assert (OAUTH_BETA in request.headers["anthropic-beta"]) == (kind is CredentialKind.OAUTH)


@pytest.mark.parametrize(
    ("kind", "status"), [(CredentialKind.API_KEY, 401), (CredentialKind.OAUTH, 401), (CredentialKind.OAUTH, 403)]
)
async def test_rejected_credential_makes_the_cli_exit(cli: Cli, kind: CredentialKind, status: int) -> None:
    """When the model API rejects the credential, the CLI exits without retries, and the proxy has the message."""
    rejection = Fail(status, "authentication_error", f"{CREDENTIAL} is not valid")
    async with ScriptedModel(sequence(rejection)) as model, _proxy(model.url, kind) as proxy:
        start = time.monotonic()
        code, lines = await cli(proxy, kind)
        duration = time.monotonic() - start
    assert (code, lines[-1]["is_error"]) == (1, True)
    assert duration < MAX_SECONDS
    assert proxy.rejected == "*** is not valid"
    assert CREDENTIAL not in json.dumps(lines)


# --- allowed requests ------------------------------------------------------------------------------------------------


async def test_proxy_requires_the_run_token(session: aiohttp.ClientSession) -> None:
    """Without it, the response is 401 and nothing is forwarded. It may be an API key or a bearer token."""
    async with ScriptedModel(sequence(Say("Hi"))) as model, _proxy(model.url) as proxy:
        token = proxy.run_token.reveal()
        for headers in (
            {},
            {"X-Api-Key": ""},
            {"X-Api-Key": CREDENTIAL},
            {"X-Api-Key": token + "x"},
            {"X-Api-Key": token[:-1]},
            {"X-Api-Key": "ü\udcff"},
            {"Authorization": token},
            {"Authorization": f"Basic {token}"},
            {"Authorization": "Bearer "},
        ):
            encoded = {
                name: value.encode("utf-8", "surrogateescape").decode("latin-1") for name, value in headers.items()
            }
            async with session.post(f"{proxy.url}/v1/messages", json={"messages": []}, headers=encoded) as response:
                status, kind, _ = await _error_of(response)
            assert (status, kind, len(model.requests)) == (401, "authentication_error", 0)
            assert response.headers["X-Should-Retry"] == "false"
        for headers in ({"X-Api-Key": token}, {"Authorization": f"bearer {token}"}):
            async with session.post(f"{proxy.url}/v1/messages", json={"messages": []}, headers=headers) as response:
                assert response.status == 200
        assert proxy.rejected is None


ALLOWED = (
    "POST /v1/messages",
    "POST /v1/messages?beta=true",
    "POST /v1/messages/count_tokens?beta=true",
    "GET /v1/models",
    "GET /v1/models?limit=1000&after_id=x%20y",
    "GET /v1/models/claude-opus-4-20250514",
)
FORBIDDEN = (
    "GET /",
    "GET /v1/messages",
    "DELETE /v1/messages",
    "POST /v1/models",
    "POST /v1/complete",
    "POST /v1/messages/",
    "POST /v1/messages/batches",
    "POST //v1/messages",
    "POST /v1//messages",
    "POST /V1/messages",
    "POST /v1/messages/../organizations/api_keys",
    "POST /v1/messages/%2e%2e/organizations/api_keys",
    "POST /v1/messages%2f..%2forganizations",
    "POST /v1/messages;x",
    "POST /v1/messages#x",
    "POST /v1/messages?x#y",
    "GET /v1/models/..",
    "GET /v1/models/../organizations/api_keys",
    "GET /v1/models/%2e%2e/organizations/api_keys",
    "GET /v1/models/x/y",
    "GET /v1/models\\..\\organizations",
    "GET /v1/organizations/api_keys",
    "GET /v1/files",
    "GET /api/oauth/profile",
    "POST http://example.com/v1/messages",
    "GET http://127.0.0.1/v1/models",
    "CONNECT example.com:443",
    "CONNECT /v1/messages",
    "TRACE /v1/messages",
    "OPTIONS *",
    "PUT /v1/messages",
)


def test_is_allowed() -> None:
    """Messages, token counts and models are allowed, in their canonical spelling, and nothing else."""
    requests = (*ALLOWED, *FORBIDDEN)
    assert list(ALLOWED) == [line for line in requests if is_allowed(*line.split(" ", 1))]
    assert not is_allowed("POST", "/v1/messages\n")
    assert not is_allowed("POST", "/v1/messages?é")


async def test_only_allowed_requests_are_forwarded(upstream: Upstream) -> None:
    """Other requests, sent as raw bytes, are client errors and do not reach the model API."""
    received: list[str] = []

    async def api(request: web.Request) -> web.Response:
        received.append(f"{request.method} {request.raw_path}")
        return web.json_response({})

    async with _proxy(await upstream(api)) as proxy:
        for line in FORBIDDEN:
            status, response = await _send_head(proxy, f"{line} HTTP/1.1")
            assert (line, status // 100) == (line, 4)
            assert CREDENTIAL.encode() not in response
        assert received == []
        for line in ALLOWED:
            assert (line, (await _send_head(proxy, f"{line} HTTP/1.1"))[0]) == (line, 200)
    assert received == list(ALLOWED)


# --- forwarding ------------------------------------------------------------------------------------------------------


def test_only_known_headers_are_forwarded() -> None:
    """Headers of the API and its client are forwarded; credentials, cookies and headers for gateways are not."""
    passed = {
        "anthropic-version": "1",
        "anthropic-beta": "a",
        "User-Agent": "cli",
        "X-Stainless-Lang": "js",
        "X-App": "cli",
    }
    dropped = {
        "X-Api-Key": "t",
        "Authorization": "Bearer t",
        "Proxy-Authorization": "t",
        "Cookie": "t",
        "Host": "h",
        "Connection": "close, anthropic-version",
        "Transfer-Encoding": "chunked",
        "Expect": "100-continue",
        "X-Original-URL": "/v1/files",
        "X-HTTP-Method-Override": "GET",
        "Forwarded": "for=x",
        "Accept-Encoding": "gzip",
    }
    headers = CIMultiDict({**passed, **dropped})
    common = {**passed, "Accept-Encoding": "identity"}
    assert upstream_headers(headers, Secret(CREDENTIAL), CredentialKind.API_KEY) == CIMultiDict(
        {**common, "X-Api-Key": CREDENTIAL}
    )
    assert upstream_headers(headers, Secret(CREDENTIAL), CredentialKind.OAUTH) == CIMultiDict(
        [*common.items(), ("Authorization", f"Bearer {CREDENTIAL}"), ("anthropic-beta", OAUTH_BETA)]
    )


async def test_bodies_are_streamed(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """Each part of a request or response body is forwarded before the next part is sent."""
    part_received, part_read = asyncio.Event(), asyncio.Event()

    async def api(request: web.Request) -> web.StreamResponse:
        assert await request.content.readexactly(3) == b"one"
        part_received.set()
        assert await request.content.read() == b"two"
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await part_read.wait()
        await response.write(b"data: 2\n\n")
        return response

    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        await part_received.wait()
        yield b"two"

    async with (
        _proxy(await upstream(api)) as proxy,
        session.post(f"{proxy.url}/v1/messages", data=body(), headers=_token(proxy)) as response,
    ):
        assert response.content_type == "text/event-stream"
        assert await response.content.readuntil(b"\n\n") == b"data: 1\n\n"
        part_read.set()
        assert await response.content.read() == b"data: 2\n\n"


async def test_bodies_are_forwarded_unchanged(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """Compressed bodies and the headers that a client needs are forwarded; cookies are not."""
    request_body, response_body = gzip.compress(b"request" * 1000), gzip.compress(b"response" * 1000)
    forwarded = {
        "Content-Encoding": "gzip",
        "Content-Type": "application/json",
        "Request-Id": "req_1",
        "Retry-After": "7",
        "Anthropic-Ratelimit-Requests-Remaining": "9",
    }
    received: list[tuple[bytes, str, str]] = []

    async def api(request: web.Request) -> web.Response:
        received.append((await request.read(), request.headers["Content-Encoding"], request.headers["Content-Length"]))
        return web.Response(body=response_body, headers={**forwarded, "Set-Cookie": "a=b", "Keep-Alive": "timeout=5"})

    async with (
        _proxy(await upstream(api)) as proxy,
        session.post(
            f"{proxy.url}/v1/messages", data=request_body, headers={**_token(proxy), "Content-Encoding": "gzip"}
        ) as response,
    ):
        assert await response.read() == response_body
    assert received == [(request_body, "gzip", str(len(request_body)))]
    assert {name: response.headers.get(name) for name in forwarded} == forwarded
    assert response.headers["Content-Length"] == str(len(response_body))
    assert {"Set-Cookie", "Keep-Alive"}.isdisjoint(response.headers)


async def test_requests_are_concurrent(upstream: Upstream) -> None:
    """200 requests, as subagents send them, do not wait for each other."""
    count = 200
    all_started = asyncio.Barrier(count)

    async def api(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await all_started.wait()
        await response.write(b"done")
        return response

    async with (
        _proxy(await upstream(api)) as proxy,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as unlimited,
    ):

        async def post() -> bytes:
            async with unlimited.post(f"{proxy.url}/v1/messages", headers=_token(proxy)) as response:
                return await response.read()

        async with asyncio.timeout(MAX_SECONDS):
            responses = await asyncio.gather(*(post() for _ in range(count)))
    assert responses == [b"done"] * count


@pytest.mark.parametrize("with_length", [True, False])
async def test_body_beyond_the_limit_is_413(
    upstream: Upstream, session: aiohttp.ClientSession, with_length: bool
) -> None:
    """With a Content-Length, the request is not forwarded at all."""
    started: list[str] = []

    async def api(request: web.Request) -> web.Response:
        started.append(request.path)
        return web.Response(body=str(len(await request.read())).encode())

    async def body(size: int) -> AsyncIterator[bytes]:
        for start in range(0, size, 65536):
            yield bytes(min(65536, size - start))

    async def post(proxy: CredentialProxy, size: int) -> int:
        headers = {**_token(proxy), "Content-Length": str(size)} if with_length else _token(proxy)
        async with session.post(f"{proxy.url}/v1/messages", data=body(size), headers=headers) as response:
            assert response.status == 200 or (await _error_of(response))[1] == "request_too_large"
            return response.status

    async with _proxy(await upstream(api)) as proxy:
        assert await post(proxy, MAX_BODY_BYTES) == 200
        assert await post(proxy, MAX_BODY_BYTES + 1) == 413
    assert len(started) == (1 if with_length else 2)


# --- upstream errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [None, "gzip"])
async def test_errors_are_forwarded_without_the_credential(
    upstream: Upstream, session: aiohttp.ClientSession, encoding: str | None
) -> None:
    """Status and headers are forwarded. The credential is redacted, and a compressed body is replaced."""
    page = json.dumps({"type": "error", "error": {"type": "x", "message": f"no {CREDENTIAL}"}}).encode()

    async def api(request: web.Request) -> web.Response:
        headers = {"Retry-After": "3", "X-Echo": f"Bearer {CREDENTIAL}"}
        if encoding:
            return web.Response(status=529, body=gzip.compress(page), headers={**headers, "Content-Encoding": encoding})
        return web.Response(status=529, body=page, headers=headers, content_type="application/json")

    async with (
        _proxy(await upstream(api)) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=_token(proxy)) as response,
    ):
        status, _, message = await _error_of(response)
    assert (status, message) == (529, "The model API responded with status 529." if encoding else "no ***")
    assert (response.headers["Retry-After"], response.headers["X-Echo"]) == ("3", "Bearer ***")
    assert proxy.rejected is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"<h1>Forbidden</h1>", "The model API responded with status 403."),
        (b'{"error": "no"}', "The model API responded with status 403."),
        (b"[" * 50_000, "The model API responded with status 403."),
        (b"x" * 1_000_000, "The model API responded with status 403."),
        (b'{"error": {"message": "' + b"y" * 5000 + b'"}}', "y" * 500),
        (b'{"error": {"message": "no made-up\\u002dreal-credential"}}', "no ***"),
    ],
)
async def test_message_of_a_rejection_is_short_and_redacted(
    upstream: Upstream, session: aiohttp.ClientSession, body: bytes, expected: str
) -> None:
    """With any body of a 403, `rejected` is a short text without the credential."""

    async def api(request: web.Request) -> web.Response:
        return web.Response(status=403, body=body)

    async with (
        _proxy(await upstream(api)) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=_token(proxy)) as response,
    ):
        assert (response.status, response.headers["X-Should-Retry"]) == (403, "false")
        assert len(await response.read()) <= MAX_ERROR_BYTES
        assert proxy.rejected == expected


async def test_redirect_is_not_followed(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """A redirect of the model API is an error, and its message is about the base URL."""
    received: list[str] = []

    async def api(request: web.Request) -> web.Response:
        received.append(request.path)
        return web.Response(status=307, headers={"Location": "/elsewhere"})

    async with (
        _proxy(await upstream(api)) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=_token(proxy), allow_redirects=False) as response,
    ):
        status, _, message = await _error_of(response)
    assert (status, response.headers.get("Location"), received) == (502, None, ["/v1/messages"])
    assert "base URL" in message


async def test_unreachable_model_api_is_502(session: aiohttp.ClientSession, unused_tcp_port: int) -> None:
    """The CLI may retry after this error."""
    async with (
        _proxy(f"http://127.0.0.1:{unused_tcp_port}") as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=_token(proxy)) as response,
    ):
        assert (await _error_of(response))[:2] == (502, "api_error")
        assert "X-Should-Retry" not in response.headers


async def test_silent_model_api_is_502(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """A request fails when the model API sends nothing for `idle_seconds`."""

    async def api(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        _proxy(await upstream(api), idle_seconds=0.05) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=_token(proxy)) as response,
    ):
        status, _, message = await _error_of(response)
    assert (status, message) == (502, "The model API did not respond in time (SocketTimeoutError).")


@pytest.mark.parametrize("failure", ["reset", "silence"])
async def test_incomplete_response_is_aborted(
    upstream: Upstream, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture, failure: str
) -> None:
    """The agent sees that a response is incomplete, and the log has no warning and no credential."""

    async def api(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half of ")
        if failure == "reset":
            assert request.transport is not None
            request.transport.abort()
        await asyncio.Event().wait()
        return response

    caplog.set_level(logging.DEBUG, "aiohttp")
    async with (
        _proxy(await upstream(api), idle_seconds=0.2) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=_token(proxy)) as response,
    ):
        assert await response.content.readexactly(8) == b"half of "
        with pytest.raises(aiohttp.ClientError):
            await response.content.read()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert CREDENTIAL not in caplog.text


async def test_disconnecting_aborts_the_upstream_request(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """When the agent disconnects, before or during a response, the request to the model API is aborted."""
    started, aborted = asyncio.Queue[str](), asyncio.Queue[str]()

    async def api(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if request.query_string == "during":
            await response.prepare(request)
        await started.put(request.query_string)
        try:
            await asyncio.Event().wait()
        finally:
            aborted.put_nowait(request.query_string)
        return response

    async with _proxy(await upstream(api)) as proxy, asyncio.timeout(MAX_SECONDS):
        for when in ("before", "during"):
            task = asyncio.ensure_future(
                session.post(f"{proxy.url}/v1/messages?{when}", headers=_token(proxy)).__aenter__()
            )
            assert await started.get() == when
            if when == "before":
                task.cancel()
            else:
                (await task).close()
            assert await aborted.get() == when


async def test_untrusted_certificate_is_rejected(
    aiohttp_server: AiohttpServer, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """A server with a certificate that is not trusted gets no request."""
    received: list[str] = []

    async def api(request: web.Request) -> web.Response:
        received.append(request.path)
        return web.json_response({})

    app = web.Application()
    app.router.add_post("/v1/messages", api)
    server = await aiohttp_server(app, ssl=_self_signed(tmp_path))
    async with (
        _proxy(f"https://127.0.0.1:{server.port}") as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=_token(proxy)) as response,
    ):
        status, _, message = await _error_of(response)
    assert (status, received) == (502, [])
    assert "Certificate" in message


def _self_signed(directory: Path) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    certificate = (
        builder.not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "server.pem").write_bytes(private + certificate.public_bytes(pem))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(directory / "server.pem")
    return context


async def test_requests_use_the_egress_proxy(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """The egress proxy gets the request, with the URL of the model API."""
    received: list[str] = []

    async def egress(request: web.Request) -> web.Response:
        received.append(request.raw_path)
        return web.json_response({})

    url = await upstream(egress)
    async with (
        _proxy("http://model.invalid/base", egress_proxy=Secret(url)) as proxy,
        session.post(f"{proxy.url}/v1/messages?beta=true", headers=_token(proxy)) as response,
    ):
        assert response.status == 200
    assert received == ["http://model.invalid/base/v1/messages?beta=true"]


# --- the proxy itself ------------------------------------------------------------------------------------------------


async def test_leaving_the_context_closes_everything(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """Current requests are aborted, and new connections are refused."""
    started = asyncio.Event()

    async def api(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        started.set()
        await asyncio.Event().wait()
        return response

    async with asyncio.timeout(MAX_SECONDS):
        async with _proxy(await upstream(api)) as proxy:
            response = await session.post(f"{proxy.url}/v1/messages", headers=_token(proxy))
            await started.wait()
        with pytest.raises(aiohttp.ClientError):
            await response.read()
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.post(f"{proxy.url}/v1/messages")


async def test_each_proxy_has_its_own_token() -> None:
    """A random token is generated unless one is given."""
    first, second = _proxy("http://x.invalid"), _proxy("http://x.invalid")
    assert first.run_token != second.run_token
    assert len(first.run_token.reveal()) >= 32
    assert _proxy("http://x.invalid", run_token=Secret("given")).run_token == Secret("given")


@pytest.mark.parametrize("credential", ["", "a b", "made-up\nkey", "made-up\r\nX-Injected: 1", "schlüssel"])
def test_credential_that_cannot_be_a_header_value_is_rejected(credential: str) -> None:
    """The error does not contain the credential."""
    with pytest.raises(CredentialUnusable) as rejection:
        CredentialProxy(Secret(credential), CredentialKind.API_KEY)
    assert not credential or credential not in str(rejection.value)


def test_representations_do_not_contain_the_credential() -> None:
    """Neither the `repr` of the proxy nor those of its attributes contain it."""
    proxy = _proxy("http://x.invalid")
    assert CREDENTIAL not in f"{proxy!r} {proxy} {vars(proxy)}"

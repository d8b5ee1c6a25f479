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

REAL = "made-up-real-credential"
#: Nothing here takes longer than a second or two on a busy machine; the CLI needs a few.
BOUND_SECONDS = 20.0
CLI_SECONDS = 60.0

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
Upstream: TypeAlias = Callable[[Handler], Awaitable[str]]
Cli: TypeAlias = Callable[..., Awaitable[tuple[int, list[dict[str, Any]]]]]


@pytest.fixture
def upstream(aiohttp_server: AiohttpServer) -> Upstream:
    """Serve a handler as the model API; gives its base URL."""

    async def start(handler: Handler) -> str:
        app = web.Application(client_max_size=2 * MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", handler)
        server = await aiohttp_server(app, auto_decompress=False)
        return str(server.make_url("/"))

    return start


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run the real CLI behind a proxy in a clean environment; gives its exit code and the lines it printed."""
    spec = importlib.util.find_spec("claude_agent_sdk")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the claude-agent-sdk package, which carries the CLI, is not installed")
    binary = Path(spec.submodule_search_locations[0], "_bundled", "claude")
    (tmp_path / "room").mkdir()

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
            cwd=tmp_path / "room",
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
    """What the agent asks with."""
    timeout = aiohttp.ClientTimeout(total=BOUND_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:
        yield session


def _proxy(upstream: str, kind: CredentialKind = CredentialKind.API_KEY, **options: Any) -> CredentialProxy:
    return CredentialProxy(Secret(REAL), kind, upstream=upstream, **options)


def _token(proxy: CredentialProxy) -> dict[str, str]:
    return {"X-Api-Key": proxy.run_token.reveal()}


async def _raw(proxy: CredentialProxy, head: str) -> tuple[int, bytes]:
    """Send the head of a request as it is, with the right token, and return status and answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    try:
        lines = (head, "Host: x", f"X-Api-Key: {proxy.run_token.reveal()}", "Connection: close", "Content-Length: 0")
        writer.write("\r\n".join((*lines, "", "")).encode())
        answer = await asyncio.wait_for(reader.read(), BOUND_SECONDS)
    finally:
        writer.close()
        await writer.wait_closed()
    return int(answer.split()[1]), answer


async def _fault(response: aiohttp.ClientResponse) -> tuple[int, str, str]:
    """Return status, kind and message of an error in the API's shape."""
    body = await response.json()
    assert body["type"] == "error"
    return response.status, body["error"]["type"], body["error"]["message"]


# --- the real agent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CredentialKind)
async def test_the_model_gets_the_credential_and_the_agent_never(cli: Cli, kind: CredentialKind) -> None:
    """The real CLI works behind the proxy; the model API sees the real credential, the agent's tools cannot."""

    def script(conversation: Conversation) -> Reply:
        if conversation.turn == 0:
            return UseTool("Bash", {"command": "env; tr '\\0' '\\n' < /proc/$PPID/environ", "description": "Look"})
        return Say(f"I saw: {conversation.last_tool_result}")

    async with ScriptedModel(script) as model, _proxy(model.url, kind) as proxy:
        code, lines = await cli(proxy, kind)
    assert code == 0
    assert proxy.run_token.reveal() in lines[-1]["result"]
    assert REAL not in json.dumps(lines)
    assert len(model.requests) >= 2
    for request in model.requests:
        shown = (request.headers.get("X-Api-Key"), request.headers.get("Authorization"))
        assert shown == ((REAL, None) if kind is CredentialKind.API_KEY else (None, f"Bearer {REAL}"))
        assert (OAUTH_BETA in request.headers["anthropic-beta"]) == (kind is CredentialKind.OAUTH)


@pytest.mark.parametrize(
    ("kind", "status"), [(CredentialKind.API_KEY, 401), (CredentialKind.OAUTH, 401), (CredentialKind.OAUTH, 403)]
)
async def test_a_rejected_credential_ends_the_agent_at_once(cli: Cli, kind: CredentialKind, status: int) -> None:
    """When the model API refuses the credential, the CLI ends in seconds and the proxy tells what the API said."""
    refusal = Fail(status, "authentication_error", f"{REAL} is not valid")
    async with ScriptedModel(sequence(refusal)) as model, _proxy(model.url, kind) as proxy:
        began = time.monotonic()
        code, lines = await cli(proxy, kind)
        took_seconds = time.monotonic() - began
    assert (code, lines[-1]["is_error"]) == (1, True)
    assert took_seconds < BOUND_SECONDS
    assert proxy.rejected == "*** is not valid"
    assert REAL not in json.dumps(lines)


# --- who may ask for what --------------------------------------------------------------------------------------------


async def test_only_the_token_of_the_task_opens_the_proxy(session: aiohttp.ClientSession) -> None:
    """Without the run token there is a 401 and nothing goes upstream; both ways of presenting it are taken."""
    async with ScriptedModel(sequence(Say("Hi"))) as model, _proxy(model.url) as proxy:
        token = proxy.run_token.reveal()
        for headers in (
            {},
            {"X-Api-Key": ""},
            {"X-Api-Key": REAL},
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
                status, kind, _ = await _fault(response)
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


def test_what_the_agent_may_ask_for() -> None:
    """Messages, token counts and models, spelled plainly, and nothing else that the credential opens."""
    asked = (*ALLOWED, *FORBIDDEN)
    assert list(ALLOWED) == [line for line in asked if is_allowed(*line.split(" ", 1))]
    assert not is_allowed("POST", "/v1/messages\n")
    assert not is_allowed("POST", "/v1/messages?é")


async def test_nothing_else_goes_upstream(upstream: Upstream) -> None:
    """On the wire too, what is not allowed is refused with an error, and the model API never hears of it."""
    heard: list[str] = []

    async def api(request: web.Request) -> web.Response:
        heard.append(f"{request.method} {request.raw_path}")
        return web.json_response({})

    async with _proxy(await upstream(api)) as proxy:
        for line in FORBIDDEN:
            status, answer = await _raw(proxy, f"{line} HTTP/1.1")
            assert (line, status // 100) == (line, 4)
            assert REAL.encode() not in answer
        assert heard == []
        for line in ALLOWED:
            assert (line, (await _raw(proxy, f"{line} HTTP/1.1"))[0]) == (line, 200)
    assert heard == list(ALLOWED)


# --- what passes -----------------------------------------------------------------------------------------------------


def test_only_known_headers_go_upstream() -> None:
    """Credentials, cookies and headers that could steer a gateway stay behind; those of the API and its client pass."""
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
    assert upstream_headers(headers, Secret(REAL), CredentialKind.API_KEY) == CIMultiDict({**common, "X-Api-Key": REAL})
    assert upstream_headers(headers, Secret(REAL), CredentialKind.OAUTH) == CIMultiDict(
        [*common.items(), ("Authorization", f"Bearer {REAL}"), ("anthropic-beta", OAUTH_BETA)]
    )


async def test_a_stream_comes_through_piece_by_piece(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """Each piece reaches the agent before the next one exists, and each piece of the agent's body the API likewise."""
    reached, read = asyncio.Event(), asyncio.Event()

    async def api(request: web.Request) -> web.StreamResponse:
        assert await request.content.readexactly(3) == b"one"
        reached.set()
        assert await request.content.read() == b"two"
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await read.wait()
        await response.write(b"data: 2\n\n")
        return response

    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        await reached.wait()
        yield b"two"

    async with (
        _proxy(await upstream(api)) as proxy,
        session.post(f"{proxy.url}/v1/messages", data=body(), headers=_token(proxy)) as response,
    ):
        assert response.content_type == "text/event-stream"
        assert await response.content.readuntil(b"\n\n") == b"data: 1\n\n"
        read.set()
        assert await response.content.read() == b"data: 2\n\n"


async def test_bodies_and_answers_pass_unchanged(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """Compressed bodies pass as they are, both ways, with the headers that a client acts on; cookies do not."""
    sent, answered = gzip.compress(b"question" * 1000), gzip.compress(b"answer" * 1000)
    kept = {
        "Content-Encoding": "gzip",
        "Content-Type": "application/json",
        "Request-Id": "req_1",
        "Retry-After": "7",
        "Anthropic-Ratelimit-Requests-Remaining": "9",
    }
    heard: list[tuple[bytes, str, str]] = []

    async def api(request: web.Request) -> web.Response:
        heard.append((await request.read(), request.headers["Content-Encoding"], request.headers["Content-Length"]))
        return web.Response(body=answered, headers={**kept, "Set-Cookie": "a=b", "Keep-Alive": "timeout=5"})

    async with (
        _proxy(await upstream(api)) as proxy,
        session.post(
            f"{proxy.url}/v1/messages", data=sent, headers={**_token(proxy), "Content-Encoding": "gzip"}
        ) as response,
    ):
        assert await response.read() == answered
    assert heard == [(sent, "gzip", str(len(sent)))]
    assert {name: response.headers.get(name) for name in kept} == kept
    assert response.headers["Content-Length"] == str(len(answered))
    assert {"Set-Cookie", "Keep-Alive"}.isdisjoint(response.headers)


async def test_hundreds_of_answers_run_at_once(upstream: Upstream) -> None:
    """The requests of many subagents do not wait for each other."""
    count = 200
    together = asyncio.Barrier(count)

    async def api(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await together.wait()
        await response.write(b"done")
        return response

    async with (
        _proxy(await upstream(api)) as proxy,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as many,
    ):

        async def ask() -> bytes:
            async with many.post(f"{proxy.url}/v1/messages", headers=_token(proxy)) as response:
                return await response.read()

        async with asyncio.timeout(BOUND_SECONDS):
            answers = await asyncio.gather(*(ask() for _ in range(count)))
    assert answers == [b"done"] * count


@pytest.mark.parametrize("told", [True, False])
async def test_a_body_beyond_the_limit_is_refused(
    upstream: Upstream, session: aiohttp.ClientSession, told: bool
) -> None:
    """More than the API would take is a 413, before it costs an upload if the size was told."""
    begun: list[str] = []

    async def api(request: web.Request) -> web.Response:
        begun.append(request.path)
        return web.Response(body=str(len(await request.read())).encode())

    async def body(size: int) -> AsyncIterator[bytes]:
        for start in range(0, size, 65536):
            yield bytes(min(65536, size - start))

    async def post(proxy: CredentialProxy, size: int) -> int:
        headers = {**_token(proxy), "Content-Length": str(size)} if told else _token(proxy)
        async with session.post(f"{proxy.url}/v1/messages", data=body(size), headers=headers) as response:
            assert response.status == 200 or (await _fault(response))[1] == "request_too_large"
            return response.status

    async with _proxy(await upstream(api)) as proxy:
        assert await post(proxy, MAX_BODY_BYTES) == 200
        assert await post(proxy, MAX_BODY_BYTES + 1) == 413
    assert len(begun) == (1 if told else 2)


# --- what goes wrong upstream ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [None, "gzip"])
async def test_errors_pass_without_the_credential(
    upstream: Upstream, session: aiohttp.ClientSession, encoding: str | None
) -> None:
    """An error keeps status and headers; a credential in it is masked, and what cannot be masked is replaced."""
    page = json.dumps({"type": "error", "error": {"type": "x", "message": f"no {REAL}"}}).encode()

    async def api(request: web.Request) -> web.Response:
        headers = {"Retry-After": "3", "X-Echo": f"Bearer {REAL}"}
        if encoding:
            return web.Response(status=529, body=gzip.compress(page), headers={**headers, "Content-Encoding": encoding})
        return web.Response(status=529, body=page, headers=headers, content_type="application/json")

    async with (
        _proxy(await upstream(api)) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=_token(proxy)) as response,
    ):
        status, _, message = await _fault(response)
    assert (status, message) == (529, "The model API answered with status 529." if encoding else "no ***")
    assert (response.headers["Retry-After"], response.headers["X-Echo"]) == ("3", "Bearer ***")
    assert proxy.rejected is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"<h1>Forbidden</h1>", "The model API answered with status 403."),
        (b'{"error": "no"}', "The model API answered with status 403."),
        (b"[" * 50_000, "The model API answered with status 403."),
        (b"x" * 1_000_000, "The model API answered with status 403."),
        (b'{"error": {"message": "' + b"y" * 5000 + b'"}}', "y" * 500),
        (b'{"error": {"message": "no made-up\\u002dreal-credential"}}', "no ***"),
    ],
)
async def test_a_rejection_is_one_bounded_sentence(
    upstream: Upstream, session: aiohttp.ClientSession, body: bytes, expected: str
) -> None:
    """Whatever the API or a gateway sends with a 403, `rejected` is a short text without the credential."""

    async def api(request: web.Request) -> web.Response:
        return web.Response(status=403, body=body)

    async with (
        _proxy(await upstream(api)) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=_token(proxy)) as response,
    ):
        assert (response.status, response.headers["X-Should-Retry"]) == (403, "false")
        assert len(await response.read()) <= MAX_ERROR_BYTES
        assert proxy.rejected == expected


async def test_a_redirect_is_not_followed(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """A redirect upstream is an error that says what to change; nobody follows it with the credential."""
    heard: list[str] = []

    async def api(request: web.Request) -> web.Response:
        heard.append(request.path)
        return web.Response(status=307, headers={"Location": "/elsewhere"})

    async with (
        _proxy(await upstream(api)) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=_token(proxy), allow_redirects=False) as response,
    ):
        status, _, message = await _fault(response)
    assert (status, response.headers.get("Location"), heard) == (502, None, ["/v1/messages"])
    assert "base URL" in message


async def test_an_api_that_is_down_is_a_502(session: aiohttp.ClientSession, unused_tcp_port: int) -> None:
    """When nothing answers upstream, the agent gets an error that it tries again after."""
    async with (
        _proxy(f"http://127.0.0.1:{unused_tcp_port}") as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=_token(proxy)) as response,
    ):
        assert (await _fault(response))[:2] == (502, "api_error")
        assert "X-Should-Retry" not in response.headers


async def test_an_api_that_stays_silent_is_a_502(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """Silence upstream has a bound."""

    async def api(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        _proxy(await upstream(api), idle_seconds=0.05) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=_token(proxy)) as response,
    ):
        status, _, message = await _fault(response)
    assert (status, message) == (502, "The model API did not answer in time (SocketTimeoutError).")


@pytest.mark.parametrize("ending", ["reset", "silence"])
async def test_a_stream_that_breaks_upstream_breaks_here(
    upstream: Upstream, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture, ending: str
) -> None:
    """A stream that was cut off never looks like a whole one, and leaves nothing in the log."""

    async def api(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half of ")
        if ending == "reset":
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
    assert REAL not in caplog.text


async def test_leaving_ends_the_request_upstream(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """When the agent goes away, its request ends upstream as well, before and within the answer."""
    begun, ended = asyncio.Queue[str](), asyncio.Queue[str]()

    async def api(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if request.query_string == "within":
            await response.prepare(request)
        await begun.put(request.query_string)
        try:
            await asyncio.Event().wait()
        finally:
            ended.put_nowait(request.query_string)
        return response

    async with _proxy(await upstream(api)) as proxy, asyncio.timeout(BOUND_SECONDS):
        for when in ("before", "within"):
            task = asyncio.ensure_future(
                session.post(f"{proxy.url}/v1/messages?{when}", headers=_token(proxy)).__aenter__()
            )
            assert await begun.get() == when
            if when == "before":
                task.cancel()
            else:
                (await task).close()
            assert await ended.get() == when


async def test_an_unknown_certificate_gets_no_credential(
    aiohttp_server: AiohttpServer, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """TLS upstream is verified: a server that nobody vouches for never sees a request."""
    heard: list[str] = []

    async def api(request: web.Request) -> web.Response:
        heard.append(request.path)
        return web.json_response({})

    app = web.Application()
    app.router.add_post("/v1/messages", api)
    server = await aiohttp_server(app, ssl=_self_signed(tmp_path))
    async with (
        _proxy(f"https://127.0.0.1:{server.port}") as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=_token(proxy)) as response,
    ):
        status, _, message = await _fault(response)
    assert (status, heard) == (502, [])
    assert "Certificate" in message


def _self_signed(folder: Path) -> ssl.SSLContext:
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
    (folder / "server.pem").write_bytes(private + certificate.public_bytes(pem))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.pem")
    return context


async def test_the_way_out_may_lead_through_a_proxy(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """With an egress proxy the request goes there, and names the model API."""
    heard: list[str] = []

    async def egress(request: web.Request) -> web.Response:
        heard.append(request.raw_path)
        return web.json_response({})

    url = await upstream(egress)
    async with (
        _proxy("http://model.invalid/base", egress_proxy=Secret(url)) as proxy,
        session.post(f"{proxy.url}/v1/messages?beta=true", headers=_token(proxy)) as response,
    ):
        assert response.status == 200
    assert heard == ["http://model.invalid/base/v1/messages?beta=true"]


# --- its life --------------------------------------------------------------------------------------------------------


async def test_nothing_listens_after_the_context(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """Leaving the context ends what is under way, at once, and closes the door."""
    begun = asyncio.Event()

    async def api(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        begun.set()
        await asyncio.Event().wait()
        return response

    async with asyncio.timeout(BOUND_SECONDS):
        async with _proxy(await upstream(api)) as proxy:
            response = await session.post(f"{proxy.url}/v1/messages", headers=_token(proxy))
            await begun.wait()
        with pytest.raises(aiohttp.ClientError):
            await response.read()
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.post(f"{proxy.url}/v1/messages")


async def test_each_task_has_a_token_of_its_own() -> None:
    """Two proxies never share a token, unless it was given."""
    first, second = _proxy("http://x.invalid"), _proxy("http://x.invalid")
    assert first.run_token != second.run_token
    assert len(first.run_token.reveal()) >= 32
    assert _proxy("http://x.invalid", run_token=Secret("given")).run_token == Secret("given")


@pytest.mark.parametrize("credential", ["", "a b", "made-up\nkey", "made-up\r\nX-Evil: 1", "schlüssel"])
def test_a_credential_that_fits_no_header_is_refused(credential: str) -> None:
    """A credential that cannot stand in a header is refused at once, in a sentence that does not show it."""
    with pytest.raises(CredentialUnusable) as refusal:
        CredentialProxy(Secret(credential), CredentialKind.API_KEY)
    assert not credential or credential not in str(refusal.value)


def test_the_credential_does_not_show() -> None:
    """Neither the proxy nor what it holds shows the credential."""
    proxy = _proxy("http://x.invalid")
    assert REAL not in f"{proxy!r} {proxy} {vars(proxy)}"

from __future__ import annotations

import asyncio
import json
import time

import aiohttp
import pytest
from aiohttp import web
from helpers.proxy import (
    CREDENTIAL,
    MAX_SECONDS,
    Cli,
    Upstream,
    cli,
    error_of,
    new_proxy,
    session,
    token_header,
    upstream,
)

from ccrun.task import Secret
from ccrun.testing.model import Conversation, Fail, Reply, Say, ScriptedModel, UseTool, sequence
from ccrun.worker.proxy import CredentialProxy
from ccrun.worker.upstream import OAUTH_BETA, CredentialKind
from ccrun.worker.upstream import Upstream as ModelApi

__all__ = ["cli", "session", "upstream"]


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

    async with ScriptedModel(script) as model, new_proxy(model.url, kind) as proxy:
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
    async with ScriptedModel(sequence(rejection)) as model, new_proxy(model.url, kind) as proxy:
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
    async with ScriptedModel(sequence(Say("Hi"))) as model, new_proxy(model.url) as proxy:
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
                status, kind, _ = await error_of(response)
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
    api = ModelApi(url="http://model.invalid", credential=Secret(CREDENTIAL), kind=CredentialKind.API_KEY)
    requests = (*ALLOWED, *FORBIDDEN)
    assert list(ALLOWED) == [line for line in requests if api.target(*line.split(" ", 1)) is not None]
    assert api.target("POST", "/v1/messages\n") is None
    assert api.target("POST", "/v1/messages?é") is None


async def test_only_allowed_requests_are_forwarded(upstream: Upstream) -> None:
    """Other requests, sent as raw bytes, are client errors and do not reach the model API."""
    received: list[str] = []

    async def api(request: web.Request) -> web.Response:
        received.append(f"{request.method} {request.raw_path}")
        return web.json_response({})

    async with new_proxy(await upstream(api)) as proxy:
        for line in FORBIDDEN:
            status, response = await _send_head(proxy, f"{line} HTTP/1.1")
            assert (line, status // 100) == (line, 4)
            assert CREDENTIAL.encode() not in response
        assert received == []
        for line in ALLOWED:
            assert (line, (await _send_head(proxy, f"{line} HTTP/1.1"))[0]) == (line, 200)
    assert received == list(ALLOWED)


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
        async with new_proxy(await upstream(api)) as proxy:
            response = await session.post(f"{proxy.url}/v1/messages", headers=token_header(proxy))
            await started.wait()
        with pytest.raises(aiohttp.ClientError):
            await response.read()
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.post(f"{proxy.url}/v1/messages")


async def test_each_proxy_has_its_own_token() -> None:
    """A random token is generated unless one is given."""
    first, second = new_proxy("http://x.invalid"), new_proxy("http://x.invalid")
    assert first.run_token != second.run_token
    assert len(first.run_token.reveal()) >= 32
    assert new_proxy("http://x.invalid", run_token=Secret("given")).run_token == Secret("given")


def test_representations_do_not_contain_the_credential() -> None:
    """Neither the `repr` of the proxy nor those of its attributes contain it."""
    proxy = new_proxy("http://x.invalid")
    assert CREDENTIAL not in f"{proxy!r} {proxy} {vars(proxy)}"

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from helpers.proxy import CREDENTIAL, MAX_SECONDS, Upstream, error_of, new_proxy, session, token_header, upstream
from pytest_aiohttp import AiohttpServer
from standins.tls import self_signed

from ccrun.egress import Egress
from ccrun.task import Secret
from ccrun.worker.proxy import (
    MAX_ERROR_BYTES,
)

__all__ = ["session", "upstream"]


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
        new_proxy(await upstream(api)) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=token_header(proxy)) as response,
    ):
        status, _, message = await error_of(response)
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
        new_proxy(await upstream(api)) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=token_header(proxy)) as response,
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
        new_proxy(await upstream(api)) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=token_header(proxy), allow_redirects=False) as response,
    ):
        status, _, message = await error_of(response)
    assert (status, response.headers.get("Location"), received) == (502, None, ["/v1/messages"])
    assert "base URL" in message


async def test_unreachable_model_api_is_502(session: aiohttp.ClientSession, unused_tcp_port: int) -> None:
    """The CLI may retry after this error."""
    async with (
        new_proxy(f"http://127.0.0.1:{unused_tcp_port}") as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=token_header(proxy)) as response,
    ):
        assert (await error_of(response))[:2] == (502, "api_error")
        assert "X-Should-Retry" not in response.headers


async def test_silent_model_api_is_502(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """A request fails when the model API sends nothing for `idle_seconds`."""

    async def api(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        new_proxy(await upstream(api), idle_seconds=0.05) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=token_header(proxy)) as response,
    ):
        status, _, message = await error_of(response)
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
        new_proxy(await upstream(api), idle_seconds=0.2) as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=token_header(proxy)) as response,
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

    async with new_proxy(await upstream(api)) as proxy, asyncio.timeout(MAX_SECONDS):
        for when in ("before", "during"):
            task = asyncio.ensure_future(
                session.post(f"{proxy.url}/v1/messages?{when}", headers=token_header(proxy)).__aenter__()
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
    server = await aiohttp_server(app, ssl=self_signed(tmp_path)[0])
    async with (
        new_proxy(f"https://127.0.0.1:{server.port}") as proxy,
        session.post(f"{proxy.url}/v1/messages", headers=token_header(proxy)) as response,
    ):
        status, _, message = await error_of(response)
    assert (status, received) == (502, [])
    assert "Certificate" in message


async def test_requests_use_the_egress_proxy(upstream: Upstream, session: aiohttp.ClientSession) -> None:
    """The egress proxy gets the request, with the URL of the model API."""
    received: list[str] = []

    async def egress(request: web.Request) -> web.Response:
        received.append(request.raw_path)
        return web.json_response({})

    url = await upstream(egress)
    async with (
        new_proxy("http://model.invalid/base", egress=Egress(http_proxy=Secret(url))) as proxy,
        session.post(f"{proxy.url}/v1/messages?beta=true", headers=token_header(proxy)) as response,
    ):
        assert response.status == 200
    assert received == ["http://model.invalid/base/v1/messages?beta=true"]

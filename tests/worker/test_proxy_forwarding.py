from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from helpers.proxy import MAX_SECONDS, Upstream, cli, error_of, new_proxy, session, token_header, upstream

from ccrun.worker.proxy import MAX_BODY_BYTES, CredentialProxy

__all__ = ["cli", "session", "upstream"]


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
        new_proxy(await upstream(api)) as proxy,
        session.post(f"{proxy.url}/v1/messages", data=body(), headers=token_header(proxy)) as response,
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
        new_proxy(await upstream(api)) as proxy,
        session.post(
            f"{proxy.url}/v1/messages", data=request_body, headers={**token_header(proxy), "Content-Encoding": "gzip"}
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
        new_proxy(await upstream(api)) as proxy,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as unlimited,
    ):

        async def post() -> bytes:
            async with unlimited.post(f"{proxy.url}/v1/messages", headers=token_header(proxy)) as response:
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
        headers = {**token_header(proxy), "Content-Length": str(size)} if with_length else token_header(proxy)
        async with session.post(f"{proxy.url}/v1/messages", data=body(size), headers=headers) as response:
            assert response.status == 200 or (await error_of(response))[1] == "request_too_large"
            return response.status

    async with new_proxy(await upstream(api)) as proxy:
        assert await post(proxy, MAX_BODY_BYTES) == 200
        assert await post(proxy, MAX_BODY_BYTES + 1) == 413
    assert len(started) == (1 if with_length else 2)

"""What counts of a response, and what is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import attrs
import pytest
from aiohttp import web
from helpers.callbacks import QUICK, raw_receiver, send
from pytest_aiohttp import AiohttpServer

from ccrun.callbacks.deliver import Delivery

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def respond_with(response: bytes, *, closes: bool = True) -> Serve:
    """Return a receiver that reads a request and sends these bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        await reader.readexactly(length)
        writer.write(response)
        await writer.drain()
        if closes:
            writer.close()
        else:
            await asyncio.Event().wait()

    return serve


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"X-Long: " + b"x" * 9_000 + b"\r\n\r\n",
        b"".join(b"X-%d: y\r\n" % number for number in range(150)) + b"\r\n",
        b"Content-Encoding: made-up\r\nContent-Length: 3\r\n\r\nabc",
        b"Content-Length: 3\r\nContent-Length: 5\r\n\r\nabc",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        b"Transfer-Encoding: chunked\r\n\r\nnot a length\r\n",
        b"Content-Length: 1000\r\n\r\nabc",
        b"Content-Length: -1\r\n\r\n",
        b"no header\r\n\x00\xff: \r\n\r\n",
    ],
)
@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("status", [b"200 OK", b"204", b"299 Made Up"])
async def test_any_2xx_is_a_success(status: bytes, rest: bytes, closes: bool) -> None:
    """Whatever follows the status line does not count, nor whether it follows."""
    async with raw_receiver(respond_with(b"HTTP/1.1 " + status + b"\r\n" + rest, closes=closes)) as url:
        assert Delivery(delivered=True, attempts=1) == await send(url)


async def test_interim_responses_are_skipped() -> None:
    """They are not the response (RFC 9110, section 15.2)."""
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    async with raw_receiver(respond_with(interim + b"HTTP/1.0 202 Accepted\r\n\r\n")) as url:
        assert Delivery(delivered=True, attempts=1) == await send(url)


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 2OO OK\r\n\r\n",
        b"HTTP/1.1 20\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/1.1 200OK\r\n\r\n",
        b"200 OK\r\n\r\n",
        b"HTTP/1.1 200",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"x" * 100_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20 + b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
async def test_other_status_lines_are_no_success(response: bytes) -> None:
    """A receiver that does not use HTTP has accepted nothing."""
    policy = attrs.evolve(QUICK, attempts=1)
    async with raw_receiver(respond_with(response)) as url:
        assert "The receiver's response is not HTTP." == (await send(url, policy=policy)).error


async def test_early_response_counts() -> None:
    """A receiver may respond and close the connection before it has read a large body."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with raw_receiver(serve) as url:
        delivery = await send(url, b"1" * 1_000_000)
    assert ("The receiver responded with 413.", True) == (delivery.error, delivery.final)


@pytest.mark.parametrize(
    "target",
    [
        "/hook?api-version=2016-10-01&sp=%2Ftriggers%2Fmanual%2Frun&sv=1.0&sig=dGVzdA%3D%3D",
        "/a%2Fb/%7Euser/%e4?x=%41&y=a+b&z=1;2",
        "/a//b/../c/./d",
        "/?",
        "/hook?a=b?c=d/e",
        "/a:b@c!$&'()*+,;=",
    ],
)
async def test_url_is_sent_as_it_was_given(aiohttp_server: AiohttpServer, target: str) -> None:
    """Signed URLs depend on each byte of path and query. A fragment is not sent."""
    seen: list[str] = []

    async def accept(request: web.Request) -> web.Response:
        seen.append(request.raw_path)
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", accept)
    server = await aiohttp_server(app)
    assert (await send(f"http://127.0.0.1:{server.port}{target}#fragment")).delivered
    assert [target] == seen

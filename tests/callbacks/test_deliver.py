from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import time
from pathlib import Path

import attrs
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.callbacks import (
    QUICK,
    ScriptedReceiver,
    raw_receiver,
    receiver,
    respond,
    send,
)
from standins.tls import self_signed

from ccrun.callbacks.deliver import Delivery

# --- the request -----------------------------------------------------------------------------------------------------


async def test_request_has_a_content_length() -> None:
    """A large body is sent with its length, not in chunks, as receivers behind a proxy need it."""
    body = b'"' + b"x" * 3_000_000 + b'"'
    async with receiver(respond(200)) as scripted:
        assert Delivery(delivered=True, attempts=1) == await send(scripted.url, body)
        [(headers, got)] = scripted.requests
        assert body == got
        assert str(len(body)) == headers["content-length"]


@pytest.mark.parametrize(
    ("userinfo", "credentials"),
    [("user:pass", "user:pass"), ("us%40er:p%C3%A4ss%E2%82%AC", "us@er:päss€"), ("user", "user:"), (":pass", ":pass")],
)
async def test_userinfo_becomes_basic_authentication(userinfo: str, credentials: str) -> None:
    """The user and password of the URL are sent as an `Authorization` header in UTF-8 (RFC 7617), not in the URL."""
    async with receiver(respond(200)) as scripted:
        await send(scripted.url.replace("http://", f"http://{userinfo}@"))
        [(headers, _)] = scripted.requests
        assert f"Basic {base64.b64encode(credentials.encode()).decode()}" == headers["authorization"]
        assert "@" not in headers["host"]


async def test_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delivery ignores proxy variables, because a proxy would bypass the guard."""
    async with receiver(respond(200)) as proxy, receiver(respond(200)) as scripted:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert Delivery(delivered=True, attempts=1) == await send(scripted.url)
        assert proxy.requests == []


async def test_untrusted_certificate_gets_no_request(tmp_path: Path) -> None:
    """Nothing is sent to a receiver whose certificate is not trusted."""
    scripted = ScriptedReceiver([respond(200)])
    app = web.Application()
    app.router.add_post("/", scripted.handle)
    server = TestServer(app, scheme="https")
    await server.start_server(ssl=self_signed(tmp_path)[0])
    delivery = await send(f"https://localhost:{server.port}/", policy=attrs.evolve(QUICK, attempts=1))
    await server.close()
    assert delivery.error == "The receiver's certificate cannot be trusted."
    assert scripted.requests == []


# --- the response ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(status: int) -> None:
    """A redirect fails the delivery, because it could send the body and its signature to a private address."""
    async with receiver(respond(status, Location="/elsewhere"), respond(200)) as scripted:
        error = f"The receiver responded with {status} to another address; redirects are not followed."
        assert Delivery(delivered=False, attempts=1, error=error, final=True, status=status) == await send(scripted.url)
        assert len(scripted.requests) == 1


async def test_each_connection_failure_has_its_error() -> None:
    """Each kind of failure has its own error, without any part of the URL."""

    async def close(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async def send_no_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP\r\n")
        await writer.drain()
        await reader.read()

    once = attrs.evolve(QUICK, attempts=1)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    async with raw_receiver(close) as closing, raw_receiver(send_no_http) as no_http:
        urls = {
            closing: "The receiver closed the connection without a response.",
            no_http: "The receiver's response is not HTTP.",
            no_http.replace("http:", "https:"): "No secure connection to the receiver could be made.",
            f"http://user:made-up@127.0.0.1:{port}/path?token=made-up": "The receiver could not be connected to.",
            "http://user:made-up@name.invalid/path?token=made-up": "The receiver's name could not be looked up.",
        }
        assert urls == {url: (await send(url, policy=once)).error for url in urls}


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hook",
        "/hook",
        "ftp://example.com/",
        "file:///etc/passwd",
        "http://",
        "http://[::1",
        "http://example.com:99999/",
        f"http://{'a' * 70}.example.com/",
        "http://us%3Aer:pw@127.0.0.1:1/",
    ],
)
async def test_invalid_url_is_a_final_failure(url: str) -> None:
    """The delivery is not retried, and the error does not contain the URL."""
    error = "The callback's address is not a valid URL."
    assert Delivery(delivered=False, attempts=1, error=error, final=True) == await send(url)


@pytest.mark.parametrize("pause", [0.0, 0.05])
async def test_body_of_a_response_is_not_read(pause: float) -> None:
    """Only the status of a response counts, even if its body is huge or never ends."""
    written = 0

    async def stream_body(request: web.Request) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse(headers={"Content-Encoding": "gzip"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                await response.write(b"x" * 1024**2 if pause == 0 else b"x")
                written += 1
                await asyncio.sleep(pause)
        return response

    async with receiver(stream_body) as scripted:
        began = time.monotonic()
        assert Delivery(delivered=True, attempts=1) == await send(scripted.url)
        assert time.monotonic() - began < 30
    assert written < 100


async def test_cancelled_delivery_closes_its_connection() -> None:
    """A cancelled delivery stops immediately and closes its connection."""
    connected, closed = asyncio.Event(), asyncio.Event()

    async def wait_for_close(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()
        closed.set()

    async with raw_receiver(wait_for_close) as url:
        task = asyncio.create_task(send(url))
        async with asyncio.timeout(30):
            await connected.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await closed.wait()

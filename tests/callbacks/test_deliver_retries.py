from __future__ import annotations

import asyncio
import datetime as dt
import socket
import struct
import time

import pytest
from aiohttp import web
from helpers.callbacks import (
    BODY,
    SECRET,
    Connection,
    raw_receiver,
    receiver,
    respond,
    send,
)
from hypothesis import example, given
from hypothesis import strategies as st

from ccrun.callbacks.deliver import Delivery, RetryPolicy, _retry_after
from ccrun.callbacks.sign import sign

# --- attempts --------------------------------------------------------------------------------------------------------


async def test_failed_attempts_are_retried_until_success() -> None:
    """A receiver that fails twice gets the same body with the same ID three times, and no more after the success."""
    async with receiver(respond(500), respond(503), respond(204)) as scripted:
        assert Delivery(delivered=True, attempts=3) == await send(scripted.url)
        assert [body for _, body in scripted.requests] == [BODY] * 3
        assert {"msg-t-1"} == {headers["webhook-id"] for headers, _ in scripted.requests}


async def test_retry_is_signed_again_and_obeys_retry_after() -> None:
    """The second attempt waits for `Retry-After`, and has a new timestamp and signature."""
    async with receiver(respond(429, Retry_After="1"), respond(200)) as scripted:
        started = time.monotonic()
        assert Delivery(delivered=True, attempts=2) == await send(scripted.url)
        assert time.monotonic() - started >= 1
        first, second = (int(headers["x-webhook-timestamp"]) for headers, _ in scripted.requests)
        assert second > first
        for headers, body in scripted.requests:
            timestamp = int(headers["x-webhook-timestamp"])
            expected = sign(body, webhook_id="msg-t-1", secret=SECRET, timestamp=timestamp)
            assert {name.lower(): value for name, value in expected.items()}.items() <= headers.items()


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 599])
async def test_number_of_attempts_is_bounded(status: int) -> None:
    """After the last attempt the delivery has failed, but not finally."""
    async with receiver(respond(status)) as scripted:
        expected = Delivery(delivered=False, attempts=4, error=f"The receiver responded with {status}.", status=status)
        assert expected == await send(scripted.url)
        assert len(scripted.requests) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 410, 413, 422])
async def test_client_error_is_final(status: int) -> None:
    """A status that another attempt would not change is not retried."""
    async with receiver(respond(status), respond(200)) as scripted:
        expected = Delivery(
            delivered=False, attempts=1, error=f"The receiver responded with {status}.", final=True, status=status
        )
        assert expected == await send(scripted.url)
        assert len(scripted.requests) == 1


async def test_long_retry_after_ends_the_delivery() -> None:
    """When `Retry-After` is longer than the time that is left, the delivery stops and returns the requested delay."""
    async with receiver(respond(503, Retry_After="3600"), respond(200)) as scripted:
        started = time.monotonic()
        error = "The receiver responded with 503."
        assert Delivery(delivered=False, attempts=1, error=error, retry_after_seconds=3600, status=503) == await send(
            scripted.url
        )
        assert time.monotonic() - started < 60
        assert len(scripted.requests) == 1


async def test_total_time_is_bounded() -> None:
    """An attempt starts only if its timeout fits into the total time, so a delivery never takes longer."""
    policy = RetryPolicy(attempt_seconds=0.2, attempts=1000, total_seconds=1, first_delay_seconds=0.001)
    async with receiver(respond(500)) as scripted:
        started = time.monotonic()
        delivery = await send(scripted.url, policy=policy)
        assert time.monotonic() - started < 30
        assert 2 <= delivery.attempts == len(scripted.requests) < 1000


async def hang(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Read nothing and send nothing."""
    await asyncio.Event().wait()


async def send_headers_forever(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send one header after the other, without end."""
    writer.write(b"HTTP/1.1 500 Internal Server Error\r\n")
    while True:
        writer.write(b"X-Header: x\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("connection", [hang, send_headers_forever])
@pytest.mark.parametrize("size", [100, 32_000_000])
async def test_attempt_has_a_timeout(connection: Connection, size: int) -> None:
    """An attempt stops after its timeout, whether the receiver sends nothing or endless headers, and whatever the body's size."""
    policy = RetryPolicy(attempt_seconds=0.2, attempts=2, total_seconds=10, first_delay_seconds=0.01)
    async with raw_receiver(connection) as url:
        started = time.monotonic()
        delivery = await send(url, b"1" * size, policy=policy)
        assert time.monotonic() - started < 60
        error = "The receiver did not respond within 0.2 s."
        assert Delivery(delivered=False, attempts=2, error=error) == delivery


async def test_connection_reset_is_retried() -> None:
    """A connection that is reset before the response is a failed attempt."""
    resets = 2

    async def reset_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal resets
        await reader.readuntil(b"\r\n\r\n")
        if resets:
            resets -= 1
            sock: socket.socket = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            await reader.read()

    async with raw_receiver(reset_twice) as url:
        assert Delivery(delivered=True, attempts=3) == await send(url)


async def test_delivery_can_be_cancelled_between_attempts() -> None:
    """A delivery that is cancelled while it waits for a retry stops immediately."""
    responded = asyncio.Event()

    async def fail(request: web.Request) -> web.StreamResponse:
        asyncio.get_running_loop().call_later(0.1, responded.set)
        return await respond(500)(request)

    async with receiver(fail) as scripted:
        task = asyncio.create_task(send(scripted.url, policy=RetryPolicy(first_delay_seconds=10)))
        async with asyncio.timeout(30):
            await responded.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert len(scripted.requests) == 1


# --- Retry-After -----------------------------------------------------------------------------------------------------


NOW = dt.datetime(2025, 1, 10, 12, 0, 0, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("0", 0),
        ("120", 120),
        ("9" * 5000, 24 * 3600),
        ("Fri, 10 Jan 2025 12:00:30 GMT", 30),
        ("Fri, 10 Jan 2025 11:00:00 GMT", 0),
        ("Fri, 10 Jan 2025 12:00:30 -0000", 30),
        ("Fri, 10 Jan 2035 12:00:00 GMT", 24 * 3600),
        ("-1", None),
        ("1.5", None),
        ("²", None),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float | None) -> None:
    """A number of seconds or a date is parsed and bounded; any other value is ignored."""
    assert seconds == _retry_after(header, NOW)


@given(header=st.text() | st.from_regex(r"[A-Z][a-z]{2}, [0-9]+ [A-Z][a-z]{2} [0-9]+ [0-9]+:[0-9:]+ [+-]?[0-9A-Z]+"))
@example(header="Fri, 10 Jan 99999 12:00:30 GMT")
@example(header="Fri, 10 Jan 2025 12:00:30 +99999999999999999999")
@example(header="Fri, 31 Dec 9999 23:59:59 -2359")
@example(header="Mon, 01 Jan 0001 00:00:00 +2359")
def test_any_retry_after_is_accepted(header: str) -> None:
    """No value of the header raises, and the delay is always within its bounds."""
    seconds = _retry_after(header, NOW)
    assert seconds is None or 0 <= seconds <= 24 * 3600

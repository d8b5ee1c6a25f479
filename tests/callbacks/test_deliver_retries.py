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
    Conversation,
    answer,
    raw_receiver,
    receiver,
    send,
)
from hypothesis import example, given
from hypothesis import strategies as st

from ccrun.callbacks.deliver import Delivery, RetryPolicy, _retry_after
from ccrun.callbacks.sign import sign

# --- attempts --------------------------------------------------------------------------------------------------------


async def test_tries_again_until_it_is_taken() -> None:
    """A receiver that fails twice gets the same bytes under the same ID a third time, and never again after that."""
    async with receiver(answer(500), answer(503), answer(204)) as scripted:
        assert Delivery(delivered=True, attempts=3) == await send(scripted.url)
        assert [body for _, body in scripted.got] == [BODY] * 3
        assert {"msg-t-1"} == {headers["webhook-id"] for headers, _ in scripted.got}


async def test_each_try_is_signed_anew_and_retry_after_is_honoured() -> None:
    """The second try comes no sooner than the receiver asked for, with a timestamp and a signature of its own."""
    async with receiver(answer(429, Retry_After="1"), answer(200)) as scripted:
        began = time.monotonic()
        assert Delivery(delivered=True, attempts=2) == await send(scripted.url)
        assert time.monotonic() - began >= 1
        first, second = (int(headers["x-webhook-timestamp"]) for headers, _ in scripted.got)
        assert second > first
        for headers, body in scripted.got:
            stamped = int(headers["x-webhook-timestamp"])
            expected = sign(body, webhook_id="msg-t-1", secret=SECRET, timestamp=stamped)
            assert {name.lower(): value for name, value in expected.items()}.items() <= headers.items()


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 599])
async def test_gives_up_after_its_attempts(status: int) -> None:
    """A receiver that goes on failing is left alone after the last attempt, and may be asked again another day."""
    async with receiver(answer(status)) as scripted:
        expected = Delivery(delivered=False, attempts=4, error=f"The receiver answered {status}.")
        assert expected == await send(scripted.url)
        assert len(scripted.got) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 410, 413, 422])
async def test_a_refusal_is_final(status: int) -> None:
    """An answer that would be the same the next time is not asked for again."""
    async with receiver(answer(status), answer(200)) as scripted:
        expected = Delivery(delivered=False, attempts=1, error=f"The receiver answered {status}.", final=True)
        assert expected == await send(scripted.url)
        assert len(scripted.got) == 1


async def test_does_not_wait_longer_than_it_has_time() -> None:
    """A receiver that wants to be left alone for longer than the delivery lasts is; what it asked for is passed on."""
    async with receiver(answer(503, Retry_After="3600"), answer(200)) as scripted:
        began = time.monotonic()
        error = "The receiver answered 503."
        assert Delivery(delivered=False, attempts=1, error=error, retry_after_seconds=3600) == await send(scripted.url)
        assert time.monotonic() - began < 5
        assert len(scripted.got) == 1


async def test_total_time_is_bounded() -> None:
    """No try is begun that could not have its full time, so tries and pauses together keep within the total."""
    policy = RetryPolicy(attempt_seconds=0.2, attempts=1000, total_seconds=1, first_delay_seconds=0.001)
    async with receiver(answer(500)) as scripted:
        began = time.monotonic()
        delivery = await send(scripted.url, policy=policy)
        assert time.monotonic() - began < 1
        assert 2 <= delivery.attempts == len(scripted.got) < 1000


async def hang(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Never read, never answer."""
    await asyncio.Event().wait()


async def drip_head(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one header after the other, without end."""
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-Header: x\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("conversation", [hang, drip_head])
@pytest.mark.parametrize("size", [100, 32_000_000])
async def test_a_receiver_that_hangs_costs_a_bounded_time(conversation: Conversation, size: int) -> None:
    """A receiver that does not answer, or never ends its answer's head, is given up for this try, read or unread."""
    policy = RetryPolicy(attempt_seconds=0.2, attempts=2, total_seconds=10, first_delay_seconds=0.01)
    async with raw_receiver(conversation) as url:
        began = time.monotonic()
        delivery = await send(url, b"1" * size, policy=policy)
        assert time.monotonic() - began < 5
        error = "The receiver did not answer within 0.2 s."
        assert Delivery(delivered=False, attempts=2, error=error) == delivery


async def test_a_reset_is_tried_again() -> None:
    """A connection that is reset before the answer counts as no answer."""
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


async def test_cancelling_ends_a_pause() -> None:
    """A delivery that is cancelled between two tries is over at once too."""
    answered = asyncio.Event()

    async def fail(request: web.Request) -> web.StreamResponse:
        asyncio.get_running_loop().call_later(0.1, answered.set)
        return await answer(500)(request)

    async with receiver(fail) as scripted:
        task = asyncio.create_task(send(scripted.url, policy=RetryPolicy(first_delay_seconds=10)))
        async with asyncio.timeout(5):
            await answered.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert len(scripted.got) == 1


# --- Retry-After -----------------------------------------------------------------------------------------------------


NOW = dt.datetime(2025, 1, 10, 12, 0, 0, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("wish", "seconds"),
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
def test_retry_after(wish: str | None, seconds: float | None) -> None:
    """Seconds and dates are understood and bounded; what is neither is passed over."""
    assert seconds == _retry_after(wish, NOW)


@given(wish=st.text() | st.from_regex(r"[A-Z][a-z]{2}, [0-9]+ [A-Z][a-z]{2} [0-9]+ [0-9]+:[0-9:]+ [+-]?[0-9A-Z]+"))
@example(wish="Fri, 10 Jan 99999 12:00:30 GMT")
@example(wish="Fri, 10 Jan 2025 12:00:30 +99999999999999999999")
@example(wish="Fri, 31 Dec 9999 23:59:59 -2359")
@example(wish="Mon, 01 Jan 0001 00:00:00 +2359")
def test_retry_after_survives_anything(wish: str) -> None:
    """No header of a receiver breaks the delivery."""
    seconds = _retry_after(wish, NOW)
    assert seconds is None or 0 <= seconds <= 24 * 3600

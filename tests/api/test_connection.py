"""Clients that are slow, and clients that close their side of the connection before they have the response."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from helpers.api import Api, api_on, until
from helpers.service import WAIT_SECONDS

from ccrun.api.connection import START_SECONDS
from ccrun.task import TaskId

TASK = TaskId("half-closed")


def post(path: str, body: bytes, *, length: int | None = None) -> bytes:
    """Return a request with this body. `length` is the stated length of the body, if it is not its own."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


async def half_closed(api: Api, request: bytes) -> bytes:
    """Send a request and the end of the connection at once; return all bytes until the server closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    try:
        writer.write(request)
        writer.write_eof()
        async with asyncio.timeout(WAIT_SECONDS):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize("storage", ["fast", "slow"])
async def test_request_gets_its_response(api: Api, storage: str) -> None:
    """However long the response takes, the client gets it, and the connection is closed after it."""
    if storage == "slow":
        api.blobs.gate = asyncio.Event()
        asyncio.get_running_loop().call_later(2 * START_SECONDS, api.blobs.gate.set)
    body = json.dumps(api.body(taskId=TASK, callbackUrl="http://127.0.0.1:9/")).encode()
    head, _, answer = (await half_closed(api, post("/run-async", body))).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 202 "), head
    assert TASK == json.loads(answer)["taskId"]


async def test_end_never_overtakes_the_request(api: Api) -> None:
    """A request that arrives together with the end of its connection is answered each time."""
    responses = await asyncio.gather(
        *(half_closed(api, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(50))
    )
    assert {b"HTTP/1.1 200 OK"} == {response.partition(b"\r\n")[0] for response in responses}


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /heal", post("/run-async", b'{"prompt": "Do', length=99)],
    ids=["nothing", "half of the head", "half of the body"],
)
async def test_incomplete_request_is_closed(api: Api, sent: bytes) -> None:
    """There is no response to wait for, and no task."""
    assert b"" == await half_closed(api, sent)
    assert [] == api.jobs.launched


async def test_stream_ends(api: Api) -> None:
    """A client that leaves closes its side too, so its stream ends at once."""
    task_id = await api.submit_started()
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(f"GET /tasks/{task_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    await reader.readuntil(b"\n\n")
    writer.write_eof()
    async with asyncio.timeout(WAIT_SECONDS):
        await reader.read()
    await until(lambda: api.feed.readers(task_id) == 0)
    writer.close()


async def test_task_that_is_run_is_streamed(api: Api) -> None:
    """The stream of `POST /run` that begins after the end of the client's side lasts until the task has finished."""
    body = json.dumps(api.body(taskId=TASK)).encode()
    reading = asyncio.create_task(half_closed(api, post("/run", body)))
    await until(lambda: api.feed.readers(TASK) > 0)
    await asyncio.sleep(2 * START_SECONDS)  # The connection would be closed by now.
    await api.start(TASK)
    await api.finish(TASK)
    assert b"event: done\n" in await reading


async def test_regular_requests_keep_their_connection(api: Api) -> None:
    """A client that does not close its side can send more requests."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    for _ in range(3):
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(WAIT_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(b'{"status":"ok"}'))
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nConnection: close\r\n" not in head
    writer.close()


@pytest.mark.parametrize(
    "sent", [b"G", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nHost: a\r\nX: "], ids=str
)
async def test_slow_head_ends_the_connection(tmp_path: Path, sent: bytes) -> None:
    """A client that begins a request and does not finish its head is disconnected, also after another request."""
    async with api_on(tmp_path, head_seconds=0.2) as api, asyncio.timeout(WAIT_SECONDS):
        for first in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
            if first:
                writer.write(first)
                await reader.readuntil(b'{"status":"ok"}')
            for byte in sent:
                writer.write(bytes([byte]))
                await writer.drain()
            assert b"" == await reader.read()
            writer.close()


async def test_time_for_the_head_does_not_limit_the_rest(tmp_path: Path) -> None:
    """A slow body, a slow response and the pause between two requests may take longer."""
    async with api_on(tmp_path, head_seconds=0.2) as api, asyncio.timeout(WAIT_SECONDS):
        api.blobs.gate = asyncio.Event()
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        request = post("/run-async", json.dumps(api.body(taskId=TASK, callbackUrl="http://127.0.0.1:9/")).encode())
        writer.write(request[:-5])
        await asyncio.sleep(0.6)
        writer.write(request[-5:])
        await asyncio.sleep(0.6)
        api.blobs.gate.set()
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
        await reader.readuntil(b"}")
        await asyncio.sleep(0.6)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()

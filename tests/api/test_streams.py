from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import structlog.testing
from helpers.api import COMPLETED, FAILED, Api, api_on, until
from helpers.service import WAIT_SECONDS, Event, read_events

from ccrun.api.dependencies import ApiTimeouts
from ccrun.lifecycle import cancelled_outcome
from ccrun.task import Outcome, TaskId

#: The log of the tasks here: three chunks, the last of one line.
CHUNKS: Final = (
    (b'{"type":"system","n":1}', b'{"type":"assistant","n":2}', '{"type":"assistant","text":"é \u2028 \\n"}'.encode()),
    (b'{"type":"user","n":4}', b'{"type":"assistant","n":5}'),
    (b'{"type":"result","n":6}',),
)
IDS: Final = tuple(f"{chunk}:{line}" for chunk, lines in enumerate(CHUNKS, 1) for line in range(1, len(lines) + 1))
#: A line, and the number of such lines that no buffers between service and client can hold.
MEGABYTE: Final = b'{"x":"' + b"y" * 1_000_000 + b'"}'
LONG_LOG_LINES: Final = 24
RETRY: Final = b"retry: 1000\n"
#: After all of `CHUNKS`.
CAUGHT_UP: Final = b"id: 4:0\nevent: caught_up\ndata: {}\n\n"


async def add_log(api: Api, task_id: TaskId) -> None:
    """Write `CHUNKS` as the log of a task."""
    for number, lines in enumerate(CHUNKS, 1):
        await api.add_chunk(task_id, number, *lines)


async def finished_with_log(api: Api, outcome: Outcome = COMPLETED) -> TaskId:
    """Return the ID of a finished task with the log `CHUNKS`."""
    task_id = await api.submit(metadata={"10": 1.5, "2": "é"})
    await api.start(task_id)
    await add_log(api, task_id)
    await api.finish(task_id, outcome)
    return task_id


async def running_with_log(api: Api) -> TaskId:
    """Return the ID of a running task with the log `CHUNKS`."""
    task_id = await api.submit()
    await api.start(task_id)
    await add_log(api, task_id)
    return task_id


async def stream_of(api: Api, path: str, **request: Any) -> bytes:
    """Return the body of a stream that ends."""
    async with api.http.get(api.url + path, **request) as response:
        assert response.status == 200, await response.text()
        return await response.read()


def ids_of(events: Iterable[Event]) -> list[str | None]:
    """Return the IDs of the lines and of the end."""
    return [event.id for event in events if event.name in ("message", "done")]


async def task_event(api: Api, task_id: TaskId, *, at: str = "1:0") -> bytes:
    """Return the first event of a stream that starts at a position."""
    status = (await api.store.record(task_id)).status
    data = f'{{"taskId":"{task_id}","status":"{status}","logsPath":"{api.store.logs_path(task_id)}"}}'
    return f"id: {at}\nevent: task\ndata: {data}\n\n".encode()


def line_events(*, after: str | None = None) -> bytes:
    """Return the events of `CHUNKS`, from the start or after an event ID."""
    lines = [line.replace(b"\xe2\x80\xa8", b"\\u2028") for chunk in CHUNKS for line in chunk]
    start = 0 if after is None else IDS.index(after) + 1
    return b"".join(
        b"id: %b\ndata: %b\n\n" % (name.encode(), line) for name, line in list(zip(IDS, lines, strict=True))[start:]
    )


# --- the events of a task --------------------------------------------------------------------------------------------


async def test_finished_task_is_replayed_exactly(api: Api) -> None:
    """The stream is retry, task, each line with its ID, `caught_up` and `done`, byte for byte, without carriage returns."""
    task_id = await finished_with_log(api)
    expected = RETRY + await task_event(api, task_id) + line_events() + CAUGHT_UP + await api.done_event(task_id)
    assert expected == await stream_of(api, f"/tasks/{task_id}/events")
    assert b"\r" not in expected


@pytest.mark.parametrize(
    ("outcome", "before_done"),
    [
        (FAILED, b'event: error\ndata: {"error":"Claude process exited with code 1","exitCode":1}\n\n'),
        (cancelled_outcome(), b'event: cancelled\ndata: {"taskId":"%b"}\n\n'),
    ],
    ids=["failed", "cancelled"],
)
async def test_failed_and_cancelled_tasks_have_an_event_before_done(
    api: Api, outcome: Outcome, before_done: bytes
) -> None:
    """A failed task has an `error` event, a cancelled one a `cancelled` event."""
    task_id = await finished_with_log(api, outcome)
    stream = await stream_of(api, f"/tasks/{task_id}/events")
    last = before_done.replace(b"%b", task_id.encode()) + await api.done_event(task_id)
    assert stream.endswith(CAUGHT_UP + last)


async def test_done_has_the_payload_of_the_callback(api: Api) -> None:
    """The data of `done` has the fields of a callback, with metadata in JavaScript's order."""
    task_id = await finished_with_log(api)
    done = (await api.events(f"/tasks/{task_id}/events"))[-1]
    assert ("done", "end") == (done.name, done.id)
    assert ["taskId", "status", "exitCode", "logsPath", "summary", "error", "metadata"] == list(done.data)
    assert ["2", "10"] == list(done.data["metadata"])


async def test_headers_disable_caching_and_buffering(api: Api) -> None:
    """The headers declare an event stream that proxies neither cache nor buffer."""
    task_id = await finished_with_log(api)
    async with api.http.get(f"{api.url}/tasks/{task_id}/events") as response:
        values = [response.headers[name] for name in ("Content-Type", "Cache-Control", "X-Accel-Buffering")]
    assert ["text/event-stream", "no-cache, no-transform", "no"] == values


async def test_stream_of_a_task_without_log(api: Api) -> None:
    """Without a log, the stream has task, `caught_up` and `done`."""
    task_id = await api.submit()
    await api.start(task_id)
    await api.finish(task_id, FAILED)
    names = [event.name for event in await api.events(f"/tasks/{task_id}/events")]
    assert ["task", "caught_up", "error", "done"] == names


async def test_large_line_is_one_event(api: Api) -> None:
    """A line that is written in several pieces is received unchanged."""
    task_id = await api.submit()
    await api.start(task_id)
    line = b'{"x":"' + b"y" * 5_000_000 + b'"}'
    await api.add_chunk(task_id, 1, line)
    await api.finish(task_id)
    assert b"id: 1:1\ndata: %b\n\n" % line in await stream_of(api, f"/tasks/{task_id}/events")


async def test_http_1_0_stream_is_complete(api: Api) -> None:
    """HTTP/1.0 has no chunks; the end of the connection is the end of the stream."""
    task_id = await finished_with_log(api)
    response = await api.raw(f"GET /tasks/{task_id}/events HTTP/1.0\r\n\r\n".encode())
    assert response.startswith(b"HTTP/1.0 200 ")
    assert response.partition(b"\r\n\r\n")[2] == await stream_of(api, f"/tasks/{task_id}/events")


async def test_head_of_a_stream_has_no_body(api: Api) -> None:
    """The response to HEAD has only headers, even for a running task, so that the connection serves the next request."""
    task_id = await running_with_log(api)
    head = f"HEAD /tasks/{task_id}/events HTTP/1.1\r\nHost: x\r\n\r\n"
    response = await api.raw((head + "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").encode())
    first, _, second = response.partition(b"\r\n\r\n")
    assert b"text/event-stream" in first
    assert second.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("query", ["?from=end", "?from="])
async def test_invalid_from_is_400(api: Api, query: str) -> None:
    """The error has both values of `from`."""
    response = await api.call("GET", f"/tasks/{await finished_with_log(api)}/events{query}")
    assert (400, "from must be start or tail") == (response.status, response.body["error"])


# --- running tasks ---------------------------------------------------------------------------------------------------


async def test_caught_up_separates_stored_and_new_lines(api: Api) -> None:
    """`caught_up` comes once, after the stored lines and before the new ones."""
    task_id = await api.submit()
    await api.start(task_id)
    await api.add_chunk(task_id, 1, b'{"n":1}')
    async with api.http.get(f"{api.url}/tasks/{task_id}/events") as response:
        events = read_events(response)
        assert ["task", "message", "caught_up"] == [(await anext(events)).name for _ in range(3)]
        await api.add_chunk(task_id, 2, b'{"n":2}')
        assert Event(name="message", id="2:1", data={"n": 2}) == await anext(events)
        await api.add_chunk(task_id, 3, b'{"n":3}')
        await api.finish(task_id)
        assert ["message", "done"] == [event.name async for event in events]


async def test_idle_stream_has_heartheartbeats(tmp_path: Path) -> None:
    """While there is nothing else, comments are sent at an interval."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(heartbeat=0.05)) as api:
        task_id = await api.submit()
        async with api.http.get(f"{api.url}/tasks/{task_id}/events") as response:
            lines = [await response.content.readline() for _ in range(9)]
            assert [b"event: caught_up\n", b"data: {}\n", b"\n"] == lines[6:]
            heartbeats = [await response.content.readline() for _ in range(3)]
            await api.start(task_id)
            await api.finish(task_id)
            rest = await response.read()
    assert [b": heartbeat\n"] * 3 == heartbeats
    assert rest.endswith(await api.done_event(task_id))


async def test_client_may_ask_for_pings(tmp_path: Path) -> None:
    """They are events, so that a client sees them, and sent at its own interval."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(heartbeat=60)) as api:
        task_id = await api.submit()
        async with api.http.get(f"{api.url}/tasks/{task_id}/events?heartbeat=1") as response:
            events = read_events(response)
            assert ["task", "caught_up", "ping", "ping"] == [(await anext(events)).name for _ in range(4)]
        for value in ("0", "61", "1.5", "x", "-1", ""):
            refused = await api.call("GET", f"/tasks/{task_id}/events?heartbeat={value}")
            message = "heartbeat must be a whole number of seconds from 1 to 60"
            assert (400, message) == (refused.status, refused.body["error"])


async def test_tail_has_only_new_lines(api: Api) -> None:
    """`from=tail` skips the stored lines and misses no new one."""
    task_id = await running_with_log(api)
    async with api.http.get(f"{api.url}/tasks/{task_id}/events?from=tail") as response:
        events = read_events(response)
        assert ["task", "caught_up"] == [(await anext(events)).name for _ in range(2)]
        await api.add_chunk(task_id, 4, b'{"n":7}')
        await api.finish(task_id)
        assert ["4:1", "end"] == [event.id async for event in events]


async def test_reconnect_after_the_tail_loses_no_line(api: Api) -> None:
    """Each event that a client may be cut after has a position, also the two that are no lines."""
    task_id = await running_with_log(api)
    for number, name in enumerate(("task", "caught_up"), 4):
        async with api.http.get(f"{api.url}/tasks/{task_id}/events?from=tail") as response:
            events = [event async for event in stop_after(read_events(response), name)]
        await api.add_chunk(task_id, number, b'{"n":7}')
        rest = await first_message(api, task_id, events[-1].id)
        assert f"{number}:1" == rest


async def stop_after(events: AsyncIterator[Event], name: str) -> AsyncIterator[Event]:
    """Yield the events until one with this name."""
    async for event in events:
        yield event
        if event.name == name:
            return


async def first_message(api: Api, task_id: TaskId, last: str | None) -> str | None:
    """Return the ID of the first line after an event."""
    headers = {"Last-Event-ID": str(last)}
    async with api.http.get(f"{api.url}/tasks/{task_id}/events?from=tail", headers=headers) as response:
        async for event in read_events(response):
            if event.name == "message":
                return event.id
    return None


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["header", "query"])
@pytest.mark.parametrize("last", IDS)
async def test_stream_resumes_after_the_last_event_id(api: Api, last: str, source: str) -> None:
    """After any event ID, by header or by query, exactly the following events are sent."""
    task_id = await finished_with_log(api)
    headers, query = ({"Last-Event-ID": last}, "") if source == "header" else ({}, f"?lastEventId={last}")
    stream = await stream_of(api, f"/tasks/{task_id}/events{query}", headers=headers)
    expected = (
        RETRY
        + await task_event(api, task_id, at=last)
        + line_events(after=last)
        + CAUGHT_UP
        + await api.done_event(task_id)
    )
    assert expected == stream


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
async def test_stream_that_was_cut_at_any_byte_resumes(api: Api, share: float) -> None:
    """A client that loses its connection within an event of a running task receives each event once after resuming."""
    task_id = await running_with_log(api)
    size = len(RETRY + await task_event(api, task_id) + line_events() + CAUGHT_UP)
    async with api.http.get(f"{api.url}/tasks/{task_id}/events") as response:
        # A client uses only complete events.
        whole = (await response.content.readexactly(round(share * size))).rpartition(b"\n\n")[0].split(b"\n")
    seen = [line.removeprefix(b"id: ").decode() for line in whole if line.startswith(b"id: ")]
    await api.add_chunk(task_id, 4, b'{"n":7}')
    await api.finish(task_id)
    headers = {"Last-Event-ID": seen[-1]} if seen else {}
    rest = await api.events(f"/tasks/{task_id}/events", headers=headers)
    # Line 0 is the start of a chunk, the position of an event that is no line.
    assert [*IDS, "4:1", "end"] == [each for each in seen if not each.endswith(":0")] + ids_of(rest)


async def test_header_takes_precedence_over_query(api: Api) -> None:
    """A browser that reconnects keeps the query of the first request and adds the header."""
    task_id = await finished_with_log(api)
    stream = await api.events(f"/tasks/{task_id}/events?lastEventId=1:1&from=tail", headers={"Last-Event-ID": "2:1"})
    assert ["2:2", "3:1", "end"] == ids_of(stream)


@pytest.mark.parametrize(
    "last", ["x", "1", "1:", ":1", "-1:1", "1:-1", "1:1:1", "1:1x", "٣:1", "1" * 40 + ":1", "../1:1", "a" * 4000, "0:0"]
)
async def test_invalid_event_id_starts_from_the_beginning(api: Api, last: str) -> None:
    """A client with an invalid ID gets everything rather than nothing."""
    task_id = await finished_with_log(api)
    events = await api.events(f"/tasks/{task_id}/events", params={"lastEventId": last})
    assert [*IDS, "end"] == ids_of(events)


@pytest.mark.parametrize("last", ["1:999", "3:1", "3:2", "4:1", "999999999999999:999999999999999"])
async def test_event_id_beyond_the_log_gets_what_follows(api: Api, last: str) -> None:
    """An ID past the last line of a chunk resumes with the next chunk, one past the log with the end."""
    task_id = await finished_with_log(api)
    events = await api.events(f"/tasks/{task_id}/events", headers={"Last-Event-ID": last})
    assert (["2:1", "2:2", "3:1"] if last == "1:999" else []) + ["end"] == ids_of(events)


async def test_stream_after_the_end_is_204(api: Api) -> None:
    """204 stops a browser's EventSource from reconnecting to a finished task."""
    task_id = await finished_with_log(api)
    response = await api.call("GET", f"/tasks/{task_id}/events", headers={"Last-Event-ID": "end"})
    assert (204, "") == (response.status, response.text)
    assert 204 == (await api.call("GET", f"/tasks/{task_id}/events?lastEventId=end")).status
    assert 404 == (await api.call("GET", "/tasks/none/events", headers={"Last-Event-ID": "end"})).status


# --- readers that disconnect or stall --------------------------------------------------------------------------------


async def test_disconnected_readers_leave_nothing_behind(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """Fifty readers that disconnect leave no asyncio task and no log line behind."""
    task_id = await running_with_log(api)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await (await http.get(f"{api.url}/health")).read()
        before = len(asyncio.all_tasks())
        with structlog.testing.capture_logs() as logs:
            readers = await asyncio.gather(*(http.get(f"{api.url}/tasks/{task_id}/events") for _ in range(50)))
            await asyncio.gather(*(reader.content.readline() for reader in readers))
            assert len(asyncio.all_tasks()) > before + 50
            for reader in readers:
                reader.close()
            await until(lambda: len(asyncio.all_tasks()) <= before)
    assert ([], []) == (logs, caplog.records)


def connect_without_reading(api: Api, path: str) -> socket.socket:
    """Send a request and read none of the response."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", api.port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    client.setblocking(False)
    return client


async def is_aborted(client: socket.socket) -> bool:
    """Read the rest of a response; return whether it was closed before its end."""
    loop = asyncio.get_running_loop()
    last = b""
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(WAIT_SECONDS):
            while piece := await loop.sock_recv(client, 1 << 20):
                last = (last + piece)[-8:]
    return not last.endswith(b"0\r\n\r\n")


async def finished_with_long_log(api: Api) -> TaskId:
    """Return the ID of a finished task with `LONG_LOG_LINES` lines of a megabyte."""
    task_id = await api.submit()
    await api.start(task_id)
    for number in range(1, LONG_LOG_LINES + 1):
        await api.add_chunk(task_id, number, MEGABYTE)
    await api.finish(task_id)
    return task_id


async def test_stalled_reader_delays_no_other(api: Api) -> None:
    """While one reader stalls, another one reads the same log to its end."""
    task_id = await finished_with_long_log(api)
    with connect_without_reading(api, f"/tasks/{task_id}/events"):
        await until(lambda: api.feed.readers(task_id) == 1)
        stream = await stream_of(api, f"/tasks/{task_id}/events")
        assert LONG_LOG_LINES == stream.count(b"\ndata: " + MEGABYTE + b"\n\n")
        assert 1 == api.feed.readers(task_id)


@pytest.mark.parametrize("path", ["events", "logs"])
async def test_stalled_reader_is_disconnected(tmp_path: Path, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """For a stalled reader, no more than the kernel buffers is read, and it is disconnected after `ApiTimeouts.send`."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(send=0.3)) as api:
        task_id = await finished_with_long_log(api)
        api.blobs.names_read.clear()
        before = len(asyncio.all_tasks())
        with (
            connect_without_reading(api, f"/tasks/{task_id}/{path}") as stalled,
            structlog.testing.capture_logs() as logs,
        ):
            await until(lambda: len(asyncio.all_tasks()) > before)
            await until(lambda: len(asyncio.all_tasks()) <= before)
            assert await is_aborted(stalled)
    # The kernel buffers about four megabytes for a connection.
    assert 1 < sum(name.endswith(".jsonl") for name in api.blobs.names_read) < LONG_LOG_LINES / 2
    assert ([], []) == (logs, caplog.records)

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import structlog.testing
from helpers.api import COMPLETED, FAILED, Api, api_on, until
from helpers.service import PATIENCE, Event, StartService, read_events

from ccrun import codec
from ccrun.api.dependencies import ApiTimeouts
from ccrun.errors import StorageError
from ccrun.lifecycle import cancelled_outcome
from ccrun.task import Outcome, Status, TaskId

#: The log of the tasks here: three chunks, the last of one line.
CHUNKS: Final = (
    (b'{"type":"system","n":1}', b'{"type":"assistant","n":2}', '{"type":"assistant","text":"é \u2028 \\n"}'.encode()),
    (b'{"type":"user","n":4}', b'{"type":"assistant","n":5}'),
    (b'{"type":"result","n":6}',),
)
IDS: Final = tuple(f"{chunk}:{line}" for chunk, lines in enumerate(CHUNKS, 1) for line in range(1, len(lines) + 1))
#: A line, and how many of them make a log that no buffer on the way holds.
MEGABYTE: Final = b'{"x":"' + b"y" * 1_000_000 + b'"}'
MANY: Final = 24
OPENING: Final = b"retry: 1000\n\n"
CAUGHT_UP: Final = b"event: caught_up\ndata: {}\n\n"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """Return an API with nobody at its door, and short waits."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(abandon=0.1)) as running:
        yield running


async def write_log(api: Api, task_id: TaskId) -> None:
    """Write `CHUNKS` as a task's log."""
    for number, lines in enumerate(CHUNKS, 1):
        await api.write(task_id, number, *lines)


async def over(api: Api, outcome: Outcome = COMPLETED) -> TaskId:
    """Return the ID of a task that is over, with `CHUNKS` as its log."""
    task_id = await api.submit(metadata={"10": 1.5, "2": "é"})
    await api.begin(task_id)
    await write_log(api, task_id)
    await api.end(task_id, outcome)
    return task_id


async def begun(api: Api) -> TaskId:
    """Return the ID of a task that runs, with `CHUNKS` as its log so far."""
    task_id = await api.submit()
    await api.begin(task_id)
    await write_log(api, task_id)
    return task_id


async def bytes_of(api: Api, path: str, **request: Any) -> bytes:
    """Return a whole stream, as it was before HTTP cut it into chunks."""
    async with api.http.get(api.url + path, **request) as response:
        assert response.status == 200, await response.text()
        return await response.read()


async def task_event(api: Api, task_id: TaskId) -> bytes:
    """Spell the first event of a stream."""
    status = (await api.store.record(task_id)).status
    data = f'{{"taskId":"{task_id}","status":"{status}","logsPath":"{api.store.logs_path(task_id)}"}}'
    return f"event: task\ndata: {data}\n\n".encode()


def line_events(*, after: str | None = None) -> bytes:
    """Spell the log of `CHUNKS`, or what of it follows an event ID."""
    lines = [line for chunk in CHUNKS for line in chunk]
    start = 0 if after is None else IDS.index(after) + 1
    return b"".join(
        b"id: %b\ndata: %b\n\n" % (name.encode(), line) for name, line in list(zip(IDS, lines, strict=True))[start:]
    )


async def done_event(api: Api, task_id: TaskId) -> bytes:
    """Spell the last event of a stream."""
    body = codec.callback_body(await api.store.record(task_id))
    return b"id: end\nevent: done\ndata: %b\n\n" % body


# --- what a stream says ----------------------------------------------------------------------------------------------


async def test_a_finished_task_is_replayed_in_these_very_bytes(api: Api) -> None:
    """Retry, task, each line with its ID, `caught_up`, `done` with the payload of the callback; no carriage return."""
    task_id = await over(api)
    expected = OPENING + await task_event(api, task_id) + line_events() + CAUGHT_UP + await done_event(api, task_id)
    assert expected == await bytes_of(api, f"/tasks/{task_id}/events")
    assert b"\r" not in expected


@pytest.mark.parametrize(
    ("outcome", "before_done"),
    [
        (FAILED, b'event: error\ndata: {"error":"Claude process exited with code 1","exitCode":1}\n\n'),
        (cancelled_outcome(), b'event: cancelled\ndata: {"taskId":"%b"}\n\n'),
    ],
    ids=["failed", "cancelled"],
)
async def test_a_task_that_did_not_complete_says_why(api: Api, outcome: Outcome, before_done: bytes) -> None:
    """A failure has an `error`, a cancel a `cancelled_outcome`, right before `done`."""
    task_id = await over(api, outcome)
    stream = await bytes_of(api, f"/tasks/{task_id}/events")
    last = before_done.replace(b"%b", task_id.encode()) + await done_event(api, task_id)
    assert stream.endswith(CAUGHT_UP + last)


async def test_done_is_the_callbacks_payload(api: Api) -> None:
    """The data of `done` has the fields of a callback, its metadata in JavaScript's order."""
    task_id = await over(api)
    done = (await api.events(f"/tasks/{task_id}/events"))[-1]
    assert ("done", "end") == (done.name, done.id)
    assert ["taskId", "status", "exitCode", "logsPath", "summary", "error", "metadata"] == list(done.data)
    assert ["2", "10"] == list(done.data["metadata"])


async def test_no_proxy_is_asked_to_keep_a_stream(api: Api) -> None:
    """The headers call it an event stream, not to be cached, not to be buffered."""
    task_id = await over(api)
    async with api.http.get(f"{api.url}/tasks/{task_id}/events") as response:
        shown = [response.headers[name] for name in ("Content-Type", "Cache-Control", "X-Accel-Buffering")]
    assert ["text/event-stream", "no-cache", "no"] == shown


async def test_a_task_over_before_its_first_line_has_a_short_stream(api: Api) -> None:
    """Without a log there are still task, `caught_up` and `done`."""
    task_id = await api.submit()
    await api.begin(task_id)
    await api.end(task_id, FAILED)
    names = [event.name for event in await api.events(f"/tasks/{task_id}/events")]
    assert ["task", "caught_up", "error", "done"] == names


async def test_a_line_of_megabytes_is_one_event(api: Api) -> None:
    """However many pieces a line is written in, it arrives whole."""
    task_id = await api.submit()
    await api.begin(task_id)
    line = b'{"x":"' + b"y" * 5_000_000 + b'"}'
    await api.write(task_id, 1, line)
    await api.end(task_id)
    assert b"id: 1:1\ndata: %b\n\n" % line in await bytes_of(api, f"/tasks/{task_id}/events")


async def test_a_stream_for_an_old_proxy_is_whole(api: Api) -> None:
    """HTTP/1.0 knows no chunks; the end of the connection is the end of the stream."""
    task_id = await over(api)
    answer = await api.raw(f"GET /tasks/{task_id}/events HTTP/1.0\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.0 200 ")
    assert answer.partition(b"\r\n\r\n")[2] == await bytes_of(api, f"/tasks/{task_id}/events")


async def test_head_of_a_stream_ends_at_once(api: Api) -> None:
    """HEAD of a running task's events tells the headers and has no body, so the connection serves the next request."""
    task_id = await begun(api)
    head = f"HEAD /tasks/{task_id}/events HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await api.raw((head + "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").encode())
    first, _, second = answer.partition(b"\r\n\r\n")
    assert b"text/event-stream" in first
    assert second.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("query", ["?from=end", "?from="])
async def test_an_unknown_start_is_named(api: Api, query: str) -> None:
    """`from` has two values."""
    answer = await api.call("GET", f"/tasks/{await over(api)}/events{query}")
    assert (400, "from must be start or tail") == (answer.status, answer.body["error"])


# --- /run ------------------------------------------------------------------------------------------------------------


async def test_run_streams_a_task_from_its_birth(api: Api) -> None:
    """The ID stands in a header before anything has happened; then comes the whole life of the task."""
    async with api.http.post(f"{api.url}/run", json=api.body(taskId="one")) as response:
        assert (200, "one") == (response.status, response.headers["X-Task-Id"])
        events = read_events(response)
        assert Event(
            name="task",
            data={"taskId": "one", "status": "pending", "logsPath": api.store.logs_path(TaskId("one"))},
        ) == await anext(events)
        await api.begin(TaskId("one"))
        await write_log(api, TaskId("one"))
        await api.end(TaskId("one"))
        rest = [event async for event in events]
    assert ["caught_up", *["message"] * 6, "done"] == [event.name for event in rest]
    assert [*IDS] == [event.id for event in rest if event.name == "message"]
    assert "sync" == (await api.call("GET", "/tasks/one")).body["type"]


async def test_the_first_byte_comes_after_the_task_is_stored(api: Api) -> None:
    """While the storage has not taken the task, nothing is answered; what it refuses is answered as an error."""
    api.blobs.gate = asyncio.Event()
    request = asyncio.create_task(api.call("POST", "/run", json=api.body()))
    await until(lambda: api.blobs.waiting > 0)
    assert not request.done()
    api.blobs.fault = StorageError()
    api.blobs.gate.set()
    assert (503, {"error": "The storage does not answer."}) == ((await request).status, (await request).body)


# --- live ------------------------------------------------------------------------------------------------------------


async def test_caught_up_stands_once_between_replay_and_life(api: Api) -> None:
    """What was there before comes before `caught_up`, what comes later after it."""
    task_id = await api.submit()
    await api.begin(task_id)
    await api.write(task_id, 1, b'{"n":1}')
    async with api.http.get(f"{api.url}/tasks/{task_id}/events") as response:
        events = read_events(response)
        assert ["task", "message", "caught_up"] == [(await anext(events)).name for _ in range(3)]
        await api.write(task_id, 2, b'{"n":2}')
        assert Event(name="message", id="2:1", data={"n": 2}) == await anext(events)
        await api.write(task_id, 3, b'{"n":3}')
        await api.end(task_id)
        assert ["message", "done"] == [event.name async for event in events]


async def test_a_quiet_stream_has_a_heartbeat(tmp_path: Path) -> None:
    """A comment, which no client takes for an event, comes whenever nothing else did for a while."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(heartbeat=0.05)) as api:
        task_id = await api.submit()
        async with api.http.get(f"{api.url}/tasks/{task_id}/events") as response:
            lines = [await response.content.readline() for _ in range(7)]
            assert [b"event: caught_up\n", b"data: {}\n"] == lines[5:]
            beats = [await response.content.readline() for _ in range(5)]
            await api.begin(task_id)
            await api.end(task_id)
            rest = await response.read()
    assert [b"\n", b": heartbeat\n", b"\n", b": heartbeat\n", b"\n"] == beats
    assert rest.endswith(await done_event(api, task_id))


async def test_tail_begins_at_the_present_end(api: Api) -> None:
    """`from=tail` leaves out what was there and misses nothing that comes."""
    task_id = await begun(api)
    async with api.http.get(f"{api.url}/tasks/{task_id}/events?from=tail") as response:
        events = read_events(response)
        assert ["task", "caught_up"] == [(await anext(events)).name for _ in range(2)]
        await api.write(task_id, 4, b'{"n":7}')
        await api.end(task_id)
        assert ["4:1", "end"] == [event.id async for event in events]


# --- coming back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["header", "query"])
@pytest.mark.parametrize("last", IDS)
async def test_a_reader_that_comes_back_misses_nothing_and_gets_nothing_twice(api: Api, last: str, how: str) -> None:
    """From every line on, by header as a browser does or by query, just what follows is sent."""
    task_id = await over(api)
    headers, query = ({"Last-Event-ID": last}, "") if how == "header" else ({}, f"?lastEventId={last}")
    stream = await bytes_of(api, f"/tasks/{task_id}/events{query}", headers=headers)
    expected = (
        OPENING + await task_event(api, task_id) + line_events(after=last) + CAUGHT_UP + await done_event(api, task_id)
    )
    assert expected == stream


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
async def test_a_stream_cut_at_any_byte_goes_on_where_it_was_cut(api: Api, share: float) -> None:
    """A client that lost its connection in the middle of an event, of a running task, gets the rest as if nothing had been."""
    task_id = await begun(api)
    there = len(OPENING + await task_event(api, task_id) + line_events() + CAUGHT_UP)
    async with api.http.get(f"{api.url}/tasks/{task_id}/events") as response:
        # What a client may count on are whole events.
        whole = (await response.content.readexactly(round(share * there))).rpartition(b"\n\n")[0].split(b"\n")
    seen = [line.removeprefix(b"id: ").decode() for line in whole if line.startswith(b"id: ")]
    await api.write(task_id, 4, b'{"n":7}')
    await api.end(task_id)
    headers = {"Last-Event-ID": seen[-1]} if seen else {}
    rest = await api.events(f"/tasks/{task_id}/events", headers=headers)
    assert [*IDS, "4:1", "end"] == seen + [event.id for event in rest if event.id]


async def test_the_header_counts_before_the_query(api: Api) -> None:
    """A browser keeps the query of the first request and adds the header when it comes back."""
    task_id = await over(api)
    stream = await api.events(f"/tasks/{task_id}/events?lastEventId=1:1&from=tail", headers={"Last-Event-ID": "2:1"})
    assert ["2:2", "3:1", "end"] == [event.id for event in stream if event.id]


@pytest.mark.parametrize(
    "last", ["x", "1", "1:", ":1", "-1:1", "1:-1", "1:1:1", "1:1x", "٣:1", "1" * 40 + ":1", "../1:1", "a" * 4000, "0:0"]
)
async def test_an_id_that_is_none_of_ours_starts_from_the_start(api: Api, last: str) -> None:
    """Whoever comes back with a broken ID gets everything rather than nothing."""
    task_id = await over(api)
    events = await api.events(f"/tasks/{task_id}/events", params={"lastEventId": last})
    assert [*IDS, "end"] == [event.id for event in events if event.id]


@pytest.mark.parametrize("last", ["1:999", "3:1", "3:2", "4:1", "999999999999999:999999999999999"])
async def test_an_id_beyond_the_log_gets_what_follows(api: Api, last: str) -> None:
    """An ID past the last line of a chunk goes on with the next chunk, one past the log with the end."""
    task_id = await over(api)
    ids = [event.id for event in await api.events(f"/tasks/{task_id}/events", headers={"Last-Event-ID": last})]
    assert (["2:1", "2:2", "3:1"] if last == "1:999" else []) + ["end"] == [event_id for event_id in ids if event_id]


async def test_a_browser_that_has_seen_the_end_is_told_to_stay_away(api: Api) -> None:
    """204 is what keeps an EventSource from connecting again and again to a task that is over."""
    task_id = await over(api)
    answer = await api.call("GET", f"/tasks/{task_id}/events", headers={"Last-Event-ID": "end"})
    assert (204, "") == (answer.status, answer.text)
    assert 204 == (await api.call("GET", f"/tasks/{task_id}/events?lastEventId=end")).status
    assert 404 == (await api.call("GET", "/tasks/none/events", headers={"Last-Event-ID": "end"})).status


# --- readers that leave ----------------------------------------------------------------------------------------------


async def leave_run(api: Api) -> TaskId:
    """Start a task over `/run`, see its first bytes, and leave."""
    async with aiohttp.ClientSession() as http, http.post(f"{api.url}/run", json=api.body()) as response:
        task_id = TaskId(response.headers["X-Task-Id"])
        await api.begin(task_id)
        await response.content.readline()
    return task_id


async def test_a_task_whose_client_left_is_cancelled(api: Api) -> None:
    """Nobody waits for it any more, so after the grace it is cancelled."""
    task_id = await leave_run(api)
    await until(lambda: api.jobs.cancelled == [task_id])
    assert (await api.store.record(task_id)).is_cancelling


async def test_a_task_whose_client_left_goes_on_for_another_reader(api: Api) -> None:
    """Whoever reads its events by the end of the grace keeps it alive."""
    async with contextlib.AsyncExitStack() as reading:
        async with aiohttp.ClientSession() as http, http.post(f"{api.url}/run", json=api.body()) as response:
            task_id = TaskId(response.headers["X-Task-Id"])
            await api.begin(task_id)
            reader = await reading.enter_async_context(api.http.get(f"{api.url}/tasks/{task_id}/events"))
        await asyncio.sleep(0.3)  # Three times the grace: that nothing happens is seen only by waiting.
        assert [] == api.jobs.cancelled
        await api.end(task_id)
        assert (await reader.read()).endswith(await done_event(api, task_id))


async def test_a_client_that_leaves_during_the_birth_leaves_no_task_behind(api: Api) -> None:
    """A client of `/run` that is gone before the first byte knows no ID to ask for: its task is given up as well."""
    api.key.gate = asyncio.Event()
    request = asyncio.create_task(api.call("POST", "/run", json=api.body(taskId="one")))
    await until(lambda: api.key.waiting == 1)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    # The server sees it within a round of its loop, before the key service answers.
    await asyncio.sleep(0.05)
    api.key.gate.set()
    await until(lambda: api.jobs.cancelled == ["one"])
    assert Status.CANCELLED is (await api.store.record(TaskId("one"))).status


async def test_a_client_that_leaves_after_a_refusal_cancels_nobody_elses_task(api: Api) -> None:
    """A request for an ID in use, whose client left meanwhile, does not give up the task that has it."""
    await api.submit(taskId="one")
    api.key.gate = asyncio.Event()
    request = asyncio.create_task(api.call("POST", "/run", json=api.body(taskId="one")))
    await until(lambda: api.key.waiting == 1)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    await asyncio.sleep(0.05)
    api.key.gate.set()
    await asyncio.sleep(0.3)  # Three times the grace.
    assert ([], Status.PENDING) == (api.jobs.cancelled, (await api.store.record(TaskId("one"))).status)


@pytest.mark.parametrize("path", ["/run-async", "/run"])
async def test_a_reader_of_events_is_no_owner(api: Api, path: str) -> None:
    """Whoever leaves `/events` cancels nothing, nor does a client of `/run` that stayed to the end."""
    async with contextlib.AsyncExitStack() as running:
        body = api.body(taskId="one", callbackUrl="http://127.0.0.1:9/")
        owner = await running.enter_async_context(api.http.post(api.url + path, json=body))
        await api.begin(TaskId("one"))
        async with aiohttp.ClientSession() as http, http.get(f"{api.url}/tasks/one/events") as response:
            await response.content.readline()
        await asyncio.sleep(0.3)  # Three times the grace.
        assert [] == api.jobs.cancelled
        await api.end(TaskId("one"))
        await owner.read()
    await asyncio.sleep(0.2)
    assert [] == api.jobs.cancelled


async def test_readers_that_left_leave_nothing_behind(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """Fifty readers that broke off leave no task in the loop, no tail of the log and no complaint in it."""
    task_id = await begun(api)
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


# --- readers that stall ----------------------------------------------------------------------------------------------


def never_reading(api: Api, path: str) -> socket.socket:
    """Ask for a long answer and read none of it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", api.port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    client.setblocking(False)
    return client


async def is_cut_off(client: socket.socket) -> bool:
    """Take what is left on a connection; return whether it broke off before the end of the answer."""
    loop = asyncio.get_running_loop()
    last = b""
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(PATIENCE):
            while piece := await loop.sock_recv(client, 1 << 20):
                last = (last + piece)[-8:]
    return not last.endswith(b"0\r\n\r\n")


async def long_log(api: Api) -> TaskId:
    """Return the ID of a task that is over, with a log of `MANY` lines of a megabyte."""
    task_id = await api.submit()
    await api.begin(task_id)
    for number in range(1, MANY + 1):
        await api.write(task_id, number, MEGABYTE)
    await api.end(task_id)
    return task_id


async def test_a_reader_that_stalls_delays_nobody(api: Api) -> None:
    """While one reader takes nothing, another reads the same log to its end."""
    task_id = await long_log(api)
    with never_reading(api, f"/tasks/{task_id}/events"):
        await until(lambda: api.feed.readers(task_id) == 1)
        stream = await bytes_of(api, f"/tasks/{task_id}/events")
        assert MANY == stream.count(b"\ndata: " + MEGABYTE + b"\n\n")
        assert 1 == api.feed.readers(task_id)


@pytest.mark.parametrize("path", ["events", "logs"])
async def test_a_reader_that_stalls_costs_little_and_is_cut_off(
    tmp_path: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond what the kernel buffers nothing of a long log is read for it, and after `Times.send` it has to come back."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(send=0.3)) as api:
        task_id = await long_log(api)
        api.blobs.names_read.clear()
        before = len(asyncio.all_tasks())
        with never_reading(api, f"/tasks/{task_id}/{path}") as stalled, structlog.testing.capture_logs() as logs:
            await until(lambda: len(asyncio.all_tasks()) > before)
            await until(lambda: len(asyncio.all_tasks()) <= before)
            assert await is_cut_off(stalled)
    # The kernel takes some four megabytes for a connection.
    assert 1 < sum(name.endswith(".jsonl") for name in api.blobs.names_read) < MANY / 2
    assert ([], []) == (logs, caplog.records)


# --- faults in mid-stream --------------------------------------------------------------------------------------------


async def break_in_the_middle(api: Api, task_id: TaskId, path: str, fault: Exception) -> bytes:
    """Read an answer while the storage breaks after its beginning; return the raw bytes of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port, limit=1 << 26)
    writer.write(f"GET /tasks/{task_id}/{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    received = await reader.readuntil(b'"n":1')
    api.blobs.fault = fault
    with contextlib.suppress(ConnectionResetError):
        received += await reader.read()
    writer.close()
    return received


async def test_a_log_that_cannot_be_read_on_breaks_off(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """An answer that has begun is cut, without an end that a client could take for the log's, and without a second status."""
    task_id = await api.submit()
    await api.begin(task_id)
    await api.write(task_id, 1, b'{"n":1}')
    big = b'{"x":"' + b"y" * 20_000_000 + b'"}'
    await api.write(task_id, 2, big)
    await api.write(task_id, 3, b'{"n":3}')
    with structlog.testing.capture_logs() as logs:
        received = await break_in_the_middle(api, task_id, "logs", StorageError())
    assert 1 == received.count(b"HTTP/1.1 ")
    assert not received.endswith(b"0\r\n\r\n")
    assert [("response_aborted", "The storage does not answer.")] == [(log["event"], log["error"]) for log in logs]
    assert [] == caplog.records


async def test_a_stream_that_breaks_is_cut(api: Api) -> None:
    """An error that nobody expected ends the connection, so that the client comes back; it shows nothing of the error."""
    task_id = await api.submit()
    await api.begin(task_id)
    await api.write(task_id, 1, b'{"n":1}')
    with structlog.testing.capture_logs() as logs:
        received = await break_in_the_middle(api, task_id, "events", RuntimeError("/srv/data"))
    assert 1 == received.count(b"HTTP/1.1 ")
    assert b"/srv" not in received
    assert not received.endswith(b"0\r\n\r\n")
    assert ["response_aborted"] == [log["event"] for log in logs]


# --- real services ---------------------------------------------------------------------------------------------------


async def test_two_services_on_one_folder_serve_each_others_tasks(start_service: StartService) -> None:
    """What one runs the other streams, lists and replays."""
    async with start_service() as one, start_service(data_dir=one.data_dir) as other:
        task_id = (await one.submit())["taskId"]
        there, here = await asyncio.gather(other.events(task_id), one.events(task_id))
        assert "completed" == there[-1].data["status"]
        shown = [[event for event in events if event.name in ("message", "done")] for events in (there, here)]
        assert shown[0] == shown[1]
        theirs = (await other.run())[-1].data["taskId"]
        assert {task_id, theirs} == {task["taskId"] for task in (await one.get("/tasks"))["tasks"]}


async def test_a_folder_that_becomes_unusable_answers_503(start_service: StartService) -> None:
    """A running service whose folder is read-only (or, for root, no folder) says so in one sentence without a path."""
    async with start_service() as service:
        await service.get("/ready")
        if os.geteuid() == 0:
            service.data_dir.rename(service.data_dir.with_name("away"))
            service.data_dir.write_text("not a folder")
        else:
            for path in [service.data_dir, *service.data_dir.rglob("*")]:
                path.chmod(0o500 if path.is_dir() else 0o400)
        async with service.http.post(f"{service.url}/run", json=service.body()) as response:
            assert (503, "5") == (response.status, response.headers["Retry-After"])
            sentence = (await response.json())["error"]
        assert sentence.startswith(("The key file can be", "The storage directory cannot be"))
        assert str(service.data_dir) not in sentence

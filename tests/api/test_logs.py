"""`GET /tasks/{taskId}/logs`."""

from __future__ import annotations

import datetime as dt
import gzip
import json
from typing import Any

import pytest
from helpers.api import Api

from ccrun.names import chunk_name
from ccrun.task import TaskId

TASK = TaskId("one")
#: The log of the tasks here.
CHUNKS = ((b'{"n":1}', b'{"n":2}', b'{"n":3}'), (b'{"n":4}',), (b'{"n":5}', b'{"n":6}'))
LOG = b"".join(line + b"\n" for lines in CHUNKS for line in lines)


async def add_log(api: Api) -> None:
    """Store a running task with `CHUNKS` as its log."""
    await api.submit_started(taskId=TASK)
    for number, lines in enumerate(CHUNKS, 1):
        await api.add_chunk(TASK, number, *lines)


async def test_log_of_a_running_task_ends_with_the_last_line(api: Api) -> None:
    """`/logs` has the lines so far, and does not wait for more."""
    task_id = await api.submit()
    assert "" == (await api.call("GET", f"/tasks/{task_id}/logs")).text
    await api.start(task_id)
    await api.add_chunk(task_id, 1, b'{"n":1}', b"not JSON")
    await api.add_chunk(task_id, 2, '{"n":"é"}'.encode())
    response = await api.call("GET", f"/tasks/{task_id}/logs")
    assert (200, "application/x-ndjson") == (response.status, response.headers["Content-Type"])
    assert '{"n":1}\nnot JSON\n{"n":"é"}\n' == response.text
    await api.finish(task_id)
    assert response.text == (await api.call("GET", f"/tasks/{task_id}/logs")).text


async def test_long_log_is_complete(api: Api) -> None:
    """A line of megabytes and more chunks than one listing returns are received unchanged and in order."""
    task_id = await api.submit_finished()
    big = b'{"n":1,"x":"' + b"y" * 3_000_000 + b'"}'
    await api.add_chunk(task_id, 1, big)
    at = dt.datetime.now(dt.UTC)
    # Written directly, because durable writes of so many files would take seconds.
    for number in range(2, 1203):
        (api.directory / chunk_name(task_id, number, at)).write_bytes(b'{"n":%d}\n' % number)
    async with api.http.get(f"{api.url}/tasks/{task_id}/logs") as response:
        lines = (await response.read()).splitlines()
    assert big == lines[0]
    assert list(range(1, 1203)) == [json.loads(line)["n"] for line in lines]


async def test_http_1_0_log_is_complete(api: Api) -> None:
    """HTTP/1.0 has no chunks; the end of the connection is the end of the log."""
    task_id = await api.submit_finished()
    await api.add_chunk(task_id, 1, b'{"n":1}')
    response = await api.raw(f"GET /tasks/{task_id}/logs HTTP/1.0\r\n\r\n".encode())
    assert response.startswith(b"HTTP/1.0 200 ")
    assert response.endswith(b'\r\n\r\n{"n":1}\n')


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        ("", [1, 2, 3, 4, 5, 6]),
        ("?after=0:0", [1, 2, 3, 4, 5, 6]),
        ("?after=1:2", [3, 4, 5, 6]),
        ("?after=1:3", [4, 5, 6]),
        ("?after=2:0", [4, 5, 6]),
        ("?after=3:1&limit=5", [6]),
        ("?after=1:1&limit=3", [2, 3, 4]),
        ("?after=1:9", [4, 5, 6]),
        ("?after=9:1", []),
        ("?limit=1", [1]),
        ("?limit=4", [1, 2, 3, 4]),
        ("?tail=1", [6]),
        ("?tail=2", [5, 6]),
        ("?tail=4", [3, 4, 5, 6]),
        ("?tail=6", [1, 2, 3, 4, 5, 6]),
        ("?tail=1000000", [1, 2, 3, 4, 5, 6]),
    ],
)
async def test_lines_of_a_part_are_returned(api: Api, query: str, numbers: list[int]) -> None:
    """After a position, at most a number of them, or the last ones."""
    await add_log(api)
    response = await api.call("GET", f"/tasks/{TASK}/logs{query}")
    assert numbers == [json.loads(line)["n"] for line in response.text.splitlines()]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?after=1", "after must be the id of an event, such as 3:7"),
        ("?after=end", "after must be the id of an event, such as 3:7"),
        ("?tail=0", "tail must be a whole number from 1 to 1000000"),
        ("?tail=-1", "tail must be a whole number from 1 to 1000000"),
        ("?limit=1000001", "limit must be a whole number from 1 to 1000000"),
        ("?limit=\u0663", "limit must be a whole number from 1 to 1000000"),
        ("?tail=1&limit=1", "tail cannot be combined with after or limit"),
    ],
)
async def test_invalid_part_is_400(api: Api, query: str, message: str) -> None:
    """The error says what is allowed."""
    await add_log(api)
    response = await api.call("GET", f"/tasks/{TASK}/logs{query}")
    assert (400, [message]) == (response.status, [error["message"] for error in response.body["details"]])


# --- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=0-", 0, 47),
        ("bytes=5-9", 5, 9),
        ("bytes=20-40", 20, 40),
        ("bytes=24-31", 24, 31),
        ("bytes=40-999999", 40, 47),
        ("bytes=-1", 47, 47),
        ("bytes=-10", 38, 47),
        ("bytes=-999", 0, 47),
    ],
)
async def test_range_of_bytes_is_returned(api: Api, header: str, first: int, last: int) -> None:
    """The total is known when the task has finished."""
    await add_log(api)
    for total in ("*", str(len(LOG))):
        response = await api.call("GET", f"/tasks/{TASK}/logs", headers={"Range": header})
        assert (206, LOG[first : last + 1].decode()) == (response.status, response.text)
        assert f"bytes {first}-{last}/{total}" == response.headers["Content-Range"]
        assert str(last - first + 1) == response.headers["Content-Length"]
        if total == "*":
            await api.finish(TASK)


@pytest.mark.parametrize("header", ["bytes=48-", "bytes=99-100", "bytes=-0"])
async def test_range_outside_of_the_log_is_416(api: Api, header: str) -> None:
    """The response has the size."""
    await add_log(api)
    response = await api.call("GET", f"/tasks/{TASK}/logs", headers={"Range": header})
    assert (416, "bytes */48") == (response.status, response.headers["Content-Range"])


@pytest.mark.parametrize(
    "headers",
    [
        {"Range": "bytes=0-1,3-4"},
        {"Range": "lines=0-1"},
        {"Range": "bytes=-"},
        {"Range": "bytes=5-2"},
        {"Range": "bytes=0-1", "If-Range": '"made-up"'},
    ],
)
async def test_other_ranges_are_ignored(api: Api, headers: dict[str, str]) -> None:
    """The response is the whole log, as RFC 9110 has it."""
    await add_log(api)
    response = await api.call("GET", f"/tasks/{TASK}/logs", headers=headers)
    assert (200, LOG.decode()) == (response.status, response.text)


# --- compression -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accepted", "encoding"), [("gzip, deflate", "gzip"), ("identity", None), ("br", None)])
async def test_log_is_compressed_for_clients_that_accept_it(api: Api, accepted: str, encoding: str | None) -> None:
    """Only gzip, which every client knows."""
    await add_log(api)
    request: dict[str, Any] = {"headers": {"Accept-Encoding": accepted}, "auto_decompress": False}
    async with api.http.request("GET", f"{api.url}/tasks/{TASK}/logs", **request) as response:
        assert (encoding, "Accept-Encoding") == (response.headers.get("Content-Encoding"), response.headers["Vary"])
        content = await response.read()
    assert LOG == (gzip.decompress(content) if encoding else content)


async def test_range_is_not_compressed(api: Api) -> None:
    """Its bytes are those of the log."""
    await add_log(api)
    headers = {"Accept-Encoding": "gzip", "Range": "bytes=0-6"}
    response = await api.call("GET", f"/tasks/{TASK}/logs", headers=headers)
    assert (None, '{"n":1}') == (response.headers.get("Content-Encoding"), response.text)


# --- long lines in streams -------------------------------------------------------------------------------------------


async def test_long_line_of_a_stream_is_cut(api: Api) -> None:
    """The event has the type and the start of the line, and the path of the whole. Other lines are unchanged."""
    await api.submit_started(taskId=TASK)
    long = b'{"type":"assistant","text":"' + "é".encode() * 1000 + b'"}'
    await api.add_chunk(TASK, 1, b'{"n":1}', long, b'{"n":3}')
    await api.finish(TASK)
    events = await api.events(f"/tasks/{TASK}/events?maxLineBytes=1025")
    first, cut, third = [event for event in events if event.name == "message"]
    assert ({"n": 1}, {"n": 3}, "1:2") == (first.data, third.data, cut.id)
    assert {"type": "assistant", "truncated": True, "bytes": len(long)} == {
        name: cut.data[name] for name in ("type", "truncated", "bytes")
    }
    assert long[:1024].decode() == cut.data["content"]
    assert long + b"\n" == (await api.call("GET", cut.data["path"])).text.encode()
    whole = await api.events(f"/tasks/{TASK}/events?maxLineBytes=67108864")
    assert json.loads(long) == [event for event in whole if event.name == "message"][1].data


@pytest.mark.parametrize("value", ["1023", "67108865", "x", "-1"])
async def test_invalid_length_of_lines_is_400(api: Api, value: str) -> None:
    """The error says what is allowed."""
    await api.submit(taskId=TASK)
    response = await api.call("GET", f"/tasks/{TASK}/events?maxLineBytes={value}")
    expected = "maxLineBytes must be a whole number from 1024 to 67108864"
    assert (400, expected) == (response.status, response.body["details"][0]["message"])

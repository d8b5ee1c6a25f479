from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ccrun import javascript_json
from ccrun.api import sse
from ccrun.api.sse import Cursor, parse_cursor

Event = tuple[str, str, str]


def read_stream(stream: bytes) -> list[Event]:
    """Parse events as the HTML standard (9.2.6) specifies for browsers. Return the type, last ID and data of each."""
    events: list[Event] = []
    kind, data, last_id = "", list[str](), ""
    for line in stream.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if not line:
            if data:
                events.append((kind or "message", last_id, "\n".join(data)))
            kind, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "event":
                kind = value
            case "data":
                data.append(value)
            case "id" if "\0" not in value:
                last_id = value
    return events


def test_event_has_one_line_for_each_field() -> None:
    """An event has its ID, name and data, one line each, and an empty line."""
    assert sse.event("done", b'{"a":1}', event_id="end") == b'id: end\nevent: done\ndata: {"a":1}\n\n'
    assert sse.json_event("x", {"a": "é"}) == 'event: x\ndata: {"a":"é"}\n\n'.encode()
    assert sse.json_event("x", {}, at=Cursor(2, 3)) == b"id: 2:3\nevent: x\ndata: {}\n\n"


def test_retry_and_heartbeat_are_not_events() -> None:
    """A stream starts with the delay after which a browser reconnects; neither that nor a heartbeat ends an event."""
    assert sse.retry(1) == b"retry: 1000\n"
    assert b"\n\n" not in sse.retry(1) + sse.HEARTBEAT + sse.HEARTBEAT
    assert read_stream(sse.retry(1) + sse.HEARTBEAT) == []


def test_line_separators_of_other_standards_are_escaped() -> None:
    """Some clients split lines at them. The JSON is the same."""
    text = "a\u2028b\u2029c\u0085d"
    for stream in (
        sse.line_events(1, json.dumps({"x": text}, ensure_ascii=False).encode() + b"\n"),
        sse.json_event("x", {"x": text}),
    ):
        assert 1 == len(stream.decode().strip().partition("data: ")[2].splitlines())
        assert {"x": text} == json.loads(stream.decode().partition("data: ")[2])


def test_lines_are_default_events_with_their_cursor() -> None:
    """Each line of a chunk is an event without a name; its ID is the cursor of the line."""
    assert sse.line_events(7, b'{"a":1}\n{"b":2}\n') == b'id: 7:1\ndata: {"a":1}\n\nid: 7:2\ndata: {"b":2}\n\n'


def test_large_line_is_copied_once() -> None:
    """A line of some megabytes needs the memory of its event and no more."""
    content = b"x" * (4 << 20) + b"\n"
    tracemalloc.start()
    try:
        events = sse.line_events(1, content)
        assert tracemalloc.get_traced_memory()[1] < 1.1 * len(events)
    finally:
        tracemalloc.stop()


def test_skipped_lines_do_not_change_ids() -> None:
    """With `after_line`, the remaining lines have the same IDs as without."""
    content = b"1\n2\n3\n"
    assert [("message", "4:3", "3")] == read_stream(sse.line_events(4, content, after_line=2))
    assert sse.line_events(4, content, after_line=3) == b""
    assert sse.line_events(4, content, after_line=99) == b""


@pytest.mark.parametrize("content", [b"", b"\n", b"\n\n"])
def test_empty_lines_have_no_events(content: bytes) -> None:
    """An empty line has no event, because browsers ignore events without data."""
    assert sse.line_events(1, content) == b""


def test_last_line_needs_no_newline() -> None:
    """A last line without a newline has an event."""
    assert [("message", "1:1", "a"), ("message", "1:2", "b")] == read_stream(sse.line_events(1, b"a\nb"))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53) + 1, 2**53 - 1), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)


@given(st.lists(json_values, max_size=6), st.integers(0, 7))
@example([{"a": "line\nbreak\r\u2028\u2029\0"}], 0)
def test_line_is_received_unchanged(values: list[object], after_line: int) -> None:
    """A parser that follows the standard gets the value and the ID of each line, for any JSON."""
    content = b"".join(javascript_json.dumps(value) + b"\n" for value in values)
    events = read_stream(sse.line_events(3, content, after_line=after_line))
    expected = [("message", f"3:{n}", value) for n, value in enumerate(values, 1) if n > after_line]
    assert expected == [(kind, event_id, json.loads(data)) for kind, event_id, data in events]


@pytest.mark.parametrize("line", [b"a\rb", b"\r", b"data: x\r\rid: 9:9\rdata: y", b"\xff\r"])
def test_line_with_carriage_return_is_wrapped(line: bytes) -> None:
    """A line with a carriage return becomes one event, whose data is JSON."""
    ((kind, event_id, data),) = read_stream(sse.line_events(1, line + b"\n"))
    assert ("message", "1:1", {"type": "text", "content": line.decode(errors="replace")}) == (
        kind,
        event_id,
        json.loads(data),
    )


@given(st.integers(0, 10**15 - 1), st.integers(0, 10**15 - 1))
def test_cursor_is_parsed_from_its_string(chunk: int, line: int) -> None:
    """`parse_cursor` is the inverse of `str`."""
    assert Cursor(chunk, line) == parse_cursor(str(Cursor(chunk, line)))


@pytest.mark.parametrize(
    "text", ["", "end", "1", "1:", ":1", "-1:1", "1:1 ", "1:1\n", "1 :1", "\u0661:1", "9" * 16 + ":1", "1:1:1"]
)
def test_other_ids_are_no_cursors(text: str) -> None:
    """Any other ID gives None."""
    assert parse_cursor(text) is None


def test_cursors_have_the_order_of_the_log() -> None:
    """A later line is greater, and so is any line of a later chunk."""
    assert [Cursor(0, 0), Cursor(1, 2), Cursor(1, 10), Cursor(2, 1)] == sorted(
        [Cursor(2, 1), Cursor(1, 10), Cursor(0, 0), Cursor(1, 2)]
    )

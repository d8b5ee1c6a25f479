from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ccrun import javascript_json
from ccrun.api import sse
from ccrun.api.sse import Cursor, parse_cursor

Event = tuple[str, str, str]


def read_stream(stream: bytes) -> list[Event]:
    """Read events as the HTML standard tells a browser to (9.2.6): type, ID so far, data."""
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


def test_event_is_spelled_with_line_feeds() -> None:
    """An event is its ID, its name and its data, a line each, and an empty line."""
    assert sse.event("done", b'{"a":1}', event_id="end") == b'id: end\nevent: done\ndata: {"a":1}\n\n'
    assert sse.json_event("caught_up", {"a": "é"}) == 'event: caught_up\ndata: {"a":"é"}\n\n'.encode()


def test_stream_opens_with_the_time_to_come_back() -> None:
    """A browser is told after how long to connect again; that and a heartbeat are no events."""
    assert sse.opening() == b"retry: 1000\n\n"
    assert read_stream(sse.opening() + sse.HEARTBEAT) == []


def test_lines_are_default_events_with_their_cursor() -> None:
    """Each line of a chunk is an event without a name, whose ID is its place."""
    assert sse.lines(7, b'{"a":1}\n{"b":2}\n') == b'id: 7:1\ndata: {"a":1}\n\nid: 7:2\ndata: {"b":2}\n\n'


def test_lines_after_one_keep_their_numbers() -> None:
    """Lines up to the one that a reader has are left out; the others have the IDs that they always have."""
    content = b"1\n2\n3\n"
    assert [("message", "4:3", "3")] == read_stream(sse.lines(4, content, after_line=2))
    assert sse.lines(4, content, after_line=3) == b""
    assert sse.lines(4, content, after_line=99) == b""


@pytest.mark.parametrize("content", [b"", b"\n", b"\n\n"])
def test_empty_lines_are_no_events(content: bytes) -> None:
    """A chunk without a line gives nothing; an event without data would be none."""
    assert sse.lines(1, content) == b""


def test_chunk_without_its_last_newline_is_whole() -> None:
    """A last line without a newline is an event too."""
    assert [("message", "1:1", "a"), ("message", "1:2", "b")] == read_stream(sse.lines(1, b"a\nb"))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53) + 1, 2**53 - 1), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)


@given(st.lists(json_values, max_size=6), st.integers(0, 7))
@example([{"a": "line\nbreak\r\u2028\u2029\0"}], 0)
def test_reader_gets_every_line_as_it_was(values: list[object], after_line: int) -> None:
    """Whatever JSON a log holds, a reader by the standard's rules gets the same values, each with its ID."""
    content = b"".join(javascript_json.dumps(value) + b"\n" for value in values)
    events = read_stream(sse.lines(3, content, after_line=after_line))
    expected = [("message", f"3:{n}", value) for n, value in enumerate(values, 1) if n > after_line]
    assert expected == [(kind, event_id, json.loads(data)) for kind, event_id, data in events]


@pytest.mark.parametrize("line", [b"a\rb", b"\r", b"data: x\r\rid: 9:9\rdata: y", b"\xff\r"])
def test_line_that_would_break_the_framing_is_wrapped(line: bytes) -> None:
    """A line with a carriage return stays one event, whose data is JSON."""
    ((kind, event_id, data),) = read_stream(sse.lines(1, line + b"\n"))
    assert ("message", "1:1", {"type": "text", "content": line.decode(errors="replace")}) == (
        kind,
        event_id,
        json.loads(data),
    )


@given(st.integers(0, 10**15 - 1), st.integers(0, 10**15 - 1))
def test_cursor_is_read_back(chunk: int, line: int) -> None:
    """An event ID of ours names its place."""
    assert Cursor(chunk, line) == parse_cursor(str(Cursor(chunk, line)))


@pytest.mark.parametrize(
    "text", ["", "end", "1", "1:", ":1", "-1:1", "1:1 ", "1:1\n", "1 :1", "\u0661:1", "9" * 16 + ":1", "1:1:1"]
)
def test_other_ids_name_no_place(text: str) -> None:
    """An ID that is none of ours is not guessed at."""
    assert parse_cursor(text) is None


def test_cursors_are_ordered_as_the_log_is() -> None:
    """A later line, or any line of a later chunk, is further on."""
    assert [Cursor(0, 0), Cursor(1, 2), Cursor(1, 10), Cursor(2, 1)] == sorted(
        [Cursor(2, 1), Cursor(1, 10), Cursor(0, 0), Cursor(1, 2)]
    )

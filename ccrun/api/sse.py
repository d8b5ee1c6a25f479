"""The format of server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html. Pure.

The only module that formats them. `aiohttp-sse` formats one event at a time; here a whole log chunk is formatted once for all
readers.
"""

from __future__ import annotations

import re
from typing import Any, Final

import attrs

from ccrun import codec

#: A comment, which keeps proxies from closing an idle stream and reveals readers that have left. It has no empty line, which some
#: clients take for the end of an event.
HEARTBEAT: Final = b": heartbeat\n"
#: The ID of the last event. A reader that reconnects with it has received all events.
LAST_ID: Final = "end"

#: U+2028, U+2029 and U+0085 in UTF-8, and as JSON escapes them.
_LINE_SEPARATORS: Final = (
    (b"\xe2\x80\xa8", b"\\u2028"),
    (b"\xe2\x80\xa9", b"\\u2029"),
    (b"\xc2\x85", b"\\u0085"),
)
#: The type of a line of the CLI, which is its first member.
_TYPE: Final = re.compile(rb'\{"type":"([a-z_]{1,64})"')
_CURSOR: Final = re.compile(r"([0-9]{1,15}):([0-9]{1,15})")


@attrs.frozen(order=True)
class Cursor:
    """A position in a log: after this line of this chunk, both counted from 1. `Cursor(0, 0)` is the start."""

    chunk: int = 0
    line: int = 0

    def __str__(self) -> str:
        return f"{self.chunk}:{self.line}"


def retry(seconds: int) -> bytes:
    """Return the field of an event that tells a browser when to reconnect."""
    return b"retry: %d\n" % (seconds * 1000)


def parse_cursor(text: str) -> Cursor | None:
    """Return the position that an event ID stands for; None if it is not an ID of a line."""
    match = _CURSOR.fullmatch(text)
    return Cursor(int(match[1]), int(match[2])) if match else None


def event(name: str, data: bytes, *, event_id: str | None = None) -> bytes:
    """Return an event.

    Args:
        name: The type of the event.
        data: JSON without a line break.
        event_id: The ID of the event.
    """
    id_field = b"" if event_id is None else b"id: %b\n" % event_id.encode()
    return b"%bevent: %b\ndata: %b\n\n" % (id_field, name.encode(), _escaped(data))


def json_event(name: str, data: dict[str, Any], *, at: Cursor | None = None) -> bytes:
    """Return an event whose data is a JSON object.

    Args:
        at: The position of a reader that has received the event.
    """
    return event(name, codec.to_json(data), event_id=None if at is None else str(at))


def line_events(chunk: int, content: bytes, *, after_line: int = 0) -> bytes:
    """Return an event of the default type for each line of a chunk, with its cursor as ID.

    Args:
        chunk: The number of the chunk.
        content: The lines of the chunk.
        after_line: The number of lines to skip.
    """
    content = _escaped(content)
    # Views, so that a line of many megabytes is copied once.
    view = memoryview(content)
    has_return = b"\r" in content
    pieces: list[bytes | memoryview] = []
    start = number = 0
    while start < len(content):
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        number += 1
        if start < end and number > after_line:
            line: bytes | memoryview = view[start:end]
            if has_return and content.find(b"\r", start, end) >= 0:
                line = _as_text(content[start:end])
            pieces += (b"id: %d:%d\ndata: " % (chunk, number), line, b"\n\n")
        start = end + 1
    return b"".join(pieces)


def cut(events: bytes, max_line_bytes: int, logs_path: str) -> bytes:
    """Return events of lines with a summary in place of each line that is too long.

    Args:
        events: What `line_events` has returned.
        max_line_bytes: The maximum length of a line.
        logs_path: The path under which the whole line can be requested, without a query.
    """
    pieces: list[bytes] = []
    for block in events.split(b"\n\n")[:-1]:
        head, _, line = block.partition(b"\ndata: ")
        if len(line) > max_line_bytes:
            chunk, number = map(int, head.removeprefix(b"id: ").split(b":"))
            kind = _TYPE.match(line)
            summary = {
                "type": kind[1].decode() if kind else "text",
                "truncated": True,
                "bytes": len(line),
                "content": line[:max_line_bytes].decode(errors="ignore"),
                "path": f"{logs_path}?after={chunk}:{number - 1}&limit=1",
            }
            block = b"%b\ndata: %b" % (head, codec.to_json(summary))
        pieces += (block, b"\n\n")
    return b"".join(pieces)


def _escaped(json_lines: bytes) -> bytes:
    """Escape the characters at which some clients split lines, although the format does not. In JSON they are in strings only."""
    for character, escape in _LINE_SEPARATORS:
        if character in json_lines:
            json_lines = json_lines.replace(character, escape)
    return json_lines


def _as_text(line: bytes) -> bytes:
    """Wrap a line that contains a carriage return, which would end the field. ccrun writes no such lines."""
    return codec.to_json({"type": "text", "content": line.decode(errors="replace")})

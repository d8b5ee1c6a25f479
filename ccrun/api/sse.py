"""The format of server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html. Pure.

No other module formats events. `aiohttp-sse` formats single events; here a chunk of a log is formatted once for all readers.
"""

from __future__ import annotations

import re
from typing import Any, Final

import attrs

from ccrun import codec

#: Milliseconds after which a browser reconnects.
RETRY_MS: Final = 1000
#: A comment, which keeps proxies from closing the stream and reveals readers that have left.
HEARTBEAT: Final = b": heartbeat\n\n"
#: The ID of the last event. A reader that reconnects with it has everything.
LAST_ID: Final = "end"

_CURSOR: Final = re.compile(r"([0-9]{1,15}):([0-9]{1,15})")


@attrs.frozen(order=True)
class Cursor:
    """A position in a log: after this line of this chunk, both counted from 1. `Cursor(0, 0)` is the start."""

    chunk: int = 0
    line: int = 0

    def __str__(self) -> str:
        return f"{self.chunk}:{self.line}"


def parse_cursor(text: str) -> Cursor | None:
    """Return the position that an event ID names, None if it is not an ID of this service."""
    match = _CURSOR.fullmatch(text)
    return Cursor(int(match[1]), int(match[2])) if match else None


def event(name: str, data: bytes, *, event_id: str | None = None) -> bytes:
    """Return an event whose data is one line."""
    identity = b"" if event_id is None else b"id: %b\n" % event_id.encode()
    return b"%bevent: %b\ndata: %b\n\n" % (identity, name.encode(), data)


def json_event(name: str, data: dict[str, Any]) -> bytes:
    """Return an event whose data is an object."""
    return event(name, codec.to_json(data))


def opening() -> bytes:
    """Return the start of a stream."""
    return b"retry: %d\n\n" % RETRY_MS


def lines(chunk: int, content: bytes, *, after_line: int = 0) -> bytes:
    """Return the lines of a chunk as events of the default type, each with its cursor as ID."""
    frames = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line and number > after_line:
            frames.append(b"id: %d:%d\ndata: %b\n\n" % (chunk, number, line if b"\r" not in line else _as_text(line)))
    return b"".join(frames)


def _as_text(line: bytes) -> bytes:
    """Wrap a line with a carriage return, which would break the format. ccrun writes no such line."""
    return codec.to_json({"type": "text", "content": line.decode(errors="replace")})

"""Lines that ccrun adds to the log of a task. Pure."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator
from typing import Any, Final

from ccrun.process.child import CutLine

_SLICE_BYTES: Final = 64 * 1024


def text_line(content: bytes | bytearray, **fields: Any) -> bytearray:
    """Return a JSON object with these fields and `content`, the bytes as text, and `omittedBytes` if the line was cut.

    Bytes that are not UTF-8 become replacement characters. Memory stays near one copy, since a line may have many megabytes.
    """
    if isinstance(content, CutLine) and content.omitted_bytes:
        fields["omittedBytes"] = content.omitted_bytes
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    opened = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))[:-1]
    wrapped = bytearray(f'{opened}{"," if fields else ""}"content":"'.encode())
    for piece in itertools.chain(slices(content), (b"",)):
        text = decoder.decode(piece, final=not piece)
        wrapped += json.dumps(text, ensure_ascii=False)[1:-1].encode()
    wrapped += b'"}'
    return wrapped


def worker_line(step: str, **fields: Any) -> bytes:
    """Return a line about a step of the worker, such as `clone` or `git`. Fields that are None are left out."""
    line = {"type": "worker", "step": step, **{name: value for name, value in fields.items() if value is not None}}
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def slices(line: bytes | bytearray) -> Iterator[bytes]:
    """Yield a line in pieces."""
    with memoryview(line) as view:
        for start in range(0, len(view), _SLICE_BYTES):
            yield bytes(view[start : start + _SLICE_BYTES])

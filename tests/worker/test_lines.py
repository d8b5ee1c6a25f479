from __future__ import annotations

import json

from ccrun.worker.lines import text_line, worker_line


def test_text_line_replaces_invalid_bytes() -> None:
    """The result is one line of JSON with the other fields first."""
    line = text_line(b'a "quote"\n\xff\xc3\xa4', type="text", index=1)
    assert {"type": "text", "index": 1, "content": 'a "quote"\n\N{REPLACEMENT CHARACTER}ä'} == json.loads(line)
    assert b"\n" not in line


def test_long_text_is_decoded_correctly() -> None:
    """Content is decoded in pieces. A character may be divided between two of them."""
    content = "ä" * 200_000 + "x"
    assert {"content": content} == json.loads(text_line(content.encode()))


def test_worker_line_omits_fields_without_a_value() -> None:
    """A lone surrogate is replaced."""
    line = worker_line("clone", host="h", revision=None, commit="c\udcff")
    assert {"type": "worker", "step": "clone", "host": "h", "commit": "c?"} == json.loads(line)

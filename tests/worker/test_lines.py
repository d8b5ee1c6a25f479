from __future__ import annotations

import json

from ccrun.worker.lines import text_line, worker_line


def test_bytes_become_text_after_the_other_fields() -> None:
    """On one line, whatever they are."""
    line = text_line(b'a "quote"\n\xff\xc3\xa4', type="text", index=1)
    assert {"type": "text", "index": 1, "content": 'a "quote"\n\N{REPLACEMENT CHARACTER}ä'} == json.loads(line)
    assert b"\n" not in line


def test_a_character_across_two_pieces_stays_whole() -> None:
    """Long content is decoded piece by piece."""
    content = "ä" * 200_000 + "x"
    assert {"content": content} == json.loads(text_line(content.encode()))


def test_a_step_of_the_worker_has_the_fields_that_there_are() -> None:
    """Those without a value are left out; a lone surrogate breaks nothing."""
    line = worker_line("clone", host="h", revision=None, commit="c\udcff")
    assert {"type": "worker", "step": "clone", "host": "h", "commit": "c?"} == json.loads(line)

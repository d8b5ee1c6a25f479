from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Mapping
from typing import Any

import attrs
import pytest
from helpers.claude import MIB
from hypothesis import given
from hypothesis import strategies as st

from ccrun.process.exit import Exit
from ccrun.task import Outcome, Reason, Status
from ccrun.worker.transcript import (
    MAX_ERROR_CHARS,
    MAX_PARSED_LINE_BYTES,
    MAX_RESULT_CHARS,
    Transcript,
    line_for_log,
    outcome_of_run,
)

# --- stream-json -----------------------------------------------------------------------------------------------------


RESULT: Mapping[str, Any] = {
    "type": "result",
    "subtype": "success",
    "is_error": False,
    "num_turns": 2,
    "total_cost_usd": 0.25,
    "usage": {"input_tokens": 20, "server": {"requests": 1}, "speed": "standard", "iterations": []},
    "session_id": "s1",
    "result": "Done.",
}


def transcript_of(*events: object) -> Transcript:
    """Return a transcript of these events, as the CLI prints them."""
    transcript = Transcript()
    for event in events:
        line = event if isinstance(event, bytes) else json.dumps(event, separators=(",", ":")).encode()
        transcript.feed(line)
    return transcript


def test_last_result_is_used_and_counts_are_summed() -> None:
    """The CLI prints several results when background work resumes the agent. Turns and tokens are those of the whole run."""
    transcript = transcript_of(RESULT, {**RESULT, "num_turns": 3, "result": "Really done."})
    assert (transcript.turns, transcript.result and transcript.result["result"]) == (5, "Really done.")
    assert transcript.usage == {"input_tokens": 40, "server": {"requests": 2}, "speed": "standard"}


def test_failed_tool_calls_are_counted() -> None:
    """A tool result with `is_error` is counted; a text that contains the same characters is not."""
    blocks = [{"type": "tool_result", "is_error": True}, {"type": "tool_result", "is_error": False}, "text"]
    user = {"type": "user", "message": {"content": blocks}}
    assistant = {
        "type": "assistant",
        "message": {"content": [{"type": "text", "text": '"is_error":true', "is_error": True}]},
    }
    assert transcript_of(user, assistant, user).errors == 2


@pytest.mark.parametrize(
    "line",
    [
        b"plain text",
        b'{"type":"result"',
        b'["type":"result"]',
        b'[{"type":"result"}]',
        b'{"x":{"type":"result"}}',
        b'{"type":"user","message":{"content":"x"},"is_error":true}',
        b'{"type":"user","message":7,"is_error":true}',
        b'{"a":' * 100_000 + b'"type":"result"',
        b'{"type":"result","n":' + b"9" * 5000 + b"}",
        b'\xff{"type":"result"}',
        b"",
    ],
)
def test_lines_that_are_not_events_are_ignored(line: bytes) -> None:
    """Output of other programs between the events has no effect."""
    transcript = transcript_of(line)
    assert (transcript.has_lines, transcript.result, transcript.turns, transcript.errors) == (True, None, 0, 0)


def test_result_longer_than_the_parse_limit_is_parsed() -> None:
    """A result is parsed at any length; other long events are not."""
    long = "x" * (2 * MAX_PARSED_LINE_BYTES)
    blocks = [{"type": "tool_result", "is_error": True, "content": long}]
    transcript = transcript_of({"type": "user", "message": {"content": blocks}}, {**RESULT, "result": long})
    assert (transcript.errors, transcript.turns) == (0, 2)


def test_invalid_values_of_a_result_are_not_recorded() -> None:
    """The record has no number that JavaScript cannot represent and no text that UTF-8 cannot encode."""
    hostile = rb"""{"type":"result","is_error":false,"num_turns":1e9,"total_cost_usd":NaN,"session_id":"\ud800","result":7,
        "usage":{"a":1e999,"b":123456789012345678901,"c":"\udfff","\ud800":1,"d":[1],"e":null}}""".replace(b"\n", b"")
    outcome = outcome_of_run(transcript_of(hostile), Exit(code=0))
    assert outcome == Outcome(
        status=Status.COMPLETED,
        reason=Reason.COMPLETED,
        exit_code=0,
        session_id="?",
        usage={"c": "?", "?": 1},
    )


# --- lines for the log -----------------------------------------------------------------------------------------------


def text(content: str) -> bytes:
    """Return the log line for a text that is not JSON."""
    return json.dumps({"type": "text", "content": content}, ensure_ascii=False, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"b":1.0,"a":[1,  2],"b":"\\u00e9\xc3\xa9"}', None),
        (b'{"a":\t1}', None),
        (b"{}", None),
        (b'{"a":1}\r', b'{"a":1}'),
        (b"", b""),
        (b" \t\r", b""),
        (b"npm warn", text("npm warn")),
        (b"  indented \x1b[1mbold\x00", text("  indented \x1b[1mbold\x00")),
        (b"[1]", text("[1]")),
        (b'"text"', text('"text"')),
        (b"null", text("null")),
        (b'{"a":1', text('{"a":1')),
        (b'{"a":NaN}', text('{"a":NaN}')),
        (b'{"a":\r1}', text('{"a":\r1}')),
        (b'{"a":"\t"}', text('{"a":"\t"}')),
        (b'{"a":"\xff"}', text('{"a":"\ufffd"}')),
        (b'\xef\xbb\xbf{"a":1}', text('\ufeff{"a":1}')),
        ('{"a":1}'.encode("utf-16-le"), text('{\0"\0a\0"\0:\x001\0}\0')),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, text('{"a":' * 100_000 + "1" + "}" * 100_000)),
    ],
)
def test_line_for_log(line: bytes, expected: bytes | None) -> None:
    """JSON objects are unchanged, blank lines become empty, and any other line becomes a text object."""
    expected_line = line if expected is None else expected
    assert (bytes(line_for_log(line)), bytes(line_for_log(bytearray(line)))) == (expected_line, expected_line)


@given(st.binary().map(lambda line: line.replace(b"\n", b"")))
def test_every_logged_line_is_one_json_object(line: bytes) -> None:
    """Any line becomes one JSON object or is empty, and a logged line is unchanged when it is converted again."""
    logged = line_for_log(line)
    if logged:
        assert isinstance(json.loads(bytes(logged).decode()), dict)
        assert not re.search(rb"[\r\n]", logged)
    assert line_for_log(logged) == logged


@pytest.mark.parametrize(
    ("line", "is_object"),
    [
        (b'{"a":"' + b"\xc3\xa9" * MIB + b'"}', True),
        (b'{"a":"x' + b"\xc3\xa9" * MIB + b'"}', True),
        (b'{"a":"' + b"\xff" * MIB + b'"}', False),
        (b'{"a":"' + b"x" * MIB + b'\xc3"}', False),
        (b'{"a":"' + b"x" * MIB + b'\r"}', False),
        (b'{"a":"' + b"x" * MIB, False),
        (b"x" * 2 * MIB, False),
    ],
)
def test_long_lines_are_classified_without_parsing(line: bytes, is_object: bool) -> None:
    """A long line that looks like an object is returned without a copy; any other becomes a text object."""
    logged = line_for_log(line)
    if is_object:
        assert logged is line
    else:
        assert bytes(logged) == text(line.decode(errors="replace"))


@pytest.mark.parametrize(("line", "max_mib"), [(b'{"a":"%s"}', 1), (b"%s", 80)])
def test_long_lines_need_no_additional_memory(line: bytes, max_mib: int) -> None:
    """For a line of 64 MiB, memory is allocated only for a text object that is returned."""
    long = bytearray(line % (b"x" * (64 * MIB)))
    tracemalloc.start()
    try:
        line_for_log(long)
        Transcript().feed(long)
        assert tracemalloc.get_traced_memory()[1] <= max_mib * MIB
    finally:
        tracemalloc.stop()


# --- the outcome -----------------------------------------------------------------------------------------------------


MAX_TURNS_RESULT: Mapping[str, Any] = {
    "type": "result",
    "subtype": "error_max_turns",
    "is_error": True,
    "num_turns": 2,
    "terminal_reason": "max_turns",
    "errors": ["Reached maximum number of turns (1)"],
}


API_RESULT = {**RESULT, "is_error": True, "terminal_reason": "api_error", "result": "API Error: 500"}


RETRY_401 = {"type": "system", "subtype": "api_retry", "attempt": 1, "error_status": 401}


OK = Exit(code=0)


@pytest.mark.parametrize(
    ("events", "exit_status", "options", "reason", "code", "error"),
    [
        ([RESULT], OK, {}, Reason.COMPLETED, 0, None),
        ([RETRY_401, RESULT], OK, {}, Reason.COMPLETED, 0, None),
        ([API_RESULT, RESULT], OK, {}, Reason.COMPLETED, 0, None),
        ([RESULT], Exit(code=143, signal=15), {"stopped_by_us": True}, Reason.COMPLETED, 0, None),
        ([RESULT], OK, {"rejected": "No."}, Reason.COMPLETED, 0, None),
        ([MAX_TURNS_RESULT], Exit(code=1), {}, Reason.MAX_TURNS, 1, "Reached maximum number of turns (1)"),
        ([API_RESULT], Exit(code=1), {}, Reason.API_ERROR, 1, "API Error: 500"),
        ([API_RESULT], OK, {}, Reason.API_ERROR, 1, "API Error: 500"),
        ([RESULT, {**RESULT, "is_error": True, "result": "Failed."}], OK, {}, Reason.AGENT_ERROR, 1, "Failed."),
        ([{"type": "result", "is_error": True}], OK, {}, Reason.AGENT_ERROR, 1, "Claude process exited with code 1"),
        ([{"type": "result"}], OK, {}, Reason.AGENT_ERROR, 1, "Claude process exited with code 1"),
        ([RESULT], Exit(code=3), {}, Reason.AGENT_ERROR, 3, "Claude process exited with code 3"),
        ([], Exit(code=1), {}, Reason.AGENT_ERROR, 1, "Claude process exited with code 1"),
        ([b"text"], OK, {}, Reason.AGENT_ERROR, 1, "The Claude CLI exited without a result."),
        ([API_RESULT], Exit(code=1), {"rejected": "No."}, Reason.CREDENTIAL_REJECTED, 1, "No."),
        ([], Exit(code=143, signal=15), {"rejected": "No."}, Reason.CREDENTIAL_REJECTED, 143, "No."),
        ([RETRY_401], Exit(code=1), {}, Reason.CREDENTIAL_REJECTED, 1, "Claude process exited with code 1"),
        ([RETRY_401, MAX_TURNS_RESULT], Exit(code=1), {}, Reason.MAX_TURNS, 1, "Reached maximum number of turns (1)"),
        ([{**API_RESULT, "api_error_status": 401}], OK, {}, Reason.CREDENTIAL_REJECTED, 1, "API Error: 500"),
        (
            [RESULT],
            Exit(code=139, signal=11),
            {},
            Reason.KILLED,
            139,
            "The Claude process was killed by signal 11 (SIGSEGV).",
        ),
        (
            [],
            Exit(code=137, signal=9),
            {"stopped_by_us": True},
            Reason.KILLED,
            137,
            "The Claude process was killed by signal 9 (SIGKILL), which usually means that memory ran out.",
        ),
        ([], Exit(code=168, signal=40), {}, Reason.KILLED, 168, "The Claude process was killed by signal 40."),
        ([API_RESULT], Exit(code=143, signal=15), {"stopped_by_us": True}, Reason.API_ERROR, 1, "API Error: 500"),
    ],
)
def test_outcome_of_a_run(
    events: list[Any], exit_status: Exit, options: Mapping[str, Any], reason: Reason, code: int, error: str | None
) -> None:
    """A run succeeds with a successful last result and exit code 0; a failure has one reason and a nonzero exit code."""
    outcome = outcome_of_run(transcript_of(*events), exit_status, **options)
    status = Status.COMPLETED if reason is Reason.COMPLETED else Status.FAILED
    assert (outcome.status, outcome.reason, outcome.exit_code, outcome.error) == (status, reason, code, error)


def test_outcome_has_the_statistics_of_the_run() -> None:
    """It has turns, errors, cost, tokens, session ID and result, also when the run has failed."""
    user = {"type": "user", "message": {"content": [{"type": "tool_result", "is_error": True}]}}
    completed = Outcome(
        status=Status.COMPLETED,
        reason=Reason.COMPLETED,
        exit_code=0,
        turns=2,
        errors=1,
        cost_usd=0.25,
        usage={"input_tokens": 20, "server": {"requests": 1}, "speed": "standard"},
        session_id="s1",
        result="Done.",
    )
    assert outcome_of_run(transcript_of(user, RESULT), OK) == completed
    failed = attrs.evolve(
        completed,
        status=Status.FAILED,
        reason=Reason.API_ERROR,
        exit_code=1,
        error="API Error: 500",
        result="API Error: 500",
    )
    assert outcome_of_run(transcript_of(user, API_RESULT), OK) == failed


def test_result_and_error_are_truncated() -> None:
    """The record stays small; an ellipsis marks the truncation."""
    long = "é" * (2 * MAX_RESULT_CHARS)
    outcome = outcome_of_run(transcript_of({**API_RESULT, "result": long}), OK)
    assert outcome.result == "é" * (MAX_RESULT_CHARS - 1) + "…"
    assert outcome.error == "é" * (MAX_ERROR_CHARS - 1) + "…"

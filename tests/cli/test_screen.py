from __future__ import annotations

from typing import Any

import pytest

from ccrun.cli.screen import MAX_TOOL_CHARS, MAX_TOOL_LINES, Row, Screen, rows


def _assistant(*blocks: Any) -> dict[str, Any]:
    return {"type": "assistant", "message": {"content": list(blocks)}}


def _results(*contents: Any) -> dict[str, Any]:
    return {
        "type": "user",
        "message": {"content": [{"type": "tool_result", "content": content} for content in contents]},
    }


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("task", {"taskId": "t-1", "status": "pending"}, [Row("task", "t-1 is pending")]),
        ("caught_up", {}, []),
        ("message", {"type": "system", "subtype": "status"}, []),
        ("message", {"type": "result", "result": "shown already"}, []),
        ("message", {"type": "text", "content": "plain"}, [Row("output", "plain")]),
        (
            "message",
            _assistant(
                {"type": "thinking", "thinking": "…"},
                {"type": "text", "text": " Hello \n"},
                {"type": "tool_use", "name": "Bash", "input": {"command": "ls", "description": "List"}},
                {"type": "tool_use", "name": "Read", "input": {"file_path": "é"}},
            ),
            [Row("agent", "Hello"), Row("tool", "Bash: ls"), Row("tool", 'Read: {"file_path": "é"}')],
        ),
        (
            "message",
            _results("a\nb", [{"type": "text", "text": "c"}, {"type": "image"}, "no block"]),
            [Row("output", "a\nb"), Row("output", "c")],
        ),
        ("message", {"type": "assistant", "message": {"content": None}}, []),
        ("message", _assistant("no block", {"type": "text", "text": 5}), []),
        ("message", [], []),
        ("error", {"error": "It failed.", "exitCode": 1}, [Row("error", "It failed.")]),
        (
            "done",
            {
                "status": "failed",
                "exitCode": 1,
                "summary": {"turns": 2, "durationMs": 1234, "costUsd": 0.01234},
            },
            [Row("failed", "exit code 1, 2 turns, 1.2 s, $0.01234")],
        ),
    ],
)
def test_rows_of_an_event(name: str, data: Any, expected: list[Row]) -> None:
    """Only events for people have rows, and an event of unexpected form raises nothing."""
    assert expected == list(rows(name, data))


def test_output_of_a_tool_is_shortened() -> None:
    """Many lines are cut, with the number of missing lines, and a long line is cut."""
    (many, long) = rows("message", _results("line\n" * 100, "x" * 10_000))
    assert "line\n" * MAX_TOOL_LINES + f"… and {100 - MAX_TOOL_LINES} more lines" == many.text
    assert MAX_TOOL_CHARS == len(long.text)


def test_text_is_wrapped_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal, rows have at most 80 columns; control characters are removed and markup is shown as text."""
    Screen().row("agent", "[bold]red\x1b[31m\r\u009b " + "word " * 30 + "\ud800\nnext")
    lines = capsys.readouterr().out.splitlines()
    assert [True] * len(lines) == [len(line) <= 80 and line == line.rstrip() for line in lines]
    assert "  0.0s agent     [bold]red[31m word word" == lines[0][:40]
    assert " " * 17 + "next" == lines[-1]

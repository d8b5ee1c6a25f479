"""The output of the demo and the checks: one row for each event, with the time at its start.

All texts come from an agent, so they are shortened and printed as text, never as markup or control sequences.
"""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs
from rich.console import Console
from rich.text import Text

#: The width of labels.
LABEL_CHARS: Final = len("completed")
#: The minimum width of texts. In a narrower window, the terminal breaks the lines.
MIN_TEXT_CHARS: Final = 20
#: Limits of the input or output of a tool. The rest is not printed.
MAX_TOOL_LINES: Final = 6
MAX_TOOL_CHARS: Final = 400
#: Characters of a text of the agent. The rest is not printed.
MAX_MESSAGE_CHARS: Final = 2000

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_STYLES: Final = {
    "agent": "bold cyan",
    "tool": "bold yellow",
    "output": "yellow",
    "completed": "bold green",
    "verified": "bold green",
    "failed": "bold red",
    "error": "bold red",
}


@attrs.frozen
class Row:
    """A label and a text."""

    label: str
    text: str


class Screen:
    """Prints rows to standard output, wrapped at its width, which is 80 columns without a terminal."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Characters that the terminal cannot show are replaced.
            sys.stdout.reconfigure(errors="replace")
        self._console = Console(highlight=False, emoji=False)
        self._started = time.monotonic()

    def row(self, label: str, text: str) -> None:
        """Print a row with the seconds since the start."""
        elapsed = f"{time.monotonic() - self._started:.1f}s"
        margin = Text.assemble((f"{elapsed:>6} ", "dim"), (f"{label:{LABEL_CHARS}} ", _STYLES.get(label, "bold")))
        width = max(self._console.width - len(margin), MIN_TEXT_CHARS)
        # A table of rich would pad all lines with spaces.
        for line in Text(_CONTROL.sub("", text)).wrap(self._console, width, overflow="fold"):
            shown = margin + line
            shown.rstrip()
            self._console.print(shown, soft_wrap=True)
            margin = Text(" " * len(margin))

    def heading(self, text: str) -> None:
        """Print a heading."""
        self._console.print()
        self._console.rule(Text(text, style="bold"), align="left", style="dim")

    def verbatim(self, text: str) -> None:
        """Print lines to be copied, without wrapping."""
        self._console.print(Text(text), soft_wrap=True)


def rows(name: str, data: Any) -> Iterator[Row]:
    """Yield the rows for an event of a stream, none for events that only programs need."""
    match name, data:
        case "task", {"taskId": task_id, "status": status}:
            yield Row("task", f"{task_id} is {status}")
        case "message", {"type": "system", "subtype": "init"}:
            yield Row("agent", f"Claude Code {data.get('claude_code_version', '')} starts in its own workspace.")
        case "message", {"type": "system", "subtype": "api_retry"}:
            yield Row("retry", f"The model API responded with {data.get('error_status')}; the CLI retries.")
        case "message", {"type": "assistant" | "user", "message": {"content": [*blocks]}}:
            yield from _blocks(blocks)
        case "message", {"type": "text" | "stderr", "content": str(text)}:
            yield Row("output", _shortened(text))
        case "error", {"error": str(sentence)}:
            yield Row("error", sentence)
        case "done", {"status": str(status)}:
            yield Row(status, figures(data))


def figures(payload: Mapping[str, Any]) -> str:
    """Return the figures of a final task, from its callback or its record."""
    summary = payload.get("summary") or {}
    parts = [
        f"exit code {payload.get('exitCode')}",
        f"{summary.get('turns')} turns",
        f"{summary.get('durationMs', 0) / 1000:.1f} s",
    ]
    if summary.get("costUsd") is not None:
        parts.append(f"${summary['costUsd']:.4g}")
    return ", ".join(parts)


def _blocks(blocks: list[Any]) -> Iterator[Row]:
    for block in blocks:
        match block:
            case {"type": "text", "text": str(text)} if text.strip():
                yield Row("agent", _cut(text.strip(), MAX_MESSAGE_CHARS))
            case {"type": "tool_use", "name": str(tool), "input": {"command": str(command)}}:
                yield Row("tool", f"{tool}: {_shortened(command)}")
            case {"type": "tool_use", "name": str(tool), "input": arguments}:
                yield Row("tool", f"{tool}: {_shortened(json.dumps(arguments, ensure_ascii=False))}")
            case {"type": "tool_result", "content": str(text)}:
                yield Row("output", _shortened(text))
            case {"type": "tool_result", "content": [*parts]}:
                yield Row(
                    "output",
                    _shortened("\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))),
                )


def _shortened(text: str) -> str:
    lines = text.strip().split("\n")
    shown = _cut("\n".join(lines[:MAX_TOOL_LINES]), MAX_TOOL_CHARS)
    left = len(lines) - MAX_TOOL_LINES
    return shown if left <= 0 else f"{shown}\n… and {left} more lines"


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else f"{text[: chars - 2]} …"

"""One structured line per event on standard output: JSON with the names of Cloud Logging, or plain text on a terminal.

Modules call `log.info("task_started", message="Task started", taskId=…)`: first a stable key for programs, then a sentence for
people, which may change, then fields. This module decides how a line looks and where it goes. Logging neither raises an
exception in the program nor blocks it: a line that cannot be written is dropped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import threading
import traceback
from collections.abc import Iterator, MutableMapping
from typing import Any, Final

import structlog

from ccrun.config import LogFormat
from ccrun.task import TaskId

#: Characters of a text; the rest is cut. Cloud Logging accepts 256 KiB an entry (https://cloud.google.com/logging/quotas).
MAX_FIELD_CHARS: Final = 16 * 1024
#: Lines that wait for a slow reader. A burst of events has a few hundred.
MAX_WAITING_LINES: Final = 4096
#: Seconds for which the exit of the program waits for such a reader.
FLUSH_SECONDS: Final = 1.0

_STDOUT: Final = 1
#: https://cloud.google.com/logging/docs/reference/v2/rest/v2/LogEntry#logseverity
_SEVERITIES: Final = frozenset({"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"})
_TRACE: Final = "logging.googleapis.com/trace"

_CONTROL_CHARACTER: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")

_Event = MutableMapping[str, Any]


def configure(log_format: LogFormat, level: str, *, fd: int = _STDOUT) -> None:
    """Configure structlog and the standard library's logging.

    Args:
        level: `DEBUG`, `INFO`, `WARNING`, `ERROR` or `CRITICAL`.
        fd: The file descriptor for the lines.
    """
    output = _Output(fd)
    chain: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _require_message,
        structlog.processors.ExceptionRenderer(_stack_trace),
    ]
    match log_format:
        case LogFormat.JSON:
            chain += [structlog.processors.TimeStamper("iso", key="time"), _json_line]
        case LogFormat.CONSOLE:
            chain += [
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper("%H:%M:%S", utc=False),
                _plain,
                structlog.dev.ConsoleRenderer(
                    event_key="message", colors=os.isatty(fd), exception_formatter=structlog.dev.plain_traceback
                ),
            ]
    structlog.configure(
        processors=chain,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: output,
        cache_logger_on_first_use=False,
    )
    records = _Records(output)
    records.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *chain],
        )
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Records)]:
        root.removeHandler(handler)
        handler.close()
    root.addHandler(records)
    root.setLevel(level)


@contextlib.contextmanager
def bound(*, task_id: TaskId | None = None, trace: str | None = None) -> Iterator[None]:
    """Add the task and the trace to each line that is logged in this context, and in asyncio tasks that are started there.

    Args:
        trace: As `trace_name` returns it.
    """
    fields = {"taskId": task_id, _TRACE: trace}
    with structlog.contextvars.bound_contextvars(**{name: value for name, value in fields.items() if value}):
        yield


def trace_name(project_id: str | None, *headers: str | None) -> str | None:
    """Return the name of the trace of a request, by which Cloud Logging groups the lines of that request.

    Args:
        headers: The values of `traceparent` and `X-Cloud-Trace-Context`, None for a missing one. The first valid one counts.
    """
    for header in headers:
        # https://www.w3.org/TR/trace-context/#traceparent-header and https://cloud.google.com/trace/docs/trace-context
        match = re.match(r"(?:[0-9a-f]{2}-)?([0-9a-f]{32})(?![0-9a-f])", header or "")
        if project_id and match and int(match[1], 16):
            return f"projects/{project_id}/traces/{match[1]}"
    return None


class _Output:
    """Writes lines to a file descriptor in a separate thread, so that a stalled reader does not block the event loop.

    `logging.handlers.QueueListener` is not used: its `stop` waits for a stalled reader without a timeout, and a full queue makes
    `QueueHandler` print a traceback for each dropped line. `sys.stdout` is not used: what it could not write stays in its
    buffer and makes the interpreter fail at exit.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lines: queue.SimpleQueue[bytes | threading.Event | None] = queue.SimpleQueue()
        threading.Thread(target=self._write_lines, name="log", daemon=True).start()

    def msg(self, line: str) -> None:
        """Write a line in the background. It is dropped when too many lines wait."""
        if self._lines.qsize() < MAX_WAITING_LINES:
            self._lines.put(f"{line}\n".encode("utf-8", "backslashreplace"))

    # structlog calls the method with the name of the level.
    debug = info = warning = error = critical = msg

    def flush(self) -> None:
        """Wait until all lines are written, `FLUSH_SECONDS` at most."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(FLUSH_SECONDS)

    def close(self) -> None:
        """Stop the thread when all lines are written."""
        self._lines.put(None)

    def _write_lines(self) -> None:
        while (item := self._lines.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            rest = memoryview(item)
            with contextlib.suppress(OSError):
                while rest:
                    rest = rest[os.write(self._fd, rest) :]


class _Records(logging.Handler):
    """Prints the records of the standard library's loggers. At exit, Python flushes and closes it."""

    def __init__(self, output: _Output) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._output.msg(self.format(record))
        except Exception:  # A handler of the standard library must not raise.
            self.handleError(record)

    def flush(self) -> None:
        self._output.flush()

    def close(self) -> None:
        self._output.close()
        super().close()


def _stack_trace(exc_info: Any) -> str:
    """Return the type, message and frames of an exception and its causes, without local variables.

    Implemented here because structlog reads the source lines from the disk, which blocks the event loop.
    """
    chain: list[BaseException] = []
    error: BaseException | None = exc_info[1]
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n\nThen:\n\n".join(_frames(error) for error in reversed(chain))


def _frames(error: BaseException) -> str:
    frames = [
        f'  File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}'
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    description = "".join(traceback.format_exception_only(error)).rstrip()
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return "\n".join(["Traceback (most recent call last):", *frames, description, *(_frames(part) for part in parts)])


def _require_message(_: Any, __: str, event: _Event) -> _Event:
    """Turn the text of other libraries' records, which have no event key, into the message."""
    if "message" not in event:
        event["message"] = event.pop("event", "")
    return event


def _json_line(_: Any, method: str, event: _Event) -> str:
    severity = method.upper() if method.upper() in _SEVERITIES else "DEFAULT"
    line = {"severity": severity, "message": _shown(event.pop("message")), "time": event["time"]}
    if "event" in event:
        line["event"] = _shown(event.pop("event"))
    if "exception" in event:
        line["stack_trace"] = event.pop("exception")
    # Fields of the event must not replace these.
    line = {**line, **event, **line}
    line = {name: _cut(value) if isinstance(value, str) else value for name, value in line.items()}
    try:
        return _json(line)
    except (ValueError, RecursionError):
        return _json({name: value if isinstance(value, int) else _shown(value) for name, value in line.items()})


def _json(line: _Event) -> str:
    return json.dumps(line, default=_shown, skipkeys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _shown(value: object) -> str:
    try:
        return _cut(value if isinstance(value, str) else repr(value))
    except Exception:  # A `__repr__` may raise any exception.
        return f"<{type(value).__name__}>"


def _cut(text: str) -> str:
    """Cut a long text in the middle: a stack trace has the place at its start and the exception at its end."""
    half = MAX_FIELD_CHARS // 2
    return text if len(text) <= MAX_FIELD_CHARS else f"{text[:half]} … {text[-half:]}"


def _plain(_: Any, __: str, event: _Event) -> _Event:
    """Escape control characters, so that no text can move the cursor of a terminal or look like another line."""
    escaped = {name: _CONTROL_CHARACTER.sub(_escape, _shown(value)) for name, value in event.items()}
    if "exception" in escaped:
        escaped["exception"] = escaped["exception"].replace(r"\n", "\n")
    return escaped


def _escape(match: re.Match[str]) -> str:
    return repr(match[0])[1:-1]

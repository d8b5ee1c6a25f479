from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

import ccrun
from ccrun import log
from ccrun.config import LogFormat
from ccrun.task import Secret, TaskId

Lines = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """Restore the logging configuration of the process after the test."""
    root = logging.getLogger()
    handlers, level, configuration = list(root.handlers), root.level, structlog.get_config()
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**configuration)


@contextlib.contextmanager
def logging_to(path: Path, log_format: LogFormat, level: str = "INFO") -> Iterator[Lines]:
    """Log to a file; yield a function that returns its lines."""
    with path.open("w+b", buffering=0) as file:
        log.configure(log_format, level, fd=file.fileno())

        def lines() -> list[str]:
            for handler in logging.getLogger().handlers:
                handler.flush()
            return path.read_text(encoding="utf-8").splitlines()

        yield lines
        lines()


@pytest.fixture
def json_lines(tmp_path: Path) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Log as JSON; return a function that returns the parsed lines."""
    with logging_to(tmp_path / "log", LogFormat.JSON) as lines:
        yield lambda: [json.loads(line) for line in lines()]


@pytest.fixture
def text_lines(tmp_path: Path) -> Iterator[Lines]:
    """Log as text; return a function that returns the lines."""
    with logging_to(tmp_path / "log", LogFormat.CONSOLE) as lines:
        yield lines


def test_line_has_the_fields_of_cloud_logging(json_lines: Callable[[], list[dict[str, Any]]]) -> None:
    """A line has severity, message and time, and then the fields of the event."""
    structlog.get_logger().warning("storage_slow", message="Storage is slow", seconds=1.5, name="é")

    (line,) = json_lines()
    assert ["severity", "message", "time", "event", "seconds", "name"] == list(line)
    assert ("WARNING", "Storage is slow", "storage_slow", 1.5, "é") == (
        line["severity"],
        line["message"],
        line["event"],
        line["seconds"],
        line["name"],
    )
    assert line["time"].endswith("Z")


def test_events_below_the_level_are_dropped(json_lines: Callable[[], list[dict[str, Any]]]) -> None:
    """The level applies to structlog and to the standard library."""
    structlog.get_logger().debug("no")
    logging.getLogger("aiohttp.server").debug("no")

    assert [] == json_lines()


async def test_bound_fields_are_in_all_lines_of_the_context(
    json_lines: Callable[[], list[dict[str, Any]]],
) -> None:
    """The task ID and the trace are in all lines of the context, also from its asyncio tasks, and in no others."""

    async def child() -> None:
        structlog.get_logger().info("child")

    trace = log.trace_name("my-project", None, f"{'a' * 32}/123;o=1")
    with log.bound(task_id=TaskId("task-1"), trace=trace):
        started = asyncio.create_task(child())
        logging.getLogger("aiohttp.server").info("library")
    await started
    structlog.get_logger().info("outside")

    name = f"projects/my-project/traces/{'a' * 32}"
    assert [
        ("library", "task-1", name),
        ("child", "task-1", name),
        ("outside", None, None),
    ] == [
        (line["message"], line.get("taskId"), line.get("logging.googleapis.com/trace"))
        for line in await asyncio.to_thread(json_lines)
    ]


@pytest.mark.parametrize(
    ("project", "headers", "expected"),
    [
        ("p", ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", None), "4bf92f3577b34da6a3ce929d0e0e4736"),
        ("p", (None, "105445aa7843bc8bf206b12000100000/1;o=1"), "105445aa7843bc8bf206b12000100000"),
        ("p", ("invalid", "105445aa7843bc8bf206b12000100000"), "105445aa7843bc8bf206b12000100000"),
        ("p", (f"00-{'0' * 32}-00f067aa0ba902b7-01", None), None),
        ("p", (None, "a" * 33), None),
        ("p", ("", '"},"severity":"x'), None),
        (None, (None, "105445aa7843bc8bf206b12000100000"), None),
    ],
)
def test_trace_name_needs_a_valid_header(
    project: str | None, headers: tuple[str | None, ...], expected: str | None
) -> None:
    """The trace comes from the header of W3C or of Google; an invalid header, or no project, gives none."""
    name = f"projects/p/traces/{expected}" if expected else None

    assert name == log.trace_name(project, *headers)


def test_secret_is_not_logged(tmp_path: Path) -> None:
    """No format logs a secret, neither in a field or message nor as a local variable of a traceback."""
    for log_format in LogFormat:
        with logging_to(tmp_path / log_format, log_format) as lines:
            secret = Secret("correct-horse")
            plain = secret.reveal()
            structlog.get_logger().info("Started.", key=secret, keys=[secret], by_name={"key": secret})
            logging.getLogger("x").info("Started with %s", secret)
            try:
                fail(f"length {len(plain)}")
            except ValueError:
                structlog.get_logger().exception("Failed.", key=secret)
            text = "\n".join(lines())
        assert "Secret(***)" in text
        assert "correct" not in text


def test_exception_is_logged_with_its_traceback(json_lines: Callable[[], list[dict[str, Any]]]) -> None:
    """The traceback is in the field `stack_trace`, which Error Reporting reads, on the line of its event."""
    try:
        fail("The message.")
    except ValueError as error:
        structlog.get_logger().exception("First.")
        structlog.get_logger().error("Second.", exc_info=error)
        logging.getLogger("x").exception("Third.")

    traces = [line["stack_trace"].splitlines() for line in json_lines()]
    assert [("Traceback (most recent call last):", "ValueError: The message.")] * 3 == [
        (trace[0], trace[-1]) for trace in traces
    ]
    assert ["ERROR"] * 3 == [line["severity"] for line in json_lines()]


def test_standard_library_logs_in_the_same_format(json_lines: Callable[[], list[dict[str, Any]]]) -> None:
    """Lines of the standard library have the same fields, and the name of their logger."""
    logging.getLogger("aiohttp.access").warning("%s took %d ms", "GET /", 5)

    (line,) = json_lines()
    assert ("WARNING", "GET / took 5 ms", "aiohttp.access") == (line["severity"], line["message"], line["logger"])


def test_new_configuration_replaces_the_old_one(tmp_path: Path) -> None:
    """After a second `configure`, each event is logged once, and the thread of the first one has stopped."""
    with logging_to(tmp_path / "first", LogFormat.JSON):
        replaced = [thread for thread in threading.enumerate() if thread.name == "log"]
        with logging_to(tmp_path / "second", LogFormat.JSON) as lines:
            structlog.get_logger().info("structlog")
            logging.getLogger("x").info("standard library")
            assert 2 == len(lines())

    for thread in replaced:
        thread.join(5)
    assert ("", False) == ((tmp_path / "first").read_text(), any(thread.is_alive() for thread in replaced))


def test_field_cannot_replace_severity_or_time(json_lines: Callable[[], list[dict[str, Any]]]) -> None:
    """Fields with the names `severity` and `time` do not replace those of the event."""
    structlog.get_logger().info("event", message="Message", severity="DEBUG", time="never")

    (line,) = json_lines()
    assert ("INFO", "Message") == (line["severity"], line["message"])
    assert "never" != line["time"]


def fail(message: str) -> None:
    """Raise an error with this message."""
    raise ValueError(message)


class _Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


_CYCLE: list[Any] = []
_CYCLE.append(_CYCLE)


@pytest.mark.parametrize("log_format", LogFormat)
@pytest.mark.parametrize(
    "value",
    [
        _Broken(),
        _CYCLE,
        {(1, 2): 3},
        float("nan"),
        b"\xff",
        "\ud800",
        "a\nb\x1b[2J",
        "x" * 1_000_000,
        object,
    ],
)
def test_any_value_is_logged_in_one_line(tmp_path: Path, log_format: LogFormat, value: object) -> None:
    """An event is one line without control characters, even if JSON has no such value or its `repr` raises."""
    with logging_to(tmp_path / "log", log_format) as lines:
        structlog.get_logger().info("Hello.", value=value, count=1)
        (line,) = lines()

    assert "\x1b[2J" not in line
    assert len(line) < 2 * log.MAX_FIELD_CHARS
    if log_format is LogFormat.JSON:
        fields = json.loads(line, parse_constant=pytest.fail)
        assert ("Hello.", 1) == (fields["message"], fields["count"])


def test_message_cannot_forge_a_line(text_lines: Lines) -> None:
    """In text, control characters of a message are escaped."""
    logging.getLogger("x").warning("bad\x1b[2J\n12:00:00 [info] forged")

    (line,) = text_lines()
    assert r"bad\x1b[2J\n12:00:00 [info] forged" in line


def test_text_has_tracebacks(text_lines: Lines) -> None:
    """In text, the traceback of an exception follows the event in separate lines."""
    try:
        fail("The message.")
    except ValueError:
        structlog.get_logger().exception("Failed.", task="t")

    lines = text_lines()
    assert "Failed." in lines[0]
    assert ("Traceback (most recent call last):", "ValueError: The message.") == (lines[1], lines[-1])


def test_lines_of_concurrent_threads_are_not_mixed(json_lines: Callable[[], list[dict[str, Any]]]) -> None:
    """Each line is one event, also when several threads log long lines."""
    text = "x" * 10_000

    def work(number: int) -> None:
        for _ in range(50):
            structlog.get_logger().info("work", number=number, text=text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert 200 == len(json_lines())


_PROGRAM = """
import logging, structlog
from ccrun import log
from ccrun.config import LogFormat
for log_format in LogFormat:
    log.configure(log_format, "INFO")
    structlog.get_logger().info("Hello.")
    logging.getLogger("x").error("Hello.")
"""


@pytest.mark.parametrize("redirect", ["| true", "> /dev/full", ">&-"])
def test_broken_stdout_does_not_stop_the_program(redirect: str) -> None:
    """With a closed pipe, a full disk or a closed stdout, the program writes no errors and exits with status 0."""
    script = f'{{ "$0" -c "$1"; echo "exited with $?" >&2; }} {redirect}'
    done = subprocess.run(
        ["/bin/sh", "-c", script, sys.executable, _PROGRAM], check=False, stderr=subprocess.PIPE, text=True
    )

    assert "exited with 0\n" == done.stderr


def test_full_pipe_does_not_stop_the_program() -> None:
    """While nothing reads the pipe, the program does not wait; later lines are lost, and earlier ones are complete."""
    program = """
import logging, os, structlog, time
from ccrun import log
from ccrun.config import LogFormat
log.configure(LogFormat.JSON, "INFO")
for number in range(20_000):
    structlog.get_logger().info("Hello.", number=number)
os.write(2, b"done")
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        # Standard output is read only after the program has finished logging.
        assert process.stderr.read() == b"done"
        lines = process.stdout.read().splitlines()
        assert process.wait(10) == 0

    numbers = [json.loads(line)["number"] for line in lines[:-1]]
    assert list(range(len(numbers))) == numbers


def test_number_of_waiting_lines_is_bounded() -> None:
    """Lines beyond `MAX_WAITING_LINES` are lost; the waiting lines are written when the pipe is read."""
    reader, writer = os.pipe()
    log.configure(LogFormat.JSON, "INFO", fd=writer)
    (output,) = (thread for thread in threading.enumerate() if thread.name == "log")
    for _ in range(3 * log.MAX_WAITING_LINES):
        structlog.get_logger().info("Hello.")
    logging.getLogger().handlers[-1].close()

    def close_when_written() -> None:
        output.join(10)
        os.close(writer)

    with os.fdopen(reader) as lines:
        closing = threading.Thread(target=close_when_written)
        closing.start()
        count = len(lines.readlines())
        closing.join()

    assert log.MAX_WAITING_LINES < count < 2 * log.MAX_WAITING_LINES


def test_every_event_has_a_stable_key_and_a_message() -> None:
    """Each call in the package passes a literal key in snake_case and a `message`: documents for operators rely on the key."""
    package = Path(ccrun.__file__).parent
    methods = {"debug", "info", "warning", "error", "critical", "exception"}
    calls = [
        node
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in methods
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("log", "logger")
    ]
    for call in calls:
        key = call.args[0]
        assert isinstance(key, ast.Constant), ast.unparse(call)
        assert re.fullmatch(r"[a-z]+(_[a-z]+)+", str(key.value)), ast.unparse(call)
        fields = [keyword.arg for keyword in call.keywords]
        assert "message" in fields, ast.unparse(call)
        assert not [name for name in fields if name and name != "exc_info" and "_" in name], ast.unparse(call)
    assert len(calls) > 20

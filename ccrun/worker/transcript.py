"""The output of the Claude CLI: its stream-json lines, and the outcome of a run.

Pure. What is said about the CLI here was observed with version 2.1.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import signal
from collections.abc import Callable, Mapping
from typing import Any, Final

from ccrun.process.child import CutLine
from ccrun.process.exit import Exit
from ccrun.results import ApiError, BackgroundTask, McpServer
from ccrun.task import EXIT_FAILED, Outcome, Reason, Status
from ccrun.worker.lines import slices, text_line

#: Bytes of a line up to which it is parsed. Longer ones (much output of a tool) are checked without a copy.
MAX_PARSED_LINE_BYTES: Final = 1024 * 1024
#: Bytes of the result in the record and the callback, whose body, with 64 KiB of metadata, must stay below the 100 kB that
#: Express accepts by default. The log has all of it.
MAX_RESULT_CHARS: Final = 4 * 1024
#: Characters of an error. The CLI may quote a complete response of the API.
MAX_ERROR_CHARS: Final = 2000
#: The maximum of a figure. Sums of such figures stay exact in JavaScript.
MAX_FIGURE: Final = 2**40
#: Levels of nested figures. Those of a result have three; a hostile line could have a thousand.
MAX_USAGE_DEPTH: Final = 8

#: Background tasks and MCP servers in the record, and characters of their names and descriptions. An agent has a few of each.
MAX_LISTED: Final = 20
MAX_NAME_CHARS: Final = 200

#: What the lines contain that are parsed.
_FACTS: Final = re.compile(
    rb'"type":"result"|"is_error":true|"api_retry"|"background_tasks_changed"|"subtype":"init"|"ScheduleWakeup"'
)
#: Masks secrets in a text.
Mask = Callable[[str], str]
_CONTROL: Final = re.compile(rb"[\x00-\x1f]")


# --- what the CLI prints ---------------------------------------------------------------------------------------------


class Transcript:
    """The facts of a run so far that matter for its outcome, collected line by line.

    Args:
        mask: Masks secrets in a text. Lines are read with them, since a secret may be a word of their format.
    """

    def __init__(self, mask: Mask = lambda text: text) -> None:
        self.mask = mask
        #: The last result. Background work can wake the agent after its first.
        self.result: Mapping[str, Any] | None = None
        #: Turns of all results.
        self.turns = 0
        #: Tools that reported an error.
        self.errors = 0
        #: Tokens of all results.
        self.usage: Mapping[str, Any] | None = None
        #: Whether the API has rejected the credential.
        self.is_refused = False
        self.has_lines = False
        #: The error for which the CLI is retrying a request of the model API.
        self.retry: ApiError | None = None
        #: The MCP servers when the agent started; None before that.
        self.mcp_servers: tuple[McpServer, ...] | None = None
        #: What runs in the background. When it finishes, the CLI wakes the agent.
        self.background_tasks: tuple[BackgroundTask, ...] = ()
        self._wakeup_is_scheduled = False

    @property
    def has_open_work(self) -> bool:
        """Whether the CLI waits to wake the agent, so that its result is not the last one."""
        return bool(self.background_tasks) or self._wakeup_is_scheduled

    def feed(self, line: bytes | bytearray) -> None:
        """Add a line of stdout. Of long lines, only results are parsed."""
        self.has_lines = True
        if self.retry is not None and b'"type":"assistant"' in line:
            self.retry = None
        if b'"type":"result"' not in line and (len(line) > MAX_PARSED_LINE_BYTES or _FACTS.search(line) is None):
            return
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            return
        match event:
            case {"type": "result"}:
                self.result = event
                self.retry = None
                self.turns += _count(event.get("num_turns"))
                self.usage = _sum(self.usage, event.get("usage"), self.mask) or self.usage
                self.is_refused = event.get("api_error_status") == 401
            case {"type": "user", "message": {"content": [*blocks]}}:
                self.errors += sum(isinstance(block, dict) and block.get("is_error") is True for block in blocks)
            case {"type": "assistant", "message": {"content": [*blocks]}}:
                if any(isinstance(block, dict) and block.get("name") == "ScheduleWakeup" for block in blocks):
                    self._wakeup_is_scheduled = True
            case {"type": "system", "subtype": "api_retry"}:
                self.retry = _retried_error(event, self.mask)
                self.is_refused = self.is_refused or self.retry.status == 401
            case {"type": "system", "subtype": "background_tasks_changed", "tasks": [*tasks]}:
                self.background_tasks = tuple(
                    BackgroundTask(
                        type=kind, description=_text(task.get("description"), MAX_NAME_CHARS, self.mask) or ""
                    )
                    for task in tasks[:MAX_LISTED]
                    if isinstance(task, dict) and (kind := _text(task.get("task_type"), MAX_NAME_CHARS, self.mask))
                )
            case {"type": "system", "subtype": "init"}:
                # The CLI prints this line again when it wakes the agent.
                self._wakeup_is_scheduled = False
                if self.mcp_servers is None:
                    self.mcp_servers = _mcp_servers(event.get("mcp_servers"), self.mask)
            case _:
                pass


def _retried_error(event: Mapping[str, Any], mask: Mask) -> ApiError:
    status, kind = event.get("error_status"), event.get("error")
    return ApiError(
        status=status if isinstance(status, int) and 100 <= status < 1000 else None,
        type=_text(kind, MAX_NAME_CHARS, mask),
        retryable=True,
    )


def _mcp_servers(servers: object, mask: Mask) -> tuple[McpServer, ...]:
    return tuple(
        McpServer(name=name, status=status)
        for server in (servers[:MAX_LISTED] if isinstance(servers, list) else ())
        if isinstance(server, dict)
        and (name := _text(server.get("name"), MAX_NAME_CHARS, mask)) is not None
        and (status := _text(server.get("status"), MAX_NAME_CHARS, mask)) is not None
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < MAX_FIGURE else 0


def _text(value: object, limit: int, mask: Mask) -> str | None:
    """Return a text that can be encoded and stored, masked and then cut; None if the value is not a text."""
    if not isinstance(value, str):
        return None
    text = mask(value.encode(errors="replace").decode())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _sum(old: Mapping[str, Any] | None, new: object, mask: Mask, depth: int = MAX_USAGE_DEPTH) -> dict[str, Any] | None:
    """Return the sum of figures: of numbers, and of objects member by member. Of two texts, it is the newer one."""
    if not isinstance(new, dict) or not depth:
        return None
    total = dict(old or {})
    for key, value in new.items():
        name = _text(key, MAX_ERROR_CHARS, mask) or ""
        before = total.get(name)
        match value:
            case dict():
                total[name] = _sum(before if isinstance(before, dict) else None, value, mask, depth - 1)
            case int() | float() if abs(value) < MAX_FIGURE:
                total[name] = value + (before if isinstance(before, int | float) else 0)
            case str():
                total[name] = _text(value, MAX_ERROR_CHARS, mask)
            case _:
                pass
    return total


def line_for_log(line: bytes | bytearray) -> bytes | bytearray:
    """Return a line of output for the log: one JSON object without a raw line break. Empty for a blank line.

    An object is returned unchanged; anything else becomes the content of a text object. A line over `MAX_PARSED_LINE_BYTES`,
    which is not parsed, counts as an object if it starts and ends like one and is UTF-8 without control characters.
    """
    if line.isspace() or not line:
        return b""
    if isinstance(line, CutLine) and line.omitted_bytes:
        return _as_text(line)
    if len(line) > MAX_PARSED_LINE_BYTES:
        return line if _looks_like_object(line) else _as_text(line)
    stripped = line.strip()
    return stripped if _is_object(stripped) else _as_text(line)


def _is_object(line: bytes | bytearray) -> bool:
    if not line.startswith(b"{") or b"\r" in line:
        return False
    try:
        return isinstance(json.loads(line.decode(), parse_constant=_reject_constant), dict)
    except (ValueError, RecursionError):
        return False


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _looks_like_object(line: bytes | bytearray) -> bool:
    if not line.startswith(b"{") or not line.endswith(b"}") or _CONTROL.search(line):
        return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for piece in slices(line):
            decoder.decode(piece)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _as_text(line: bytes | bytearray) -> bytes | bytearray:
    return text_line(line, type="text")


# --- the outcome -------------------------------------------------------------------------------------------------------


def outcome_of_run(
    transcript: Transcript,
    ended: Exit,
    *,
    stopped_by_us: bool = False,
    rejected: str | None = None,
    api_errors: Mapping[int, ApiError] | None = None,
) -> Outcome:
    """Return the outcome of a run: completed when the last result is no error, the process was successful and no work was open.

    Args:
        ended: The exit status of the process.
        stopped_by_us: Whether ccrun stopped the process, so that its exit status does not matter when there is a result.
        rejected: The message of the model API when it rejected the credential.
        api_errors: The last error of the model API with each status.
    """
    result = transcript.result or {}
    if stopped_by_us and transcript.result is not None:
        ended = Exit(code=0)
    is_success = result.get("is_error") is False
    api_error = None
    if is_success and ended.ok and not (transcript.background_tasks or (stopped_by_us and transcript.has_open_work)):
        reason, error = Reason.COMPLETED, None
    else:
        if not is_success:
            api_error = _api_error(transcript, api_errors or {})
        reason, error = _failure(
            transcript, None if is_success else _error_text(result, transcript.mask), ended, rejected
        )
    cost = result.get("total_cost_usd")
    return Outcome(
        status=Status.COMPLETED if error is None else Status.FAILED,
        reason=reason,
        exit_code=0 if error is None else ended.code or EXIT_FAILED,
        error=error,
        turns=transcript.turns,
        errors=transcript.errors,
        cost_usd=cost if isinstance(cost, int | float) and 0 <= cost < math.inf else None,
        usage=transcript.usage,
        session_id=_text(result.get("session_id"), MAX_ERROR_CHARS, transcript.mask),
        result=_text(result.get("result"), MAX_RESULT_CHARS, transcript.mask),
        background_tasks=transcript.background_tasks,
        api_error=api_error,
        mcp_servers=transcript.mcp_servers or (),
    )


def _api_error(transcript: Transcript, known: Mapping[int, ApiError]) -> ApiError | None:
    """Return the error of the model API that a run has failed with or was retrying, as the API reported it if it did."""
    if transcript.retry is not None:
        status = transcript.retry.status
        return known.get(status, transcript.retry) if status is not None else transcript.retry
    result = transcript.result or {}
    status = result.get("api_error_status")
    if not isinstance(status, int):
        return None
    kind = _text(result.get("api_error_type"), MAX_NAME_CHARS, transcript.mask)
    unknown = ApiError(status=status, type=kind, message=_error_text(result, transcript.mask), retryable=False)
    return known.get(status, unknown)


def _failure(transcript: Transcript, words: str | None, ended: Exit, rejected: str | None) -> tuple[Reason, str]:
    """Return why a run failed, as the CLI reports it if it does."""
    result = transcript.result or {}
    plain = words or f"Claude process exited with code {ended.code or EXIT_FAILED}"
    if rejected is not None or transcript.is_refused:
        return Reason.CREDENTIAL_REJECTED, rejected or plain
    if ended.signal is not None:
        return Reason.KILLED, _killed_by(ended.signal)
    if transcript.result is None and ended.ok:
        return Reason.AGENT_ERROR, "The Claude CLI exited without a result."
    if result.get("subtype") == "error_max_turns":
        return Reason.MAX_TURNS, plain
    if result.get("terminal_reason") in ("api_error", "prompt_too_long") or result.get("api_error_status") is not None:
        return Reason.API_ERROR, plain
    if result.get("is_error") is False and ended.ok:
        return Reason.AGENT_ERROR, unfinished_work(transcript)
    return Reason.AGENT_ERROR, plain


def unfinished_work(transcript: Transcript) -> str:
    """Return a sentence about what the agent still waited for."""
    names = ", ".join(task.description or task.type for task in transcript.background_tasks)
    return f"Work in the background was stopped before it had finished: {names or 'a scheduled wakeup of the agent'}."


def _error_text(result: Mapping[str, Any], mask: Mask) -> str | None:
    """Return the text of a result that is an error, else its list of errors."""
    errors = result.get("errors")
    listed = "; ".join(error for error in errors if isinstance(error, str)) if isinstance(errors, list) else None
    return _text(result.get("result") or listed, MAX_ERROR_CHARS, mask) or None


def _killed_by(number: int) -> str:
    try:
        name = f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        name = f"signal {number}"
    guess = ", which usually means that memory ran out" if number == signal.SIGKILL else ""
    return f"The Claude process was killed by {name}{guess}."

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccrun.claude_cli import find_cli
from ccrun.errors import CcrunError
from ccrun.process.child import spawn
from ccrun.process.exit import Exit
from ccrun.spec import ConfigFile, TaskSpec, is_reserved_variable
from ccrun.task import Outcome, Reason, Secret, Status, TaskId, TaskType
from ccrun.testing.model import Fail, Hang, RecordedRequest, Say, Script, ScriptedModel, UseTool, sequence
from ccrun.worker.claude import MAX_TEMPORARY_PATH_BYTES, argv, environment, option_files
from ccrun.worker.transcript import (
    MAX_ERROR_CHARS,
    MAX_PARSED_LINE_BYTES,
    MAX_RESULT_CHARS,
    Transcript,
    line_for_log,
    outcome_of_run,
)

MIB = 1024 * 1024


def task(**fields: Any) -> TaskSpec:
    """Return a task with these fields, and defaults for the required ones."""
    defaults = {"task_id": TaskId("t1"), "type": TaskType.ASYNC, "prompt": "Do it.", "timeout_minutes": 1.0}
    return TaskSpec(**{**defaults, **fields})


def agent_environment(spec: TaskSpec, **changed: Any) -> dict[str, str]:
    """Return the environment of the agent; the directories do not exist."""
    defaults = {
        "inherited": {"PATH": "/usr/bin:/bin"},
        "home": Path("/t/home"),
        "config": Path("/t/config"),
        "temporary": Path("/t/tmp"),
        "base_url": "http://127.0.0.1:1",
        "run_token": Secret("run-token"),
        "is_oauth": False,
        "is_root": False,
        "marker": "t1",
    }
    return environment(spec, **{**defaults, **changed})


# --- finding the CLI -------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory with the executables `claude` and `other`, and `plain`, which is not executable."""
    for name in ("claude", "other", "plain"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o644 if name == "plain" else 0o755)
    return tmp_path


def test_configured_cli_is_used(programs: Path) -> None:
    """It may be a path or the name of a program on the PATH."""
    assert find_cli(str(programs / "other"), str(programs)) == programs / "other"
    assert find_cli("other", str(programs)) == programs / "other"


@pytest.mark.parametrize("configured", ["missing", "plain"])
def test_configured_cli_that_is_not_executable_is_an_error(programs: Path, configured: str) -> None:
    """No other CLI is used instead, and the error has no local path."""
    with pytest.raises(CcrunError, match=r"^CLAUDE_CLI does not name a program that can be run\.$"):
        find_cli(str(programs / configured), str(programs))


def test_cli_on_path_is_preferred_to_the_bundled_cli(programs: Path, tmp_path: Path) -> None:
    """Without `claude` on the PATH, the CLI of the SDK package is used, and the package is not imported."""
    assert find_cli(None, f"/nowhere:{programs}") == programs / "claude"
    assert find_cli(None, "/nowhere").parts[-3:] == ("claude_agent_sdk", "_bundled", "claude")
    assert "claude_agent_sdk" not in sys.modules


def test_error_for_a_missing_cli_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names all three remedies."""
    # With None, importing the package fails.
    monkeypatch.setitem(sys.modules, "claude_agent_sdk", None)
    message = "The Claude CLI was not found: set CLAUDE_CLI, put `claude` on PATH or install ccrun[claude]."
    with pytest.raises(CcrunError, match=re.escape(message)):
        find_cli(None, "/nowhere")


# --- the environment -------------------------------------------------------------------------------------------------


def test_environment_has_only_the_expected_variables() -> None:
    """Of the worker's variables, it has PATH, locale and time zone only. The real credential is not in it."""
    inherited = {
        "PATH": "/bin",
        "LC_ALL": "de_DE.UTF-8",
        "TZ": "UTC",
        "ANTHROPIC_API_KEY": "real",
        "GCS_LOGS_BUCKET": "b",
    }
    spec = task(environment_secrets={"TOKEN": Secret("s3cret")}, anthropic_api_key=Secret("real"))
    assert agent_environment(spec, inherited=inherited) == {
        "PATH": "/bin",
        "LANG": "C.UTF-8",
        "LC_ALL": "de_DE.UTF-8",
        "TZ": "UTC",
        "TERM": "dumb",
        "TOKEN": "s3cret",
        "HOME": "/t/home",
        "CLAUDE_CONFIG_DIR": "/t/config",
        "TMPDIR": "/t/tmp",
        "ANTHROPIC_BASE_URL": "http://127.0.0.1:1",
        "ANTHROPIC_API_KEY": "run-token",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "CCRUN_MARK": "t1",
    }


def test_secrets_cannot_override_variables_of_ccrun() -> None:
    """A secret with the name of a reserved variable is ignored; PATH and NO_PROXY are merged; LANG may be overridden."""
    defaults = {**agent_environment(task()), **agent_environment(task(), is_oauth=True, is_root=True)}
    secrets = {name: Secret("secret") for name in (*defaults, "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_USE_BEDROCK")}
    del secrets["no_proxy"]
    changed = {**agent_environment(task(environment_secrets=secrets), is_oauth=True, is_root=True)}
    merged = {"PATH": "secret:/usr/bin:/bin", "NO_PROXY": "secret,127.0.0.1", "no_proxy": "secret,127.0.0.1"}
    assert changed == {**agent_environment(task(), is_oauth=True, is_root=True), **merged, "LANG": "secret"}


@pytest.mark.parametrize(
    "name",
    [
        "DATABASE_URL",
        "PATH",
        "LD_LIBRARY_PATH",
        "GITHUB_TOKEN",
        "NODE_OPTIONS",
        "MY_HOME",
        "MAX_THINKING_TOKENS",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS",
        "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS",
        "CLAUDE_BASH_MAINTAIN_PROJECT_WORKING_DIR",
    ],
)
def test_other_variables_are_not_reserved(name: str) -> None:
    """A secret may set any variable that does not affect the CLI's requests, its directories or its permissions."""
    assert not is_reserved_variable(name)


@pytest.mark.parametrize(
    "name",
    [
        "ANTHROPIC_BASE_URL",
        "CCRUN_X",
        "CLAUDE_CODE_USE_VERTEX",
        "CLAUDE_CODE_OAUTH_TOKEN",
        "CLAUDE_CODE_API_BASE_URL",
        "CLAUDE_CODE_SESSION_ACCESS_TOKEN",
        "CLAUDE_CODE_SKIP_BEDROCK_AUTH",
        "CLAUDE_CODE_PROVIDER_MANAGED_BY_HOST",
        "CLAUDE_CODE_CLIENT_CERT",
        "CLAUDE_BRIDGE_BASE_URL",
        "CLAUDE_CODE_TMPDIR",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
    ],
)
def test_variables_that_route_the_cli_are_reserved(name: str) -> None:
    """A request may not choose the CLI's server, credential, directories or parent program by a variable."""
    assert is_reserved_variable(name)


def test_environment_with_an_oauth_token_as_root() -> None:
    """The run token is passed as an OAuth token, and IS_SANDBOX lets root use every permission mode."""
    plain = agent_environment(task())
    changed = agent_environment(task(), is_oauth=True, is_root=True)
    del plain["ANTHROPIC_API_KEY"]
    assert changed == {**plain, "CLAUDE_CODE_OAUTH_TOKEN": "run-token", "IS_SANDBOX": "1"}


# --- arguments and input files ---------------------------------------------------------------------------------------


def test_default_arguments() -> None:
    """The CLI never asks for a permission, and the number of turns is limited."""
    command = ["/bin/claude", "-p", "--verbose", "--output-format=stream-json", "--permission-prompts=none"]
    assert argv(task(), cli=Path("/bin/claude"), files={}, config=Path("/c")) == [*command, "--max-turns=6"]


def test_values_are_joined_to_their_options() -> None:
    """A value that begins with `--` is not read as an option, and each tool has its own option."""
    spec = task(
        model="--danger",
        fallback_model="haiku",
        permission_mode="plan",
        max_turns=3,
        allowed_tools=("Bash(git log:*, -n)", "--dangerously-skip-permissions"),
        disallowed_tools=("WebFetch",),
        strict_mcp_config=True,
        plugins={"a/commands/x.md": ConfigFile(content=""), "a/skills/y/SKILL.md": ConfigFile(content="")},
    )
    command = argv(spec, cli=Path("claude"), files={"mcp-config": Path("/f/mcp-config")}, config=Path("/c"))
    assert command[5:] == [
        "--max-turns=3",
        "--model=--danger",
        "--fallback-model=haiku",
        "--permission-mode=plan",
        "--allowedTools=Bash(git log:*, -n)",
        "--allowedTools=--dangerously-skip-permissions",
        "--disallowedTools=WebFetch",
        "--mcp-config=/f/mcp-config",
        "--plugin-dir=/c/task-plugins/a",
        "--strict-mcp-config",
    ]


def test_arguments_contain_nothing_confidential() -> None:
    """Other users of the machine see the arguments in the process list, so these have no prompts and no secrets."""
    spec = task(
        prompt="word-1",
        system_prompt="word-2",
        append_system_prompt="word-3",
        mcp_config={"mcpServers": {"word-4": {}}},
        subagents={"word-5": ConfigFile(content="word-6")},
        environment_secrets={"WORD_7": Secret("word-8")},
        anthropic_api_key=Secret("word-9"),
    )
    files = {option: Path("/f", option) for option in option_files(spec, agent_environment(spec))}
    assert "word" not in " ".join(argv(spec, cli=Path("claude"), files=files, config=Path("/c"))).lower()


def test_settings_of_the_request_do_not_override_those_of_ccrun() -> None:
    """Settings and options of the request are added to the settings of ccrun, and an option overrides a setting."""
    given = {"apiKeyHelper": "x", "hooks": {}, "env": {"A": "b", "ANTHROPIC_BASE_URL": "x", "MAX_THINKING_TOKENS": "1"}}
    plain = json.loads(option_files(task(), agent_environment(task()))["settings"])
    spec = task(settings=given, max_thinking_tokens=0, small_model="tiny")
    options = {"A": "b", "MAX_THINKING_TOKENS": "0", "ANTHROPIC_DEFAULT_HAIKU_MODEL": "tiny"}
    assert {**plain, "hooks": {}, "env": {**plain["env"], **options}} == json.loads(
        option_files(spec, agent_environment(spec))["settings"]
    )


def test_subagents_are_converted_for_the_agents_option() -> None:
    """Comma-separated tools become lists, null fields are removed, and a missing description is added."""
    matter = {"name": "other", "tools": "Read, Bash(git log:*, -n),", "model": None, "disallowedTools": ["Edit"]}
    spec = task(subagents={"a": ConfigFile(frontmatter=matter, content="Be a."), "b": ConfigFile(content="Be b.")})
    assert json.loads(option_files(spec, {})["agents"]) == {
        "a": {
            "description": "The subagent a.",
            "tools": ["Read", "Bash(git log:*, -n)"],
            "disallowedTools": ["Edit"],
            "prompt": "Be a.",
        },
        "b": {"description": "The subagent b.", "prompt": "Be b."},
    }


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


# --- the real CLI ----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class CliRun:
    """A run of the real CLI."""

    outcome: Outcome
    events: list[dict[str, Any]]
    stderr: str
    requests: list[RecordedRequest]
    task_dir: Path

    @property
    def init(self) -> dict[str, Any]:
        """The first event of the CLI, which describes its configuration."""
        return next(event for event in self.events if event.get("subtype") == "init")

    def request_body(self, number: int = 0) -> str:
        """Return the body of a request to the model, as JSON."""
        posts = [request for request in self.requests if request.method == "POST"]
        return json.dumps(posts[number].body, ensure_ascii=False)

    @property
    def tool_results(self) -> list[str]:
        """The contents of the tool results, as JSON."""
        return [
            json.dumps(block["content"])
            for event in self.events
            if event.get("type") == "user"
            for block in event["message"]["content"]
            if block.get("type") == "tool_result"
        ]


@pytest.fixture
def task_dir() -> Iterator[Path]:
    """The directories of a task. The paths of `tmp_path` are too long for the socket of the CLI."""
    directory = Path(tempfile.mkdtemp(prefix="ccrun-"))
    for name in ("home", "config", "tmp", "inputs", "work"):
        (directory / name).mkdir(mode=0o700)
    assert len(os.fsencode(directory / "tmp")) <= MAX_TEMPORARY_PATH_BYTES
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def run_cli(task_dir: Path) -> Callable[..., Any]:
    """Return a function that runs the real CLI with a scripted model, as the worker does."""
    cli = find_cli(None, "")

    async def run(spec: TaskSpec, script: Script, *, is_oauth: bool = False, stop: bool = False) -> CliRun:
        transcript, events = Transcript(), []
        async with ScriptedModel(script) as model:
            variables = environment(
                spec,
                inherited={"PATH": os.environ["PATH"]},
                home=task_dir / "home",
                config=task_dir / "config",
                temporary=task_dir / "tmp",
                base_url=model.url,
                run_token=Secret("made-up-key"),
                is_oauth=is_oauth,
                is_root=os.geteuid() == 0,
                marker=str(task_dir),
            )
            files = {}
            for option, content in option_files(spec, variables).items():
                files[option] = task_dir / "inputs" / option
                files[option].write_bytes(content)
            command = argv(spec, cli=cli, files=files, config=task_dir / "config")
            async with spawn(command, env=variables, cwd=task_dir / "work", stdin=spec.prompt.encode()) as child:
                async for line in child.lines():
                    transcript.feed(line)
                    assert line_for_log(line) == line
                    events.append(json.loads(line))
                    if stop:
                        child.terminate()
                exit_status = await child.wait()
            return CliRun(
                outcome=outcome_of_run(transcript, exit_status),
                events=events,
                stderr=child.stderr_tail.decode(),
                requests=list(model.requests),
                task_dir=task_dir,
            )

    return run


def bash(command: str) -> UseTool:
    """Return a model response that runs a shell command."""
    return UseTool("Bash", {"command": command, "description": "A test"})


async def test_cli_completes_a_task(run_cli: Callable[..., Any]) -> None:
    """The outcome has the statistics of the CLI, and a prompt of 640 kB reaches the model over stdin."""
    prompt = "--help é\n" + "0123456789abcdef" * 40_000
    run = await run_cli(task(prompt=prompt, model="claude-sonnet-4-5"), sequence(Say("Done.")))
    assert (run.outcome.reason, run.outcome.exit_code, run.outcome.turns) == (Reason.COMPLETED, 0, 1)
    assert (run.outcome.result, run.outcome.session_id) == ("Done.", run.init["session_id"])
    assert run.outcome.usage is not None
    assert run.outcome.cost_usd is not None
    assert (json.dumps(prompt, ensure_ascii=False)[1:-1] in run.request_body(), run.init["model"]) == (
        True,
        "claude-sonnet-4-5",
    )


async def test_tools_run_in_the_working_directory(run_cli: Callable[..., Any], task_dir: Path) -> None:
    """A tool runs in the directory in which the CLI was started, and a failed one is counted."""
    spec = task(permission_mode="bypassPermissions")
    run = await run_cli(spec, sequence(bash("pwd > here"), bash("exit 7"), Say("Done.")))
    assert (task_dir / "work" / "here").read_text() == f"{task_dir / 'work'}\n"
    assert (run.outcome.reason, run.outcome.turns, run.outcome.errors) == (Reason.COMPLETED, 3, 1)


async def test_run_fails_at_the_maximum_number_of_turns(run_cli: Callable[..., Any]) -> None:
    """The maximum comes from the request, and the error states it."""
    run = await run_cli(task(max_turns=1, permission_mode="bypassPermissions"), sequence(bash("true")))
    assert run.outcome.reason is Reason.MAX_TURNS
    assert (run.outcome.exit_code, run.outcome.error) == (1, "Reached maximum number of turns (1)")


async def test_error_of_the_model_api_fails_the_run(run_cli: Callable[..., Any]) -> None:
    """The error of the task contains the message of the model API."""
    run = await run_cli(task(), sequence(Fail(400, "invalid_request_error", "no such model")))
    assert (run.outcome.status, run.outcome.reason, run.outcome.exit_code) == (Status.FAILED, Reason.API_ERROR, 1)
    assert "no such model" in run.outcome.error


@pytest.mark.parametrize("is_oauth", [False, True])
async def test_rejected_credential_is_reported(run_cli: Callable[..., Any], is_oauth: bool) -> None:
    """The CLI does not retry after a 401 with `x-should-retry: false`."""
    rejection = Fail(401, "authentication_error", "invalid x-api-key", headers={"x-should-retry": "false"})
    run = await run_cli(task(), sequence(rejection), is_oauth=is_oauth)
    assert (run.outcome.status, run.outcome.reason) == (Status.FAILED, Reason.CREDENTIAL_REJECTED)


async def test_terminated_cli_has_failed(run_cli: Callable[..., Any]) -> None:
    """The CLI is terminated while it reads a response."""
    run = await run_cli(task(), sequence(Hang("Well,")), stop=True)
    assert run.outcome.status is Status.FAILED
    assert run.outcome.exit_code == 143


async def test_system_prompts_reach_the_model_from_files(run_cli: Callable[..., Any]) -> None:
    """Both may begin with a dash, and may be longer than an argument of a process."""
    system, appended = "--system é\n" + "s" * MIB, '-appended "quoted"'
    run = await run_cli(task(system_prompt=system, append_system_prompt=appended), sequence(Say("Done.")))
    assert (system.replace("\n", "\\n") in run.request_body(), json.dumps(appended)[1:-1] in run.request_body()) == (
        True,
        True,
    )


async def test_values_that_look_like_options_are_values(run_cli: Callable[..., Any]) -> None:
    """A model or a tool with the name of an option does not set that option."""
    flag = "--dangerously-skip-permissions"
    run = await run_cli(task(model=flag, allowed_tools=(flag,), disallowed_tools=(flag,)), sequence(Say("Done.")))
    assert (run.init["model"], run.init["permissionMode"]) == (flag, "default")


async def test_allowed_and_disallowed_tools(run_cli: Callable[..., Any]) -> None:
    """Spaces and commas in parentheses are preserved, other commands are denied, and disallowed tools are not offered."""
    spec = task(allowed_tools=("Bash(touch a, b)", "Bash(mkdir c:*)"), disallowed_tools=("WebFetch", "WebSearch"))
    run = await run_cli(spec, sequence(bash("touch a, b"), bash("mkdir c"), bash("touch d"), Say("Done.")))
    assert sorted(os.listdir(run.task_dir / "work")) == ["a,", "b", "c"]  # noqa: PTH208
    assert (run.outcome.reason, run.outcome.errors) == (Reason.COMPLETED, 1)
    assert not {"WebFetch", "WebSearch"} & set(run.init["tools"])


@pytest.mark.parametrize("mode", ["acceptEdits", "auto", "bypassPermissions", "default", "dontAsk", "manual", "plan"])
async def test_cli_accepts_every_permission_mode(run_cli: Callable[..., Any], mode: str) -> None:
    """The CLI runs in every mode that a request may have, also as root."""
    run = await run_cli(task(permission_mode=mode), sequence(Say("Done.")))
    assert (run.outcome.reason, run.stderr) == (Reason.COMPLETED, "")


async def test_commands_and_subagents_of_the_task_override_those_of_the_repository(
    run_cli: Callable[..., Any], task_dir: Path
) -> None:
    """Those of the repository with other names are still available."""
    for kind, name, origin in (
        ("commands", "greet", "repository"),
        ("commands", "only", "repository"),
        ("agents", "rev", "repository"),
    ):
        directory = task_dir / "work" / ".claude" / kind
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.md").write_text(f"---\nname: {name}\ndescription: d-{origin}\n---\nbody-{origin}")
    (task_dir / "config" / "commands").mkdir()
    (task_dir / "config" / "commands" / "greet.md").write_text("---\ndescription: d-task\n---\nbody-task")
    subagent = ConfigFile(frontmatter={"description": "d-task", "tools": "Read, Grep"}, content="body-task")
    run = await run_cli(task(prompt="/greet", subagents={"rev": subagent}), sequence(Say("Done.")))
    assert {"greet", "only"} <= set(run.init["slash_commands"])
    assert "rev" in run.init["agents"]
    assert ("body-task" in run.request_body(), "body-repository" in run.request_body()) == (True, False)
    assert ("rev: d-task" in run.request_body(), "rev: d-repository" in run.request_body()) == (True, False)


MCP_SERVER = """
import json, os, sys
with open("received", "w") as file:
    json.dump([sys.argv[1:], os.environ.get("GIVEN")], file)
for line in sys.stdin:
    request = json.loads(line)
    match request["method"]:
        case "initialize":
            version = request["params"]["protocolVersion"]
            result = {"protocolVersion": version, "capabilities": {}, "serverInfo": {"name": "s", "version": "1"}}
        case _:
            result = {"tools": []}
    if "id" in request:
        print(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}), flush=True)
"""


async def test_cli_expands_variables_in_the_mcp_configuration(run_cli: Callable[..., Any], task_dir: Path) -> None:
    """`${VAR}` is replaced by a secret of the task, in arguments and variables."""
    server = {
        "command": sys.executable,
        "args": ["-c", MCP_SERVER, "${TOKEN}", "${MISSING:-none}"],
        "env": {"GIVEN": "<${TOKEN}>"},
    }
    spec = task(mcp_config={"mcpServers": {"task": server}}, environment_secrets={"TOKEN": Secret("s3cret")})
    run = await run_cli(spec, sequence(Say("Done.")))
    assert [(server["name"], server["status"]) for server in run.init["mcp_servers"]] == [("task", "connected")]
    assert json.loads((task_dir / "work" / "received").read_text()) == [["s3cret", "none"], "<s3cret>"]


@pytest.mark.parametrize("is_strict", [False, True])
async def test_servers_of_the_repository_start_unless_the_configuration_is_strict(
    run_cli: Callable[..., Any], task_dir: Path, is_strict: bool
) -> None:
    """The repository's `.mcp.json` counts beside the servers of the task, but not with `strictMcpConfig`."""
    server = {"command": sys.executable, "args": ["-c", MCP_SERVER]}
    (task_dir / "work" / ".mcp.json").write_text(json.dumps({"mcpServers": {"repository": server}}))
    spec = task(mcp_config={"mcpServers": {"task": server}}, strict_mcp_config=is_strict)
    run = await run_cli(spec, sequence(Say("Done.")))
    expected = {"task"} if is_strict else {"task", "repository"}
    assert expected == {server["name"] for server in run.init["mcp_servers"]}


@pytest.mark.parametrize(
    ("is_oauth", "expected"),
    [(False, {"x-api-key": "made-up-key"}), (True, {"Authorization": "Bearer made-up-key"})],
)
async def test_repository_cannot_redirect_requests(
    run_cli: Callable[..., Any], task_dir: Path, is_oauth: bool, expected: Mapping[str, str]
) -> None:
    """With any settings in the repository, requests go to the proxy, with the run token."""
    (task_dir / "work" / ".claude").mkdir()
    settings = {
        "apiKeyHelper": "echo other",
        "env": {
            "ANTHROPIC_API_KEY": "other",
            "ANTHROPIC_AUTH_TOKEN": "other",
            "ANTHROPIC_BASE_URL": "http://127.0.0.1:1",
            "CLAUDE_CODE_OAUTH_TOKEN": "other",
            "CLAUDE_CODE_USE_BEDROCK": "1",
            "CLAUDE_CODE_USE_FOUNDRY": "1",
            "CLAUDE_CODE_USE_VERTEX": "1",
            "HTTP_PROXY": "http://127.0.0.1:1",
            "HTTPS_PROXY": "http://127.0.0.1:1",
            "NO_PROXY": "example.com",
        },
    }
    (task_dir / "work" / ".claude" / "settings.json").write_text(json.dumps(settings))
    run = await run_cli(task(), sequence(Say("Done.")), is_oauth=is_oauth)
    assert run.outcome.reason is Reason.COMPLETED
    headers = run.requests[0].headers
    assert {name: headers[name] for name in ("x-api-key", "Authorization") if name in headers} == expected


async def test_cli_writes_only_to_the_task_directory(run_cli: Callable[..., Any], task_dir: Path) -> None:
    """Its state, sockets and temporary files are below HOME, the configuration directory and TMPDIR."""
    show = bash("echo $CLAUDE_CODE_MESSAGING_SOCKET; echo x > $(mktemp)")
    run = await run_cli(task(permission_mode="bypassPermissions"), sequence(show, Say("Done.")))
    assert str(task_dir / "tmp" / "cc-socks") in run.tool_results[0]
    shared = [Path(f"/tmp/claude-{os.geteuid()}"), Path("/tmp/cc-socks"), Path(f"/tmp/cc-socks-{os.geteuid()}")]
    outside = [name for directory in shared for name in glob.glob(f"{directory}/*{task_dir.name}*")]  # noqa: PTH207
    assert outside == []
    written = {path.relative_to(task_dir).parts[0] for path in task_dir.rglob("*")}  # A few hundred files.
    assert written == {"home", "config", "tmp", "inputs", "work"}
    assert os.listdir(task_dir / "work") == []  # noqa: PTH208

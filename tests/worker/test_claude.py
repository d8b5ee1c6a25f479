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
from ccrun.task import ConfigFile, Outcome, Reason, Secret, Status, TaskId, TaskSpec, TaskType, is_reserved_variable
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
PATIENCE_SECONDS = 60.0


def task(**fields: Any) -> TaskSpec:
    """Return a task of which only `fields` matter."""
    needed = {"task_id": TaskId("t1"), "type": TaskType.ASYNC, "prompt": "Do it.", "timeout_minutes": 1.0}
    return TaskSpec(**{**needed, **fields})


def surroundings(spec: TaskSpec, **changed: Any) -> dict[str, str]:
    """Return the environment of a task in rooms that do not exist."""
    usual = {
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
    return environment(spec, **{**usual, **changed})


# --- finding the CLI -------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with `claude` and `other`, both of which can be run, and `plain`, which cannot."""
    for name in ("claude", "other", "plain"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o644 if name == "plain" else 0o755)
    return tmp_path


def test_the_configured_cli_wins(programs: Path) -> None:
    """A path and a name on the PATH are both taken."""
    assert find_cli(str(programs / "other"), str(programs)) == programs / "other"
    assert find_cli("other", str(programs)) == programs / "other"


@pytest.mark.parametrize("configured", ["missing", "plain"])
def test_a_configured_cli_that_cannot_be_run_is_no_reason_to_take_another(programs: Path, configured: str) -> None:
    """The operator is told, without a local path."""
    with pytest.raises(CcrunError, match=r"^CLAUDE_CLI does not name a program that can be run\.$"):
        find_cli(str(programs / configured), str(programs))


def test_the_path_comes_before_the_bundled_cli(programs: Path, tmp_path: Path) -> None:
    """`claude` on the PATH is taken, and without one the CLI of the package, which is not imported for it."""
    assert find_cli(None, f"/nowhere:{programs}") == programs / "claude"
    assert find_cli(None, "/nowhere").parts[-3:] == ("claude_agent_sdk", "_bundled", "claude")
    assert "claude_agent_sdk" not in sys.modules


def test_no_cli_at_all_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the three ways out."""
    # What Python itself puts there for a package that must not be found.
    monkeypatch.setitem(sys.modules, "claude_agent_sdk", None)
    sentence = "The Claude CLI was not found: set CLAUDE_CLI, put `claude` on PATH or install ccrun[claude]."
    with pytest.raises(CcrunError, match=re.escape(sentence)):
        find_cli(None, "/nowhere")


# --- the environment -------------------------------------------------------------------------------------------------


def test_the_environment_holds_what_it_should_and_nothing_else() -> None:
    """Of the worker's own only PATH, locale and time zone; the real credential is not in it."""
    inherited = {
        "PATH": "/bin",
        "LC_ALL": "de_DE.UTF-8",
        "TZ": "UTC",
        "ANTHROPIC_API_KEY": "real",
        "GCS_LOGS_BUCKET": "b",
    }
    spec = task(environment_secrets={"TOKEN": Secret("s3cret")}, anthropic_api_key=Secret("real"))
    assert surroundings(spec, inherited=inherited) == {
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


def test_every_variable_that_ccrun_sets_is_reserved_or_merged() -> None:
    """No secret of the caller's can take the place of what keeps the agent in; a PATH or a NO_PROXY of its own is added."""
    plain = {**surroundings(task()), **surroundings(task(), is_oauth=True, is_root=True)}
    hostile = {name: Secret("theirs") for name in (*plain, "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_USE_BEDROCK")}
    del hostile["no_proxy"]
    changed = {**surroundings(task(environment_secrets=hostile), is_oauth=True, is_root=True)}
    free = {"PATH": "theirs:/usr/bin:/bin", "NO_PROXY": "theirs,127.0.0.1", "no_proxy": "theirs,127.0.0.1"}
    assert changed == {**surroundings(task(), is_oauth=True, is_root=True), **free, "LANG": "theirs"}


@pytest.mark.parametrize("name", ["DATABASE_URL", "PATH", "LD_LIBRARY_PATH", "GITHUB_TOKEN", "NODE_OPTIONS", "MY_HOME"])
def test_other_variables_are_the_callers_own(name: str) -> None:
    """What only decides how the caller's own code runs is free."""
    assert not is_reserved_variable(name)


def test_an_oauth_token_and_root_change_the_environment() -> None:
    """The dummy credential is of the real one's kind, and root is allowed what the CLI refuses to it outside a container."""
    plain = surroundings(task())
    changed = surroundings(task(), is_oauth=True, is_root=True)
    del plain["ANTHROPIC_API_KEY"]
    assert changed == {**plain, "CLAUDE_CODE_OAUTH_TOKEN": "run-token", "IS_SANDBOX": "1"}


# --- arguments and input files ---------------------------------------------------------------------------------------


def test_the_plain_command() -> None:
    """Nobody is ever asked for a permission, and the turns have a bound."""
    command = ["/bin/claude", "-p", "--verbose", "--output-format=stream-json", "--permission-prompts=none"]
    assert argv(task(), cli=Path("/bin/claude"), files={}) == [*command, "--max-turns=6"]


def test_values_are_tied_to_their_flags() -> None:
    """No value can be read as a flag, whatever it begins with, and each tool stays a value of its own."""
    spec = task(
        model="--danger",
        fallback_model="haiku",
        permission_mode="plan",
        max_turns=3,
        allowed_tools=("Bash(git log:*, -n)", "--dangerously-skip-permissions"),
        disallowed_tools=("WebFetch",),
    )
    assert argv(spec, cli=Path("claude"), files={"mcp-config": Path("/f/mcp-config")})[5:] == [
        "--max-turns=3",
        "--model=--danger",
        "--fallback-model=haiku",
        "--permission-mode=plan",
        "--allowedTools=Bash(git log:*, -n)",
        "--allowedTools=--dangerously-skip-permissions",
        "--disallowedTools=WebFetch",
        "--mcp-config=/f/mcp-config",
        "--strict-mcp-config",
    ]


def test_nothing_confidential_is_an_argument() -> None:
    """What other users of the machine see in the process list has neither texts nor secrets."""
    spec = task(
        prompt="word-1",
        system_prompt="word-2",
        append_system_prompt="word-3",
        mcp_config={"mcpServers": {"word-4": {}}},
        subagents={"word-5": ConfigFile(content="word-6")},
        environment_secrets={"WORD_7": Secret("word-8")},
        anthropic_api_key=Secret("word-9"),
    )
    files = {option: Path("/f", option) for option in option_files(spec, surroundings(spec))}
    assert "word" not in " ".join(argv(spec, cli=Path("claude"), files=files)).lower()


def test_subagents_become_what_the_flag_takes() -> None:
    """Lists that front matter writes as text become lists, empty fields go, and a description is always there."""
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


def told(*events: object) -> Transcript:
    """Return a transcript that was fed these events as the CLI prints them."""
    transcript = Transcript()
    for event in events:
        line = event if isinstance(event, bytes) else json.dumps(event, separators=(",", ":")).encode()
        transcript.feed(line)
    return transcript


def test_the_last_result_counts_and_figures_add_up() -> None:
    """When background work wakes the agent again, turns and tokens are those of the whole run."""
    transcript = told(RESULT, {**RESULT, "num_turns": 3, "result": "Really done."})
    assert (transcript.turns, transcript.result and transcript.result["result"]) == (5, "Really done.")
    assert transcript.usage == {"input_tokens": 40, "server": {"requests": 2}, "speed": "standard"}


def test_tools_that_fail_are_counted() -> None:
    """Only what the CLI reports as a tool's error counts, not a text that looks like it."""
    blocks = [{"type": "tool_result", "is_error": True}, {"type": "tool_result", "is_error": False}, "text"]
    user = {"type": "user", "message": {"content": blocks}}
    talk = {
        "type": "assistant",
        "message": {"content": [{"type": "text", "text": '"is_error":true', "is_error": True}]},
    }
    assert told(user, talk, user).errors == 2


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
def test_lines_that_are_no_events_do_no_harm(line: bytes) -> None:
    """Whatever a program prints between the events is passed over."""
    transcript = told(line)
    assert (transcript.has_lines, transcript.result, transcript.turns, transcript.errors) == (True, None, 0, 0)


def test_a_result_longer_than_what_is_parsed_elsewhere_is_seen() -> None:
    """A long answer is a result like any other; other long lines are not parsed."""
    long = "x" * (2 * MAX_PARSED_LINE_BYTES)
    blocks = [{"type": "tool_result", "is_error": True, "content": long}]
    transcript = told({"type": "user", "message": {"content": blocks}}, {**RESULT, "result": long})
    assert (transcript.errors, transcript.turns) == (0, 2)


def test_figures_that_cannot_be_kept_are_dropped() -> None:
    """Neither a number that JavaScript does not have nor a text that cannot be encoded gets into the record."""
    hostile = rb"""{"type":"result","is_error":false,"num_turns":1e9,"total_cost_usd":NaN,"session_id":"\ud800","result":7,
        "usage":{"a":1e999,"b":123456789012345678901,"c":"\udfff","\ud800":1,"d":[1],"e":null}}""".replace(b"\n", b"")
    outcome = outcome_of_run(told(hostile), Exit(code=0))
    assert outcome == Outcome(
        status=Status.COMPLETED,
        reason=Reason.COMPLETED,
        exit_code=0,
        session_id="?",
        usage={"c": "?", "?": 1},
    )


# --- lines for the log -----------------------------------------------------------------------------------------------


def text(content: str) -> bytes:
    """Return the line of a text object."""
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
def test_a_line_of_the_log(line: bytes, expected: bytes | None) -> None:
    """Objects stay byte for byte, anything else becomes a text object, blank lines go; the kind of bytes makes no difference."""
    wanted = line if expected is None else expected
    assert (bytes(line_for_log(line)), bytes(line_for_log(bytearray(line)))) == (wanted, wanted)


@given(st.binary().map(lambda line: line.replace(b"\n", b"")))
def test_every_line_of_the_log_is_one_object(line: bytes) -> None:
    """Whatever a program prints, readers get one JSON object a line, and it stays one when it is read again."""
    logged = line_for_log(line)
    if logged:
        assert isinstance(json.loads(bytes(logged).decode()), dict)
        assert not re.search(rb"[\r\n]", logged)
    assert line_for_log(logged) == logged


@pytest.mark.parametrize(
    ("line", "is_kept"),
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
def test_long_lines_are_judged_by_their_looks(line: bytes, is_kept: bool) -> None:
    """A long object is handed back as it is and not copied; what cannot be one becomes a text object."""
    logged = line_for_log(line)
    if is_kept:
        assert logged is line
    else:
        assert bytes(logged) == text(line.decode(errors="replace"))


@pytest.mark.parametrize(("line", "most"), [(b'{"a":"%s"}', 1), (b"%s", 80)])
def test_long_lines_cost_no_memory_beside_what_is_returned(line: bytes, most: int) -> None:
    """64 MiB are looked at in slices: an object costs nothing more, a text its wrapped self."""
    long = bytearray(line % (b"x" * (64 * MIB)))
    tracemalloc.start()
    try:
        line_for_log(long)
        Transcript().feed(long)
        assert tracemalloc.get_traced_memory()[1] <= most * MIB
    finally:
        tracemalloc.stop()


# --- the verdict -----------------------------------------------------------------------------------------------------

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
    ("events", "ended", "more", "reason", "code", "error"),
    [
        ([RESULT], OK, {}, Reason.COMPLETED, 0, None),
        ([RETRY_401, RESULT], OK, {}, Reason.COMPLETED, 0, None),
        ([API_RESULT, RESULT], OK, {}, Reason.COMPLETED, 0, None),
        ([RESULT], Exit(code=143, signal=15), {"stopped_by_us": True}, Reason.COMPLETED, 0, None),
        ([RESULT], OK, {"rejected": "No."}, Reason.COMPLETED, 0, None),
        ([MAX_TURNS_RESULT], Exit(code=1), {}, Reason.MAX_TURNS, 1, "Reached maximum number of turns (1)"),
        ([API_RESULT], Exit(code=1), {}, Reason.API_ERROR, 1, "API Error: 500"),
        ([API_RESULT], OK, {}, Reason.API_ERROR, 1, "API Error: 500"),
        ([RESULT, {**RESULT, "is_error": True, "result": "Oh."}], OK, {}, Reason.AGENT_ERROR, 1, "Oh."),
        ([{"type": "result", "is_error": True}], OK, {}, Reason.AGENT_ERROR, 1, "Claude process exited with code 1"),
        ([{"type": "result"}], OK, {}, Reason.AGENT_ERROR, 1, "Claude process exited with code 1"),
        ([RESULT], Exit(code=3), {}, Reason.AGENT_ERROR, 3, "Claude process exited with code 3"),
        ([], Exit(code=1), {}, Reason.AGENT_ERROR, 1, "Claude process exited with code 1"),
        ([b"noise"], OK, {}, Reason.AGENT_ERROR, 1, "The Claude CLI exited without a result."),
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
def test_a_run_is_judged(
    events: list[Any], ended: Exit, more: Mapping[str, Any], reason: Reason, code: int, error: str | None
) -> None:
    """Success needs a good last result and a good end; a failure has one reason, never exit code 0, and the CLI's own words."""
    outcome = outcome_of_run(told(*events), ended, **more)
    status = Status.COMPLETED if reason is Reason.COMPLETED else Status.FAILED
    assert (outcome.status, outcome.reason, outcome.exit_code, outcome.error) == (status, reason, code, error)


def test_an_outcome_has_the_figures_of_the_run() -> None:
    """Turns, errors, cost, tokens, session and text come from the CLI, also when the run has failed."""
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
    assert outcome_of_run(told(user, RESULT), OK) == completed
    failed = attrs.evolve(
        completed,
        status=Status.FAILED,
        reason=Reason.API_ERROR,
        exit_code=1,
        error="API Error: 500",
        result="API Error: 500",
    )
    assert outcome_of_run(told(user, API_RESULT), OK) == failed


def test_texts_of_the_cli_are_bounded() -> None:
    """The record stays small, however long the answer is; a cut is visible."""
    long = "é" * (2 * MAX_RESULT_CHARS)
    outcome = outcome_of_run(told({**API_RESULT, "result": long}), OK)
    assert outcome.result == "é" * (MAX_RESULT_CHARS - 1) + "…"
    assert outcome.error == "é" * (MAX_ERROR_CHARS - 1) + "…"


# --- the real CLI ----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Run:
    """A run of the real CLI."""

    outcome: Outcome
    events: list[dict[str, Any]]
    stderr: str
    requests: list[RecordedRequest]
    room: Path

    @property
    def init(self) -> dict[str, Any]:
        """The first thing that the CLI says of itself."""
        return next(event for event in self.events if event.get("subtype") == "init")

    def asked(self, number: int = 0) -> str:
        """What the model was asked: all of the body, as JSON."""
        posts = [request for request in self.requests if request.method == "POST"]
        return json.dumps(posts[number].body, ensure_ascii=False)

    @property
    def tool_results(self) -> list[str]:
        """What the tools gave back, as JSON."""
        return [
            json.dumps(block["content"])
            for event in self.events
            if event.get("type") == "user"
            for block in event["message"]["content"]
            if block.get("type") == "tool_result"
        ]


@pytest.fixture
def room() -> Iterator[Path]:
    """The task's folder: pytest's own is too long for the CLI's socket."""
    folder = Path(tempfile.mkdtemp(prefix="ccrun-"))
    for name in ("home", "config", "tmp", "inputs", "work"):
        (folder / name).mkdir(mode=0o700)
    assert len(os.fsencode(folder / "tmp")) <= MAX_TEMPORARY_PATH_BYTES
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def run_cli(room: Path) -> Callable[..., Any]:
    """Runs the real CLI on a task, with a script in the model's place, as the worker will."""
    cli = find_cli(None, "")

    async def run(spec: TaskSpec, script: Script, *, is_oauth: bool = False, stop: bool = False) -> Run:
        transcript, events = Transcript(), []
        async with ScriptedModel(script) as model:
            surrounding = environment(
                spec,
                inherited={"PATH": os.environ["PATH"]},
                home=room / "home",
                config=room / "config",
                temporary=room / "tmp",
                base_url=model.url,
                run_token=Secret("made-up-key"),
                is_oauth=is_oauth,
                is_root=os.geteuid() == 0,
                marker=str(room),
            )
            files = {}
            for option, content in option_files(spec, surrounding).items():
                files[option] = room / "inputs" / option
                files[option].write_bytes(content)
            command = argv(spec, cli=cli, files=files)
            async with spawn(command, env=surrounding, cwd=room / "work", stdin=spec.prompt.encode()) as child:
                async for line in child.lines():
                    transcript.feed(line)
                    assert line_for_log(line) == line
                    events.append(json.loads(line))
                    if stop:
                        child.terminate()
                ended = await child.wait()
            return Run(
                outcome=outcome_of_run(transcript, ended),
                events=events,
                stderr=child.stderr_tail.decode(),
                requests=list(model.requests),
                room=room,
            )

    return run


def bash(command: str) -> UseTool:
    """Return what a model says that wants a shell command run."""
    return UseTool("Bash", {"command": command, "description": "A test"})


async def test_the_cli_answers(run_cli: Callable[..., Any]) -> None:
    """A plain run completes, with the figures of the CLI; the prompt reaches the model through stdin, however long."""
    prompt = "--help é\n" + "0123456789abcdef" * 40_000
    run = await run_cli(task(prompt=prompt, model="claude-sonnet-4-5"), sequence(Say("Done.")))
    assert (run.outcome.reason, run.outcome.exit_code, run.outcome.turns) == (Reason.COMPLETED, 0, 1)
    assert (run.outcome.result, run.outcome.session_id) == ("Done.", run.init["session_id"])
    assert run.outcome.usage is not None
    assert run.outcome.cost_usd is not None
    assert (json.dumps(prompt, ensure_ascii=False)[1:-1] in run.asked(), run.init["model"]) == (
        True,
        "claude-sonnet-4-5",
    )


async def test_the_cli_uses_tools_in_the_task_folder(run_cli: Callable[..., Any], room: Path) -> None:
    """A tool runs where the task is, and one that fails is counted."""
    spec = task(permission_mode="bypassPermissions")
    run = await run_cli(spec, sequence(bash("pwd > here"), bash("exit 7"), Say("Done.")))
    assert (room / "work" / "here").read_text() == f"{room / 'work'}\n"
    assert (run.outcome.reason, run.outcome.turns, run.outcome.errors) == (Reason.COMPLETED, 3, 1)


async def test_the_cli_stops_at_the_limit_of_turns(run_cli: Callable[..., Any]) -> None:
    """The limit is the request's, and the failure says so."""
    run = await run_cli(task(max_turns=1, permission_mode="bypassPermissions"), sequence(bash("true")))
    assert run.outcome.reason is Reason.MAX_TURNS
    assert (run.outcome.exit_code, run.outcome.error) == (1, "Reached maximum number of turns (1)")


async def test_an_error_of_the_api_is_a_failure(run_cli: Callable[..., Any]) -> None:
    """The API's own words reach the caller."""
    run = await run_cli(task(), sequence(Fail(400, "invalid_request_error", "no such thing")))
    assert (run.outcome.status, run.outcome.reason, run.outcome.exit_code) == (Status.FAILED, Reason.API_ERROR, 1)
    assert "no such thing" in run.outcome.error


@pytest.mark.parametrize("is_oauth", [False, True])
async def test_a_refused_credential_is_told(run_cli: Callable[..., Any], is_oauth: bool) -> None:
    """A 401 that says not to try again ends the run at once."""
    refusal = Fail(401, "authentication_error", "invalid x-api-key", headers={"x-should-retry": "false"})
    run = await run_cli(task(), sequence(refusal), is_oauth=is_oauth)
    assert (run.outcome.status, run.outcome.reason) == (Status.FAILED, Reason.CREDENTIAL_REJECTED)


async def test_a_cli_that_was_terminated_is_no_success(run_cli: Callable[..., Any]) -> None:
    """Ended in the middle of an answer, it has failed."""
    run = await run_cli(task(), sequence(Hang("Well,")), stop=True)
    assert run.outcome.status is Status.FAILED
    assert run.outcome.exit_code == 143


async def test_system_prompts_reach_the_model_from_files(run_cli: Callable[..., Any]) -> None:
    """Both of them, whatever they begin with, and far beyond what one argument can hold."""
    system, appended = "--system é\n" + "s" * MIB, '-appended "quoted"'
    run = await run_cli(task(system_prompt=system, append_system_prompt=appended), sequence(Say("Done.")))
    assert (system.replace("\n", "\\n") in run.asked(), json.dumps(appended)[1:-1] in run.asked()) == (True, True)


async def test_values_that_look_like_flags_are_values(run_cli: Callable[..., Any]) -> None:
    """Neither a model nor a tool of such a name turns a flag of the CLI on."""
    flag = "--dangerously-skip-permissions"
    run = await run_cli(task(model=flag, allowed_tools=(flag,), disallowed_tools=(flag,)), sequence(Say("Done.")))
    assert (run.init["model"], run.init["permissionMode"]) == (flag, "default")


async def test_tools_are_allowed_one_by_one(run_cli: Callable[..., Any]) -> None:
    """Spaces and commas in parentheses survive; what is not allowed is denied and not waited for; what is disallowed is gone."""
    spec = task(allowed_tools=("Bash(touch a, b)", "Bash(mkdir c:*)"), disallowed_tools=("WebFetch", "WebSearch"))
    run = await run_cli(spec, sequence(bash("touch a, b"), bash("mkdir c"), bash("touch d"), Say("Done.")))
    assert sorted(os.listdir(run.room / "work")) == ["a,", "b", "c"]  # noqa: PTH208
    assert (run.outcome.reason, run.outcome.errors) == (Reason.COMPLETED, 1)
    assert not {"WebFetch", "WebSearch"} & set(run.init["tools"])


@pytest.mark.parametrize("mode", ["acceptEdits", "auto", "bypassPermissions", "default", "dontAsk", "manual", "plan"])
async def test_every_permission_mode_is_known_to_the_cli(run_cli: Callable[..., Any], mode: str) -> None:
    """No mode that a request may name makes the CLI refuse to run, not even as root."""
    run = await run_cli(task(permission_mode=mode), sequence(Say("Done.")))
    assert (run.outcome.reason, run.stderr) == (Reason.COMPLETED, "")


async def test_commands_and_subagents_of_the_task_win_over_the_repositorys(
    run_cli: Callable[..., Any], room: Path
) -> None:
    """Commands from the configuration folder, subagents from the flag; the repository's others stay."""
    for kind, name, origin in (
        ("commands", "greet", "theirs"),
        ("commands", "only", "theirs"),
        ("agents", "rev", "theirs"),
    ):
        folder = room / "work" / ".claude" / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(f"---\nname: {name}\ndescription: d-{origin}\n---\nbody-{origin}")
    (room / "config" / "commands").mkdir()
    (room / "config" / "commands" / "greet.md").write_text("---\ndescription: d-ours\n---\nbody-ours")
    ours = ConfigFile(frontmatter={"description": "d-ours", "tools": "Read, Grep"}, content="body-ours")
    run = await run_cli(task(prompt="/greet", subagents={"rev": ours}), sequence(Say("Done.")))
    assert {"greet", "only"} <= set(run.init["slash_commands"])
    assert "rev" in run.init["agents"]
    assert ("body-ours" in run.asked(), "body-theirs" in run.asked()) == (True, False)
    assert ("rev: d-ours" in run.asked(), "rev: d-theirs" in run.asked()) == (True, False)


MCP_SERVER = """
import json, os, sys
with open("seen", "w") as seen:
    json.dump([sys.argv[1:], os.environ.get("GIVEN")], seen)
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


async def test_the_cli_expands_variables_for_mcp_servers(run_cli: Callable[..., Any], room: Path) -> None:
    """`${VAR}` comes from the task's secrets, in arguments and variables alike, and the repository's servers do not run."""
    (room / "work" / ".mcp.json").write_text('{"mcpServers":{"theirs":{"command":"touch","args":["ran"]}}}')
    (room / "work" / ".claude").mkdir()
    (room / "work" / ".claude" / "settings.json").write_text('{"enableAllProjectMcpServers":true}')
    server = {
        "command": sys.executable,
        "args": ["-c", MCP_SERVER, "${TOKEN}", "${MISSING:-none}"],
        "env": {"GIVEN": "<${TOKEN}>"},
    }
    spec = task(mcp_config={"mcpServers": {"ours": server}}, environment_secrets={"TOKEN": Secret("s3cret")})
    run = await run_cli(spec, sequence(Say("Done.")))
    assert [(server["name"], server["status"]) for server in run.init["mcp_servers"]] == [("ours", "connected")]
    assert json.loads((room / "work" / "seen").read_text()) == [["s3cret", "none"], "<s3cret>"]
    assert not (room / "work" / "ran").exists()


@pytest.mark.parametrize(
    ("is_oauth", "expected"),
    [(False, {"x-api-key": "made-up-key"}), (True, {"Authorization": "Bearer made-up-key"})],
)
async def test_a_repository_cannot_lead_the_requests_elsewhere(
    run_cli: Callable[..., Any], room: Path, is_oauth: bool, expected: Mapping[str, str]
) -> None:
    """Whatever the settings in the repository say, requests go to the proxy, with the credential that opens it."""
    (room / "work" / ".claude").mkdir()
    theirs = {
        "apiKeyHelper": "echo theirs",
        "env": {
            "ANTHROPIC_API_KEY": "theirs",
            "ANTHROPIC_AUTH_TOKEN": "theirs",
            "ANTHROPIC_BASE_URL": "http://127.0.0.1:1",
            "CLAUDE_CODE_OAUTH_TOKEN": "theirs",
            "CLAUDE_CODE_USE_BEDROCK": "1",
            "CLAUDE_CODE_USE_FOUNDRY": "1",
            "CLAUDE_CODE_USE_VERTEX": "1",
            "HTTP_PROXY": "http://127.0.0.1:1",
            "HTTPS_PROXY": "http://127.0.0.1:1",
            "NO_PROXY": "example.com",
        },
    }
    (room / "work" / ".claude" / "settings.json").write_text(json.dumps(theirs))
    run = await run_cli(task(), sequence(Say("Done.")), is_oauth=is_oauth)
    assert run.outcome.reason is Reason.COMPLETED
    headers = run.requests[0].headers
    assert {name: headers[name] for name in ("x-api-key", "Authorization") if name in headers} == expected


async def test_all_that_the_cli_writes_stays_in_the_task_folder(run_cli: Callable[..., Any], room: Path) -> None:
    """Its state, its sockets and its temporary files are below HOME, the configuration folder and TMPDIR."""
    show = bash("echo $CLAUDE_CODE_MESSAGING_SOCKET; echo x > $(mktemp)")
    run = await run_cli(task(permission_mode="bypassPermissions"), sequence(show, Say("Done.")))
    assert str(room / "tmp" / "cc-socks") in run.tool_results[0]
    shared = [Path(f"/tmp/claude-{os.geteuid()}"), Path("/tmp/cc-socks"), Path(f"/tmp/cc-socks-{os.geteuid()}")]
    strangers = [name for folder in shared for name in glob.glob(f"{folder}/*{room.name}*")]  # noqa: PTH207
    assert strangers == []
    left = {path.relative_to(room).parts[0] for path in room.rglob("*")}  # a few hundred files
    assert left == {"home", "config", "tmp", "inputs", "work"}
    assert os.listdir(room / "work") == []  # noqa: PTH208

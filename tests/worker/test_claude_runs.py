from __future__ import annotations

import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from helpers.claude import MIB, task

from ccrun.claude_cli import find_cli
from ccrun.process.child import spawn
from ccrun.spec import ConfigFile, TaskSpec
from ccrun.task import Outcome, Reason, Secret, Status
from ccrun.testing.model import Fail, Hang, RecordedRequest, Say, Script, ScriptedModel, UseTool, sequence
from ccrun.worker.claude import MAX_TEMPORARY_PATH_BYTES, argv, environment, option_files
from ccrun.worker.transcript import (
    Transcript,
    line_for_log,
    outcome_of_run,
)


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
                network={},
                home=task_dir / "home",
                config=task_dir / "config",
                temporary=task_dir / "tmp",
                model_api={
                    "ANTHROPIC_BASE_URL": model.url,
                    "CLAUDE_CODE_OAUTH_TOKEN" if is_oauth else "ANTHROPIC_API_KEY": "made-up-key",
                },
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

"""Results of the CLI that are not the last word: work in the background, retries of the model API, missing MCP servers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
from helpers.worker import PRELUDE, FakeCli, WorkerSetup, serve_model, worker_setup

from ccrun.results import ApiError, BackgroundTask, McpServer
from ccrun.spec import PostRunActions, UploadAction
from ccrun.task import EXIT_TIMEOUT, Reason, Status, TaskRecord
from ccrun.testing.model import Conversation, Fail, Reply, Say, UseTool

__all__ = ["serve_model", "worker_setup"]

UPLOAD = PostRunActions(upload_files=UploadAction(glob_patterns=("done.txt",)))
#: A server of the Model Context Protocol on stdin and stdout.
MCP_SERVER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request.get("method") == "initialize":
        result = {"protocolVersion": request["params"]["protocolVersion"], "capabilities": {},
                  "serverInfo": {"name": "test", "version": "1"}}
    elif "id" in request:
        result = {}
    else:
        continue
    print(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}), flush=True)
"""
#: A CLI that prints a result while a task runs in the background.
WITH_OPEN_WORK = (
    PRELUDE
    + """
say(type="system", subtype="background_tasks_changed", tasks=[{"task_type": "local_bash", "description": "the build"}])
result()
"""
)


def summary_of(record: TaskRecord) -> Any:
    """Return the summary of a final record."""
    assert record.summary is not None
    return record.summary


def hurry(worker_setup: WorkerSetup) -> Any:
    """Return timeouts with which a silent CLI without open work is stopped soon."""
    return attrs.evolve(worker_setup.deps.timeouts, after_result=0.2)


# --- the real CLI ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["Bash", "Monitor"])
async def test_background_work_is_waited_for(worker_setup: WorkerSetup, serve_model: Any, tool: str) -> None:
    """The agent ends its turn, its command goes on for longer than the timeout after a result, and the agent is woken."""
    command = "sleep 2; echo finished > done.txt"
    started: dict[str, dict[str, Any]] = {
        "Bash": {"command": command, "run_in_background": True, "description": "x"},
        "Monitor": {"command": command, "description": "x", "timeout_ms": 60000, "persistent": False},
    }

    def script(conversation: Conversation) -> Reply:
        return UseTool(tool, started[tool]) if conversation.turn == 0 else Say(f"Turn {conversation.turn}.")

    model = await serve_model(script)
    await worker_setup.submit(allowed_tools=("Bash", "Monitor"), post_execution_actions=UPLOAD)
    record = await worker_setup.run(upstream=model.url, timeouts=hurry(worker_setup))
    assert (Status.COMPLETED, "Turn 2.", ()) == (
        record.status,
        summary_of(record).result,
        summary_of(record).background_tasks,
    )
    assert ["done.txt"] == [file.original_path for file in record.uploaded_files or ()]


async def test_scheduled_wakeup_is_waited_for(worker_setup: WorkerSetup, serve_model: Any) -> None:
    """The CLI wakes the agent a minute later at the earliest; the limit of the task is what ends the wait here."""

    def script(conversation: Conversation) -> Reply:
        wakeup = {"delaySeconds": 60, "reason": "x", "prompt": "continue"}
        return UseTool("ScheduleWakeup", wakeup) if conversation.turn == 0 else Say("Later.")

    model = await serve_model(script)
    await worker_setup.submit(allowed_tools=("ScheduleWakeup",), timeout_minutes=0.1)
    record = await worker_setup.run(upstream=model.url, timeouts=hurry(worker_setup))
    assert (Status.FAILED, Reason.TIMEOUT) == (record.status, record.reason)
    assert "a scheduled wakeup of the agent" in (record.error or "")


async def test_retries_until_the_timeout_are_an_error_of_the_api(worker_setup: WorkerSetup, serve_model: Any) -> None:
    """The record names what the model API responded with, in place of the timeout."""
    model = await serve_model(lambda _: Fail(529, "overloaded_error", "Overloaded", {"Retry-After": "1"}))
    await worker_setup.submit(timeout_minutes=0.05)
    record = await worker_setup.run(upstream=model.url)
    assert (Status.FAILED, Reason.API_ERROR) == (record.status, record.reason)
    assert "status 529 (overloaded_error: Overloaded)" in (record.error or "")
    error = summary_of(record).api_error
    assert (529, "overloaded_error", "Overloaded", True) == (error.status, error.type, error.message, error.retryable)
    assert error.resets_at is not None


async def test_unreachable_api_is_named(worker_setup: WorkerSetup) -> None:
    """Without any response, the record says that the model API cannot be reached."""
    await worker_setup.submit(timeout_minutes=0.05)
    record = await worker_setup.run(upstream="http://127.0.0.1:9")
    assert Reason.API_ERROR is record.reason
    assert "The model API cannot be reached" in (record.error or "")
    assert summary_of(record).api_error.status is None


async def test_too_long_prompt_is_an_error_of_the_api(worker_setup: WorkerSetup, serve_model: Any) -> None:
    """The message is the API's own; it is not worth a retry."""
    message = "prompt is too long: 210000 tokens > 200000 maximum"
    model = await serve_model(lambda _: Fail(400, "invalid_request_error", message))
    await worker_setup.submit()
    record = await worker_setup.run(upstream=model.url)
    assert Reason.API_ERROR is record.reason
    assert (
        ApiError(status=400, type="invalid_request_error", message=message, retryable=False)
        == summary_of(record).api_error
    )


async def test_success_after_a_retry_has_no_error(worker_setup: WorkerSetup, serve_model: Any) -> None:
    """An error that a retry has overcome is not in the record."""
    replies: list[Reply] = [Fail(529, "overloaded_error", "Overloaded")]
    model = await serve_model(lambda _: replies.pop() if replies else Say("Done."))
    await worker_setup.submit()
    record = await worker_setup.run(upstream=model.url)
    assert (Status.COMPLETED, None) == (record.status, summary_of(record).api_error)


@pytest.fixture
def mcp_server(tmp_path: Path) -> dict[str, Any]:
    """Return the configuration of a server that works."""
    (tmp_path / "server.py").write_text(MCP_SERVER)
    return {"command": sys.executable, "args": [str(tmp_path / "server.py")]}


async def test_record_lists_the_mcp_servers(
    worker_setup: WorkerSetup, serve_model: Any, mcp_server: dict[str, Any]
) -> None:
    """A server that does not start is `failed`, and the task goes on without it."""
    model = await serve_model(lambda _: Say("Done."))
    await worker_setup.submit(
        mcp_config={"mcpServers": {"good": mcp_server, "bad": {"command": "/nonexistent/server"}}}
    )
    record = await worker_setup.run(upstream=model.url)
    assert Status.COMPLETED is record.status
    assert (
        McpServer(name="good", status="connected"),
        McpServer(name="bad", status="failed"),
    ) == summary_of(record).mcp_servers


async def test_required_mcp_server_fails_the_task(
    worker_setup: WorkerSetup, serve_model: Any, mcp_server: dict[str, Any]
) -> None:
    """With `requireMcp`, a server that is not connected ends the task before the agent has its first turn."""
    model = await serve_model(lambda _: Say("Done."))
    config = {"mcpServers": {"good": mcp_server, "bad": {"command": "/nonexistent/server"}}}
    await worker_setup.submit(mcp_config=config, require_mcp=True)
    record = await worker_setup.run(upstream=model.url)
    assert (Status.FAILED, Reason.PREPARE_FAILED) == (record.status, record.reason)
    assert "requireMcp is set, and these MCP servers are not connected: bad (failed)." == record.error


# --- a script in place of the CLI --------------------------------------------------------------------------------------


async def test_open_work_at_the_timeout_is_named(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """The task does not count as completed, and the record names what was stopped."""
    await worker_setup.submit(timeout_minutes=0.01)
    cli = fake_cli(WITH_OPEN_WORK + "time.sleep(600)")
    record = await worker_setup.run(cli=lambda: cli, timeouts=hurry(worker_setup))
    assert (Status.FAILED, Reason.TIMEOUT, EXIT_TIMEOUT) == (record.status, record.reason, record.exit_code)
    assert (record.error or "").endswith("Work in the background was stopped before it had finished: the build.")
    assert (BackgroundTask(type="local_bash", description="the build"),) == summary_of(record).background_tasks


async def test_exit_with_open_work_is_a_failure(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """If the CLI exits although it has announced work in the background, the task does not count as completed."""
    await worker_setup.submit()
    cli = fake_cli(WITH_OPEN_WORK)
    record = await worker_setup.run(cli=lambda: cli)
    assert (Status.FAILED, Reason.AGENT_ERROR) == (record.status, record.reason)
    assert "Work in the background was stopped before it had finished: the build." == record.error


async def test_silence_after_the_last_result_is_a_hang(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """When the background work has finished, a CLI that does not exit is stopped, and the task is completed."""
    await worker_setup.submit()
    finished = """
say(type="system", subtype="background_tasks_changed", tasks=[])
time.sleep(600)
"""
    cli = fake_cli(WITH_OPEN_WORK + finished)
    record = await worker_setup.run(cli=lambda: cli, timeouts=hurry(worker_setup))
    assert (Status.COMPLETED, ()) == (record.status, summary_of(record).background_tasks)


async def test_listed_names_are_bounded(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """Whatever a line contains, the record stays small and is written."""
    await worker_setup.submit()
    tasks = [1, {}, {"task_type": 1}, *({"task_type": "x", "description": "d" * 9999} for _ in range(999))]
    cli = fake_cli(
        PRELUDE
        + f"tasks = json.loads({json.dumps(tasks)!r})"
        + """
say(type="system", subtype="init", mcp_servers=[1, {"name": 2}, {"name": "n" * 9999, "status": "s" * 9999}] * 99)
say(type="system", subtype="background_tasks_changed", tasks=tasks)
result()
"""
    )
    record = await worker_setup.run(cli=lambda: cli)
    summary = summary_of(record)
    assert len(summary.background_tasks) <= 20
    assert len(summary.mcp_servers) <= 20
    assert all(len(task.description) <= 200 for task in summary.background_tasks)

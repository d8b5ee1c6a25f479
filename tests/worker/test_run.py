"""Whole tasks, run in the process of the test with the real CLI or with a script that behaves like it."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.service import MADE_UP_KEY
from helpers.worker import PRELUDE, RESULT, TASK, FakeCli, WorkerSetup, serve_model, worker_setup

from ccrun import lifecycle
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.blobs import Blob
from ccrun.callbacks import deliver, guard
from ccrun.callbacks.owed import OwedCallbacks
from ccrun.claude_cli import find_cli
from ccrun.errors import StorageError
from ccrun.spec import ConfigFile
from ccrun.store import Store
from ccrun.task import CallbackState, Reason, Secret, Status, TaskId
from ccrun.testing.model import Fail, Say, UseTool, sequence

__all__ = ["serve_model", "worker_setup"]

# --- the real CLI ----------------------------------------------------------------------------------------------------


async def test_task_is_completed(worker_setup: WorkerSetup, serve_model: Any) -> None:
    """The record has the statistics of the CLI, the log has its output, and the workspace is deleted."""
    model = await serve_model(sequence(UseTool("Bash", {"command": "pwd"}), Say("All done.")))
    await worker_setup.submit(allowed_tools=("Bash",))
    record = await worker_setup.run(upstream=model.url)
    assert (Status.COMPLETED, Reason.COMPLETED, 0, None) == (
        record.status,
        record.reason,
        record.exit_code,
        record.error,
    )
    assert record.summary is not None
    assert (2, 0, "All done.") == (record.summary.turns, record.summary.errors, record.summary.result)
    lines = await worker_setup.log()
    assert ("init", "result") == (lines[0]["subtype"], lines[-1]["type"])
    assert not list(Path(tempfile.gettempdir()).glob(f"ws-{TASK}*"))
    assert {MADE_UP_KEY} == {request.headers.get("x-api-key") for request in model.requests}


async def test_task_fails_at_the_maximum_number_of_turns(worker_setup: WorkerSetup, serve_model: Any) -> None:
    """The reason is `max_turns`, and the error is the message of the CLI."""
    model = await serve_model(sequence(UseTool("Bash", {"command": "true"})))
    await worker_setup.submit(allowed_tools=("Bash",), max_turns=1)
    record = await worker_setup.run(upstream=model.url)
    assert (Status.FAILED, Reason.MAX_TURNS, 1) == (record.status, record.reason, record.exit_code)
    assert "Reached maximum number of turns (1)" == record.error


async def test_rejected_credential_fails_the_task_without_retries(worker_setup: WorkerSetup, serve_model: Any) -> None:
    """Retries of the CLI would take minutes. The error has the message of the model API."""
    model = await serve_model(lambda _: Fail(401, "authentication_error", "invalid x-api-key"))
    await worker_setup.submit()
    start = time.monotonic()
    record = await worker_setup.run(upstream=model.url)
    assert time.monotonic() - start < 60
    assert (Status.FAILED, Reason.CREDENTIAL_REJECTED) == (record.status, record.reason)
    assert record.error is not None
    assert "invalid x-api-key" in record.error


async def test_configuration_of_the_cli_is_not_in_the_workspace(worker_setup: WorkerSetup, serve_model: Any) -> None:
    """The CLI has the commands, subagents and MCP servers of the request, and the working directory is empty."""
    model = await serve_model(sequence(UseTool("Bash", {"command": "ls -A | wc -l"}), Say("Done.")))
    await worker_setup.submit(
        allowed_tools=("Bash",),
        slash_commands={"greet": ConfigFile(frontmatter={"description": "Greets"}, content="Say hello.")},
        subagents={"critic": ConfigFile(frontmatter={"description": "Criticizes"}, content="Be strict.")},
        mcp_config={"mcpServers": {"absent": {"command": "false"}}},
    )
    await worker_setup.run(upstream=model.url)
    lines = await worker_setup.log()
    assert "greet" in lines[0]["slash_commands"]
    assert "critic" in lines[0]["agents"]
    assert ["absent"] == [server["name"] for server in lines[0]["mcp_servers"]]
    [output] = [block["content"] for line in lines if line["type"] == "user" for block in line["message"]["content"]]
    assert "0" == output.strip()


# --- the outcome -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "status", "reason", "exit_code", "error"),
    [
        ("result()", Status.COMPLETED, Reason.COMPLETED, 0, None),
        ("sys.exit(3)", Status.FAILED, Reason.AGENT_ERROR, 3, "Claude process exited with code 3"),
        ("result(); sys.exit(1)", Status.FAILED, Reason.AGENT_ERROR, 1, "Claude process exited with code 1"),
        ("result(is_error=True, result='Failed.')", Status.FAILED, Reason.AGENT_ERROR, 1, "Failed."),
        ("pass", Status.FAILED, Reason.AGENT_ERROR, 1, "The Claude CLI exited without a result."),
        (
            "result(); os.kill(os.getpid(), signal.SIGSEGV)",
            Status.FAILED,
            Reason.KILLED,
            139,
            "The Claude process was killed by signal 11 (SIGSEGV).",
        ),
    ],
)
async def test_outcome_of_the_cli(
    worker_setup: WorkerSetup,
    fake_cli: FakeCli,
    script: str,
    status: Status,
    reason: Reason,
    exit_code: int,
    error: str | None,
) -> None:
    """A task is completed only if the CLI exits with code 0 after a successful result."""
    await worker_setup.submit()
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + script))
    assert (status, reason, exit_code, error) == (record.status, record.reason, record.exit_code, record.error)


async def test_missing_cli_fails_the_task(worker_setup: WorkerSetup) -> None:
    """The error names the setting to change."""
    await worker_setup.submit()
    record = await worker_setup.run(cli=lambda: find_cli("no-such-program", os.environ["PATH"]))
    assert (Status.FAILED, Reason.PREPARE_FAILED) == (record.status, record.reason)
    assert "CLAUDE_CLI does not name a program that can be run." == record.error


async def test_text_and_stderr_are_logged_as_json(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """Each line of the log is a JSON object, so that readers can parse it."""
    await worker_setup.submit()
    await worker_setup.run(
        cli=lambda: fake_cli(PRELUDE + "print('plain'); print('warning', file=sys.stderr); result()")
    )
    lines = await worker_setup.log()
    assert [{"type": "text", "content": "plain"}, RESULT, {"type": "stderr", "content": "warning\n"}] == lines


# --- the payload -----------------------------------------------------------------------------------------------------


async def test_second_worker_does_nothing(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """The agent of a task runs once."""
    await worker_setup.submit()
    first = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "result()"))
    second = await worker_setup.run(cli=lambda: pytest.fail("the CLI was started twice"))
    assert first == second


async def test_payload_is_deleted_before_the_agent_starts(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """The sealed request is stored no longer than necessary."""
    await worker_setup.submit()
    directory = Path(worker_setup.deps.store.logs_path(TASK).removeprefix("file://"))
    script = f"result(result=str(os.path.exists({str(directory / 'encrypted-payload.bin')!r})))"
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + script))
    assert record.summary is not None
    assert "False" == record.summary.result


async def test_payload_of_another_task_is_rejected(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """A payload that was sealed for one task cannot be opened for another."""
    other = TaskId(f"{TASK}-2")
    await worker_setup.submit(task_id=other)
    await worker_setup.submit()
    directory = Path(worker_setup.deps.store.logs_path(TASK).removeprefix("file://")).parent
    (directory / other / "encrypted-payload.bin").replace(directory / TASK / "encrypted-payload.bin")
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "result()"))
    assert (Status.FAILED, Reason.PREPARE_FAILED) == (record.status, record.reason)
    assert "The sealed payload was changed, or belongs to another task." == record.error


# --- secrets ---------------------------------------------------------------------------------------------------------


async def test_agent_does_not_inherit_the_environment(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """It has the allowed variables and the secrets of the request, but not the credential."""
    await worker_setup.submit(environment_secrets={"TEST_TOKEN": Secret("made-up-token")})
    await worker_setup.run(
        cli=lambda: fake_cli(PRELUDE + "say(type='env', names=sorted(os.environ), values=str(os.environ))")
    )
    [line] = await worker_setup.log()
    assert {
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_BASE_URL",
        "CCRUN_MARK",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
        "CLAUDE_CONFIG_DIR",
        "DISABLE_AUTOUPDATER",
        "HOME",
        "LANG",
        "NO_PROXY",
        "PATH",
        "TERM",
        "TEST_TOKEN",
        "TMPDIR",
        "no_proxy",
    } == set(line["names"]) - {"IS_SANDBOX", "LC_CTYPE", "OLDPWD", "PWD", "_"}
    assert "of-the-service" not in line["values"]
    assert MADE_UP_KEY not in line["values"]


async def test_secrets_are_redacted_in_log_and_record(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """A secret that the agent prints is replaced by `***`. The metadata of the request is unchanged."""
    await worker_setup.submit(environment_secrets={"A": Secret('pass"word-1')}, metadata={"note": 'pass"word-1'})
    script = "say(type='x', text=os.environ['A']); result(result='It is ' + os.environ['A'])"
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + script))
    assert record.summary is not None
    assert "It is ***" == record.summary.result
    assert ["***", "It is ***"] == [line.get("text", line.get("result")) for line in await worker_setup.log()]
    assert {"note": 'pass"word-1'} == record.metadata


# --- storage ---------------------------------------------------------------------------------------------------------


class RejectingBlobs(DirectoryBlobs):
    """Rejects all log chunks."""

    async def create(self, name: str, content: Any) -> int:
        if name.endswith(".jsonl"):
            raise StorageError("The storage directory cannot be written: No space left on device.")
        return await super().create(name, content)


async def test_log_that_cannot_be_written_fails_the_task(
    worker_setup: WorkerSetup, fake_cli: FakeCli, tmp_path: Path
) -> None:
    """The agent is stopped, and the error of the task has that of the storage."""
    await worker_setup.submit()
    record = await worker_setup.run(
        store=Store(RejectingBlobs(tmp_path / "data")), cli=lambda: fake_cli(PRELUDE + "say(type='x')\ntime.sleep(600)")
    )
    assert (Status.FAILED, Reason.KILLED) == (record.status, record.reason)
    assert (
        "The storage failed, so the task was stopped: 1 line of the log could not be stored. "
        "The storage directory cannot be written: No space left on device."
    ) == record.error


class FailingBlobs(DirectoryBlobs):
    """Rejects one write of a final record."""

    fails_next = False

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        if self.fails_next and b'"status":"running"' not in content:
            FailingBlobs.fails_next = False
            raise StorageError("The storage does not respond.")
        return await super().replace(name, content, generation=generation)

    async def read(self, name: str) -> Blob:
        return await super().read(name)


async def test_outcome_is_recorded_after_a_storage_error(
    worker_setup: WorkerSetup, fake_cli: FakeCli, tmp_path: Path
) -> None:
    """The write is retried."""
    await worker_setup.submit()
    FailingBlobs.fails_next = True
    record = await worker_setup.run(
        store=Store(FailingBlobs(tmp_path / "data")), cli=lambda: fake_cli(PRELUDE + "result()")
    )
    assert Status.COMPLETED == record.status


# --- the callback ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[str, list[bytes], list[int]]]:
    """A receiver of callbacks: its URL, the bodies it received, and the statuses of its next responses, then 200."""
    bodies: list[bytes] = []
    statuses: list[int] = []

    async def receive(request: web.Request) -> web.Response:
        bodies.append(await request.read())
        return web.Response(status=statuses.pop(0) if statuses else 200)

    app = web.Application()
    app.router.add_post("/hook", receive)
    async with TestServer(app) as server:
        yield str(server.make_url("/hook?token=of-the-receiver")), bodies, statuses


def owed_callbacks(worker_setup: WorkerSetup) -> OwedCallbacks:
    """Return the callbacks of the store, with short delays between attempts."""
    return OwedCallbacks(
        store=worker_setup.deps.store,
        wrapper=worker_setup.deps.wrapper,
        secret=Secret("made-up-callback-secret"),
        guard=guard.CallbackGuard(everywhere=True),
        policy=deliver.RetryPolicy(first_delay_seconds=0.01),
    )


async def test_callback_is_delivered_and_recorded(
    worker_setup: WorkerSetup, fake_cli: FakeCli, receiver: tuple[str, list[bytes], list[int]]
) -> None:
    """The second attempt sends the same body as the first, and the record has the delivery."""
    url, bodies, statuses = receiver
    statuses += [500]
    await worker_setup.submit(callback_url=Secret(url), metadata={"id": 1})
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "result()"), callbacks=owed_callbacks(worker_setup))
    assert record.webhook is not None
    assert (CallbackState.DELIVERED, 2) == (record.webhook.state, record.webhook.attempts)
    assert bodies[0] == bodies[1]
    body = json.loads(bodies[1])
    assert (TASK, "completed", 0, {"id": 1}) == (body["taskId"], body["status"], body["exitCode"], body["metadata"])
    assert "of-the-receiver" not in str(record.callback_url)


async def test_workspace_is_removed_before_the_callback(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """A worker that is killed while it delivers the callback leaves no files of the agent."""
    workspace = Path(tempfile.gettempdir()) / f"ws-{TASK}"
    found: list[bool] = []

    async def receive(_: web.Request) -> web.Response:
        found.append(workspace.exists())
        return web.Response()

    app = web.Application()
    app.router.add_post("/", receive)
    async with TestServer(app) as server:
        await worker_setup.submit(callback_url=Secret(str(server.make_url("/"))))
        script = PRELUDE + "say(type='x', cwd=os.getcwd())\nresult()"
        await worker_setup.run(cli=lambda: fake_cli(script), callbacks=owed_callbacks(worker_setup))
    assert [False] == found
    assert str(workspace / "repository") == (await worker_setup.log())[0]["cwd"]


async def test_callback_that_fails_is_owed(
    worker_setup: WorkerSetup, fake_cli: FakeCli, receiver: tuple[str, list[bytes], list[int]]
) -> None:
    """The task is still marked as active, so that a sweep delivers the callback."""
    url, _, statuses = receiver
    statuses += [500] * 10
    await worker_setup.submit(callback_url=Secret(url))
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "result()"), callbacks=owed_callbacks(worker_setup))
    assert record.webhook is not None
    assert (Status.COMPLETED, CallbackState.OWED) == (record.status, record.webhook.state)
    assert "The receiver responded with 500." == record.webhook.last_error
    assert [TASK] == [mark.task_id for mark in await worker_setup.deps.store.active()]


async def test_undelivered_callback_is_due_after_a_shutdown(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """A receiver that hangs does not delay the shutdown, and a sweep may deliver the callback immediately."""
    request_received = asyncio.Event()

    async def hang(_: web.Request) -> web.Response:
        request_received.set()
        await asyncio.sleep(600)
        return web.Response()

    app = web.Application()
    app.router.add_post("/", hang)
    async with TestServer(app) as server:
        await worker_setup.submit(callback_url=Secret(str(server.make_url("/"))))
        timeouts = attrs.evolve(worker_setup.deps.timeouts, shutdown_callback=0.1)
        running = asyncio.create_task(
            worker_setup.run(
                cli=lambda: fake_cli(PRELUDE + "result()"), callbacks=owed_callbacks(worker_setup), timeouts=timeouts
            )
        )
        await request_received.wait()
        worker_setup.shutdown.set()
        record = await running
    assert record.webhook is not None
    assert CallbackState.OWED == record.webhook.state
    assert lifecycle.is_callback_due(record, at=dt.datetime.now(dt.UTC))

"""One task from payload to outcome, run in this process; the CLI is real, or an executable that fails as the real one might."""

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
from helpers.service import MADE_UP_KEY, WAIT_SECONDS, until_record
from helpers.worker import PRELUDE, RESULT, TASK, FakeCli, WorkerSetup, serve_model, worker_setup

from ccrun import lifecycle, task
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.blobs import Blob
from ccrun.callbacks import deliver, guard
from ccrun.callbacks.owed import OwedCallbacks
from ccrun.claude_cli import find_cli
from ccrun.errors import StorageError
from ccrun.store import Store
from ccrun.task import CallbackState, ConfigFile, Reason, Secret, Status, TaskId
from ccrun.testing.model import Fail, Say, UseTool, sequence

__all__ = ["serve_model", "worker_setup"]

# --- the real CLI ------------------------------------------------------------------------------------------------------


async def test_a_task_that_the_cli_completes_is_completed(worker_setup: WorkerSetup, serve_model: Any) -> None:
    """The outcome carries the CLI's own figures, the log ends with its result, and nothing of the task is left on disk."""
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


async def test_max_turns_is_a_failure_of_its_own(worker_setup: WorkerSetup, serve_model: Any) -> None:
    """A task that runs out of turns fails with the reason `max_turns` and the CLI's own words."""
    model = await serve_model(sequence(UseTool("Bash", {"command": "true"})))
    await worker_setup.submit(allowed_tools=("Bash",), max_turns=1)
    record = await worker_setup.run(upstream=model.url)
    assert (Status.FAILED, Reason.MAX_TURNS, 1) == (record.status, record.reason, record.exit_code)
    assert "Reached maximum number of turns (1)" == record.error


async def test_a_rejected_credential_ends_the_task_at_once(worker_setup: WorkerSetup, serve_model: Any) -> None:
    """The CLI's own retries take minutes; with ccrun the task ends within 15 s, and the error says what is wrong."""
    model = await serve_model(lambda _: Fail(401, "authentication_error", "invalid x-api-key"))
    await worker_setup.submit()
    began = time.monotonic()
    record = await worker_setup.run(upstream=model.url)
    assert time.monotonic() - began < 15
    assert (Status.FAILED, Reason.CREDENTIAL_REJECTED) == (record.status, record.reason)
    assert record.error is not None
    assert "invalid x-api-key" in record.error


async def test_what_the_request_gives_the_cli_is_seen_by_it_and_not_by_the_workspace(
    worker_setup: WorkerSetup, serve_model: Any
) -> None:
    """Commands, subagents and MCP servers reach the CLI, and the folder that the agent works in stays empty."""
    model = await serve_model(sequence(UseTool("Bash", {"command": "ls -A | wc -l"}), Say("Done.")))
    await worker_setup.submit(
        allowed_tools=("Bash",),
        slash_commands={"greet": ConfigFile(frontmatter={"description": "Greets"}, content="Say hello.")},
        subagents={"critic": ConfigFile(frontmatter={"description": "Criticises"}, content="Be strict.")},
        mcp_config={"mcpServers": {"nobody": {"command": "false"}}},
    )
    await worker_setup.run(upstream=model.url)
    lines = await worker_setup.log()
    assert "greet" in lines[0]["slash_commands"]
    assert "critic" in lines[0]["agents"]
    assert ["nobody"] == [server["name"] for server in lines[0]["mcp_servers"]]
    [printed] = [block["content"] for line in lines if line["type"] == "user" for block in line["message"]["content"]]
    assert "0" == printed.strip()


# --- how a run is judged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "status", "reason", "exit_code", "error"),
    [
        ("result()", Status.COMPLETED, Reason.COMPLETED, 0, None),
        ("sys.exit(3)", Status.FAILED, Reason.AGENT_ERROR, 3, "Claude process exited with code 3"),
        ("result(); sys.exit(1)", Status.FAILED, Reason.AGENT_ERROR, 1, "Claude process exited with code 1"),
        ("result(is_error=True, result='No!')", Status.FAILED, Reason.AGENT_ERROR, 1, "No!"),
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
async def test_the_outcome_says_how_the_cli_ended(
    worker_setup: WorkerSetup,
    fake_cli: FakeCli,
    script: str,
    status: Status,
    reason: Reason,
    exit_code: int,
    error: str | None,
) -> None:
    """Only exit 0 with a result that is no error is success; a signal never is."""
    await worker_setup.submit()
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + script))
    assert (status, reason, exit_code, error) == (record.status, record.reason, record.exit_code, record.error)


async def test_a_missing_cli_fails_the_task_with_what_to_do(worker_setup: WorkerSetup) -> None:
    """A worker without the CLI says how to get it."""
    await worker_setup.submit()
    record = await worker_setup.run(cli=lambda: find_cli("no-such-program", os.environ["PATH"]))
    assert (Status.FAILED, Reason.PREPARE_FAILED) == (record.status, record.reason)
    assert "CLAUDE_CLI does not name a program that can be run." == record.error


async def test_plain_text_and_stderr_are_kept_as_json_lines(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """Every line of the log is JSON, whatever the CLI prints, so that a reader can parse each."""
    await worker_setup.submit()
    await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "print('plain'); print('oh', file=sys.stderr); result()"))
    lines = await worker_setup.log()
    assert [{"type": "text", "content": "plain"}, RESULT, {"type": "stderr", "content": "oh\n"}] == lines


# --- what ends a task from outside -----------------------------------------------------------------------------------------

#: Says one thing, leaves a grandchild in a session of its own, ignores SIGTERM, never ends.
STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
say(type="system", pid=os.getpid(), child=child.pid)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until_log(worker_setup: WorkerSetup) -> None:
    """Wait until the agent has said something."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not (await worker_setup.deps.store.listing(TASK, first=1)).chunks:
            await asyncio.sleep(0.01)


async def test_a_task_over_its_time_ends_with_124_and_leaves_no_process(
    worker_setup: WorkerSetup, fake_cli: FakeCli
) -> None:
    """The watchdog ends the whole family of the CLI, and the log is kept up to that point."""
    await worker_setup.submit(timeout_minutes=0.01)
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + STUBBORN))
    assert (Status.FAILED, Reason.TIMEOUT, 124) == (record.status, record.reason, record.exit_code)
    assert "The task did not finish within 0.01 minutes." == record.error
    [line] = await worker_setup.log()
    assert [False, False] == [is_alive(line["pid"]), is_alive(line["child"])]


async def test_a_cancel_on_the_record_ends_the_task(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """A cancel needs no signal: the worker sees it on the record, and the task ends as cancelled with 130."""
    await worker_setup.submit()
    running = asyncio.create_task(worker_setup.run(cli=lambda: fake_cli(PRELUDE + STUBBORN)))
    await until_record(worker_setup.deps.store, TASK, lambda record: record.status is Status.RUNNING)
    await worker_setup.dispatcher.cancel(TASK)
    record = await running
    assert (Status.CANCELLED, Reason.CANCELLED, 130) == (record.status, record.reason, record.exit_code)


async def test_a_worker_that_is_told_to_end_records_that(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """SIGTERM without a cancel is the platform's: a failure with the reason `killed`, in time and with the log as it was."""
    await worker_setup.submit()
    timeouts = attrs.evolve(worker_setup.deps.timeouts, term_grace=600.0, shutdown_term_grace=0.2)
    running = asyncio.create_task(worker_setup.run(cli=lambda: fake_cli(PRELUDE + STUBBORN), timeouts=timeouts))
    await until_log(worker_setup)
    began = time.monotonic()
    worker_setup.shutdown.set()
    record = await running
    assert time.monotonic() - began < 10
    assert (Status.FAILED, Reason.KILLED, 143) == (record.status, record.reason, record.exit_code)
    assert "The worker was shut down before the task finished." == record.error
    assert 1 == len(await worker_setup.log())


async def test_a_cancel_that_was_answered_stands(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """A task that was told to be cancelled ends as cancelled, even when the CLI had just succeeded."""
    await worker_setup.submit()
    deps = attrs.evolve(worker_setup.deps.timeouts, cancel_poll=60.0)
    script = PRELUDE + "say(type='system')\nwhile not os.path.exists(%r): time.sleep(0.01)\nresult()"
    flag = Path(tempfile.mkdtemp()) / "cancelled"
    running = asyncio.create_task(worker_setup.run(cli=lambda: fake_cli(script % str(flag)), timeouts=deps))
    await until_record(worker_setup.deps.store, TASK, lambda record: record.status is Status.RUNNING)
    await worker_setup.dispatcher.cancel(TASK)
    flag.touch()
    record = await running
    assert Status.CANCELLED == record.status
    assert "result" == (await worker_setup.log())[-1]["type"]


async def test_a_task_that_others_have_ended_ends_its_agent(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """A worker that was taken for dead stops the agent and leaves the record as it is."""
    await worker_setup.submit()
    running = asyncio.create_task(worker_setup.run(cli=lambda: fake_cli(PRELUDE + STUBBORN)))
    await until_log(worker_setup)
    lost = task.Outcome(status=Status.FAILED, reason=Reason.WORKER_LOST, exit_code=1, error="Lost.")
    ended = await worker_setup.deps.store.update(
        TASK, lambda record: lifecycle.finish(record, lost, at=dt.datetime.now(dt.UTC))
    )
    assert ended == await running
    [line] = await worker_setup.log()
    assert [False, False] == [is_alive(line["pid"]), is_alive(line["child"])]


async def test_a_cli_that_says_nothing_is_stalled(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """A CLI without a first line is ended long before the task's time is up."""
    await worker_setup.submit()
    timeouts = attrs.evolve(worker_setup.deps.timeouts, first_line=0.3)
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "time.sleep(600)"), timeouts=timeouts)
    assert (Status.FAILED, Reason.STALLED) == (record.status, record.reason)
    assert "The Claude CLI printed nothing within 0.3 s." == record.error


async def test_a_cli_that_goes_on_with_a_refused_credential_is_ended(
    worker_setup: WorkerSetup, fake_cli: FakeCli
) -> None:
    """Should the CLI try again in spite of all, the task ends at once with a reason that says so."""
    await worker_setup.submit()
    retry = "say(type='system', subtype='api_retry', error_status=401)\ntime.sleep(600)"
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + retry))
    assert (Status.FAILED, Reason.CREDENTIAL_REJECTED) == (record.status, record.reason)


async def test_a_cli_that_does_not_exit_after_its_result_has_completed(
    worker_setup: WorkerSetup, fake_cli: FakeCli
) -> None:
    """The result counts, not the process that forgot to end."""
    await worker_setup.submit()
    timeouts = attrs.evolve(worker_setup.deps.timeouts, after_result=0.2)
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "result()\ntime.sleep(600)"), timeouts=timeouts)
    assert (Status.COMPLETED, 0) == (record.status, record.exit_code)


# --- one worker a task, one payload a worker -------------------------------------------------------------------------------


async def test_a_second_worker_finds_the_task_taken(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """Whoever comes second does nothing, so that no agent runs twice."""
    await worker_setup.submit()
    first = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "result()"))
    second = await worker_setup.run(cli=lambda: pytest.fail("the CLI was started twice"))
    assert first == second


async def test_the_payload_is_gone_when_the_agent_begins(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """The sealed request lives no longer than it must."""
    await worker_setup.submit()
    folder = Path(worker_setup.deps.store.logs_path(TASK).removeprefix("file://"))
    script = f"result(result=str(os.path.exists({str(folder / 'encrypted-payload.bin')!r})))"
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + script))
    assert record.summary is not None
    assert "False" == record.summary.result


async def test_a_payload_of_another_task_is_not_opened(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """What was sealed for one task fails under another's name, with one clear sentence."""
    other = TaskId(f"{TASK}-2")
    await worker_setup.submit(task_id=other)
    await worker_setup.submit()
    folder = Path(worker_setup.deps.store.logs_path(TASK).removeprefix("file://")).parent
    (folder / other / "encrypted-payload.bin").replace(folder / TASK / "encrypted-payload.bin")
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "result()"))
    assert (Status.FAILED, Reason.PREPARE_FAILED) == (record.status, record.reason)
    assert "The sealed payload was changed, or belongs to another task." == record.error


# --- secrets ---------------------------------------------------------------------------------------------------------------


async def test_the_agent_gets_nothing_of_the_workers_environment(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """Only the allow-list and the request's own secrets; of the credential, not a trace."""
    await worker_setup.submit(environment_secrets={"TEST_TOKEN": Secret("hush")})
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


async def test_secrets_are_masked_in_log_and_record(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """A secret that the agent prints reaches neither readers nor receivers; the metadata goes back as it came."""
    await worker_setup.submit(environment_secrets={"A": Secret('pass"word-1')}, metadata={"note": 'pass"word-1'})
    script = "say(type='x', text=os.environ['A']); result(result='It is ' + os.environ['A'])"
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + script))
    assert record.summary is not None
    assert "It is ***" == record.summary.result
    assert ["***", "It is ***"] == [line.get("text", line.get("result")) for line in await worker_setup.log()]
    assert {"note": 'pass"word-1'} == record.metadata


# --- storage ---------------------------------------------------------------------------------------------------------------


class LogRefused(DirectoryBlobs):
    """A storage that takes no log chunk."""

    async def create(self, name: str, content: Any) -> int:
        if name.endswith(".jsonl"):
            raise StorageError("The storage directory cannot be written: No space left on device.")
        return await super().create(name, content)


async def test_a_log_that_cannot_be_written_fails_the_task(
    worker_setup: WorkerSetup, fake_cli: FakeCli, tmp_path: Path
) -> None:
    """A task whose log was lost is no success, and says why; the agent does not run on unseen."""
    await worker_setup.submit()
    record = await worker_setup.run(
        store=Store(LogRefused(tmp_path / "data")), cli=lambda: fake_cli(PRELUDE + "say(type='x')\ntime.sleep(600)")
    )
    assert (Status.FAILED, Reason.KILLED) == (record.status, record.reason)
    expected = "The storage failed, so the task was stopped: "
    assert expected + "The storage directory cannot be written: No space left on device." == record.error


class SlowRecord(DirectoryBlobs):
    """A storage whose records cannot be changed until it is mended."""

    is_broken = False

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        if self.is_broken and b'"status":"running"' not in content:
            SlowRecord.is_broken = False
            raise StorageError("The storage does not answer.")
        return await super().replace(name, content, generation=generation)

    async def read(self, name: str) -> Blob:
        return await super().read(name)


async def test_the_outcome_is_recorded_after_a_fault_of_the_storage(
    worker_setup: WorkerSetup, fake_cli: FakeCli, tmp_path: Path
) -> None:
    """One write that fails does not lose the outcome."""
    await worker_setup.submit()
    SlowRecord.is_broken = True
    record = await worker_setup.run(
        store=Store(SlowRecord(tmp_path / "data")), cli=lambda: fake_cli(PRELUDE + "result()")
    )
    assert Status.COMPLETED == record.status


# --- the callback ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[str, list[bytes], list[int]]]:
    """A receiver of callbacks: its URL, the bodies it got, and the statuses that it answers with, 200 when none is left."""
    bodies: list[bytes] = []
    statuses: list[int] = []

    async def receive(request: web.Request) -> web.Response:
        bodies.append(await request.read())
        return web.Response(status=statuses.pop(0) if statuses else 200)

    app = web.Application()
    app.router.add_post("/hook", receive)
    async with TestServer(app) as server:
        yield str(server.make_url("/hook?token=of-the-receiver")), bodies, statuses


def with_courier(worker_setup: WorkerSetup) -> OwedCallbacks:
    """Return a courier that does not wait long."""
    return OwedCallbacks(
        store=worker_setup.deps.store,
        wrapper=worker_setup.deps.wrapper,
        secret=Secret("made-up-callback-secret"),
        guard=guard.CallbackGuard(everywhere=True),
        policy=deliver.RetryPolicy(first_delay_seconds=0.01),
    )


async def test_the_callback_comes_once_and_is_recorded(
    worker_setup: WorkerSetup, fake_cli: FakeCli, receiver: tuple[str, list[bytes], list[int]]
) -> None:
    """The receiver gets the outcome when the record has it, and the record tells that it was delivered."""
    url, bodies, statuses = receiver
    statuses += [500]
    await worker_setup.submit(callback_url=Secret(url), metadata={"id": 1})
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "result()"), callbacks=with_courier(worker_setup))
    assert record.webhook is not None
    assert (CallbackState.DELIVERED, 2) == (record.webhook.state, record.webhook.attempts)
    assert bodies[0] == bodies[1]
    body = json.loads(bodies[1])
    assert (TASK, "completed", 0, {"id": 1}) == (body["taskId"], body["status"], body["exitCode"], body["metadata"])
    assert "of-the-receiver" not in str(record.callback_url)


async def test_a_callback_that_fails_is_owed(
    worker_setup: WorkerSetup, fake_cli: FakeCli, receiver: tuple[str, list[bytes], list[int]]
) -> None:
    """What cannot be delivered now stays a debt on the record, for a sweep."""
    url, _, statuses = receiver
    statuses += [500] * 10
    await worker_setup.submit(callback_url=Secret(url))
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "result()"), callbacks=with_courier(worker_setup))
    assert record.webhook is not None
    assert (Status.COMPLETED, CallbackState.OWED) == (record.status, record.webhook.state)
    assert "The receiver answered 500." == record.webhook.last_error
    assert [TASK] == [mark.task_id for mark in await worker_setup.deps.store.active()]


async def test_at_shutdown_an_undelivered_callback_is_handed_to_the_sweep(
    worker_setup: WorkerSetup, fake_cli: FakeCli
) -> None:
    """A receiver that hangs does not hold a worker that must end; the debt is due at once."""
    hanging = asyncio.Event()

    async def hang(_: web.Request) -> web.Response:
        hanging.set()
        await asyncio.sleep(600)
        return web.Response()

    app = web.Application()
    app.router.add_post("/", hang)
    async with TestServer(app) as server:
        await worker_setup.submit(callback_url=Secret(str(server.make_url("/"))))
        timeouts = attrs.evolve(worker_setup.deps.timeouts, shutdown_callback=0.1)
        running = asyncio.create_task(
            worker_setup.run(
                cli=lambda: fake_cli(PRELUDE + "result()"), callbacks=with_courier(worker_setup), timeouts=timeouts
            )
        )
        await hanging.wait()
        worker_setup.shutdown.set()
        record = await running
    assert record.webhook is not None
    assert CallbackState.OWED == record.webhook.state
    assert lifecycle.is_callback_due(record, at=dt.datetime.now(dt.UTC))

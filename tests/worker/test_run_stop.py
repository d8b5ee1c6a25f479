"""Tasks that are stopped before they finish, run in the process of the test."""

from __future__ import annotations

import asyncio
import datetime as dt
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
from helpers.service import WAIT_SECONDS, until_record
from helpers.worker import PRELUDE, TASK, FakeCli, WorkerSetup, serve_model, worker_setup

from ccrun import lifecycle, task
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.store import Store
from ccrun.task import Reason, Status

__all__ = ["serve_model", "worker_setup"]

#: A CLI that prints one line, starts a child in another session, ignores SIGTERM and does not exit.
IGNORES_SIGTERM = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
say(type="system", pid=os.getpid(), child=child.pid)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until_first_chunk(worker_setup: WorkerSetup) -> None:
    """Wait until the log has a chunk."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not (await worker_setup.deps.store.logs.listing(TASK, first=1)).chunks:
            await asyncio.sleep(0.01)


async def test_timeout_kills_all_processes_of_the_task(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """The exit code is 124, and the log has all lines until then."""
    await worker_setup.submit(timeout_minutes=0.01)
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + IGNORES_SIGTERM))
    assert (Status.FAILED, Reason.TIMEOUT, 124) == (record.status, record.reason, record.exit_code)
    assert "The task did not finish within 0.01 minutes." == record.error
    [line] = await worker_setup.log()
    assert [False, False] == [is_alive(line["pid"]), is_alive(line["child"])]


async def test_cancellation_on_the_record_stops_the_task(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """No signal is needed: the worker polls the record. The exit code is 130."""
    await worker_setup.submit()
    running = asyncio.create_task(worker_setup.run(cli=lambda: fake_cli(PRELUDE + IGNORES_SIGTERM)))
    await until_record(worker_setup.deps.store, TASK, lambda record: record.status is Status.RUNNING)
    await worker_setup.dispatcher.cancel(TASK)
    record = await running
    assert (Status.CANCELLED, Reason.CANCELLED, 130) == (record.status, record.reason, record.exit_code)


async def test_shutdown_of_the_worker_is_recorded(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """After SIGTERM without a cancellation, the task fails with the reason `killed`, and its log is stored."""
    await worker_setup.submit()
    timeouts = attrs.evolve(worker_setup.deps.timeouts, term_grace=600.0, shutdown_term_grace=0.2)
    running = asyncio.create_task(worker_setup.run(cli=lambda: fake_cli(PRELUDE + IGNORES_SIGTERM), timeouts=timeouts))
    await until_first_chunk(worker_setup)
    start = time.monotonic()
    worker_setup.shutdown.set()
    record = await running
    assert time.monotonic() - start < 60
    assert (Status.FAILED, Reason.KILLED, 143) == (record.status, record.reason, record.exit_code)
    assert "The worker was shut down before the task finished." == record.error
    assert 1 == len(await worker_setup.log())


async def test_task_cancelled_before_its_result_is_cancelled(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """A cancellation that was accepted is valid, even if the CLI succeeds before the worker reads it."""
    await worker_setup.submit()
    deps = attrs.evolve(worker_setup.deps.timeouts, cancel_poll=60.0)
    script = PRELUDE + "say(type='system')\nwhile not os.path.exists(%r): time.sleep(0.01)\nresult()"
    cancelled_file = Path(tempfile.mkdtemp()) / "cancelled"
    running = asyncio.create_task(worker_setup.run(cli=lambda: fake_cli(script % str(cancelled_file)), timeouts=deps))
    await until_record(worker_setup.deps.store, TASK, lambda record: record.status is Status.RUNNING)
    await worker_setup.dispatcher.cancel(TASK)
    cancelled_file.touch()
    record = await running
    assert Status.CANCELLED == record.status
    assert "result" == (await worker_setup.log())[-1]["type"]


async def test_settled_task_stops_its_agent(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """A worker that was considered lost stops the agent and does not change the record."""
    await worker_setup.submit()
    running = asyncio.create_task(worker_setup.run(cli=lambda: fake_cli(PRELUDE + IGNORES_SIGTERM)))
    await until_first_chunk(worker_setup)
    lost = task.Outcome(status=Status.FAILED, reason=Reason.WORKER_LOST, exit_code=1, error="Lost.")
    settled = await worker_setup.deps.store.update(
        TASK, lambda record: lifecycle.finish(record, lost, at=dt.datetime.now(dt.UTC))
    )
    assert settled == await running
    [line] = await worker_setup.log()
    assert [False, False] == [is_alive(line["pid"]), is_alive(line["child"])]


async def test_cli_without_output_is_stalled(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """A CLI that does not print a first line is stopped long before the timeout of the task."""
    await worker_setup.submit()
    timeouts = attrs.evolve(worker_setup.deps.timeouts, first_line=0.3)
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "time.sleep(600)"), timeouts=timeouts)
    assert (Status.FAILED, Reason.STALLED) == (record.status, record.reason)
    assert "The Claude CLI printed nothing within 0.3 s." == record.error


async def test_cli_that_retries_with_a_rejected_credential_is_stopped(
    worker_setup: WorkerSetup, fake_cli: FakeCli
) -> None:
    """The task fails with the reason `credential_rejected`."""
    await worker_setup.submit()
    retry = "say(type='system', subtype='api_retry', error_status=401)\ntime.sleep(600)"
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + retry))
    assert (Status.FAILED, Reason.CREDENTIAL_REJECTED) == (record.status, record.reason)


async def test_cli_that_does_not_exit_after_its_result_is_stopped(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """The task is completed, since the result was successful."""
    await worker_setup.submit()
    timeouts = attrs.evolve(worker_setup.deps.timeouts, after_result=0.2)
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "result()\ntime.sleep(600)"), timeouts=timeouts)
    assert (Status.COMPLETED, 0) == (record.status, record.exit_code)


# --- the log of an agent that prints fast ---------------------------------------------------------------------------

#: A CLI that prints numbered lines as fast as it can, also after SIGTERM.
PRINTS_FAST = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
number = 0
while True:
    sys.stdout.write("".join('{"type":"x","number":%d}\\n' % n for n in range(number, number + 1000)))
    number += 1000
"""


class DistantBlobs(DirectoryBlobs):
    """A storage that needs 50 ms for each object that is created, as Cloud Storage does."""

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        await asyncio.sleep(0.05)
        return await super().create(name, content)


async def until_chunks(worker_setup: WorkerSetup, count: int) -> None:
    """Wait until the log has this number of chunks."""
    async with asyncio.timeout(WAIT_SECONDS):
        while len((await worker_setup.deps.store.logs.listing(TASK, first=1)).chunks) < count:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("cause", ["cancellation", "shutdown"])
async def test_stop_loses_no_line_of_an_agent_that_prints_fast(
    worker_setup: WorkerSetup, fake_cli: FakeCli, tmp_path: Path, cause: str
) -> None:
    """When the task is final, the log has every line in order until the agent was killed, and nothing is written later."""
    await worker_setup.submit()
    timeouts = attrs.evolve(worker_setup.deps.timeouts, shutdown_term_grace=0.3)
    store = Store(DistantBlobs(tmp_path / "data"))
    running = asyncio.create_task(
        worker_setup.run(store=store, cli=lambda: fake_cli(PRELUDE + PRINTS_FAST), timeouts=timeouts)
    )
    await until_chunks(worker_setup, 5)
    start = time.monotonic()
    if cause == "shutdown":
        worker_setup.shutdown.set()
    else:
        await worker_setup.dispatcher.cancel(TASK)
    record = await running
    # The platform sends SIGKILL ten seconds after SIGTERM.
    assert time.monotonic() - start < 10
    lines = await worker_setup.log()
    numbers = [line["number"] for line in lines if line["type"] == "x"]
    assert list(range(len(numbers))) == numbers
    assert len(numbers) > 5 * worker_setup.deps.flush_policy.flush_lines
    assert (Status.FAILED if cause == "shutdown" else Status.CANCELLED) == record.status
    assert "could not be stored" not in (record.error or "")


class HangingBlobs(DirectoryBlobs):
    """A storage that stores three chunks; then creating an object hangs."""

    created = 0

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        if name.endswith(".jsonl"):
            self.created += 1
            if self.created > 3:
                await asyncio.Event().wait()
        return await super().create(name, content)


async def test_record_of_a_shutdown_says_how_many_lines_are_missing(
    worker_setup: WorkerSetup, fake_cli: FakeCli, tmp_path: Path
) -> None:
    """A storage that hangs does not delay the final record, which says how many lines of the log were not stored."""
    await worker_setup.submit()
    timeouts = attrs.evolve(worker_setup.deps.timeouts, shutdown_term_grace=0.1, shutdown=5.0)
    running = asyncio.create_task(
        worker_setup.run(
            store=Store(HangingBlobs(tmp_path / "data")), cli=lambda: fake_cli(PRELUDE + PRINTS_FAST), timeouts=timeouts
        )
    )
    await until_chunks(worker_setup, 3)
    start = time.monotonic()
    worker_setup.shutdown.set()
    record = await running
    assert time.monotonic() - start < 10
    assert (Status.FAILED, Reason.KILLED, 143) == (record.status, record.reason, record.exit_code)
    missing = re.search(r"(\d+) lines of the log could not be stored", record.error or "")
    assert missing is not None
    assert int(missing[1]) > 0
    assert 3 == len((await worker_setup.deps.store.logs.listing(TASK, first=1)).chunks)

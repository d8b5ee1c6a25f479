"""Tasks that use more of the machine than they may, beside one that does not."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from helpers.worker import PRELUDE, TASK, FakeCli, WorkerSetup, worker_setup

from ccrun.process.sandbox import find_sandbox
from ccrun.process.tree import lists_children
from ccrun.spec import PostRunActions, UploadAction
from ccrun.task import EXIT_KILLED, Reason, Status
from ccrun.worker.isolation import IsolationPolicy
from ccrun.worker.limits import TaskLimits

__all__ = ["worker_setup"]
pytestmark = pytest.mark.skipif(not lists_children(), reason="the kernel does not list the children of a process")

MIB = 1024**2
#: What the Python of the fake CLI and the processes of other tests need is far below.
LIMITS = TaskLimits(memory_bytes=700 * MIB, processes=200, disk_bytes=200 * MIB, seconds=0.1)
WAIT = "time.sleep(1000)"
EXCESSES = {
    "memory": (
        "held = []\nwhile True: held.append(bytearray(b'x' * (50 * 2**20))); time.sleep(0.01)",
        Reason.OUT_OF_MEMORY,
        "MiB of memory, and may use 700 MiB.",
    ),
    "processes": (
        "children = [subprocess.Popen(['sleep', '1000'], start_new_session=True, env={}) for _ in range(300)]\n" + WAIT,
        Reason.LIMIT_EXCEEDED,
        "processes, and may have 200.",
    ),
    "disk": (
        "file = open('large', 'wb')\nwhile True: file.write(b'x' * 2**20); file.flush(); time.sleep(0.001)",
        Reason.LIMIT_EXCEEDED,
        "MiB of the disk, and may use 200 MiB.",
    ),
}


@pytest.mark.parametrize("is_isolated", [False, True], ids=["no sandbox", "sandbox"])
@pytest.mark.parametrize("excess", EXCESSES)
async def test_excess_ends_the_task(
    worker_setup: WorkerSetup, fake_cli: FakeCli, excess: str, *, is_isolated: bool
) -> None:
    """The task ends with the reason, and nothing of it is left."""
    script, reason, words = EXCESSES[excess]
    cli = fake_cli(PRELUDE + script)
    policy = IsolationPolicy()
    if is_isolated:
        found = await asyncio.to_thread(
            lambda: find_sandbox(path=os.environ["PATH"], programs=[cli], hidden=[], user=None)
        )
        if isinstance(found, str):
            pytest.skip(found)
        policy = IsolationPolicy(find_sandbox=lambda: found)
    await worker_setup.submit()
    record = await worker_setup.run(cli=lambda: cli, limits=LIMITS, isolation=policy)
    assert (Status.FAILED, reason, EXIT_KILLED) == (record.status, record.reason, record.exit_code)
    assert record.error is not None
    assert record.error.startswith("The task was stopped: it used ")
    assert words in record.error
    assert [] == await asyncio.to_thread(lambda: list(Path("/tmp").glob(f"ws-{TASK}*")))


async def test_limits_also_hold_before_the_agent(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """A command of the request is stopped, too."""
    await worker_setup.submit(
        pre_execution_commands=("while :; do head -c 10000000 /dev/zero >>large; sleep 0.01; done",)
    )
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + "result()"), limits=LIMITS)
    assert Reason.LIMIT_EXCEEDED is record.reason


async def test_limits_hold_until_the_actions_are_done(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """An agent that exceeds one after its result gets no actions. The record keeps the figures of its run."""
    script = f"result()\n{EXCESSES['disk'][0]}"
    await worker_setup.submit(
        post_execution_actions=PostRunActions(upload_files=UploadAction(glob_patterns=("large",)))
    )
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + script), limits=LIMITS)
    assert (Status.FAILED, Reason.LIMIT_EXCEEDED, EXIT_KILLED) == (record.status, record.reason, record.exit_code)
    assert ((), ()) == (record.uploaded_files or (), record.action_errors)
    assert record.summary is not None
    assert 2 == record.summary.turns


def test_what_is_allowed_is_no_excess() -> None:
    """Exactly the limit may be used."""
    limits = TaskLimits(memory_bytes=1, processes=2, disk_bytes=3)
    assert limits.exceeded(memory=1, processes=2, disk=3) is None
    assert TaskLimits().exceeded(memory=2**50, processes=10**6, disk=2**50) is None

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from helpers.git import GitSetup, git_setup
from helpers.post_run import KEY, PostRunSetup, setup
from helpers.worker import TASK, Agent, agent, agent_user, worker_setup
from standins.gitssh import needs_ssh

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.errors import StorageError
from ccrun.results import ActionError
from ccrun.spec import PostRunActions
from ccrun.store import Store
from ccrun.task import Reason, Status
from ccrun.worker.dependencies import PostRunLimits, WorkerTimeouts

__all__ = ["agent", "agent_user", "git_setup", "setup", "worker_setup"]
pytestmark = needs_ssh


def rescue_of(uploaded: Mapping[str, bytes]) -> bytes:
    """Return the patch, which must be the only uploaded file."""
    assert {"rescue.patch"} == set(uploaded)
    return uploaded["rescue.patch"]


async def test_changes_of_a_failed_task_are_rescued(setup: PostRunSetup, agent: Agent, git_setup: GitSetup) -> None:
    """`git apply` restores committed and uncommitted changes, binary files and deletions."""
    script = (
        "git config user.name A; git config user.email a@b; echo new >a.txt; git commit -qam Message; "
        "printf '\\0\\1' >bin; rm b.txt"
    )
    record = await setup.run(agent(script, last="exit 1"), actions=PostRunActions())
    patch = rescue_of(await setup.uploaded(record))
    clone = git_setup.folder / "clone"
    await git_setup.git("clone", "--quiet", f"file://{setup.repository.path}", str(clone))
    await git_setup.git.at(clone)("apply", "-", stdin=patch)
    assert ("new\n", b"\0\1", False) == (
        (clone / "a.txt").read_text(),
        (clone / "bin").read_bytes(),
        (clone / "b.txt").exists(),
    )
    [uploaded] = record.uploaded_files or ()
    assert "rescue.patch" == uploaded.original_path


async def test_changes_are_rescued_after_a_timeout(setup: PostRunSetup, agent: Agent) -> None:
    """The agent was stopped by the timeout."""
    record = await setup.run(agent("echo new >a.txt; sleep 60"), timeout_minutes=0.02)
    assert Reason.TIMEOUT == record.reason
    assert b"+new" in rescue_of(await setup.uploaded(record))


async def test_changes_of_a_cancelled_task_are_rescued(setup: PostRunSetup, agent: Agent) -> None:
    """The task is cancelled while the agent runs."""
    await setup.worker_setup.submit(git_repo=setup.server.url("group/demo"), ssh_key=KEY)
    cli = agent('echo new >a.txt; echo \'{"type":"working"}\'; sleep 60')
    running = asyncio.create_task(setup.worker_setup.run(cli=cli, agent_user=setup.user))
    async with asyncio.timeout(30):
        while not any(line["type"] == "working" for line in await setup.worker_setup.log()):
            await asyncio.sleep(0.02)
    await setup.worker_setup.dispatcher.cancel(TASK)
    record = await running
    assert Status.CANCELLED == record.status
    assert b"+new" in rescue_of(await setup.uploaded(record))


async def test_changes_are_rescued_during_a_shutdown(setup: PostRunSetup, agent: Agent) -> None:
    """The worker has enough time for it before the platform kills it."""
    await setup.worker_setup.submit(git_repo=setup.server.url("group/demo"), ssh_key=KEY)
    cli = agent('echo new >a.txt; echo \'{"type":"working"}\'; sleep 60')
    running = asyncio.create_task(setup.worker_setup.run(cli=cli, agent_user=setup.user))
    async with asyncio.timeout(30):
        while not any(line["type"] == "working" for line in await setup.worker_setup.log()):
            await asyncio.sleep(0.02)
    setup.worker_setup.shutdown.set()
    record = await running
    assert Reason.KILLED == record.reason
    assert b"+new" in rescue_of(await setup.uploaded(record))


async def test_no_patch_without_changes(setup: PostRunSetup, agent: Agent) -> None:
    """A failed task without changes has no uploads and no errors."""
    record = await setup.run(agent("true", last="exit 1"))
    assert (None, ()) == (record.uploaded_files, record.action_errors)


async def test_patch_that_is_too_large_has_only_complete_files(setup: PostRunSetup, agent: Agent) -> None:
    """Files beyond the limit are omitted, and this is reported."""
    cli = agent("echo new >a.txt; seq 100000 >z.txt", last="exit 1")
    await setup.worker_setup.submit(git_repo=setup.server.url("group/demo"), ssh_key=KEY)
    timeouts = WorkerTimeouts(term_grace=0.3, cancel_poll=0.02, actions=PostRunLimits(rescue_bytes=5000))
    record = await setup.worker_setup.run(cli=cli, agent_user=setup.user, timeouts=timeouts)
    patch = rescue_of(await setup.uploaded(record))
    assert b"+new" in patch
    assert b"z.txt" not in patch
    assert ["rescue"] == [error.action for error in record.action_errors]


async def test_patch_without_any_complete_file_is_reported(setup: PostRunSetup, agent: Agent) -> None:
    """No patch is stored."""
    await setup.worker_setup.submit(git_repo=setup.server.url("group/demo"), ssh_key=KEY)
    timeouts = WorkerTimeouts(term_grace=0.3, cancel_poll=0.02, actions=PostRunLimits(rescue_bytes=5000))
    cli = agent("seq 100000 >z.txt", last="exit 1")
    record = await setup.worker_setup.run(cli=cli, agent_user=setup.user, timeouts=timeouts)
    assert None is record.uploaded_files
    assert [ActionError(action="rescue", error="The changes are lost: no file's patch fits into 5000 bytes.")] == list(
        record.action_errors
    )


class FullBlobs(DirectoryBlobs):
    """Stores records and logs, but no files."""

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        raise StorageError("The storage is full.")


async def test_patch_that_cannot_be_stored_is_reported(setup: PostRunSetup, agent: Agent, tmp_path: Path) -> None:
    """The outcome of the task is unchanged."""
    await setup.worker_setup.submit(git_repo=setup.server.url("group/demo"), ssh_key=KEY)
    cli = agent("echo new >a.txt", last="exit 3")
    record = await setup.worker_setup.run(cli=cli, agent_user=setup.user, store=Store(FullBlobs(tmp_path / "data")))
    assert (3, [ActionError(action="rescue", error="The storage is full.")]) == (
        record.exit_code,
        list(record.action_errors),
    )

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import pytest
from helpers.git import GitSetup, git_setup
from helpers.worker import TASK, WorkerSetup, agent, agent_user, worker_setup
from standins.githttp import TOKEN, GitHttp
from standins.gitssh import GitSsh, key_pair, needs_ssh
from standins.repos import Repository

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.errors import StorageError
from ccrun.process.user import User
from ccrun.store import Store
from ccrun.task import (
    ActionError,
    GitAction,
    GitCommit,
    GitToken,
    PostRunActions,
    Reason,
    Recovery,
    Secret,
    Status,
    TaskRecord,
    UploadAction,
)
from ccrun.worker.dependencies import PostRunLimits, WorkerTimeouts

__all__ = ["agent", "agent_user", "git_setup", "worker_setup"]
pytestmark = needs_ssh

Agent = Callable[..., Callable[[], Path]]

KEY = Secret(key_pair().openssh)
COMMIT_AND_PUSH = PostRunActions(git=GitAction(commit=True, push=True, commit_message="From the agent"))


@attrs.frozen(kw_only=True)
class Scene:
    """A repository on a server, and a worker that runs a task on it."""

    worker_setup: WorkerSetup
    repository: Repository
    server: GitSsh
    user: User | None

    async def run(
        self, cli: Callable[[], Path], *, actions: PostRunActions = COMMIT_AND_PUSH, **fields: Any
    ) -> TaskRecord:
        """Run a task to its end."""
        given = {"git_repo": self.server.url(self.repository.name), "ssh_key": KEY, "post_execution_actions": actions}
        await self.worker_setup.submit(**{**given, **fields})
        return await self.worker_setup.run(cli=cli, agent_user=self.user)

    async def stored(self, record: TaskRecord) -> dict[str, bytes]:
        """Return what was uploaded, by its path."""
        return await uploads(self.worker_setup.deps.store, record)

    async def said(self, step: str) -> list[str]:
        """Return what the worker says of a step in the log."""
        lines = await self.worker_setup.log()
        return [str(line.get("content")) for line in lines if (line["type"], line.get("step")) == ("worker", step)]


async def uploads(store: Store, record: TaskRecord) -> dict[str, bytes]:
    """Return what was uploaded, by its path."""
    prefix = f"sessions/{TASK}/uploads/"
    found = {}
    for file in record.uploaded_files or ():
        name = prefix + file.gcs_path.partition(f"/{prefix}")[2]
        blob = await store._blobs.read(name)
        assert file.size_bytes == len(blob.content)
        found[name.removeprefix(prefix)] = blob.content
    return found


@pytest.fixture
async def scene(worker_setup: WorkerSetup, git_setup: GitSetup, agent_user: User | None) -> AsyncIterator[Scene]:
    """A repository with a few files, for an agent of either kind."""
    repository = await git_setup.repos.create("group/demo", {"a.txt": "old", "b.txt": "old"})
    async with GitSsh(git_setup.repos) as server:
        yield Scene(worker_setup=worker_setup, repository=repository, server=server, user=agent_user)


# --- git ---------------------------------------------------------------------------------------------------------------


async def test_what_the_agent_changed_is_committed_and_pushed(scene: Scene, agent: Agent) -> None:
    """The record tells the commit that the server has."""
    record = await scene.run(agent("echo new >a.txt; rm b.txt; echo c >c.txt"))
    sha = await scene.repository.sha("main")
    assert (Status.COMPLETED, ()) == (record.status, record.action_errors)
    assert GitCommit(sha=sha, message="From the agent", pushed=True, branch="main") == record.git_commit
    assert {"a.txt": b"new\n", "c.txt": b"c\n"} == await scene.repository.files("main")
    assert None is record.uploaded_files
    assert f"Pushed {str(sha)[:12]} to main." == (await scene.said("git"))[-1]


async def test_nothing_to_commit_is_no_error_and_said(scene: Scene, agent: Agent) -> None:
    """In the record and in the log."""
    record = await scene.run(agent("true"))
    sha = await scene.repository.sha("main")
    assert () == record.action_errors
    expected = GitCommit(sha=sha, message="Nothing to commit", pushed=False, branch="main", committed=False)
    assert expected == record.git_commit
    assert ["Nothing to commit."] == await scene.said("git")


async def test_a_commit_without_a_push_stays_local(scene: Scene, agent: Agent) -> None:
    """The commit has its ID, the server has nothing of it."""
    record = await scene.run(agent("echo new >a.txt"), actions=PostRunActions(git=GitAction(commit=True)))
    assert record.git_commit is not None
    assert (False, f"Changes by Claude Code\n\nTask: {TASK}") == (
        record.git_commit.pushed,
        record.git_commit.message,
    )
    assert {"a.txt": b"old", "b.txt": b"old"} == await scene.repository.files("main")


async def test_a_push_without_a_commit_takes_the_agents_own(scene: Scene, agent: Agent) -> None:
    """What it left uncommitted stays out, and the message told is the agent's."""
    script = "git config user.name A; git config user.email a@b; echo new >a.txt; git commit -qam Own; echo more >b.txt"
    record = await scene.run(agent(script), actions=PostRunActions(git=GitAction(push=True)))
    assert record.git_commit is not None
    assert ("Own", True) == (record.git_commit.message, record.git_commit.pushed)
    assert {"a.txt": b"new\n", "b.txt": b"old"} == await scene.repository.files("main")


async def test_only_the_files_of_the_request_are_committed(scene: Scene, agent: Agent) -> None:
    """By patterns."""
    chosen = PostRunActions(git=GitAction(commit=True, push=True, files=("src/**", "!src/no.txt")))
    record = await scene.run(
        agent("echo new >a.txt; mkdir src; echo 1 >src/yes.txt; echo 2 >src/no.txt"), actions=chosen
    )
    assert () == record.action_errors
    assert {"a.txt": b"old", "b.txt": b"old", "src/yes.txt": b"1\n"} == await scene.repository.files("main")


async def test_another_branch_is_made(scene: Scene, agent: Agent) -> None:
    """And the one that was cloned stays."""
    elsewhere = PostRunActions(git=GitAction(commit=True, push=True, branch="agent/work"))
    record = await scene.run(agent("echo new >a.txt"), actions=elsewhere)
    assert record.git_commit is not None
    assert {"main", "agent/work"} == set(await scene.repository.branches())
    assert "agent/work" == record.git_commit.branch


async def test_a_branch_that_moved_is_told_as_recovery(scene: Scene, agent: Agent) -> None:
    """With the commit that it was at and the files in which the agent's side has won."""
    theirs: list[str] = []

    async def move(command: str) -> None:
        if "receive-pack" in command and not theirs:
            theirs.append(await scene.repository.commit({"a.txt": "theirs"}))

    scene.server.before = move
    record = await scene.run(agent("echo ours >a.txt"))
    assert record.git_commit is not None
    recovery = Recovery(method="rebase", remote_sha=theirs[0], conflict_files=("a.txt",))
    assert (True, recovery) == (record.git_commit.pushed, record.git_commit.recovery)
    assert await scene.repository.sha("main") == record.git_commit.sha


async def test_with_fail_a_branch_that_moved_is_reported_and_the_work_kept(scene: Scene, agent: Agent) -> None:
    """Nothing is pushed; the changes are in the patch."""

    async def move(command: str) -> None:
        await scene.repository.commit({"b.txt": f"theirs {command}"})

    script = agent("echo ours >a.txt")
    strict = PostRunActions(git=GitAction(commit=True, push=True, conflict_strategy="fail"))
    await scene.worker_setup.submit(git_repo=scene.server.url("group/demo"), ssh_key=KEY, post_execution_actions=strict)

    def cli() -> Path:
        # The clone is over when the CLI is looked for.
        scene.server.before = move
        return script()

    record = await scene.worker_setup.run(cli=cli, agent_user=scene.user)
    assert record.git_commit is not None
    assert (Status.COMPLETED, False) == (record.status, record.git_commit.pushed)
    [error] = record.action_errors
    assert "git" == error.action
    assert "has moved to" in error.error
    assert b"+ours" in (await scene.stored(record))["rescue.patch"]


async def test_a_protected_branch_is_reported_and_the_work_kept(scene: Scene, agent: Agent) -> None:
    """In the server's words; the task has completed all the same."""
    scene.repository.protect("main")
    record = await scene.run(agent("echo ours >a.txt"))
    [error] = record.action_errors
    assert (Status.COMPLETED, "git") == (record.status, error.action)
    assert "GH006" in error.error
    assert b"+ours" in (await scene.stored(record))["rescue.patch"]


async def test_a_repository_inside_is_told(scene: Scene, agent: Agent) -> None:
    """It is left out; what else was changed is committed."""
    record = await scene.run(
        agent(
            "git init -q nested; echo x >nested/x; git -C nested add x; echo new >a.txt; "
            "git -C nested -c user.name=a -c user.email=a@b commit -qm x"
        )
    )
    assert [
        ActionError(action="git", error="Repositories inside the repository were left out of the commit: nested.")
    ] == list(record.action_errors)
    assert {"a.txt": b"new\n", "b.txt": b"old"} == await scene.repository.files("main")


async def test_variables_in_dotenv_are_there_and_never_committed(scene: Scene, agent: Agent) -> None:
    """The agent reads them there, for its eyes only; git does not see the file."""
    script = (
        's=$(git status --porcelain); printf %s "$s" >status.txt; stat -c %a .env >mode.txt; '
        '(. ./.env; echo "$SECRET_ONE" | rev >read.txt)'
    )
    record = await scene.run(agent(script), environment_secrets={"SECRET_ONE": Secret("made-up-value")})
    assert () == record.action_errors
    files = await scene.repository.files("main")
    assert (b"", b"600\n", b"eulav-pu-edam\n") == (files["status.txt"], files["mode.txt"], files["read.txt"])
    assert ".env" not in files


async def test_a_commit_of_dotenv_by_the_agent_is_not_pushed(scene: Scene, agent: Agent) -> None:
    """It holds secrets."""
    script = "git add -f .env; git -c user.name=a -c user.email=a@b commit -qm leak"
    record = await scene.run(agent(script), environment_secrets={"SECRET_ONE": Secret("made-up-value")})
    assert [
        ActionError(action="git", error="The agent has committed .env, which holds secrets, so nothing was pushed.")
    ] == list(record.action_errors)
    assert {"a.txt", "b.txt"} == set(await scene.repository.files("main"))
    assert b"made-up-value" not in b"".join((await scene.stored(record)).values())


async def test_a_dotenv_of_the_repository_keeps_its_lines(scene: Scene, agent: Agent) -> None:
    """The agent finds both; on the server it stays as it was."""
    await scene.repository.commit({".env": "OWN=1\n"})
    script = (
        's=$(git status --porcelain); printf "%s" "$s" >status.txt; (. ./.env; echo "$OWN $SECRET_ONE" | rev >read.txt)'
    )
    await scene.run(agent(script), environment_secrets={"SECRET_ONE": Secret("made-up-value")})
    files = await scene.repository.files("main")
    assert (b"", b"eulav-pu-edam 1\n", b"OWN=1\n") == (files["status.txt"], files["read.txt"], files[".env"])


async def test_a_workspace_without_a_repository_can_be_told(scene: Scene, agent: Agent) -> None:
    """A commit was asked for, and there is nothing to commit to."""
    record = await scene.run(
        agent("echo x >x"), actions=PostRunActions(git=GitAction(commit=True)), git_repo=None, ssh_key=None
    )
    [error] = record.action_errors
    assert error.error.startswith("The workspace is not a git repository")


async def test_no_secret_is_in_what_is_told(scene: Scene, agent: Agent) -> None:
    """Not in the message, the errors or the log."""
    secret = "made-up-value-of-a-secret"
    scene.repository.hook("pre-receive", f"echo {secret} >&2\nexit 1\n")
    told = PostRunActions(git=GitAction(commit=True, push=True, commit_message=f"With {secret}"))
    record = await scene.run(
        agent(f"echo {secret} >a.txt; echo {secret}"), actions=told, environment_secrets={"S": Secret(secret)}
    )
    assert record.git_commit is not None
    assert "With ***" == record.git_commit.message
    assert "***" in str(record.action_errors)
    everything = json.dumps(await scene.worker_setup.log()) + repr(record)
    assert secret not in everything
    assert KEY.reveal().splitlines()[2] not in everything
    assert b"+***" in (await scene.stored(record))["rescue.patch"]


# --- uploads and their order -------------------------------------------------------------------------------------------------


async def test_files_are_uploaded_and_told(scene: Scene, agent: Agent) -> None:
    """Below `uploads/` and the prefix, with their sizes; what cannot be uploaded is told, and the rest goes."""
    both = PostRunActions(
        git=COMMIT_AND_PUSH.git, upload_files=UploadAction(glob_patterns=("**/*.log", "out"), gcs_prefix="kept")
    )
    record = await scene.run(agent("mkdir out; echo 1 >out/.x; echo 2 >a.log; ln -s /etc/passwd b.log"), actions=both)
    assert {"kept/out/.x": b"1\n", "kept/a.log": b"2\n"} == await scene.stored(record)
    assert ["a.log", "out/.x"] == sorted(file.original_path for file in record.uploaded_files or ())
    assert record.git_commit is not None
    assert record.git_commit.pushed


async def test_our_dotenv_is_never_uploaded(scene: Scene, agent: Agent) -> None:
    """Whatever the patterns say."""
    keeps = PostRunActions(upload_files=UploadAction(glob_patterns=("**", ".env")))
    record = await scene.run(agent("true"), actions=keeps, environment_secrets={"SECRET_ONE": Secret("made-up-value")})
    assert {"a.txt", "b.txt"} == set(await scene.stored(record))


async def test_an_action_that_fails_lets_the_others_run(scene: Scene, agent: Agent) -> None:
    """Git first; then the uploads, although git has failed."""
    scene.repository.protect("main")
    both = PostRunActions(git=COMMIT_AND_PUSH.git, upload_files=UploadAction(glob_patterns=("a.txt",)))
    record = await scene.run(agent("echo new >a.txt"), actions=both)
    assert ["git"] == [error.action for error in record.action_errors]
    assert {"a.txt", "rescue.patch"} == set(await scene.stored(record))


async def test_uploads_need_no_repository(scene: Scene, agent: Agent) -> None:
    """They are of the workspace."""
    keeps = PostRunActions(upload_files=UploadAction(glob_patterns=("*.txt",)))
    record = await scene.run(agent("echo x >x.txt"), actions=keeps, git_repo=None, ssh_key=None)
    assert {"x.txt": b"x\n"} == await scene.stored(record)


async def test_actions_run_after_success_alone(scene: Scene, agent: Agent) -> None:
    """A task that failed pushes and uploads nothing but the patch of its changes."""
    both = PostRunActions(git=COMMIT_AND_PUSH.git, upload_files=UploadAction(glob_patterns=("**",)))
    record = await scene.run(agent("echo new >a.txt", last="exit 3"), actions=both)
    assert (Status.FAILED, 3, None) == (record.status, record.exit_code, record.git_commit)
    assert {"rescue.patch"} == set(await scene.stored(record))
    assert {"a.txt": b"old", "b.txt": b"old"} == await scene.repository.files("main")


# --- work is not lost ----------------------------------------------------------------------------------------------------------


def rescue_of(stored: Mapping[str, bytes]) -> bytes:
    """Return the patch."""
    assert {"rescue.patch"} == set(stored)
    return stored["rescue.patch"]


async def test_a_task_that_fails_keeps_its_changes(scene: Scene, agent: Agent, git_setup: GitSetup) -> None:
    """Committed or not, new, binary and removed; `git apply` puts them onto what was cloned."""
    script = (
        "git config user.name A; git config user.email a@b; echo new >a.txt; git commit -qam Own; "
        "printf '\\0\\1' >bin; rm b.txt"
    )
    record = await scene.run(agent(script, last="exit 1"), actions=PostRunActions())
    patch = rescue_of(await scene.stored(record))
    fresh = git_setup.folder / "fresh"
    await git_setup.git("clone", "--quiet", f"file://{scene.repository.path}", str(fresh))
    await git_setup.git.at(fresh)("apply", "-", stdin=patch)
    assert ("new\n", b"\0\1", False) == (
        (fresh / "a.txt").read_text(),
        (fresh / "bin").read_bytes(),
        (fresh / "b.txt").exists(),
    )
    [uploaded] = record.uploaded_files or ()
    assert "rescue.patch" == uploaded.original_path


async def test_a_task_over_its_time_keeps_its_changes(scene: Scene, agent: Agent) -> None:
    """The watchdog has ended the agent."""
    record = await scene.run(agent("echo new >a.txt; sleep 60"), timeout_minutes=0.02)
    assert Reason.TIMEOUT == record.reason
    assert b"+new" in rescue_of(await scene.stored(record))


async def test_a_task_that_is_cancelled_keeps_its_changes(scene: Scene, agent: Agent) -> None:
    """A cancel on the record."""
    await scene.worker_setup.submit(git_repo=scene.server.url("group/demo"), ssh_key=KEY)
    cli = agent('echo new >a.txt; echo \'{"type":"at work"}\'; sleep 60')
    running = asyncio.create_task(scene.worker_setup.run(cli=cli, agent_user=scene.user))
    async with asyncio.timeout(30):
        while not any(line["type"] == "at work" for line in await scene.worker_setup.log()):
            await asyncio.sleep(0.02)
    await scene.worker_setup.dispatcher.cancel(TASK)
    record = await running
    assert Status.CANCELLED == record.status
    assert b"+new" in rescue_of(await scene.stored(record))


async def test_a_worker_that_is_told_to_end_keeps_the_changes(scene: Scene, agent: Agent) -> None:
    """Within the time that the platform gives it."""
    await scene.worker_setup.submit(git_repo=scene.server.url("group/demo"), ssh_key=KEY)
    cli = agent('echo new >a.txt; echo \'{"type":"at work"}\'; sleep 60')
    running = asyncio.create_task(scene.worker_setup.run(cli=cli, agent_user=scene.user))
    async with asyncio.timeout(30):
        while not any(line["type"] == "at work" for line in await scene.worker_setup.log()):
            await asyncio.sleep(0.02)
    scene.worker_setup.shutdown.set()
    record = await running
    assert Reason.KILLED == record.reason
    assert b"+new" in rescue_of(await scene.stored(record))


async def test_an_unchanged_tree_leaves_no_patch(scene: Scene, agent: Agent) -> None:
    """There is nothing to keep."""
    record = await scene.run(agent("true", last="exit 1"))
    assert (None, ()) == (record.uploaded_files, record.action_errors)


async def test_a_patch_that_is_too_large_keeps_whole_files(scene: Scene, agent: Agent) -> None:
    """Those that fit, and says so."""
    cli = agent("echo new >a.txt; seq 100000 >z.txt", last="exit 1")
    await scene.worker_setup.submit(git_repo=scene.server.url("group/demo"), ssh_key=KEY)
    timeouts = WorkerTimeouts(term_grace=0.3, cancel_poll=0.02, actions=PostRunLimits(rescue_bytes=5000))
    record = await scene.worker_setup.run(cli=cli, agent_user=scene.user, timeouts=timeouts)
    patch = rescue_of(await scene.stored(record))
    assert b"+new" in patch
    assert b"z.txt" not in patch
    assert ["rescue"] == [error.action for error in record.action_errors]


async def test_a_patch_of_which_nothing_fits_is_told(scene: Scene, agent: Agent) -> None:
    """And none is kept."""
    await scene.worker_setup.submit(git_repo=scene.server.url("group/demo"), ssh_key=KEY)
    timeouts = WorkerTimeouts(term_grace=0.3, cancel_poll=0.02, actions=PostRunLimits(rescue_bytes=5000))
    cli = agent("seq 100000 >z.txt", last="exit 1")
    record = await scene.worker_setup.run(cli=cli, agent_user=scene.user, timeouts=timeouts)
    assert None is record.uploaded_files
    assert [ActionError(action="rescue", error="The changes are lost: no file's patch fits into 5000 bytes.")] == list(
        record.action_errors
    )


class FullBlobs(DirectoryBlobs):
    """A place that takes records and logs, and no files."""

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        raise StorageError("The storage is full.")


async def test_a_patch_that_cannot_be_stored_is_told(scene: Scene, agent: Agent, tmp_path: Path) -> None:
    """The task ends as it would have."""
    await scene.worker_setup.submit(git_repo=scene.server.url("group/demo"), ssh_key=KEY)
    cli = agent("echo new >a.txt", last="exit 3")
    record = await scene.worker_setup.run(cli=cli, agent_user=scene.user, store=Store(FullBlobs(tmp_path / "data")))
    assert (3, [ActionError(action="rescue", error="The storage is full.")]) == (
        record.exit_code,
        list(record.action_errors),
    )


# --- time ----------------------------------------------------------------------------------------------------------------------


async def test_a_push_that_hangs_is_given_up(scene: Scene, agent: Agent) -> None:
    """After its own bound; the task has completed, and its work is kept."""

    async def hang(command: str) -> None:
        await asyncio.sleep(600)

    script = agent("echo new >a.txt")
    await scene.worker_setup.submit(
        git_repo=scene.server.url("group/demo"), ssh_key=KEY, post_execution_actions=COMMIT_AND_PUSH
    )

    def cli() -> Path:
        scene.server.before = hang
        return script()

    timeouts = WorkerTimeouts(term_grace=0.3, cancel_poll=0.02, actions=PostRunLimits(push=0.5))
    record = await scene.worker_setup.run(cli=cli, agent_user=scene.user, timeouts=timeouts)
    [error] = record.action_errors
    assert (Status.COMPLETED, "git") == (record.status, error.action)
    assert error.error.startswith("The repository was not pushed within 0.5 s")
    assert b"+new" in (await scene.stored(record))["rescue.patch"]


async def test_a_cancel_breaks_off_the_actions(scene: Scene, agent: Agent) -> None:
    """The task ends as cancelled, and what was not pushed is kept."""

    async def hang(command: str) -> None:
        await scene.worker_setup.dispatcher.cancel(TASK)
        await asyncio.sleep(600)

    script = agent("echo new >a.txt")
    await scene.worker_setup.submit(
        git_repo=scene.server.url("group/demo"), ssh_key=KEY, post_execution_actions=COMMIT_AND_PUSH
    )

    def cli() -> Path:
        scene.server.before = hang
        return script()

    record = await scene.worker_setup.run(cli=cli, agent_user=scene.user)
    assert Status.CANCELLED == record.status
    assert b"+new" in (await scene.stored(record))["rescue.patch"]


async def test_the_time_limit_does_not_cut_off_the_actions(scene: Scene, agent: Agent) -> None:
    """It is the agent's; what keeps its work has bounds of its own."""

    async def slow(command: str) -> None:
        await asyncio.sleep(1.5)

    script = agent("echo new >a.txt")
    await scene.worker_setup.submit(
        git_repo=scene.server.url("group/demo"),
        ssh_key=KEY,
        post_execution_actions=COMMIT_AND_PUSH,
        timeout_minutes=0.05,
    )

    def cli() -> Path:
        scene.server.before = slow
        return script()

    record = await scene.worker_setup.run(cli=cli, agent_user=scene.user)
    assert (Status.COMPLETED, ()) == (record.status, record.action_errors)


async def test_it_goes_over_http_with_a_token_too(scene: Scene, agent: Agent, git_setup: GitSetup) -> None:
    """From the clone to the push."""
    async with GitHttp(git_setup.repos) as server:
        record = await scene.run(
            agent("echo new >a.txt"), git_repo=server.url("group/demo"), ssh_key=None, git_token=GitToken.parse(TOKEN)
        )
    assert record.git_commit is not None
    assert await scene.repository.sha("main") == record.git_commit.sha

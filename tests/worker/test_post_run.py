from __future__ import annotations

import asyncio
import json
from pathlib import Path

import attrs
from helpers.git import GitSetup, git_setup
from helpers.post_run import COMMIT_AND_PUSH, KEY, PostRunSetup, setup
from helpers.worker import TASK, Agent, agent, separate_user, worker_setup
from standins.githttp import TOKEN, GitHttp
from standins.gitssh import needs_ssh

from ccrun.results import ActionError, GitCommit, Recovery
from ccrun.spec import GitAction, GitToken, PostRunActions, UploadAction
from ccrun.task import Secret, Status
from ccrun.worker.dependencies import PostRunLimits, WorkerTimeouts

__all__ = ["agent", "git_setup", "separate_user", "setup", "worker_setup"]
pytestmark = needs_ssh


# --- git -------------------------------------------------------------------------------------------------------------


async def test_changes_are_committed_and_pushed(setup: PostRunSetup, agent: Agent) -> None:
    """The record has the commit that is on the server."""
    record = await setup.run(agent("echo new >a.txt; rm b.txt; echo c >c.txt"))
    sha = await setup.repository.sha("main")
    assert (Status.COMPLETED, ()) == (record.status, record.action_errors)
    assert GitCommit(sha=sha, message="From the agent", pushed=True, branch="main") == record.git_commit
    assert {"a.txt": b"new\n", "c.txt": b"c\n"} == await setup.repository.files("main")
    assert None is record.uploaded_files
    assert f"Pushed {str(sha)[:12]} to main." == (await setup.worker_lines("git"))[-1]


async def test_worker_and_agent_may_be_the_same_user(setup: PostRunSetup, agent: Agent) -> None:
    """What the agent has committed and what it has not are pushed, as with a separate user."""
    script = "echo one >a.txt; git commit -qam One; echo two >b.txt"
    record = await attrs.evolve(setup, user=None).run(agent(script))
    assert (Status.COMPLETED, ()) == (record.status, record.action_errors)
    assert {"a.txt": b"one\n", "b.txt": b"two\n"} == await setup.repository.files("main")


async def test_nothing_to_commit_is_not_an_error(setup: PostRunSetup, agent: Agent) -> None:
    """The record and the log state it."""
    record = await setup.run(agent("true"))
    sha = await setup.repository.sha("main")
    assert () == record.action_errors
    expected = GitCommit(sha=sha, message="Nothing to commit", pushed=False, branch="main", committed=False)
    assert expected == record.git_commit
    assert ["Nothing to commit."] == await setup.worker_lines("git")


async def test_commit_without_push_is_local(setup: PostRunSetup, agent: Agent) -> None:
    """The record has the commit, and the server is unchanged."""
    record = await setup.run(agent("echo new >a.txt"), actions=PostRunActions(git=GitAction(commit=True)))
    assert record.git_commit is not None
    assert (False, f"Changes by Claude Code\n\nTask: {TASK}") == (
        record.git_commit.pushed,
        record.git_commit.message,
    )
    assert {"a.txt": b"old", "b.txt": b"old"} == await setup.repository.files("main")


async def test_push_without_commit_pushes_the_commits_of_the_agent(setup: PostRunSetup, agent: Agent) -> None:
    """Uncommitted changes are not pushed, and the record has the message of the agent."""
    script = (
        "git config user.name A; git config user.email a@b; echo new >a.txt; git commit -qam Message; echo more >b.txt"
    )
    record = await setup.run(agent(script), actions=PostRunActions(git=GitAction(push=True)))
    assert record.git_commit is not None
    assert ("Message", True) == (record.git_commit.message, record.git_commit.pushed)
    assert {"a.txt": b"new\n", "b.txt": b"old"} == await setup.repository.files("main")


async def test_only_matching_files_are_committed(setup: PostRunSetup, agent: Agent) -> None:
    """Patterns of the request select them."""
    actions = PostRunActions(git=GitAction(commit=True, push=True, files=("src/**", "!src/no.txt")))
    record = await setup.run(
        agent("echo new >a.txt; mkdir src; echo 1 >src/yes.txt; echo 2 >src/no.txt"), actions=actions
    )
    assert () == record.action_errors
    assert {"a.txt": b"old", "b.txt": b"old", "src/yes.txt": b"1\n"} == await setup.repository.files("main")


async def test_missing_branch_is_created(setup: PostRunSetup, agent: Agent) -> None:
    """The cloned branch is unchanged."""
    actions = PostRunActions(git=GitAction(commit=True, push=True, branch="agent/work"))
    record = await setup.run(agent("echo new >a.txt"), actions=actions)
    assert record.git_commit is not None
    assert {"main", "agent/work"} == set(await setup.repository.branches())
    assert "agent/work" == record.git_commit.branch


async def test_rebase_is_recorded(setup: PostRunSetup, agent: Agent) -> None:
    """The record has the commit of the remote branch and the files in which the agent's version replaced it."""
    remote_shas: list[str] = []

    async def move_branch(command: str) -> None:
        if "receive-pack" in command and not remote_shas:
            remote_shas.append(await setup.repository.commit({"a.txt": "remote"}))

    setup.server.before = move_branch
    record = await setup.run(agent("echo agent >a.txt"))
    assert record.git_commit is not None
    recovery = Recovery(method="rebase", remote_sha=remote_shas[0], conflict_files=("a.txt",))
    assert (True, recovery) == (record.git_commit.pushed, record.git_commit.recovery)
    assert await setup.repository.sha("main") == record.git_commit.sha


async def test_strategy_fail_does_not_push_to_a_moved_branch(setup: PostRunSetup, agent: Agent) -> None:
    """The error is recorded, and the changes are rescued."""

    async def move_branch(command: str) -> None:
        await setup.repository.commit({"b.txt": f"remote {command}"})

    script = agent("echo agent >a.txt")
    actions = PostRunActions(git=GitAction(commit=True, push=True, conflict_strategy="fail"))
    await setup.worker_setup.submit(
        git_repo=setup.server.url("group/demo"), ssh_key=KEY, post_execution_actions=actions
    )

    def cli() -> Path:
        # The CLI is located after the clone.
        setup.server.before = move_branch
        return script()

    record = await setup.worker_setup.run(cli=cli, agent_user=setup.user)
    assert record.git_commit is not None
    assert (Status.COMPLETED, False) == (record.status, record.git_commit.pushed)
    [error] = record.action_errors
    assert "git" == error.action
    assert "has moved to" in error.error
    assert b"+agent" in (await setup.uploaded(record))["rescue.patch"]


async def test_rejected_push_is_reported_and_rescued(setup: PostRunSetup, agent: Agent) -> None:
    """The error has the message of the server, and the task is completed."""
    setup.repository.protect("main")
    record = await setup.run(agent("echo agent >a.txt"))
    [error] = record.action_errors
    assert (Status.COMPLETED, "git") == (record.status, error.action)
    assert "GH006" in error.error
    assert b"+agent" in (await setup.uploaded(record))["rescue.patch"]


async def test_nested_repository_is_reported(setup: PostRunSetup, agent: Agent) -> None:
    """It is not committed; other changes are."""
    record = await setup.run(
        agent(
            "git init -q nested; echo x >nested/x; git -C nested add x; echo new >a.txt; "
            "git -C nested -c user.name=a -c user.email=a@b commit -qm x"
        )
    )
    assert [
        ActionError(action="git", error="Repositories inside the repository were left out of the commit: nested.")
    ] == list(record.action_errors)
    assert {"a.txt": b"new\n", "b.txt": b"old"} == await setup.repository.files("main")


async def test_dotenv_is_readable_and_not_committed(setup: PostRunSetup, agent: Agent) -> None:
    """The agent reads its secrets from the file, which only its user may read and which git ignores."""
    script = (
        's=$(git status --porcelain); printf %s "$s" >status.txt; stat -c %a .env >mode.txt; '
        '(. ./.env; echo "$SECRET_ONE" | rev >read.txt)'
    )
    record = await setup.run(agent(script), environment_secrets={"SECRET_ONE": Secret("made-up-value")})
    assert () == record.action_errors
    files = await setup.repository.files("main")
    assert (b"", b"600\n", b"eulav-pu-edam\n") == (files["status.txt"], files["mode.txt"], files["read.txt"])
    assert ".env" not in files


async def test_dotenv_committed_by_the_agent_is_not_pushed(setup: PostRunSetup, agent: Agent) -> None:
    """It contains secrets, so the push fails and the patch does not contain them either."""
    script = "git add -f .env; git -c user.name=a -c user.email=a@b commit -qm leak"
    record = await setup.run(agent(script), environment_secrets={"SECRET_ONE": Secret("made-up-value")})
    assert [
        ActionError(action="git", error="The agent has committed .env, which holds secrets, so nothing was pushed.")
    ] == list(record.action_errors)
    assert {"a.txt", "b.txt"} == set(await setup.repository.files("main"))
    assert b"made-up-value" not in b"".join((await setup.uploaded(record)).values())


async def test_dotenv_of_the_repository_is_merged(setup: PostRunSetup, agent: Agent) -> None:
    """The agent reads both the original variables and the secrets; the file on the server is unchanged."""
    await setup.repository.commit({".env": "ORIGINAL=1\n"})
    script = 's=$(git status --porcelain); printf "%s" "$s" >status.txt; (. ./.env; echo "$ORIGINAL $SECRET_ONE" | rev >read.txt)'
    await setup.run(agent(script), environment_secrets={"SECRET_ONE": Secret("made-up-value")})
    files = await setup.repository.files("main")
    assert (b"", b"eulav-pu-edam 1\n", b"ORIGINAL=1\n") == (files["status.txt"], files["read.txt"], files[".env"])


async def test_commit_without_a_repository_is_reported(setup: PostRunSetup, agent: Agent) -> None:
    """The agent has not created one either."""
    record = await setup.run(
        agent("echo x >x"), actions=PostRunActions(git=GitAction(commit=True)), git_repo=None, ssh_key=None
    )
    [error] = record.action_errors
    assert error.error.startswith("The workspace is not a git repository")


async def test_secrets_are_redacted(setup: PostRunSetup, agent: Agent) -> None:
    """Neither the record, the log nor the patch contains a secret."""
    secret = "made-up-value-of-a-secret"
    setup.repository.hook("pre-receive", f"echo {secret} >&2\nexit 1\n")
    actions = PostRunActions(git=GitAction(commit=True, push=True, commit_message=f"With {secret}"))
    record = await setup.run(
        agent(f"echo {secret} >a.txt; echo {secret}"), actions=actions, environment_secrets={"S": Secret(secret)}
    )
    assert record.git_commit is not None
    assert "With ***" == record.git_commit.message
    assert "***" in str(record.action_errors)
    texts = json.dumps(await setup.worker_setup.log()) + repr(record)
    assert secret not in texts
    assert KEY.reveal().splitlines()[2] not in texts
    assert b"+***" in (await setup.uploaded(record))["rescue.patch"]


# --- uploads ---------------------------------------------------------------------------------------------------------


async def test_files_are_uploaded_and_recorded(setup: PostRunSetup, agent: Agent) -> None:
    """They are stored below the prefix. A link is not uploaded, and git actions run as well."""
    actions = PostRunActions(
        git=COMMIT_AND_PUSH.git, upload_files=UploadAction(glob_patterns=("**/*.log", "out"), gcs_prefix="prefix")
    )
    record = await setup.run(
        agent("mkdir out; echo 1 >out/.x; echo 2 >a.log; ln -s /etc/passwd b.log"), actions=actions
    )
    assert {"prefix/out/.x": b"1\n", "prefix/a.log": b"2\n"} == await setup.uploaded(record)
    assert ["a.log", "out/.x"] == sorted(file.original_path for file in record.uploaded_files or ())
    assert record.git_commit is not None
    assert record.git_commit.pushed


async def test_dotenv_of_the_worker_is_never_uploaded(setup: PostRunSetup, agent: Agent) -> None:
    """No pattern matches it."""
    actions = PostRunActions(upload_files=UploadAction(glob_patterns=("**", ".env")))
    record = await setup.run(
        agent("true"), actions=actions, environment_secrets={"SECRET_ONE": Secret("made-up-value")}
    )
    assert {"a.txt", "b.txt"} == set(await setup.uploaded(record))


async def test_failed_action_does_not_prevent_others(setup: PostRunSetup, agent: Agent) -> None:
    """The files are uploaded although the push has failed."""
    setup.repository.protect("main")
    actions = PostRunActions(git=COMMIT_AND_PUSH.git, upload_files=UploadAction(glob_patterns=("a.txt",)))
    record = await setup.run(agent("echo new >a.txt"), actions=actions)
    assert ["git"] == [error.action for error in record.action_errors]
    assert {"a.txt", "rescue.patch"} == set(await setup.uploaded(record))


async def test_uploads_do_not_need_a_repository(setup: PostRunSetup, agent: Agent) -> None:
    """The patterns are relative to the workspace."""
    actions = PostRunActions(upload_files=UploadAction(glob_patterns=("*.txt",)))
    record = await setup.run(agent("echo x >x.txt"), actions=actions, git_repo=None, ssh_key=None)
    assert {"x.txt": b"x\n"} == await setup.uploaded(record)


async def test_actions_run_only_after_success(setup: PostRunSetup, agent: Agent) -> None:
    """For a failed task, only the patch of its changes is stored."""
    actions = PostRunActions(git=COMMIT_AND_PUSH.git, upload_files=UploadAction(glob_patterns=("**",)))
    record = await setup.run(agent("echo new >a.txt", last="exit 3"), actions=actions)
    assert (Status.FAILED, 3, None) == (record.status, record.exit_code, record.git_commit)
    assert {"rescue.patch"} == set(await setup.uploaded(record))
    assert {"a.txt": b"old", "b.txt": b"old"} == await setup.repository.files("main")


# --- timeouts --------------------------------------------------------------------------------------------------------


async def test_push_that_hangs_is_stopped(setup: PostRunSetup, agent: Agent) -> None:
    """It has a timeout. The task is completed, and its changes are rescued."""

    async def hang(command: str) -> None:
        await asyncio.sleep(600)

    script = agent("echo new >a.txt")
    await setup.worker_setup.submit(
        git_repo=setup.server.url("group/demo"), ssh_key=KEY, post_execution_actions=COMMIT_AND_PUSH
    )

    def cli() -> Path:
        setup.server.before = hang
        return script()

    timeouts = WorkerTimeouts(term_grace=0.3, cancel_poll=0.02, actions=PostRunLimits(push=0.5))
    record = await setup.worker_setup.run(cli=cli, agent_user=setup.user, timeouts=timeouts)
    [error] = record.action_errors
    assert (Status.COMPLETED, "git") == (record.status, error.action)
    assert error.error.startswith("The repository was not pushed within 0.5 s: ")
    assert b"+new" in (await setup.uploaded(record))["rescue.patch"]


async def test_cancellation_stops_the_actions(setup: PostRunSetup, agent: Agent) -> None:
    """The task is cancelled, and the changes that were not pushed are rescued."""

    async def hang(command: str) -> None:
        await setup.worker_setup.dispatcher.cancel(TASK)
        await asyncio.sleep(600)

    script = agent("echo new >a.txt")
    await setup.worker_setup.submit(
        git_repo=setup.server.url("group/demo"), ssh_key=KEY, post_execution_actions=COMMIT_AND_PUSH
    )

    def cli() -> Path:
        setup.server.before = hang
        return script()

    record = await setup.worker_setup.run(cli=cli, agent_user=setup.user)
    assert Status.CANCELLED == record.status
    assert b"+new" in (await setup.uploaded(record))["rescue.patch"]


async def test_timeout_of_the_task_does_not_stop_the_actions(setup: PostRunSetup, agent: Agent) -> None:
    """It applies to the agent; the actions have separate timeouts."""

    async def slow(command: str) -> None:
        await asyncio.sleep(1.5)

    script = agent("echo new >a.txt")
    await setup.worker_setup.submit(
        git_repo=setup.server.url("group/demo"),
        ssh_key=KEY,
        post_execution_actions=COMMIT_AND_PUSH,
        timeout_minutes=0.05,
    )

    def cli() -> Path:
        setup.server.before = slow
        return script()

    record = await setup.worker_setup.run(cli=cli, agent_user=setup.user)
    assert (Status.COMPLETED, ()) == (record.status, record.action_errors)


async def test_clone_and_push_over_http_with_a_token(setup: PostRunSetup, agent: Agent, git_setup: GitSetup) -> None:
    """The worker uses the token for both operations."""
    async with GitHttp(git_setup.repos) as server:
        record = await setup.run(
            agent("echo new >a.txt"), git_repo=server.url("group/demo"), ssh_key=None, git_token=GitToken.parse(TOKEN)
        )
    assert record.git_commit is not None
    assert await setup.repository.sha("main") == record.git_commit.sha

"""Which repositories of this machine a task can read."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.git import GitSetup, git_setup, http, ssh
from helpers.worker import Agent, WorkerSetup, agent, agent_user, worker_setup
from standins.githttp import TOKEN, GitHttp
from standins.repos import Submodule

from ccrun.process.user import User
from ccrun.spec import GitToken
from ccrun.task import Reason, Status

__all__ = ["agent", "agent_user", "git_setup", "http", "ssh", "worker_setup"]


async def test_repository_is_read_with_the_rights_of_the_agent(
    worker_setup: WorkerSetup, git_setup: GitSetup, agent: Agent, agent_user: User | None
) -> None:
    """A `file:` repository that only the worker's user may read is not cloned for another user."""
    repository = await git_setup.repos.create("private", {"a.txt": "private"})
    repository.path.chmod(0o700)
    await worker_setup.submit(git_repo=f"file://{repository.path}")
    record = await worker_setup.run(cli=agent("true"), agent_user=agent_user)
    if agent_user is None:
        assert Status.COMPLETED is record.status
    else:
        error = "The repository in gitRepo does not exist, or the agent's user may not read it."
        assert (Reason.PREPARE_FAILED, error) == (record.reason, record.error)


async def test_repository_of_another_user_can_be_read(
    worker_setup: WorkerSetup, git_setup: GitSetup, agent: Agent, agent_user: User | None
) -> None:
    """It is enough that the agent's user may read it; the owner may be anyone."""
    repository = await git_setup.repos.create("shared", {"a.txt": "shared"})
    for directory in repository.path.parents:
        if directory.stat().st_mode & 0o005 != 0o005:
            directory.chmod(directory.stat().st_mode | 0o005)
    await worker_setup.submit(git_repo=f"file://{repository.path}")
    record = await worker_setup.run(cli=agent("grep -q shared a.txt || exit 3"), agent_user=agent_user)
    assert Status.COMPLETED is record.status, record.error


@pytest.mark.parametrize("scheme", ["file", "http"])
async def test_submodule_cannot_name_this_machine(
    worker_setup: WorkerSetup, git_setup: GitSetup, http: GitHttp, agent: Agent, scheme: str
) -> None:
    """A repository cannot have a submodule in a directory of the machine, nor one by http unless its own URL is http."""
    private = await git_setup.repos.create("private", {"a.txt": "private"})
    sha = await private.sha()
    assert sha is not None
    url = f"file://{private.path}" if scheme == "file" else http.url("private")
    outer = await git_setup.repos.create("outer", {"lib": Submodule(url, sha)})
    own = http.url("outer") if scheme == "file" else f"file://{outer.path}"
    token = GitToken.parse(TOKEN) if scheme == "file" else None
    await worker_setup.submit(git_repo=own, git_submodules=True, git_token=token)
    record = await worker_setup.run(cli=agent("true"))
    assert Reason.PREPARE_FAILED is record.reason
    assert record.error is not None
    assert "not allowed" in record.error
    assert not list(Path(git_setup.folder).rglob("a.txt"))

"""A task with a repository, and an agent that is a script: for the actions after the agent and the patches of its changes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from standins.gitssh import GitSsh, key_pair
from standins.repos import Repository

from ccrun.process.user import User
from ccrun.spec import GitAction, PostRunActions
from ccrun.store import Store
from ccrun.task import Secret, TaskRecord
from helpers.git import GitSetup
from helpers.worker import TASK, WorkerSetup

KEY: Final = Secret(key_pair().openssh)
COMMIT_AND_PUSH: Final = PostRunActions(git=GitAction(commit=True, push=True, commit_message="From the agent"))


@attrs.frozen(kw_only=True)
class PostRunSetup:
    """A repository on a server, and a worker that runs a task on it."""

    worker_setup: WorkerSetup
    repository: Repository
    server: GitSsh
    user: User | None

    async def run(
        self, cli: Callable[[], Path], *, actions: PostRunActions = COMMIT_AND_PUSH, **fields: Any
    ) -> TaskRecord:
        """Run a task until it is final."""
        await self.submit(actions=actions, **fields)
        return await self.worker_setup.run(cli=cli, agent_user=self.user)

    async def submit(self, *, actions: PostRunActions = COMMIT_AND_PUSH, **fields: Any) -> None:
        """Create the task."""
        defaults = {
            "git_repo": self.server.url(self.repository.name),
            "ssh_key": KEY,
            "post_execution_actions": actions,
        }
        await self.worker_setup.submit(**{**defaults, **fields})

    async def uploaded(self, record: TaskRecord) -> dict[str, bytes]:
        """Return the contents of the uploaded files, by path."""
        return await uploads(self.worker_setup.deps.store, record)

    async def worker_lines(self, step: str) -> list[str]:
        """Return the texts of the worker's log lines for a step."""
        lines = await self.worker_setup.log()
        return [str(line.get("content")) for line in lines if (line["type"], line.get("step")) == ("worker", step)]


async def uploads(store: Store, record: TaskRecord) -> dict[str, bytes]:
    """Return the contents of the uploaded files, by path."""
    prefix = f"sessions/{TASK}/uploads/"
    found = {}
    for file in record.uploaded_files or ():
        name = prefix + file.gcs_path.partition(f"/{prefix}")[2]
        blob = await store._blobs.read(name)
        assert file.size_bytes == len(blob.content)
        found[name.removeprefix(prefix)] = blob.content
    return found


@pytest.fixture
async def setup(worker_setup: WorkerSetup, git_setup: GitSetup, agent_user: User | None) -> AsyncIterator[PostRunSetup]:
    """A repository with two files, and an agent with each kind of user."""
    repository = await git_setup.repos.create("group/demo", {"a.txt": "old", "b.txt": "old"})
    async with GitSsh(git_setup.repos) as server:
        yield PostRunSetup(worker_setup=worker_setup, repository=repository, server=server, user=agent_user)

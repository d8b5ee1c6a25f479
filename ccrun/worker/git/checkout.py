"""The repository in the workspace, and what is kept of it outside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs

from ccrun.worker.git import changes
from ccrun.worker.git.changes import Changes
from ccrun.worker.git.clone import Clone, PackSnapshot
from ccrun.worker.git.remote import Access
from ccrun.worker.git.run import Git
from ccrun.worker.workspace import Workspace


@attrs.frozen(kw_only=True)
class Checkout:
    """The repository in the workspace, and what is kept of it outside.

    Args:
        agent_git: git as the agent's user, without any secret.
        worker_git: git as the worker's user; its home is given to it for each use.
        access: How to get into the server; None where the request names no repository.
        clone: What was cloned.
        keepsake: The objects that came from the server, when something is to be pushed.
        hides_dotenv: Whether `.env` is ours.
    """

    workspace: Workspace
    agent_git: Git
    worker_git: Callable[[Path], Git]
    access: Access | None = None
    clone: Clone | None = None
    snapshot: PackSnapshot | None = None
    excludes_dotenv: bool = False

    async def changes(self) -> Changes:
        """Look at what the agent left. Raises `GitError`."""
        return await changes.examine(
            self.agent_git,
            self.workspace.repository,
            base=self.clone.base if self.clone else None,
            excludes_dotenv=self.excludes_dotenv,
            room=self.workspace.root,
        )

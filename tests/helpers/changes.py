"""A clone that an agent has changed."""

from __future__ import annotations

import os
from pathlib import Path

import attrs
import pytest
from standins.githttp import GitHttp
from standins.repos import Executable, Link, Repository

from ccrun.process.user import User
from ccrun.worker.git import changes
from ccrun.worker.git.changes import Changes
from ccrun.worker.git.clone import Clone
from helpers.git import GitSetup, git_at, http_access


@attrs.frozen(kw_only=True)
class CloneSetup:
    """A clone that an agent has changed."""

    git_setup: GitSetup
    repository: Repository
    cloned: Clone
    user: User | None = None

    @property
    def path(self) -> Path:
        """The directory of the clone."""
        return self.git_setup.into

    async def git(self, *arguments: str) -> str:
        """Run git as the agent."""
        identity = {"GIT_AUTHOR_NAME": "Agent", "GIT_AUTHOR_EMAIL": "agent@example.com"}
        identity |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in identity.items()}
        return (await self.git_setup.git.at(self.path, **identity)(*arguments)).decode().strip()

    async def changes(self, *, excludes_dotenv: bool = False) -> Changes:
        """Return the changes in the clone."""
        git = git_at(self.git_setup.folder / "home", self.user, protocols="")
        return await changes.examine(
            git, self.path, base=self.cloned.base, excludes_dotenv=excludes_dotenv, parent=self.git_setup.folder
        )

    async def files_of(self, found: Changes, tree: str) -> dict[str, str]:
        """Return mode and content of each file of a git tree, by path."""
        output = await found.git("ls-tree", "-r", "-z", "--full-tree", tree)
        files = {}
        for line in output.split(b"\0")[:-1]:
            entry, path = line.split(b"\t")
            mode, kind, blob = entry.decode().split(" ")
            content = (await found.git("cat-file", "blob", blob)).decode() if kind == "blob" else blob
            files[os.fsdecode(path)] = f"{mode} {content}"
        return files


FILES = {
    "unchanged.txt": "unchanged",
    "deleted.txt": "deleted",
    "changed.txt": "old",
    "tool": Executable("#!/bin/sh\n"),
    "link": Link("unchanged.txt"),
}


CLONED_FILES = {
    "unchanged.txt": "100644 unchanged",
    "deleted.txt": "100644 deleted",
    "changed.txt": "100644 old",
    "tool": "100755 #!/bin/sh\n",
    "link": "120000 unchanged.txt",
}


async def clone_with(git_setup: GitSetup, files: dict[str, object] | None = FILES) -> CloneSetup:
    """Clone a repository with these files."""
    repository = await git_setup.repos.create("demo", files)  # type: ignore[arg-type]
    async with GitHttp(git_setup.repos, public=True) as server:
        cloned = await git_setup.clone(http_access(server.url("demo"), None))
    return CloneSetup(git_setup=git_setup, repository=repository, cloned=cloned)


@pytest.fixture
async def setup(git_setup: GitSetup) -> CloneSetup:
    """A clone with a few files."""
    return await clone_with(git_setup)

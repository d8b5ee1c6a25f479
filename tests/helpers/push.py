"""Clones of repositories whose changes are committed and pushed as the worker does it."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from standins.gitssh import GitSsh
from standins.repos import Repository

from ccrun.urls import parse_git_url
from ccrun.worker.git import changes, push
from ccrun.worker.git.changes import Identity
from ccrun.worker.git.clone import Clone, PackSnapshot
from ccrun.worker.git.push import Push, Pushed, import_commit
from ccrun.worker.git.remote import Access
from ccrun.worker.git.run import Git
from helpers.git import SECONDS, GitSetup, ssh_access

IDENTITY: Final = Identity(name="Bot", email="bot@example.com")


@attrs.frozen(kw_only=True)
class CloneSetup:
    """A clone, with functions that commit and push its changes as the worker does."""

    git_setup: GitSetup
    repository: Repository
    access: Access
    cloned: Clone
    snapshot: PackSnapshot

    @property
    def path(self) -> Path:
        """The directory of the clone."""
        return self.git_setup.into

    def write(self, **files: str) -> None:
        """Write files. The name `a__txt` means `a.txt`."""
        for name, content in files.items():
            (self.path / name.replace("__", ".")).write_text(content)

    async def git(self, *arguments: str) -> str:
        """Run git as the agent."""
        identity = {f"GIT_{role}_{part}": "agent" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
        return (await self.git_setup.git.at(self.path, **identity)(*arguments)).decode().strip()

    async def import_commit(self) -> Git:
        """Commit all changes and import the commit into a bare repository of the worker."""
        git = self.git_setup.git
        found = await changes.examine(
            git, self.path, base=self.cloned.base, excludes_dotenv=False, parent=self.git_setup.folder
        )
        staged = await found.stage()
        commit = found.head if staged.is_empty else await found.commit(staged, "Worker commit", IDENTITY)
        assert commit is not None
        pack = io.BytesIO()
        await found.pack(commit, pack)
        return await self.import_pack(commit, pack.getvalue(), shallow=found.shallow)

    async def import_pack(self, commit: str, content: bytes, *, shallow: bytes = b"") -> Git:
        """Import a pack into a bare repository of the worker."""
        pack = self.git_setup.folder / "pack"
        pack.write_bytes(content)
        return await import_commit(
            self.git_setup.git,
            self.git_setup.folder / "bare",
            commit=commit,
            pack=pack,
            clone=self.cloned,
            snapshot=self.snapshot,
            shallow=shallow,
        )

    async def push(self, branch: str = "main", *, rebases: bool = True, seconds: float = SECONDS) -> Pushed:
        """Commit all changes and push them."""
        wanted = Push(branch=branch, base=self.cloned.base, identity=IDENTITY, rebases=rebases)
        return await push.push(await self.import_commit(), self.access, wanted, seconds=seconds)


class CloneFactory:
    """Creates and clones repositories."""

    def __init__(self, git_setup: GitSetup) -> None:
        self._git_setup = git_setup
        self.servers: list[GitSsh] = []
        self.snapshots: list[PackSnapshot] = []

    async def create(
        self, files: Any = None, *, revision: str | None = None, depth: int = 1, over_ssh: bool = False, **options: Any
    ) -> CloneSetup:
        """Create the repository `demo` with these files, and clone it: without a server unless the test needs one."""
        repository = await self._git_setup.repos.create("demo", files, **options)
        return await self.clone(repository, revision=revision, depth=depth, over_ssh=over_ssh)

    async def clone(
        self, repository: Repository, *, revision: str | None = None, depth: int = 1, over_ssh: bool = False
    ) -> CloneSetup:
        """Clone an existing repository."""
        access = Access(remote=parse_git_url(f"file://{repository.path}"))
        if over_ssh:
            server = await GitSsh(self._git_setup.repos).__aenter__()
            self.servers.append(server)
            access = ssh_access(server.url(repository.name))
        cloned = await self._git_setup.clone(access, revision=revision, depth=depth)
        snapshot = await PackSnapshot.of(self._git_setup.into)
        self.snapshots.append(snapshot)
        return CloneSetup(
            git_setup=self._git_setup, repository=repository, access=access, cloned=cloned, snapshot=snapshot
        )


@pytest.fixture
async def clones(git_setup: GitSetup) -> AsyncIterator[CloneFactory]:
    """A factory of clones, which stops its servers after the test."""
    factory = CloneFactory(git_setup)
    yield factory
    for snapshot in factory.snapshots:
        snapshot.close()
    for server in factory.servers:
        await server.__aexit__(None, None, None)

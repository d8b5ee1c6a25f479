"""Git as the worker runs it, git servers over SSH and HTTP, and a directory to clone into."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import attrs
import pytest
from standins.githttp import TOKEN, GitHttp
from standins.gitssh import GitSsh, KeyPair, key_pair
from standins.repos import Repos

from ccrun.process.confinement import Confinement
from ccrun.process.user import User, find_user
from ccrun.spec import GitToken
from ccrun.task import Secret
from ccrun.urls import parse_git_url
from ccrun.worker.git import run
from ccrun.worker.git.clone import Clone, CloneOptions, clone
from ccrun.worker.git.remote import Access
from ccrun.worker.git.run import Git

#: Seconds for one exchange with a server on loopback.
SECONDS: Final = 30.0
#: Unique to this process. Killing a child kills every process with its marker, and other processes run these tests too.
MARKER: Final = f"made-up-marker-{os.getpid()}"
PROGRAM: Final = run.find_git(run.SYSTEM_PATH)
PROTOCOLS: Final = "https:ssh:http:file"


def git_at(home: Path, user: User | None = None, protocols: str = PROTOCOLS) -> Git:
    """Return git as the worker configures it."""
    home.mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name == "PATH"}
    environment = run.environment(program=PROGRAM, inherited=inherited, home=home, marker=MARKER, protocols=protocols)
    return Git(program=PROGRAM, environment=environment, cwd=home, confinement=Confinement(user=user))


def ssh_access(url: str, key: KeyPair | str | None = None) -> Access:
    """Return access to a server over SSH, by default with a key that the server accepts."""
    text = key if isinstance(key, str) else (key or key_pair()).openssh
    return Access(remote=parse_git_url(url), ssh_key=Secret(text))


def http_access(url: str, token: str | None = TOKEN) -> Access:
    """Return access to a server over HTTP, by default with a token that the server accepts."""
    secret = None if token is None else GitToken.parse(token)
    return Access(remote=parse_git_url(url), git_token=secret)


@attrs.frozen(kw_only=True)
class GitSetup:
    """Repositories to clone, an empty home directory and a directory to clone into."""

    repos: Repos
    folder: Path

    @property
    def git(self) -> Git:
        """Git as the worker configures it."""
        return git_at(self.folder / "home")

    @property
    def into(self) -> Path:
        """The directory to clone into."""
        return self.folder / "repository"

    async def clone(
        self,
        access: Access,
        *,
        revision: str | None = None,
        depth: int = 1,
        submodules: bool = False,
        review_base: str | None = None,
        sparse: tuple[str, ...] = (),
    ) -> Clone:
        """Clone as the worker does."""
        self.into.mkdir(parents=True, exist_ok=True)
        return await clone(
            self.git,
            access,
            self.into,
            CloneOptions(revision=revision, depth=depth, submodules=submodules, review_base=review_base, sparse=sparse),
            seconds=SECONDS,
            pauses=(0.01, 0.02),
        )


@pytest.fixture
def git_setup(tmp_path: Path) -> GitSetup:
    """Repositories, and a directory to clone into."""
    return GitSetup(repos=Repos(tmp_path / "remote"), folder=tmp_path / "local")


@pytest.fixture
async def ssh(git_setup: GitSetup) -> AsyncIterator[GitSsh]:
    """A server of the repositories over SSH."""
    async with GitSsh(git_setup.repos) as server:
        yield server


@pytest.fixture
async def http(git_setup: GitSetup) -> AsyncIterator[GitHttp]:
    """A server of the repositories over HTTP, which requires the token."""
    async with GitHttp(git_setup.repos) as server:
        yield server


def agent_user() -> User | None:
    """Return a user to run an agent as, or None if this process may not switch users."""
    return find_user("61234", run.SYSTEM_PATH) if os.geteuid() == 0 else None

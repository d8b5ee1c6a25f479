"""A git of the worker's and one of the agent's, real servers to talk to, and a workspace to clone into."""

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

from ccrun.process.user import User, find_user
from ccrun.task import GitToken, Secret
from ccrun.urls import parse_git_url
from ccrun.worker.git import run
from ccrun.worker.git.clone import Clone, clone
from ccrun.worker.git.remote import Access
from ccrun.worker.git.run import Git

#: Seconds for one exchange with a server on loopback.
SECONDS: Final = 30.0
#: Of this process alone: others run these tests at the same time, and whoever ends a child ends all that carries its mark.
MARKER: Final = f"made-up-marker-{os.getpid()}"
PROGRAM: Final = run.find_git(run.SYSTEM_PATH)
PROTOCOLS: Final = "https:ssh:http:file"


def git_at(home: Path, user: User | None = None, protocols: str = PROTOCOLS) -> Git:
    """Return a git as the worker makes it."""
    home.mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name == "PATH"}
    environment = run.environment(program=PROGRAM, inherited=inherited, home=home, marker=MARKER, protocols=protocols)
    return Git(program=PROGRAM, environment=environment, cwd=home, user=user)


def ssh_access(url: str, key: KeyPair | str | None = None) -> Access:
    """Return how to get into a server over SSH, by default with the key that it takes."""
    text = key if isinstance(key, str) else (key or key_pair()).openssh
    return Access(remote=parse_git_url(url), ssh_key=Secret(text))


def http_access(url: str, token: str | None = TOKEN) -> Access:
    """Return how to get into a server over HTTP, by default with the token that it takes."""
    secret = None if token is None else GitToken.parse(token)
    return Access(remote=parse_git_url(url), git_token=secret)


@attrs.frozen(kw_only=True)
class Ground:
    """Where a test clones: servers, a home that is empty, and a folder to clone into."""

    repos: Repos
    folder: Path

    @property
    def git(self) -> Git:
        """The worker's git."""
        return git_at(self.folder / "home")

    @property
    def into(self) -> Path:
        """Where the repository goes."""
        return self.folder / "repository"

    async def clone(
        self, access: Access, *, revision: str | None = None, depth: int = 1, submodules: bool = False
    ) -> Clone:
        """Clone as the worker does."""
        self.into.mkdir(parents=True, exist_ok=True)
        return await clone(
            self.git, access, self.into, revision=revision, depth=depth, submodules=submodules, seconds=SECONDS
        )


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    """Repositories, and a place to clone them to."""
    return Ground(repos=Repos(tmp_path / "remote"), folder=tmp_path / "local")


@pytest.fixture
async def ssh(ground: Ground) -> AsyncIterator[GitSsh]:
    """The repositories, over SSH."""
    async with GitSsh(ground.repos) as server:
        yield server


@pytest.fixture
async def http(ground: Ground) -> AsyncIterator[GitHttp]:
    """The repositories, over HTTP; for the token alone."""
    async with GitHttp(ground.repos) as server:
        yield server


def agent_user() -> User | None:
    """Return a user for an agent, where this process may start others as one."""
    return find_user("61234", run.SYSTEM_PATH) if os.geteuid() == 0 else None

"""Submodule links in what is pushed."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from helpers.git import GitSetup, git_setup
from helpers.post_run import PostRunSetup, setup
from helpers.worker import Agent, agent, separate_user, worker_setup
from standins.gitssh import needs_ssh
from standins.repos import Repository, Submodule

from ccrun.spec import GitAction, PostRunActions
from ccrun.task import TaskRecord

__all__ = ["agent", "git_setup", "separate_user", "setup", "worker_setup"]
pytestmark = needs_ssh


COMMIT = "git -c user.name=A -c user.email=a@b commit -q"


@attrs.frozen(kw_only=True)
class LinkSetup:
    """A repository with the submodule `lib`, at the commit `linked`."""

    setup: PostRunSetup
    lib: Repository
    linked: str

    async def run(self, script: Callable[[], Path], *, commit: bool = True) -> TaskRecord:
        """Run a task with submodules."""
        actions = PostRunActions(git=GitAction(commit=commit, push=True, commit_message="From the agent"))
        return await self.setup.run(script, actions=actions, git_submodules=True)

    async def link(self, path: str = "lib") -> str | None:
        """Return the commit that is linked on the server."""
        found = (await self.setup.repository.files("main")).get(path)
        return None if found is None else found.decode()


@pytest.fixture
async def links(setup: PostRunSetup, git_setup: GitSetup) -> LinkSetup:
    """A repository with a submodule whose URL is relative."""
    lib = await git_setup.repos.create("group/lib", {"lib.txt": "lib\n"})
    linked = await lib.sha()
    assert linked is not None
    await setup.repository.commit({"lib": Submodule("../lib.git", linked)})
    return LinkSetup(setup=setup, lib=lib, linked=linked)


async def test_link_to_a_commit_that_only_the_agent_has_is_not_pushed(links: LinkSetup, agent: Agent) -> None:
    """Other changes are pushed, and the record names the link and the reason."""
    record = await links.run(agent(f"echo new >a.txt; cd lib; echo x >lib.txt; {COMMIT} -am inner"))
    assert links.linked == await links.link()
    assert b"new\n" == (await links.setup.repository.files("main"))["a.txt"]
    [error] = record.action_errors
    assert "git" == error.action
    assert error.error.startswith("The submodule link lib to ")
    assert error.error.endswith("its server does not have it.")


@pytest.mark.parametrize("commit", [True, False])
async def test_link_that_the_agent_has_committed_is_restored(links: LinkSetup, agent: Agent, commit: bool) -> None:
    """A commit on top of the agent's has the old link, and the agent's other changes."""
    script = f"(cd lib; echo x >lib.txt; {COMMIT} -am inner); echo new >a.txt; {COMMIT} -am outer"
    record = await links.run(agent(script), commit=commit)
    assert links.linked == await links.link()
    assert b"new\n" == (await links.setup.repository.files("main"))["a.txt"]
    [restoring, outer, *_] = await links.setup.repository.log("main")
    assert "Leave out what the server cannot have" == restoring.message.strip()
    assert "outer" == outer.message.strip()
    assert 1 == len(record.action_errors)


async def test_link_to_a_commit_of_the_server_is_pushed(links: LinkSetup, agent: Agent) -> None:
    """The agent may move a submodule to any commit that its server has."""
    newer = await links.lib.commit({"lib.txt": "newer\n"})
    # The agent has no access to the server in these tests, so it writes the same objects.
    commit = base64.b64encode((await links.lib.git("cat-file", "commit", newer)).encode()).decode()
    script = (
        "cd lib; echo newer >lib.txt; git add lib.txt; git write-tree; "
        f"git checkout -q $(base64 -d <<<{commit} | git hash-object -t commit -w --stdin)"
    )
    record = await links.run(agent(script))
    assert () == record.action_errors
    assert newer == await links.link()


async def test_new_link_without_a_server_is_left_out(links: LinkSetup, agent: Agent) -> None:
    """The agent has committed a repository that it has created."""
    script = f"git init -q made; (cd made; echo x >x; git add x; {COMMIT} -m made); git add made; {COMMIT} -m outer"
    record = await links.run(agent(script))
    assert None is await links.link("made")
    [error] = record.action_errors
    assert error.error.endswith("it has no URL in .gitmodules.")


async def test_gitmodules_does_not_hide_a_link(links: LinkSetup, agent: Agent) -> None:
    """`ignore = all` is a setting for git status, and the link is not pushed."""
    script = (
        f"(cd lib; echo x >lib.txt; {COMMIT} -am inner); git config -f .gitmodules submodule.lib.ignore all; "
        f"git config submodule.lib.ignore none; git add .gitmodules; git update-index --cacheinfo "
        f"160000,$(git -C lib rev-parse HEAD),lib; {COMMIT} -m outer"
    )
    record = await links.run(agent(script))
    assert links.linked == await links.link()
    assert b"ignore = all" in (await links.setup.repository.files("main"))[".gitmodules"]
    assert "was left out" in str(record.action_errors)


async def test_nothing_but_a_link_that_is_left_out_is_nothing_to_commit(links: LinkSetup, agent: Agent) -> None:
    """No commit is pushed."""
    before = await links.setup.repository.sha("main")
    record = await links.run(agent(f"cd lib; echo x >lib.txt; {COMMIT} -am inner"))
    assert record.git_commit is not None
    assert (before, "Nothing to commit") == (record.git_commit.sha, record.git_commit.message)
    assert before == await links.setup.repository.sha("main")

"""Clones in which only some directories are checked out, and the agent's changes in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.git import GitSetup, git_setup, ssh, ssh_access
from helpers.post_run import PostRunSetup, setup
from helpers.worker import Agent, agent, separate_user, worker_setup
from standins.gitssh import GitSsh, needs_ssh
from standins.repos import Submodule

from ccrun.task import Status

__all__ = ["agent", "git_setup", "separate_user", "setup", "ssh", "worker_setup"]
pytestmark = needs_ssh

FILES = {
    "top.txt": "top",
    "src/next.txt": "next",
    "src/lib/a.txt": "a",
    "src/lib/deep/b.txt": "b",
    "src/other/c.txt": "c",
    "docs/d.txt": "d",
    'a "b\\/e.txt': "e",
}
#: What is checked out for `src/lib`.
CHECKED_OUT = {"top.txt", "src/next.txt", "src/lib/a.txt", "src/lib/deep/b.txt"}


def files_in(directory: Path) -> set[str]:
    """Return the paths of the files in a work tree."""
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[0] != ".git"}


async def texts(setup: PostRunSetup) -> dict[str, str]:
    """Return the files of the branch on the server, without those that it had before."""
    files = await setup.repository.files()
    return {path: content.decode() for path, content in files.items() if path not in ("a.txt", "b.txt")}


@pytest.mark.parametrize("by", ["default", "branch", "commit"])
async def test_only_the_directories_are_checked_out(git_setup: GitSetup, ssh: GitSsh, by: str) -> None:
    """The files in them, and those next to and above them, are checked out. git shows no change."""
    repository = await git_setup.repos.create("demo", FILES)
    revision = {"default": None, "branch": "main", "commit": await repository.sha()}[by]
    cloned = await git_setup.clone(ssh_access(ssh.url("demo")), revision=revision, sparse=("src/lib",))
    assert CHECKED_OUT == files_in(git_setup.into)
    assert await repository.sha() == cloned.base
    assert b"" == await git_setup.git.at(git_setup.into)("status", "--porcelain")


async def test_directories_may_have_any_name(git_setup: GitSetup, ssh: GitSsh) -> None:
    """Quotes and backslashes in a name have no special meaning. A directory that does not exist has no files."""
    await git_setup.repos.create("demo", FILES)
    await git_setup.clone(ssh_access(ssh.url("demo")), sparse=('a "b\\', "missing"))
    assert {"top.txt", 'a "b\\/e.txt'} == files_in(git_setup.into)


async def test_submodules_outside_the_directories_are_not_cloned(git_setup: GitSetup, ssh: GitSsh) -> None:
    """Those inside them are."""
    inner = await git_setup.repos.create("inner", {"inner.txt": "inner"})
    sha = await inner.sha()
    assert sha is not None
    links = {path: Submodule(ssh.url("inner"), sha) for path in ("src/lib/in", "docs/out")}
    await git_setup.repos.create("demo", {**FILES, **links})
    await git_setup.clone(ssh_access(ssh.url("demo")), submodules=True, sparse=("src/lib",))
    assert "src/lib/in/inner.txt" in files_in(git_setup.into)
    assert "docs/out/inner.txt" not in files_in(git_setup.into)


async def test_empty_repository_has_no_directories(git_setup: GitSetup, ssh: GitSsh) -> None:
    """A task can start with an empty repository."""
    await git_setup.repos.create("demo", None)
    assert (await git_setup.clone(ssh_access(ssh.url("demo")), sparse=("src",))).base is None


async def test_changes_are_pushed_and_other_files_are_kept(setup: PostRunSetup, agent: Agent) -> None:
    """Files that were not checked out are not deleted by the push. New ones may be anywhere."""
    await setup.repository.commit(FILES)
    script = "rm src/lib/a.txt; echo new >src/lib/deep/b.txt; mkdir docs; echo new >docs/d.txt; echo new >docs/new.txt"
    record = await setup.run(agent(script), sparse_checkout=("src/lib",))
    assert (Status.COMPLETED, ()) == (record.status, record.action_errors)
    files = {**FILES, "src/lib/deep/b.txt": "new\n", "docs/d.txt": "new\n", "docs/new.txt": "new\n"}
    del files["src/lib/a.txt"]
    assert files == await texts(setup)


async def test_lost_index_deletes_no_file_outside_the_directories(setup: PostRunSetup, agent: Agent) -> None:
    """Without the index of the agent, git takes files that were not checked out for deleted. They are kept, and named."""
    await setup.repository.commit(FILES)
    record = await setup.run(agent("rm .git/index; echo new >top.txt"), sparse_checkout=("src/lib",))
    assert {**FILES, "top.txt": "new\n"} == await texts(setup)
    (error,) = record.action_errors
    kept = 'a "b\\/e.txt, docs/d.txt, src/other/c.txt'
    assert f"Files outside sparseCheckout are missing from the index, and were kept: {kept}." == error.error


async def test_committed_deletion_outside_the_directories_is_pushed(setup: PostRunSetup, agent: Agent) -> None:
    """What the agent has committed arrives as it made it."""
    await setup.repository.commit(FILES)
    script = "git rm -q --sparse docs/d.txt; git commit -qm 'Remove the document'"
    record = await setup.run(agent(script), sparse_checkout=("src/lib",))
    assert () == record.action_errors
    assert "docs/d.txt" not in await texts(setup)

from __future__ import annotations

import asyncio
import os

import attrs
import pytest
from helpers.changes import CLONED_FILES, CloneSetup, clone_with, setup
from helpers.git import GitSetup, agent_user, git_setup
from standins.githttp import needs_backend

from ccrun.worker.git.changes import Identity
from ccrun.worker.git.run import GitError

__all__ = ["git_setup", "setup"]
pytestmark = needs_backend


@pytest.mark.parametrize("damage", ["missing", "garbage", "locked", "fifo", "link"])
async def test_invalid_index_is_replaced(setup: CloneSetup, damage: str) -> None:
    """The index of the agent only makes staging faster."""
    index = setup.path / ".git" / "index"
    if damage != "locked":
        index.unlink()
    match damage:
        case "garbage":
            index.write_bytes(b"DIRC\0\0\0\2\0\0\0\x05 invalid")
        case "locked":
            index.with_suffix(".lock").write_bytes(b"")
        case "fifo":
            os.mkfifo(index)
        case "link":
            index.symlink_to("/etc/passwd")
    (setup.path / "changed.txt").write_text("new")
    found = await setup.changes()
    assert {**CLONED_FILES, "changed.txt": "100644 new"} == await setup.files_of(found, (await found.stage()).tree)


async def test_sparse_checkout_deletes_nothing(git_setup: GitSetup) -> None:
    """Files that are not checked out are not considered deleted."""
    setup = await clone_with(git_setup, {"a/1": "1", "b/2": "2"})
    await setup.git("sparse-checkout", "set", "a")
    assert not (setup.path / "b" / "2").exists()
    (setup.path / "a" / "1").write_text("new")
    found = await setup.changes()
    assert {"a/1": "100644 new", "b/2": "100644 2"} == await setup.files_of(found, (await found.stage()).tree)


async def test_settings_of_the_agent_are_ignored(setup: CloneSetup) -> None:
    """Settings in the repository do not change which files and contents are committed."""
    for setting in (
        "core.worktree=/etc",
        "commit.gpgSign=true",
        "core.autocrlf=true",
        "core.fileMode=false",
        "alias.add=!false",
    ):
        await setup.git("config", *setting.split("=", 1))
    (setup.path / "changed.txt").write_text("a\r\nb\r\n")
    found = await setup.changes()
    staged = await found.stage()
    assert {**CLONED_FILES, "changed.txt": "100644 a\r\nb\r\n"} == await setup.files_of(found, staged.tree)
    await found.commit(staged, "Worker commit", Identity())


async def test_missing_repository_is_an_error(setup: CloneSetup) -> None:
    """The agent has moved the `.git` directory."""
    (setup.path / ".git").rename(setup.git_setup.folder / "moved")
    with pytest.raises(GitError, match=r"^The workspace is not a git repository, or git can no longer read it\.$"):
        await setup.changes()


async def test_replaced_repository_is_an_error(setup: CloneSetup) -> None:
    """The new repository does not have the cloned commit."""
    (setup.path / ".git").rename(setup.git_setup.folder / "moved")
    await setup.git("init", "--quiet")
    with pytest.raises(GitError, match=r"^The repository no longer has the commit that was cloned"):
        await setup.changes()


async def test_unreadable_file_is_reported(setup: CloneSetup) -> None:
    """Other files are staged. git runs as a user without the permissions of root."""
    user = await asyncio.to_thread(agent_user)
    if user is None:
        pytest.skip("needs root to run git as another user")
    for path in (setup.git_setup.folder, *setup.git_setup.folder.rglob("*")):
        os.chown(path, user.uid, user.gid, follow_symlinks=False)
    for parent in (setup.git_setup.folder, *setup.git_setup.folder.parents):
        if parent.stat().st_uid == 0 and "pytest" in str(parent):
            parent.chmod(0o755)
    (setup.path / "locked").write_text("x")
    (setup.path / "locked").chmod(0)
    (setup.path / "open").write_text("y")
    os.chown(setup.path / "locked", 0, 0)
    found = await attrs.evolve(setup, user=user).changes()
    staged = await found.stage()
    assert staged.unreadable is not None
    assert "locked" in staged.unreadable
    output = await found.git("ls-tree", "--name-only", staged.tree)
    assert b"open" in output.split(b"\n")

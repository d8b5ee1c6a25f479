from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import pytest
from helpers.changes import CLONED_FILES, CloneSetup, clone_with, setup
from helpers.git import GitSetup, git_setup
from standins.githttp import needs_backend
from standins.repos import Submodule

from ccrun.worker.git.changes import Identity
from ccrun.worker.git.run import Git

__all__ = ["git_setup", "setup"]
pytestmark = needs_backend


# --- staging ---------------------------------------------------------------------------------------------------------


async def test_no_changes_are_staged_in_an_unchanged_clone(setup: CloneSetup) -> None:
    """The staged tree is that of the cloned commit."""
    found = await setup.changes()
    staged = await found.stage()
    assert (True, (), None) == (staged.is_empty, staged.left_out, staged.unreadable)
    assert CLONED_FILES == await setup.files_of(found, staged.tree)
    assert setup.cloned.base == found.head


async def test_changes_of_all_kinds_are_staged(setup: CloneSetup) -> None:
    """They are new, changed, deleted, renamed and binary files, modes, links, and names with any characters."""
    (setup.path / "changed.txt").write_text("new")
    (setup.path / "deleted.txt").unlink()
    (setup.path / "tool").chmod(0o644)
    (setup.path / "unchanged.txt").rename(setup.path / "moved.txt")
    (setup.path / "link").unlink()
    (setup.path / "link").symlink_to("/etc/passwd")
    (setup.path / "äöü").mkdir()
    (setup.path / "äöü" / "☃ \n.bin").write_text("\0bin")
    (setup.path / "run").write_text("x")
    (setup.path / "run").chmod(0o755)
    found = await setup.changes()
    staged = await found.stage()
    assert {
        "changed.txt": "100644 new",
        "tool": "100644 #!/bin/sh\n",
        "moved.txt": "100644 unchanged",
        "link": "120000 /etc/passwd",
        "äöü/☃ \n.bin": "100644 \0bin",
        "run": "100755 x",
    } == await setup.files_of(found, staged.tree)
    assert not staged.is_empty


async def test_file_with_a_name_that_is_not_utf8_is_staged(setup: CloneSetup) -> None:
    """File names are bytes."""
    Path(os.fsdecode(os.fsencode(setup.path) + b"/\xff\xfe")).write_text("x")
    found = await setup.changes()
    assert "100644 x" == (await setup.files_of(found, (await found.stage()).tree))[os.fsdecode(b"\xff\xfe")]


async def test_file_and_directory_may_replace_each_other(git_setup: GitSetup) -> None:
    """Both changes are staged together."""
    setup = await clone_with(git_setup, {"a": "file", "b/c": "in a directory"})
    (setup.path / "a").unlink()
    (setup.path / "a").mkdir()
    (setup.path / "a" / "x").write_text("x")
    (setup.path / "b" / "c").unlink()
    (setup.path / "b").rmdir()
    (setup.path / "b").write_text("b")
    found = await setup.changes()
    assert {"a/x": "100644 x", "b": "100644 b"} == await setup.files_of(found, (await found.stage()).tree)


async def test_only_selected_paths_are_staged(setup: CloneSetup) -> None:
    """Other files are as in the last commit."""
    (setup.path / "changed.txt").write_text("new")
    (setup.path / "deleted.txt").unlink()
    (setup.path / "more.txt").write_text("more")
    found = await setup.changes()
    staged = await found.stage(lambda path: path in ("deleted.txt", "more.txt"))
    expected = {**CLONED_FILES, "more.txt": "100644 more"}
    del expected["deleted.txt"]
    assert expected == await setup.files_of(found, staged.tree)


async def test_ignored_files_are_not_staged(git_setup: GitSetup) -> None:
    """`.gitignore` applies to untracked files, but not to tracked ones."""
    setup = await clone_with(git_setup, {".gitignore": "*.log\ntracked\n", "tracked": "old"})
    (setup.path / "a.log").write_text("log")
    (setup.path / "tracked").write_text("new")
    found = await setup.changes()
    assert {".gitignore", "tracked"} == set(await setup.files_of(found, (await found.stage()).tree))


async def test_special_files_are_not_staged(setup: CloneSetup) -> None:
    """FIFOs and sockets are skipped without an error."""
    os.mkfifo(setup.path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        previous = Path.cwd()
        os.chdir(setup.path)
        try:
            server.bind("sock")
        finally:
            os.chdir(previous)
        found = await setup.changes()
        staged = await found.stage()
    assert (True, CLONED_FILES) == (staged.is_empty, await setup.files_of(found, staged.tree))


async def test_nested_repository_is_not_staged(setup: CloneSetup) -> None:
    """It is reported. A submodule in `.gitmodules` is staged."""
    await setup.git("init", "--quiet", "nested")
    (setup.path / "nested" / "a").write_text("a")
    await setup.git("-C", "nested", "add", "a")
    await setup.git("-C", "nested", "commit", "--quiet", "-m", "a")
    await setup.git("init", "--quiet", "module")
    await setup.git("-C", "module", "commit", "--quiet", "--allow-empty", "-m", "a")
    (setup.path / ".gitmodules").write_text('[submodule "m"]\n\tpath = module\n\turl = https://example.com/m.git\n')
    found = await setup.changes()
    staged = await found.stage()
    assert ("nested",) == staged.left_out
    assert {*CLONED_FILES, ".gitmodules", "module"} == set(await setup.files_of(found, staged.tree))


async def test_submodule_that_was_not_cloned_is_unchanged(git_setup: GitSetup) -> None:
    """Its directory is empty, and its entry in the tree is preserved."""
    inner = await git_setup.repos.create("inner", {"a": "a"})
    sha = await inner.sha()
    assert sha is not None
    setup = await clone_with(git_setup, {"a.txt": "a", "lib": Submodule("https://example.com/inner.git", sha)})
    found = await setup.changes()
    assert (await found.stage()).is_empty


async def test_commits_of_the_agent_are_preserved(setup: CloneSetup) -> None:
    """The commit of the agent is the parent of the worker's, also with a detached HEAD."""
    (setup.path / "first.txt").write_text("1")
    await setup.git("add", "first.txt")
    await setup.git("commit", "--quiet", "-m", "Agent commit")
    agent_commit = await setup.git("rev-parse", "HEAD")
    await setup.git("checkout", "--quiet", "--detach")
    (setup.path / "second.txt").write_text("2")
    found = await setup.changes()
    assert agent_commit == found.head
    commit = await found.commit(await found.stage(), "Worker commit\n\nMore.", Identity())
    commit_text = await found.git("log", "-1", "--format=%P|%an <%ae>|%cn <%ce>|%B", commit)
    author = "Claude Code <noreply@anthropic.com>"
    assert f"{agent_commit}|{author}|{author}|Worker commit\n\nMore." == commit_text.decode().strip()
    assert "Agent commit" == await found.message(agent_commit)


async def test_first_commit_of_an_empty_repository(git_setup: GitSetup) -> None:
    """It has no parent."""
    setup = await clone_with(git_setup, None)
    (setup.path / "a").write_text("a")
    found = await setup.changes()
    staged = await found.stage()
    assert (None, False) == (found.head, staged.is_empty)
    commit = await found.commit(staged, "First", Identity())
    assert "" == (await found.git("log", "-1", "--format=%P", commit)).decode().strip()


async def test_identity_from_gitconfig(git_setup: GitSetup) -> None:
    """The `.gitconfig` in the root directory sets it. Characters that are invalid in an identity are removed."""
    setup = await clone_with(git_setup, {".gitconfig": '[user]\n\tname = "Ro<b>ot\\n"\n\temail = bot@example.com\n'})
    found = await setup.changes()
    await found.stage()
    assert Identity(name="Robot", email="bot@example.com") == await found.identity()


@pytest.mark.parametrize("content", [None, "[user\n", "[include]\n\tpath = /etc/passwd\n", "[user]\n\tname\n"])
async def test_default_identity_without_a_valid_gitconfig(git_setup: GitSetup, content: str | None) -> None:
    """The file is missing, invalid or includes another file."""
    setup = await clone_with(git_setup, {"a": "a"} if content is None else {".gitconfig": content})
    found = await setup.changes()
    await found.stage()
    assert Identity() == await found.identity()


# --- .env ------------------------------------------------------------------------------------------------------------


async def test_dotenv_of_the_worker_is_never_staged(git_setup: GitSetup) -> None:
    """The agent has added it to the index, and the repository has a `.env` as well."""
    setup = await clone_with(git_setup, {".env": "ORIGINAL=1\n", "a": "a"})
    (setup.path / ".env").write_text("SECRET=made-up\n")
    await setup.git("add", "--force", ".env")
    found = await setup.changes(excludes_dotenv=True)
    staged = await found.stage()
    assert (True, "100644 ORIGINAL=1\n") == (staged.is_empty, (await setup.files_of(found, staged.tree))[".env"])
    assert not await found.contains_dotenv()


async def test_dotenv_committed_by_the_agent_is_detected(setup: CloneSetup) -> None:
    """It is detected even if a later commit removes it."""
    (setup.path / ".env").write_text("SECRET=made-up\n")
    await setup.git("add", "--force", ".env")
    await setup.git("commit", "--quiet", "-m", "Add")
    await setup.git("rm", "--quiet", "--cached", ".env")
    await setup.git("commit", "--quiet", "-m", "Remove")
    assert await (await setup.changes(excludes_dotenv=True)).contains_dotenv()
    assert not await (await setup.changes(excludes_dotenv=False)).contains_dotenv()


# --- patches ---------------------------------------------------------------------------------------------------------


async def test_patch_restores_the_tree(setup: CloneSetup) -> None:
    """`git apply` restores committed and uncommitted changes, also of binary files."""
    (setup.path / "first.txt").write_text("1")
    await setup.git("add", "first.txt")
    await setup.git("commit", "--quiet", "-m", "first")
    (setup.path / "changed.txt").write_bytes(bytes(range(256)))
    (setup.path / "deleted.txt").unlink()
    found = await setup.changes()
    staged = await found.stage()
    patch = io.BytesIO()
    assert await found.patch(patch, old=found.base, max_bytes=10_000_000)
    clone = setup.git_setup.folder / "clone"
    await setup.git_setup.git("clone", "--quiet", f"file://{setup.repository.path}", str(clone))
    await setup.git_setup.git.at(clone)("apply", "--index", "-", stdin=patch.getvalue())
    assert staged.tree == (await setup.git_setup.git.at(clone)("write-tree")).decode().strip()


async def test_patch_is_limited(setup: CloneSetup) -> None:
    """The result states that the patch is incomplete."""
    (setup.path / "large.txt").write_text("line\n" * 100_000)
    found = await setup.changes()
    await found.stage()
    patch = io.BytesIO()
    assert not await found.patch(patch, old=found.base, max_bytes=1000)
    assert 1000 == len(patch.getvalue())


async def test_environment_of_git_is_minimal(setup: CloneSetup) -> None:
    """It has no secrets of the worker, and all protocols are disabled."""
    found = await setup.changes()
    assert isinstance(found.git, Git)
    assert "none" == found.git.environment["GIT_ALLOW_PROTOCOL"]
    assert not [name for name in found.git.environment if "TOKEN" in name or "KEY" in name or "SSH_AUTH" in name]

from __future__ import annotations

import asyncio
import io
import os
import socket
from pathlib import Path

import attrs
import pytest
from helpers.git import GitSetup, agent_user, git_at, git_setup, http_access
from standins.githttp import GitHttp, needs_backend
from standins.repos import Executable, Link, Repository, Submodule

from ccrun.process.user import User
from ccrun.worker.git import changes
from ccrun.worker.git.changes import Changes, Identity
from ccrun.worker.git.clone import Clone
from ccrun.worker.git.run import Git, GitError

__all__ = ["git_setup"]
pytestmark = needs_backend


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


# --- a repository that the agent has changed -------------------------------------------------------------------------


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
    assert await found.patch(patch, max_bytes=10_000_000)
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
    assert not await found.patch(patch, max_bytes=1000)
    assert 1000 == len(patch.getvalue())


async def test_environment_of_git_is_minimal(setup: CloneSetup) -> None:
    """It has no secrets of the worker, and all protocols are disabled."""
    found = await setup.changes()
    assert isinstance(found.git, Git)
    assert "none" == found.git.environment["GIT_ALLOW_PROTOCOL"]
    assert not [name for name in found.git.environment if "TOKEN" in name or "KEY" in name or "SSH_AUTH" in name]

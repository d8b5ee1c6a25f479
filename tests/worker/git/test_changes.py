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
class Tree:
    """A clone as an agent works in it."""

    git_setup: GitSetup
    repository: Repository
    cloned: Clone
    user: User | None = None

    @property
    def path(self) -> Path:
        """The agent's folder."""
        return self.git_setup.into

    async def git(self, *arguments: str) -> str:
        """Run git as the agent might."""
        identity = {"GIT_AUTHOR_NAME": "Agent", "GIT_AUTHOR_EMAIL": "agent@example.com"}
        identity |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in identity.items()}
        return (await self.git_setup.git.at(self.path, **identity)(*arguments)).decode().strip()

    async def changes(self, *, excludes_dotenv: bool = False) -> Changes:
        """Look at what was left."""
        git = git_at(self.git_setup.folder / "home", self.user, protocols="")
        return await changes.examine(
            git, self.path, base=self.cloned.base, excludes_dotenv=excludes_dotenv, room=self.git_setup.folder
        )

    async def listed(self, found: Changes, tree: str) -> dict[str, str]:
        """Return mode and content of each file of a tree, but for the files that it was cloned with."""
        printed = await found.git("ls-tree", "-r", "-z", "--full-tree", tree)
        listed = {}
        for line in printed.split(b"\0")[:-1]:
            told, path = line.split(b"\t")
            mode, kind, blob = told.decode().split(" ")
            content = (await found.git("cat-file", "blob", blob)).decode() if kind == "blob" else blob
            listed[os.fsdecode(path)] = f"{mode} {content}"
        return listed


FILES = {
    "kept.txt": "kept",
    "gone.txt": "gone",
    "changed.txt": "old",
    "tool": Executable("#!/bin/sh\n"),
    "link": Link("kept.txt"),
}
KEPT = {
    "kept.txt": "100644 kept",
    "gone.txt": "100644 gone",
    "changed.txt": "100644 old",
    "tool": "100755 #!/bin/sh\n",
    "link": "120000 kept.txt",
}


async def make(git_setup: GitSetup, files: dict[str, object] | None = FILES) -> Tree:
    """Clone a repository with these files."""
    repository = await git_setup.repos.create("demo", files)  # type: ignore[arg-type]
    async with GitHttp(git_setup.repos, public=True) as server:
        cloned = await git_setup.clone(http_access(server.url("demo"), None))
    return Tree(git_setup=git_setup, repository=repository, cloned=cloned)


@pytest.fixture
async def tree(git_setup: GitSetup) -> Tree:
    """A clone with a few files."""
    return await make(git_setup)


# --- what is taken up ------------------------------------------------------------------------------------------------


async def test_an_unchanged_tree_is_empty(tree: Tree) -> None:
    """Nothing to commit, and the tree is that of the base."""
    found = await tree.changes()
    staged = await found.stage()
    assert (True, (), None) == (staged.is_empty, staged.left_out, staged.unreadable)
    assert KEPT == await tree.listed(found, staged.tree)
    assert tree.cloned.base == found.head


async def test_all_kinds_of_changes_are_taken_up(tree: Tree) -> None:
    """New, changed, removed, renamed and binary files, modes, links, and names in any script."""
    (tree.path / "changed.txt").write_text("new")
    (tree.path / "gone.txt").unlink()
    (tree.path / "tool").chmod(0o644)
    (tree.path / "kept.txt").rename(tree.path / "moved.txt")
    (tree.path / "link").unlink()
    (tree.path / "link").symlink_to("/etc/passwd")
    (tree.path / "äöü").mkdir()
    (tree.path / "äöü" / "☃ \n.bin").write_text("\0bin")
    (tree.path / "run").write_text("x")
    (tree.path / "run").chmod(0o755)
    found = await tree.changes()
    staged = await found.stage()
    assert {
        "changed.txt": "100644 new",
        "tool": "100644 #!/bin/sh\n",
        "moved.txt": "100644 kept",
        "link": "120000 /etc/passwd",
        "äöü/☃ \n.bin": "100644 \0bin",
        "run": "100755 x",
    } == await tree.listed(found, staged.tree)
    assert not staged.is_empty


async def test_a_name_that_is_no_utf8_is_taken_up(tree: Tree) -> None:
    """Names of files are bytes."""
    Path(os.fsdecode(os.fsencode(tree.path) + b"/\xff\xfe")).write_text("x")
    found = await tree.changes()
    assert "100644 x" == (await tree.listed(found, (await found.stage()).tree))[os.fsdecode(b"\xff\xfe")]


async def test_a_file_may_become_a_folder_and_a_folder_a_file(git_setup: GitSetup) -> None:
    """In one commit."""
    tree = await make(git_setup, {"a": "file", "b/c": "in a folder"})
    (tree.path / "a").unlink()
    (tree.path / "a").mkdir()
    (tree.path / "a" / "x").write_text("x")
    (tree.path / "b" / "c").unlink()
    (tree.path / "b").rmdir()
    (tree.path / "b").write_text("b")
    found = await tree.changes()
    assert {"a/x": "100644 x", "b": "100644 b"} == await tree.listed(found, (await found.stage()).tree)


async def test_only_wanted_paths_are_taken_up(tree: Tree) -> None:
    """The others stay as they were in the last commit."""
    (tree.path / "changed.txt").write_text("new")
    (tree.path / "gone.txt").unlink()
    (tree.path / "more.txt").write_text("more")
    found = await tree.changes()
    staged = await found.stage(lambda path: path in ("gone.txt", "more.txt"))
    expected = {**KEPT, "more.txt": "100644 more"}
    del expected["gone.txt"]
    assert expected == await tree.listed(found, staged.tree)


async def test_what_git_ignores_is_left_alone(git_setup: GitSetup) -> None:
    """As `.gitignore` and the agent's own excludes of the repository say; tracked files are never ignored."""
    tree = await make(git_setup, {".gitignore": "*.log\ntracked\n", "tracked": "old"})
    (tree.path / "a.log").write_text("log")
    (tree.path / "tracked").write_text("new")
    found = await tree.changes()
    assert {".gitignore", "tracked"} == set(await tree.listed(found, (await found.stage()).tree))


async def test_what_is_no_file_is_left_alone(tree: Tree) -> None:
    """Pipes and sockets neither hang nor fail it."""
    os.mkfifo(tree.path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tree.path)
        try:
            server.bind("sock")
        finally:
            os.chdir(here)
        found = await tree.changes()
        staged = await found.stage()
    assert (True, KEPT) == (staged.is_empty, await tree.listed(found, staged.tree))


async def test_a_repository_inside_is_left_out_and_named(tree: Tree) -> None:
    """Only its name could be committed; a submodule that `.gitmodules` tells of is another matter."""
    await tree.git("init", "--quiet", "nested")
    (tree.path / "nested" / "a").write_text("a")
    await tree.git("-C", "nested", "add", "a")
    await tree.git("-C", "nested", "commit", "--quiet", "-m", "a")
    await tree.git("init", "--quiet", "module")
    await tree.git("-C", "module", "commit", "--quiet", "--allow-empty", "-m", "a")
    (tree.path / ".gitmodules").write_text('[submodule "m"]\n\tpath = module\n\turl = https://example.com/m.git\n')
    found = await tree.changes()
    staged = await found.stage()
    assert ("nested",) == staged.left_out
    assert {*KEPT, ".gitmodules", "module"} == set(await tree.listed(found, staged.tree))


async def test_a_submodule_that_was_not_asked_for_is_no_change(git_setup: GitSetup) -> None:
    """Its folder is empty, and stays committed as it was."""
    inner = await git_setup.repos.create("inner", {"a": "a"})
    sha = await inner.sha()
    assert sha is not None
    tree = await make(git_setup, {"a.txt": "a", "lib": Submodule("https://example.com/inner.git", sha)})
    found = await tree.changes()
    assert (await found.stage()).is_empty


async def test_the_agents_own_commits_are_kept(tree: Tree) -> None:
    """What it committed by itself is below what is taken up now; on a branch or not."""
    (tree.path / "first.txt").write_text("1")
    await tree.git("add", "first.txt")
    await tree.git("commit", "--quiet", "-m", "The agent's own")
    own = await tree.git("rev-parse", "HEAD")
    await tree.git("checkout", "--quiet", "--detach")
    (tree.path / "second.txt").write_text("2")
    found = await tree.changes()
    assert own == found.head
    commit = await found.commit(await found.stage(), "Ours\n\nMore.", Identity())
    told = await found.git("log", "-1", "--format=%P|%an <%ae>|%cn <%ce>|%B", commit)
    who = "Claude Code <noreply@anthropic.com>"
    assert f"{own}|{who}|{who}|Ours\n\nMore." == told.decode().strip()
    assert "The agent's own" == await found.message(own)


async def test_an_empty_repository_gets_its_first_commit(git_setup: GitSetup) -> None:
    """Without a parent."""
    tree = await make(git_setup, None)
    (tree.path / "a").write_text("a")
    found = await tree.changes()
    staged = await found.stage()
    assert (None, False) == (found.head, staged.is_empty)
    commit = await found.commit(staged, "First", Identity())
    assert "" == (await found.git("log", "-1", "--format=%P", commit)).decode().strip()


async def test_the_identity_is_that_of_the_repository(git_setup: GitSetup) -> None:
    """As `.gitconfig` at its top says, without what could end a header; else that of Claude Code."""
    tree = await make(git_setup, {".gitconfig": '[user]\n\tname = "Ro<b>ot\\n"\n\temail = bot@example.com\n'})
    found = await tree.changes()
    await found.stage()
    assert Identity(name="Robot", email="bot@example.com") == await found.identity()


@pytest.mark.parametrize("content", [None, "[user\n", "[include]\n\tpath = /etc/passwd\n", "[user]\n\tname\n"])
async def test_a_gitconfig_that_says_nothing_leaves_the_usual_identity(
    git_setup: GitSetup, content: str | None
) -> None:
    """Missing, broken, or leading elsewhere."""
    tree = await make(git_setup, {"a": "a"} if content is None else {".gitconfig": content})
    found = await tree.changes()
    await found.stage()
    assert Identity() == await found.identity()


# --- .env ------------------------------------------------------------------------------------------------------------


async def test_our_dotenv_is_never_taken_up(git_setup: GitSetup) -> None:
    """Not even when the agent has added it to its index, or the repository has one of its own."""
    tree = await make(git_setup, {".env": "OWN=1\n", "a": "a"})
    (tree.path / ".env").write_text("SECRET=made-up\n")
    await tree.git("add", "--force", ".env")
    found = await tree.changes(excludes_dotenv=True)
    staged = await found.stage()
    assert (True, "100644 OWN=1\n") == (staged.is_empty, (await tree.listed(found, staged.tree))[".env"])
    assert not await found.contains_dotenv()


async def test_a_commit_of_our_dotenv_by_the_agent_is_noticed(tree: Tree) -> None:
    """Also when a later commit has taken it out again."""
    (tree.path / ".env").write_text("SECRET=made-up\n")
    await tree.git("add", "--force", ".env")
    await tree.git("commit", "--quiet", "-m", "Leak")
    await tree.git("rm", "--quiet", "--cached", ".env")
    await tree.git("commit", "--quiet", "-m", "Hide")
    assert await (await tree.changes(excludes_dotenv=True)).contains_dotenv()
    assert not await (await tree.changes(excludes_dotenv=False)).contains_dotenv()


# --- what the agent did to git ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "garbage", "locked", "fifo", "link"])
async def test_an_index_that_is_no_good_is_made_anew(tree: Tree, damage: str) -> None:
    """The agent's own index only saves time."""
    index = tree.path / ".git" / "index"
    if damage != "locked":
        index.unlink()
    match damage:
        case "garbage":
            index.write_bytes(b"DIRC\0\0\0\2\0\0\0\x05 nonsense")
        case "locked":
            index.with_suffix(".lock").write_bytes(b"")
        case "fifo":
            os.mkfifo(index)
        case "link":
            index.symlink_to("/etc/passwd")
    (tree.path / "changed.txt").write_text("new")
    found = await tree.changes()
    assert {**KEPT, "changed.txt": "100644 new"} == await tree.listed(found, (await found.stage()).tree)


async def test_a_sparse_checkout_removes_nothing(git_setup: GitSetup) -> None:
    """What the agent has no files of is not taken for removed."""
    tree = await make(git_setup, {"a/1": "1", "b/2": "2"})
    await tree.git("sparse-checkout", "set", "a")
    assert not (tree.path / "b" / "2").exists()
    (tree.path / "a" / "1").write_text("new")
    found = await tree.changes()
    assert {"a/1": "100644 new", "b/2": "100644 2"} == await tree.listed(found, (await found.stage()).tree)


async def test_settings_of_the_agents_decide_nothing(tree: Tree) -> None:
    """Another work tree, a signature, a filter, an alias: what is committed is what stands in the workspace."""
    for setting in (
        "core.worktree=/etc",
        "commit.gpgSign=true",
        "core.autocrlf=true",
        "core.fileMode=false",
        "alias.add=!false",
    ):
        await tree.git("config", *setting.split("=", 1))
    (tree.path / "changed.txt").write_text("a\r\nb\r\n")
    found = await tree.changes()
    staged = await found.stage()
    assert {**KEPT, "changed.txt": "100644 a\r\nb\r\n"} == await tree.listed(found, staged.tree)
    await found.commit(staged, "Ours", Identity())


async def test_a_workspace_without_a_repository_is_told(tree: Tree) -> None:
    """The agent may have removed it."""
    (tree.path / ".git").rename(tree.git_setup.folder / "moved-away")
    with pytest.raises(GitError, match=r"^The workspace is not a git repository, or git can no longer read it\.$"):
        await tree.changes()


async def test_another_repository_in_its_place_is_told(tree: Tree) -> None:
    """The commit that was cloned is not in it."""
    (tree.path / ".git").rename(tree.git_setup.folder / "moved-away")
    await tree.git("init", "--quiet")
    with pytest.raises(GitError, match=r"^The repository no longer has the commit that was cloned"):
        await tree.changes()


async def test_a_file_that_cannot_be_read_is_told_and_the_others_go(tree: Tree) -> None:
    """As a user who may not read everything."""
    user = await asyncio.to_thread(agent_user)
    if user is None:
        pytest.skip("needs root, to work as a user who may not read everything")
    for folder in (tree.git_setup.folder, *tree.git_setup.folder.rglob("*")):
        os.chown(folder, user.uid, user.gid, follow_symlinks=False)
    for above in (tree.git_setup.folder, *tree.git_setup.folder.parents):
        if above.stat().st_uid == 0 and "pytest" in str(above):
            above.chmod(0o755)
    (tree.path / "locked").write_text("x")
    (tree.path / "locked").chmod(0)
    (tree.path / "open").write_text("y")
    os.chown(tree.path / "locked", 0, 0)
    found = await attrs.evolve(tree, user=user).changes()
    staged = await found.stage()
    assert staged.unreadable is not None
    assert "locked" in staged.unreadable
    printed = await found.git("ls-tree", "--name-only", staged.tree)
    assert b"open" in printed.split(b"\n")


# --- what leaves -----------------------------------------------------------------------------------------------------


async def test_a_patch_gives_the_tree_back(tree: Tree) -> None:
    """Of what was committed and what was not, binary files included; `git apply` takes it."""
    (tree.path / "first.txt").write_text("1")
    await tree.git("add", "first.txt")
    await tree.git("commit", "--quiet", "-m", "first")
    (tree.path / "changed.txt").write_bytes(bytes(range(256)))
    (tree.path / "gone.txt").unlink()
    found = await tree.changes()
    staged = await found.stage()
    patch = io.BytesIO()
    assert await found.patch(patch, max_bytes=10_000_000)
    fresh = tree.git_setup.folder / "fresh"
    await tree.git_setup.git("clone", "--quiet", f"file://{tree.repository.path}", str(fresh))
    await tree.git_setup.git.at(fresh)("apply", "--index", "-", stdin=patch.getvalue())
    assert staged.tree == (await tree.git_setup.git.at(fresh)("write-tree")).decode().strip()


async def test_a_patch_ends_at_its_bound(tree: Tree) -> None:
    """And says that it is not whole."""
    (tree.path / "large.txt").write_text("line\n" * 100_000)
    found = await tree.changes()
    await found.stage()
    patch = io.BytesIO()
    assert not await found.patch(patch, max_bytes=1000)
    assert 1000 == len(patch.getvalue())


async def test_git_at_work_has_no_more_than_it_needs(tree: Tree) -> None:
    """No variable of the worker's own, and no protocol at all."""
    found = await tree.changes()
    assert isinstance(found.git, Git)
    assert "none" == found.git.environment["GIT_ALLOW_PROTOCOL"]
    assert not [name for name in found.git.environment if "TOKEN" in name or "KEY" in name or "SSH_AUTH" in name]

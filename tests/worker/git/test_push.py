from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from helpers.git import SECONDS, GitSetup, git_setup, http_access, ssh_access
from standins.githttp import GitHttp
from standins.gitssh import GitSsh, Mode, needs_ssh
from standins.repos import Executable, Link, Repository

from ccrun.task import Recovery
from ccrun.worker.git import changes, push
from ccrun.worker.git.changes import Identity
from ccrun.worker.git.clone import Clone, PackSnapshot
from ccrun.worker.git.push import BranchMoved, Push, Pushed, import_commit
from ccrun.worker.git.remote import Access
from ccrun.worker.git.run import Git, GitError

__all__ = ["git_setup"]
pytestmark = needs_ssh

IDENTITY = Identity(name="Bot", email="bot@example.com")


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
        self, files: Any = None, *, revision: str | None = None, depth: int = 1, **options: Any
    ) -> CloneSetup:
        """Create the repository `demo` with these files, and clone it."""
        repository = await self._git_setup.repos.create("demo", files, **options)
        return await self.clone(repository, revision=revision, depth=depth)

    async def clone(self, repository: Repository, *, revision: str | None = None, depth: int = 1) -> CloneSetup:
        """Clone an existing repository."""
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


LINES = "".join(f"line {number}\n" for number in range(20))


# --- a branch that has not moved -------------------------------------------------------------------------------------


async def test_changes_reach_the_branch(clones: CloneFactory) -> None:
    """Changes of all kinds become one commit, with the cloned commit as its parent."""
    setup = await clones.create({"a.txt": "old", "deleted.txt": "x", "tool": "t"})
    setup.write(a__txt="new", b__txt="b")
    (setup.path / "deleted.txt").unlink()
    (setup.path / "tool").chmod(0o755)
    (setup.path / "link").symlink_to("a.txt")
    (setup.path / "ü☃").write_bytes(bytes(range(256)))
    pushed = await setup.push()
    assert None is pushed.recovery
    assert pushed.sha == await setup.repository.sha("main")
    assert {
        "a.txt": b"new",
        "b.txt": b"b",
        "tool": b"t",
        "link": b"a.txt",
        "ü☃": bytes(range(256)),
    } == await setup.repository.files("main")
    modes = await setup.repository.modes("main")
    assert ("100755", "120000") == (modes["tool"], modes["link"])
    [commit, base] = await setup.repository.log("main")
    assert ((setup.cloned.base,), "Bot <bot@example.com>") == (commit.parents, commit.author)
    assert setup.cloned.base == base.sha


async def test_commits_of_the_agent_are_pushed(clones: CloneFactory) -> None:
    """They precede the commit of the worker and are unchanged."""
    setup = await clones.create({"a.txt": "old"})
    setup.write(b__txt="b")
    await setup.git("add", "b.txt")
    await setup.git("commit", "--quiet", "-m", "Agent commit")
    setup.write(c__txt="c")
    await setup.push()
    messages = [commit.message.strip() for commit in await setup.repository.log("main")]
    assert ["Worker commit", "Agent commit"] == messages[:2]


async def test_first_branch_of_an_empty_repository_is_created(clones: CloneFactory) -> None:
    """It has the name from the request."""
    setup = await clones.create(None)
    setup.write(a__txt="a")
    pushed = await setup.push("trunk")
    assert {"trunk": pushed.sha} == await setup.repository.branches()


async def test_missing_branch_is_created(clones: CloneFactory) -> None:
    """This also works with a detached HEAD."""
    setup = await clones.create({"a.txt": "old"})
    await setup.git("checkout", "--quiet", "--detach")
    setup.write(a__txt="new")
    pushed = await setup.push("feature/x")
    assert {"main": setup.cloned.base, "feature/x": pushed.sha} == await setup.repository.branches()


async def test_branch_behind_the_clone_is_fast_forwarded(clones: CloneFactory, git_setup: GitSetup) -> None:
    """The clone is shallow, so its history is fetched to find the commit of the branch."""
    repository = await git_setup.repos.create("demo", {"a.txt": "1"}, allow_any_sha1=True)
    await repository.make_branch("topic")
    for number in "234":
        await repository.commit({"a.txt": number}, branch="topic")
    setup = await clones.clone(repository, revision="topic")
    setup.write(b__txt="b")
    pushed = await setup.push("main", rebases=False)
    assert None is pushed.recovery
    assert 5 == len(await repository.log("main"))


async def test_repeated_push_changes_nothing(clones: CloneFactory) -> None:
    """The branch is already at the commit."""
    setup = await clones.create({"a.txt": "old"})
    setup.write(a__txt="new")
    bare_repo = await setup.import_commit()
    wanted = Push(branch="main", base=setup.cloned.base, identity=IDENTITY, rebases=True)
    first = await push.push(bare_repo, setup.access, wanted, seconds=SECONDS)
    assert first == await push.push(bare_repo, setup.access, wanted, seconds=SECONDS)


async def test_push_over_http_with_a_token(clones: CloneFactory, git_setup: GitSetup) -> None:
    """The changes reach the branch as they do over SSH."""
    repository = await git_setup.repos.create("demo", {"a.txt": "old"})
    async with GitHttp(git_setup.repos) as server:
        access = http_access(server.url("demo"))
        cloned = await git_setup.clone(access)
        snapshot = await PackSnapshot.of(git_setup.into)
        clones.snapshots.append(snapshot)
        setup = CloneSetup(
            git_setup=git_setup,
            repository=repository,
            access=access,
            cloned=cloned,
            snapshot=snapshot,
        )
        setup.write(a__txt="new")
        pushed = await setup.push()
    assert pushed.sha == await repository.sha("main")


# --- a branch that has moved -----------------------------------------------------------------------------------------


async def test_changes_of_other_files_are_rebased(clones: CloneFactory) -> None:
    """There is no conflict, and the remote changes are preserved."""
    setup = await clones.create({"a.txt": "old", "b.txt": "old"})
    remote = await setup.repository.commit({"b.txt": "remote"})
    setup.write(a__txt="local")
    pushed = await setup.push()
    assert Recovery(method="rebase", remote_sha=remote) == pushed.recovery
    assert {"a.txt": b"local", "b.txt": b"remote"} == await setup.repository.files("main")
    assert (remote,) == (await setup.repository.log("main"))[0].parents


async def test_conflicting_lines_of_the_agent_are_used(clones: CloneFactory) -> None:
    """The other lines of the file are merged, and the file is reported."""
    setup = await clones.create({"a.txt": LINES})
    remote = await setup.repository.commit(
        {"a.txt": LINES.replace("line 3\n", "REMOTE 3\n").replace("line 15", "REMOTE 15")}
    )
    setup.write(a__txt=LINES.replace("line 3\n", "LOCAL 3\n"))
    pushed = await setup.push()
    assert Recovery(method="rebase", remote_sha=remote, conflict_files=("a.txt",)) == pushed.recovery
    expected = LINES.replace("line 3\n", "LOCAL 3\n").replace("line 15", "REMOTE 15")
    assert {"a.txt": expected.encode()} == await setup.repository.files("main")


@pytest.mark.parametrize(
    ("remote", "local", "expected"),
    [
        ({"a.txt": None}, {"a.txt": "local"}, {"a.txt": b"local"}),
        ({"a.txt": "remote"}, {"a.txt": None}, {}),
        ({"n.txt": "remote"}, {"n.txt": "local"}, {"n.txt": b"local", "a.txt": b"old"}),
        ({"a.txt": b"\0remote"}, {"a.txt": b"\0local"}, {"a.txt": b"\0local"}),
        ({"l": Link("x")}, {"l": Link("y")}, {"l": b"y", "a.txt": b"old"}),
        ({"d": "file"}, {"d/e": "in a directory"}, {"d/e": b"in a directory", "a.txt": b"old"}),
    ],
    ids=["removed-changed", "changed-removed", "both-added", "binary", "links", "file-directory"],
)
async def test_conflicting_files_of_the_agent_are_used(
    clones: CloneFactory, remote: Any, local: Any, expected: Any
) -> None:
    """The conflicts: changed and removed, added twice, binary, links, a file and a directory of the same name."""
    setup = await clones.create({"a.txt": "old", "keep.txt": "k"})
    await setup.repository.commit(remote)
    for name, content in local.items():
        path = setup.path / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        match content:
            case Link(target=target):
                path.symlink_to(target)
            case str():
                path.write_text(content)
            case bytes():
                path.write_bytes(content)
    pushed = await setup.push()
    assert pushed.recovery is not None
    files = await setup.repository.files("main")
    del files["keep.txt"]
    if pushed.recovery.method == "rebase":
        assert set(pushed.recovery.conflict_files) <= {*remote, *local, "d~HEAD"}
        assert pushed.recovery.conflict_files
    assert expected == files


async def test_several_commits_are_rebased_in_order(clones: CloneFactory) -> None:
    """Each has its message and its author."""
    setup = await clones.create({"a.txt": "old"})
    await setup.repository.commit({"b.txt": "remote"})
    for number in "12":
        setup.write(a__txt=number)
        await setup.git("commit", "--quiet", "-a", "-m", f"Commit {number}")
    setup.write(a__txt="3")
    await setup.push()
    commits = [(commit.message.strip(), commit.author) for commit in await setup.repository.log("main")]
    assert [
        ("Worker commit", "Bot <bot@example.com>"),
        ("Commit 2", "agent <agent>"),
        ("Commit 1", "agent <agent>"),
    ] == commits[:3]


async def test_commits_are_rebased_onto_a_rewritten_branch(clones: CloneFactory) -> None:
    """The branch no longer contains the cloned commit."""
    setup = await clones.create({"a.txt": "old"})
    other = await setup.git_setup.repos.create("other", {"z.txt": "z"})
    await setup.repository.git("fetch", "--quiet", f"file://{other.path}", "+main:main")
    remote = await setup.repository.sha("main")
    setup.write(b__txt="local")
    pushed = await setup.push()
    assert remote is not None
    assert Recovery(method="rebase", remote_sha=remote) == pushed.recovery
    assert {"z.txt": b"z", "b.txt": b"local"} == await setup.repository.files("main")


async def test_branch_is_replaced_when_a_rebase_is_impossible(clones: CloneFactory) -> None:
    """The history exceeds `MAX_REBASED`. The record has the replaced commit, so that it can be restored."""
    setup = await clones.create({"a.txt": "old"})
    remote = await setup.repository.commit({"b.txt": "remote"})
    parent = await setup.git("rev-parse", "HEAD")
    many = "".join(
        f"commit refs/heads/many\ncommitter a <a@b> {1_700_000_000 + number} +0000\ndata 1\nx\n"
        + (f"from {parent}\n" if number == 0 else "")
        + f"M 100644 inline n.txt\ndata {len(str(number))}\n{number}\n"
        for number in range(push.MAX_REBASED + 1)
    )
    await setup.git_setup.git.at(setup.path)("fast-import", "--quiet", stdin=many.encode())
    await setup.git("checkout", "--quiet", "many")
    pushed = await setup.push()
    assert Recovery(method="force-with-lease", remote_sha=remote) == pushed.recovery
    assert {"a.txt": b"old", "n.txt": str(push.MAX_REBASED).encode()} == await setup.repository.files("main")


async def test_moved_branch_is_an_error_without_rebases(clones: CloneFactory) -> None:
    """Nothing is pushed, and the error has the commit of the branch."""
    setup = await clones.create({"a.txt": "old"})
    remote = await setup.repository.commit({"b.txt": "remote"})
    setup.write(a__txt="local")
    with pytest.raises(BranchMoved, match=rf"^main has moved to {remote[:12]}, so nothing was pushed\.$"):
        await setup.push(rebases=False)
    assert remote == await setup.repository.sha("main")


async def test_concurrent_push_loses_nothing(clones: CloneFactory) -> None:
    """After a push between fetch and push, the worker fetches and rebases again."""
    setup = await clones.create({"a.txt": "old"})
    setup.write(a__txt="local")
    remote_shas: list[str] = []

    async def push_concurrently(command: str) -> None:
        if "receive-pack" in command and len(remote_shas) < 2:
            remote_shas.append(await setup.repository.commit({f"{len(remote_shas)}.txt": "remote"}))

    clones.servers[-1].before = push_concurrently
    pushed = await setup.push()
    assert pushed.recovery is not None
    assert remote_shas[-1] == pushed.recovery.remote_sha
    assert {"0.txt", "1.txt", "a.txt"} == set(await setup.repository.files("main"))


async def test_push_fails_after_repeated_concurrent_pushes(clones: CloneFactory) -> None:
    """The worker attempts it `PUSH_ATTEMPTS` times."""
    setup = await clones.create({"a.txt": "old"})
    setup.write(a__txt="local")
    remote_shas: list[str] = []

    async def push_concurrently(command: str) -> None:
        if "receive-pack" in command:
            remote_shas.append(await setup.repository.commit({f"{len(remote_shas)}.txt": "remote"}))

    clones.servers[-1].before = push_concurrently
    with pytest.raises(GitError, match=r"^main was changed by others during each attempt"):
        await setup.push()
    assert push.PUSH_ATTEMPTS == len(remote_shas)
    assert remote_shas[-1] == await setup.repository.sha("main")


# --- rejected pushes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["update", "pre-receive"])
async def test_rejection_has_the_message_of_the_server(clones: CloneFactory, hook: str) -> None:
    """The branch is protected, as on GitHub."""
    setup = await clones.create({"a.txt": "old"})
    setup.repository.protect("main", hook=hook)
    setup.write(a__txt="local")
    with pytest.raises(
        GitError, match=r"^The server rejected the push to main: .*GH006: Protected branch update failed"
    ):
        await setup.push()
    assert setup.cloned.base == await setup.repository.sha("main")


async def test_push_to_a_read_only_repository_fails(clones: CloneFactory) -> None:
    """The clone has succeeded."""
    setup = await clones.create({"a.txt": "old"})
    clones.servers[-1].read_only = True
    setup.write(a__txt="local")
    with pytest.raises(GitError):
        await setup.push()
    assert setup.cloned.base == await setup.repository.sha("main")


async def test_push_to_a_server_that_hangs_is_stopped(clones: CloneFactory) -> None:
    """The push has a timeout."""
    setup = await clones.create({"a.txt": "old"})
    setup.write(a__txt="local")
    clones.servers[-1].mode = Mode.HANG
    with pytest.raises(GitError, match=r"^The repository was not pushed within 1 s"):
        await setup.push(seconds=1)


# --- hostile packs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"garbage", b"PACK\0\0\0\2\0\0\0\1x"])
async def test_invalid_pack_is_rejected(clones: CloneFactory, content: bytes) -> None:
    """It is not imported."""
    setup = await clones.create({"a.txt": "old"})
    with pytest.raises(GitError):
        await setup.import_pack("1" * 40, content)


async def test_commit_with_missing_objects_is_rejected(clones: CloneFactory) -> None:
    """The tree of the commit does not exist."""
    setup = await clones.create({"a.txt": "old"})
    commit = (
        b"tree 1234567890123456789012345678901234567890\nparent %s\n" % str(setup.cloned.base).encode()
        + b"author a <a> 1 +0000\ncommitter a <a> 1 +0000\n\nx\n"
    )
    git = setup.git_setup.git.at(setup.path)
    sha = (await git("hash-object", "-t", "commit", "-w", "--literally", "--stdin", stdin=commit)).decode().strip()
    pack = await git("pack-objects", "--quiet", "--stdout", stdin=f"{sha}\n".encode())
    with pytest.raises(GitError):
        await setup.import_pack(sha, pack)


async def test_tree_with_dot_git_is_rejected(clones: CloneFactory) -> None:
    """A checkout of such a tree would write to the repository."""
    setup = await clones.create({"a.txt": "old"})
    git = setup.git_setup.git.at(setup.path)
    inner = bytes.fromhex(await setup.git("rev-parse", "HEAD^{tree}"))
    arguments = ("hash-object", "-t", "tree", "-w", "--literally", "--stdin")
    tree = (await git(*arguments, stdin=b"40000 .git\0" + inner)).decode().strip()
    commit = await setup.git("commit-tree", "-p", "HEAD", "-m", "message", tree)
    wanted = f"{commit}\n^{setup.cloned.base}\n".encode()
    pack = await git("pack-objects", "--quiet", "--revs", "--stdout", stdin=wanted)
    with pytest.raises(GitError, match="hasDotgit"):
        await setup.import_pack(commit, pack)


async def test_executable_mode_is_preserved(clones: CloneFactory) -> None:
    """An executable file has the same mode after clone, commit and rebase."""
    setup = await clones.create({"tool": Executable("#!/bin/sh\n")})
    await setup.repository.commit({"b.txt": "remote"})
    (setup.path / "tool").write_text("#!/bin/sh\ntrue\n")
    await setup.push()
    assert "100755" == (await setup.repository.modes("main"))["tool"]

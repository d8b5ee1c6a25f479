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

WHO = Identity(name="Bot", email="bot@example.com")


@attrs.frozen(kw_only=True)
class Work:
    """A clone, whose changes are committed and pushed as the worker does."""

    git_setup: GitSetup
    repository: Repository
    access: Access
    cloned: Clone
    snapshot: PackSnapshot

    @property
    def path(self) -> Path:
        """The agent's folder."""
        return self.git_setup.into

    def write(self, **files: str) -> None:
        """Write files; `a__txt` stands for `a.txt`."""
        for name, content in files.items():
            (self.path / name.replace("__", ".")).write_text(content)

    async def git(self, *arguments: str) -> str:
        """Run git as the agent might."""
        identity = {f"GIT_{role}_{part}": "agent" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
        return (await self.git_setup.git.at(self.path, **identity)(*arguments)).decode().strip()

    async def import_commit(self) -> Git:
        """Commit all changes, and bring them into a repository of the worker's."""
        git = self.git_setup.git
        found = await changes.examine(
            git, self.path, base=self.cloned.base, excludes_dotenv=False, room=self.git_setup.folder
        )
        staged = await found.stage()
        commit = found.head if staged.is_empty else await found.commit(staged, "Ours", WHO)
        assert commit is not None
        pack = io.BytesIO()
        await found.pack(commit, pack)
        return await self.import_pack(commit, pack.getvalue(), shallow=found.shallow)

    async def import_pack(self, commit: str, content: bytes, *, shallow: bytes = b"") -> Git:
        """Bring a pack into a repository of the worker's."""
        pack = self.git_setup.folder / "pack"
        pack.write_bytes(content)
        return await import_commit(
            self.git_setup.git,
            self.git_setup.folder / "vault",
            commit=commit,
            pack=pack,
            clone=self.cloned,
            snapshot=self.snapshot,
            shallow=shallow,
        )

    async def push(self, branch: str = "main", *, rebases: bool = True, seconds: float = SECONDS) -> Pushed:
        """Commit all changes and push them."""
        wanted = Push(branch=branch, base=self.cloned.base, identity=WHO, rebases=rebases)
        return await push.push(await self.import_commit(), self.access, wanted, seconds=seconds)


class Start:
    """Starts a piece of work on a repository with these files."""

    def __init__(self, git_setup: GitSetup) -> None:
        self._ground = git_setup
        self.servers: list[GitSsh] = []
        self.keepsakes: list[PackSnapshot] = []

    async def __call__(self, files: Any = None, *, revision: str | None = None, depth: int = 1, **more: Any) -> Work:
        """Make the repository, and clone it."""
        repository = await self._ground.repos.create("demo", files, **more)
        return await self.on(repository, revision=revision, depth=depth)

    async def on(self, repository: Repository, *, revision: str | None = None, depth: int = 1) -> Work:
        """Clone a repository that is there."""
        server = await GitSsh(self._ground.repos).__aenter__()
        self.servers.append(server)
        access = ssh_access(server.url(repository.name))
        cloned = await self._ground.clone(access, revision=revision, depth=depth)
        snapshot = await PackSnapshot.of(self._ground.into)
        self.keepsakes.append(snapshot)
        return Work(git_setup=self._ground, repository=repository, access=access, cloned=cloned, snapshot=snapshot)


@pytest.fixture
async def start(git_setup: GitSetup) -> AsyncIterator[Start]:
    """Return what starts a piece of work."""
    starter = Start(git_setup)
    yield starter
    for snapshot in starter.keepsakes:
        snapshot.close()
    for server in starter.servers:
        await server.__aexit__(None, None, None)


LINES = "".join(f"line {number}\n" for number in range(20))


# --- onto a branch that has not moved --------------------------------------------------------------------------------


async def test_changes_reach_the_branch(start: Start) -> None:
    """All kinds of them, as one commit on top of what was cloned."""
    work = await start({"a.txt": "old", "gone.txt": "x", "tool": "t"})
    work.write(a__txt="new", b__txt="b")
    (work.path / "gone.txt").unlink()
    (work.path / "tool").chmod(0o755)
    (work.path / "link").symlink_to("a.txt")
    (work.path / "ü☃").write_bytes(bytes(range(256)))
    pushed = await work.push()
    assert None is pushed.recovery
    assert pushed.sha == await work.repository.sha("main")
    assert {
        "a.txt": b"new",
        "b.txt": b"b",
        "tool": b"t",
        "link": b"a.txt",
        "ü☃": bytes(range(256)),
    } == await work.repository.files("main")
    modes = await work.repository.modes("main")
    assert ("100755", "120000") == (modes["tool"], modes["link"])
    [commit, base] = await work.repository.log("main")
    assert ((work.cloned.base,), "Bot <bot@example.com>") == (commit.parents, commit.author)
    assert work.cloned.base == base.sha


async def test_the_agents_own_commits_come_along(start: Start) -> None:
    """As they are, below ours."""
    work = await start({"a.txt": "old"})
    work.write(b__txt="b")
    await work.git("add", "b.txt")
    await work.git("commit", "--quiet", "-m", "The agent's own")
    work.write(c__txt="c")
    await work.push()
    messages = [commit.message.strip() for commit in await work.repository.log("main")]
    assert ["Ours", "The agent's own"] == messages[:2]


async def test_an_empty_repository_gets_its_first_branch(start: Start) -> None:
    """Named as the request wants."""
    work = await start(None)
    work.write(a__txt="a")
    pushed = await work.push("trunk")
    assert {"trunk": pushed.sha} == await work.repository.branches()


async def test_a_branch_that_is_missing_is_made(start: Start) -> None:
    """From a detached head as well."""
    work = await start({"a.txt": "old"})
    await work.git("checkout", "--quiet", "--detach")
    work.write(a__txt="new")
    pushed = await work.push("feature/x")
    assert {"main": work.cloned.base, "feature/x": pushed.sha} == await work.repository.branches()


async def test_a_branch_behind_the_clone_is_moved_forward(start: Start, git_setup: GitSetup) -> None:
    """Although what was cloned is cut off: the branch stands in its past, which is looked up."""
    repository = await git_setup.repos.create("demo", {"a.txt": "1"}, allow_any_sha1=True)
    await repository.make_branch("topic")
    for number in "234":
        await repository.commit({"a.txt": number}, branch="topic")
    work = await start.on(repository, revision="topic")
    work.write(b__txt="b")
    pushed = await work.push("main", rebases=False)
    assert None is pushed.recovery
    assert 5 == len(await repository.log("main"))


async def test_what_is_there_already_is_not_pushed_again(start: Start) -> None:
    """The branch is at the very commit."""
    work = await start({"a.txt": "old"})
    work.write(a__txt="new")
    bare_repo = await work.import_commit()
    wanted = Push(branch="main", base=work.cloned.base, identity=WHO, rebases=True)
    first = await push.push(bare_repo, work.access, wanted, seconds=SECONDS)
    assert first == await push.push(bare_repo, work.access, wanted, seconds=SECONDS)


async def test_it_goes_over_http_with_the_token(start: Start, git_setup: GitSetup) -> None:
    """As over SSH."""
    repository = await git_setup.repos.create("demo", {"a.txt": "old"})
    async with GitHttp(git_setup.repos) as server:
        access = http_access(server.url("demo"))
        cloned = await git_setup.clone(access)
        snapshot = await PackSnapshot.of(git_setup.into)
        start.keepsakes.append(snapshot)
        work = Work(
            git_setup=git_setup,
            repository=repository,
            access=access,
            cloned=cloned,
            snapshot=snapshot,
        )
        work.write(a__txt="new")
        pushed = await work.push()
    assert pushed.sha == await repository.sha("main")


# --- onto a branch that has moved ------------------------------------------------------------------------------------------


async def test_changes_of_other_files_are_put_on_top(start: Start) -> None:
    """Without a conflict, and what others pushed stays."""
    work = await start({"a.txt": "old", "b.txt": "old"})
    theirs = await work.repository.commit({"b.txt": "theirs"})
    work.write(a__txt="ours")
    pushed = await work.push()
    assert Recovery(method="rebase", remote_sha=theirs) == pushed.recovery
    assert {"a.txt": b"ours", "b.txt": b"theirs"} == await work.repository.files("main")
    assert (theirs,) == (await work.repository.log("main"))[0].parents


async def test_of_lines_that_collide_the_agents_win(start: Start) -> None:
    """And the rest of such a file is merged; its name is told."""
    work = await start({"a.txt": LINES})
    theirs = await work.repository.commit(
        {"a.txt": LINES.replace("line 3\n", "THEIRS 3\n").replace("line 15", "THEIRS 15")}
    )
    work.write(a__txt=LINES.replace("line 3\n", "OURS 3\n"))
    pushed = await work.push()
    assert Recovery(method="rebase", remote_sha=theirs, conflict_files=("a.txt",)) == pushed.recovery
    expected = LINES.replace("line 3\n", "OURS 3\n").replace("line 15", "THEIRS 15")
    assert {"a.txt": expected.encode()} == await work.repository.files("main")


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ({"a.txt": None}, {"a.txt": "ours"}, {"a.txt": b"ours"}),
        ({"a.txt": "theirs"}, {"a.txt": None}, {}),
        ({"n.txt": "theirs"}, {"n.txt": "ours"}, {"n.txt": b"ours", "a.txt": b"old"}),
        ({"a.txt": b"\0theirs"}, {"a.txt": b"\0ours"}, {"a.txt": b"\0ours"}),
        ({"l": Link("x")}, {"l": Link("y")}, {"l": b"y", "a.txt": b"old"}),
        ({"d": "file"}, {"d/e": "in a folder"}, {"d/e": b"in a folder", "a.txt": b"old"}),
    ],
    ids=["removed-changed", "changed-removed", "both-added", "binary", "links", "file-folder"],
)
async def test_of_files_that_collide_the_agents_win(start: Start, theirs: Any, ours: Any, expected: Any) -> None:
    """Removed by one and changed by the other, added by both, binary, links, a file and a folder of one name."""
    work = await start({"a.txt": "old", "keep.txt": "k"})
    await work.repository.commit(theirs)
    for name, content in ours.items():
        path = work.path / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        match content:
            case Link(target=target):
                path.symlink_to(target)
            case str():
                path.write_text(content)
            case bytes():
                path.write_bytes(content)
    pushed = await work.push()
    assert pushed.recovery is not None
    files = await work.repository.files("main")
    del files["keep.txt"]
    if pushed.recovery.method == "rebase":
        assert set(pushed.recovery.conflict_files) <= {*theirs, *ours, "d~HEAD"}
        assert pushed.recovery.conflict_files
    assert expected == files


async def test_several_commits_are_put_on_top_in_their_order(start: Start) -> None:
    """Each with its message and its author."""
    work = await start({"a.txt": "old"})
    await work.repository.commit({"b.txt": "theirs"})
    for number in "12":
        work.write(a__txt=number)
        await work.git("commit", "--quiet", "-a", "-m", f"Own {number}")
    work.write(a__txt="3")
    await work.push()
    told = [(commit.message.strip(), commit.author) for commit in await work.repository.log("main")]
    assert [("Ours", "Bot <bot@example.com>"), ("Own 2", "agent <agent>"), ("Own 1", "agent <agent>")] == told[:3]


async def test_a_branch_that_was_rewritten_is_put_below(start: Start) -> None:
    """The commit that was cloned is no longer in it."""
    work = await start({"a.txt": "old"})
    other = await work.git_setup.repos.create("other", {"z.txt": "z"})
    await work.repository.git("fetch", "--quiet", f"file://{other.path}", "+main:main")
    theirs = await work.repository.sha("main")
    work.write(b__txt="ours")
    pushed = await work.push()
    assert theirs is not None
    assert Recovery(method="rebase", remote_sha=theirs) == pushed.recovery
    assert {"z.txt": b"z", "b.txt": b"ours"} == await work.repository.files("main")


async def test_what_cannot_be_put_on_top_replaces_the_branch(start: Start) -> None:
    """A history longer than anybody rebases; what the branch was is told, so that nothing is lost."""
    work = await start({"a.txt": "old"})
    theirs = await work.repository.commit({"b.txt": "theirs"})
    parent = await work.git("rev-parse", "HEAD")
    many = "".join(
        f"commit refs/heads/many\ncommitter a <a@b> {1_700_000_000 + number} +0000\ndata 1\nx\n"
        + (f"from {parent}\n" if number == 0 else "")
        + f"M 100644 inline n.txt\ndata {len(str(number))}\n{number}\n"
        for number in range(push.MAX_REBASED + 1)
    )
    await work.git_setup.git.at(work.path)("fast-import", "--quiet", stdin=many.encode())
    await work.git("checkout", "--quiet", "many")
    pushed = await work.push()
    assert Recovery(method="force-with-lease", remote_sha=theirs) == pushed.recovery
    assert {"a.txt": b"old", "n.txt": str(push.MAX_REBASED).encode()} == await work.repository.files("main")


async def test_a_branch_that_moved_is_reported_when_that_is_wanted(start: Start) -> None:
    """Nothing is pushed."""
    work = await start({"a.txt": "old"})
    theirs = await work.repository.commit({"b.txt": "theirs"})
    work.write(a__txt="ours")
    with pytest.raises(BranchMoved, match=rf"^main has moved to {theirs[:12]} meanwhile, so nothing was pushed\.$"):
        await work.push(rebases=False)
    assert theirs == await work.repository.sha("main")


async def test_whoever_pushes_in_between_loses_nothing(start: Start) -> None:
    """Between our look at the branch and our push: it is looked at again."""
    work = await start({"a.txt": "old"})
    work.write(a__txt="ours")
    came: list[str] = []

    async def push_in_between(command: str) -> None:
        if "receive-pack" in command and len(came) < 2:
            came.append(await work.repository.commit({f"{len(came)}.txt": "theirs"}))

    start.servers[-1].before = push_in_between
    pushed = await work.push()
    assert pushed.recovery is not None
    assert came[-1] == pushed.recovery.remote_sha
    assert {"0.txt", "1.txt", "a.txt"} == set(await work.repository.files("main"))


async def test_a_branch_that_moves_all_the_time_is_given_up(start: Start) -> None:
    """After three tries."""
    work = await start({"a.txt": "old"})
    work.write(a__txt="ours")
    came: list[str] = []

    async def push_in_between(command: str) -> None:
        if "receive-pack" in command:
            came.append(await work.repository.commit({f"{len(came)}.txt": "theirs"}))

    start.servers[-1].before = push_in_between
    with pytest.raises(GitError, match=r"^main was changed by others at each attempt"):
        await work.push()
    assert push.PUSH_ATTEMPTS == len(came)
    assert came[-1] == await work.repository.sha("main")


# --- what the server refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["update", "pre-receive"])
async def test_a_protected_branch_is_told_in_the_servers_words(start: Start, hook: str) -> None:
    """As GitHub says it."""
    work = await start({"a.txt": "old"})
    work.repository.protect("main", hook=hook)
    work.write(a__txt="ours")
    with pytest.raises(
        GitError, match=r"^The server rejected the push to main: .*GH006: Protected branch update failed"
    ):
        await work.push()
    assert work.cloned.base == await work.repository.sha("main")


async def test_a_repository_that_may_only_be_read_is_told(start: Start) -> None:
    """The push is refused, not the clone."""
    work = await start({"a.txt": "old"})
    start.servers[-1].read_only = True
    work.write(a__txt="ours")
    with pytest.raises(GitError):
        await work.push()
    assert work.cloned.base == await work.repository.sha("main")


async def test_a_server_that_hangs_is_given_up(start: Start) -> None:
    """In bounded time."""
    work = await start({"a.txt": "old"})
    work.write(a__txt="ours")
    start.servers[-1].mode = Mode.HANG
    with pytest.raises(GitError, match=r"^The repository was not pushed within 1 s"):
        await work.push(seconds=1)


# --- what the agent's user hands over is data -------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"garbage", b"PACK\0\0\0\2\0\0\0\1x"])
async def test_a_pack_that_is_none_is_refused(start: Start, content: bytes) -> None:
    """Nothing of it gets into a push."""
    work = await start({"a.txt": "old"})
    with pytest.raises(GitError):
        await work.import_pack("1" * 40, content)


async def test_a_commit_whose_objects_are_not_all_there_is_refused(start: Start) -> None:
    """A tree that nobody has."""
    work = await start({"a.txt": "old"})
    commit = (
        b"tree 1234567890123456789012345678901234567890\nparent %s\n" % str(work.cloned.base).encode()
        + b"author a <a> 1 +0000\ncommitter a <a> 1 +0000\n\nx\n"
    )
    git = work.git_setup.git.at(work.path)
    sha = (await git("hash-object", "-t", "commit", "-w", "--literally", "--stdin", stdin=commit)).decode().strip()
    pack = await git("pack-objects", "--quiet", "--stdout", stdin=f"{sha}\n".encode())
    with pytest.raises(GitError):
        await work.import_pack(sha, pack)


async def test_objects_that_would_hurt_others_are_refused(start: Start) -> None:
    """A tree with a `.git` in it writes into the repository of whoever checks it out."""
    work = await start({"a.txt": "old"})
    git = work.git_setup.git.at(work.path)
    inner = bytes.fromhex(await work.git("rev-parse", "HEAD^{tree}"))
    arguments = ("hash-object", "-t", "tree", "-w", "--literally", "--stdin")
    tree = (await git(*arguments, stdin=b"40000 .git\0" + inner)).decode().strip()
    commit = await work.git("commit-tree", "-p", "HEAD", "-m", "evil", tree)
    wanted = f"{commit}\n^{work.cloned.base}\n".encode()
    pack = await git("pack-objects", "--quiet", "--revs", "--stdout", stdin=wanted)
    with pytest.raises(GitError, match="hasDotgit"):
        await work.import_pack(commit, pack)


async def test_an_executable_stays_one(start: Start) -> None:
    """Through clone, commit and rebase."""
    work = await start({"tool": Executable("#!/bin/sh\n")})
    await work.repository.commit({"b.txt": "theirs"})
    (work.path / "tool").write_text("#!/bin/sh\ntrue\n")
    await work.push()
    assert "100755" == (await work.repository.modes("main"))["tool"]

from __future__ import annotations

import pytest
from helpers.git import SECONDS, GitSetup, git_setup, http_access
from helpers.push import IDENTITY, CloneFactory, CloneSetup, clones
from standins.githttp import GitHttp
from standins.gitssh import Mode, needs_ssh
from standins.repos import Executable

from ccrun.worker.git import push
from ccrun.worker.git.clone import PackSnapshot
from ccrun.worker.git.push import Push
from ccrun.worker.git.run import GitError

__all__ = ["clones", "git_setup"]
pytestmark = needs_ssh

# --- a branch that has not moved -------------------------------------------------------------------------------------


async def test_changes_reach_the_branch(clones: CloneFactory) -> None:
    """Changes of all kinds become one commit, with the cloned commit as its parent."""
    setup = await clones.create({"a.txt": "old", "deleted.txt": "x", "tool": "t"}, over_ssh=True)
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
    setup = await clones.create({"a.txt": "old"}, over_ssh=True)
    clones.servers[-1].read_only = True
    setup.write(a__txt="local")
    with pytest.raises(GitError):
        await setup.push()
    assert setup.cloned.base == await setup.repository.sha("main")


async def test_push_to_a_server_that_hangs_is_stopped(clones: CloneFactory) -> None:
    """The push has a timeout."""
    setup = await clones.create({"a.txt": "old"}, over_ssh=True)
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

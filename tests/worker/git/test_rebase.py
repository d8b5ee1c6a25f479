"""Pushes to a branch that has moved since the clone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from helpers.git import SECONDS, git_setup
from helpers.push import IDENTITY, CloneFactory, CloneSetup, clones
from standins.gitssh import needs_ssh
from standins.repos import Link

from ccrun.results import Recovery
from ccrun.worker.git import push
from ccrun.worker.git.clone import RETRY_PAUSES
from ccrun.worker.git.push import BranchMoved, Push
from ccrun.worker.git.run import GitError

__all__ = ["clones", "git_setup"]
pytestmark = needs_ssh

LINES = "".join(f"line {number}\n" for number in range(20))


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
    assert "rebase" == pushed.recovery.method
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


async def commit_too_many(setup: CloneSetup) -> None:
    """Make the agent commit more often than `MAX_REBASED`; the commits change `n.txt`."""
    parent = await setup.git("rev-parse", "HEAD")
    many = "".join(
        f"commit refs/heads/many\ncommitter a <a@b> {1_700_000_000 + number} +0000\ndata 1\nx\n"
        + (f"from {parent}\n" if number == 0 else "")
        + f"M 100644 inline n.txt\ndata {len(str(number))}\n{number}\n"
        for number in range(push.MAX_REBASED + 1)
    )
    await setup.git_setup.git.at(setup.path)("fast-import", "--quiet", stdin=many.encode())
    await setup.git("checkout", "--quiet", "many")


async def test_too_many_commits_are_merged(clones: CloneFactory) -> None:
    """The work of both sides stays on the branch."""
    setup = await clones.create({"a.txt": "old"})
    remote = await setup.repository.commit({"b.txt": "remote"})
    await commit_too_many(setup)
    pushed = await setup.push()
    assert Recovery(method="merge", remote_sha=remote) == pushed.recovery
    expected = {"a.txt": b"old", "b.txt": b"remote", "n.txt": str(push.MAX_REBASED).encode()}
    assert expected == await setup.repository.files("main")
    assert remote in (await setup.repository.log("main"))[0].parents


async def test_branch_is_replaced_when_a_merge_has_conflicts(clones: CloneFactory) -> None:
    """The commits are too many to be rebased. The record has the replaced commit, so that it can be restored."""
    setup = await clones.create({"a.txt": "old"})
    remote = await setup.repository.commit({"n.txt": "remote"})
    await commit_too_many(setup)
    pushed = await setup.push()
    assert Recovery(method="force-with-lease", remote_sha=remote) == pushed.recovery
    assert {"a.txt": b"old", "n.txt": str(push.MAX_REBASED).encode()} == await setup.repository.files("main")


async def test_agents_own_merge_is_merged(clones: CloneFactory) -> None:
    """The agent has made nothing but a merge of commits that the server had already."""
    setup = await clones.create({"a.txt": "old"}, depth=9)
    parent = await setup.git("rev-parse", "HEAD")
    merge = await setup.git("commit-tree", "-p", parent, "-p", parent, "-m", "merge", f"{parent}^{{tree}}")
    other = await setup.git("commit-tree", "-p", merge, "-p", parent, "-m", "merge again", f"{parent}^{{tree}}")
    await setup.git("reset", "--quiet", "--hard", other)
    remote = await setup.repository.commit({"b.txt": "remote"})
    pushed = await setup.push()
    assert pushed.recovery is not None
    assert remote == pushed.recovery.remote_sha
    assert {"a.txt": b"old", "b.txt": b"remote"} == await setup.repository.files("main")


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ('case "$*" in *cherry-pick*) exit 1; esac', "cannot be applied to the branch"),
        ('case "$*" in *hash-object*) echo fatal: no space >&2; exit 1; esac', "no space"),
        ('case "$*" in *"worktree add"*) exit 128; esac', "git worktree failed"),
        ('case "$*" in *rev-list*--topo-order*) exit 1; esac', "git rev-list failed"),
        ('case "$*" in *merge-base*) exit 128; esac', "git merge-base failed"),
    ],
    ids=["pick", "commit", "worktree", "list", "ancestor"],
)
async def test_other_errors_leave_the_branch_as_it_is(
    clones: CloneFactory, tmp_path: Path, program: str, error: str
) -> None:
    """An error that is not a conflict is reported, and never taken for a reason to replace the work of others."""
    setup = await clones.create({"a.txt": "old"})
    remote = await setup.repository.commit({"a.txt": "remote"})
    setup.write(a__txt="local")
    bare_repo = await setup.import_commit()
    faulty = tmp_path / "git"
    faulty.write_text(f'#!/bin/sh\n{program}\nexec {bare_repo.program} "$@"\n')
    faulty.chmod(0o755)
    wanted = Push(branch="main", base=setup.cloned.base, identity=IDENTITY, rebases=True)
    with pytest.raises(GitError, match=error):
        await push.push(attrs.evolve(bare_repo, program=faulty), setup.access, wanted, seconds=SECONDS)
    assert remote == await setup.repository.sha("main")


#: Messages in which git would take something for a comment, or for superfluous space.
MESSAGES = (
    "#1234 fix the thing",
    "#1\n\n# a heading\n\n  indented\n\n\n\nmuch space  \n",
    "",
    "ein ß",
    "# Conflicts:\n#\ta.txt\n",
)


@pytest.mark.parametrize("remote", [{"b.txt": "remote"}, {"a.txt": None, "keep.txt": "k"}], ids=["clean", "conflict"])
async def test_messages_are_verbatim(clones: CloneFactory, remote: Any) -> None:
    """Messages keep each byte, with and without a conflict: nothing in them is taken for a comment or cleaned up."""
    setup = await clones.create({"a.txt": "old"})
    sha = await setup.repository.commit(remote)
    for message in MESSAGES:
        setup.write(a__txt=message + "local")
        await setup.git("add", "a.txt")
        commit = b"tree %b\nparent %b\nauthor A <a@b> 1700000000 +0200\ncommitter A <a@b> 1700000000 +0200\n\n%b" % (
            (await setup.git("write-tree")).encode(),
            (await setup.git("rev-parse", "HEAD")).encode(),
            message.encode(),
        )
        made = await setup.git_setup.git.at(setup.path)("hash-object", "-t", "commit", "-w", "--stdin", stdin=commit)
        await setup.git("reset", "--quiet", "--hard", made.decode().strip())
    pushed = await setup.push()
    assert pushed.recovery is not None
    assert ("rebase", sha) == (pushed.recovery.method, pushed.recovery.remote_sha)
    bare_repo = setup.git_setup.git.at(setup.repository.path)
    for age, message in enumerate(reversed(MESSAGES)):
        headers, _, stored = (await bare_repo("cat-file", "commit", f"main~{age}")).partition(b"\n\n")
        assert message.encode() == stored
        assert b"author A <a@b> 1700000000 +0200" in headers.splitlines()


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
    setup = await clones.create({"a.txt": "old"}, over_ssh=True)
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
    """The worker makes three attempts."""
    setup = await clones.create({"a.txt": "old"}, over_ssh=True)
    setup.write(a__txt="local")
    remote_shas: list[str] = []

    async def push_concurrently(command: str) -> None:
        if "receive-pack" in command:
            remote_shas.append(await setup.repository.commit({f"{len(remote_shas)}.txt": "remote"}))

    clones.servers[-1].before = push_concurrently
    with pytest.raises(GitError, match=r"^main was changed by others during each attempt"):
        await setup.push()
    assert len(RETRY_PAUSES) + 1 == len(remote_shas)
    assert remote_shas[-1] == await setup.repository.sha("main")

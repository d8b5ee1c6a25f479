from __future__ import annotations

from pathlib import Path

import pytest
from standins.git_process import DATE, GitFailed, git, run_git
from standins.repos import OTHER_AUTHOR, Executable, Link, Repos, Submodule


@pytest.fixture
def repos(tmp_path: Path) -> Repos:
    """Return an empty directory of repositories."""
    return Repos(tmp_path / "repos")


async def test_files_are_read_back(repos: Repos) -> None:
    """Files of every kind and name are read back unchanged."""
    repository = await repos.create(
        "a",
        {
            "b": b"\x00\xff",
            'd i"r\\/é\n.txt': "text",
            "run.sh": Executable("#!/bin/sh\n"),
            "link": Link("b"),
            "empty": "",
        },
    )
    assert {
        "b": b"\x00\xff",
        'd i"r\\/é\n.txt': b"text",
        "run.sh": b"#!/bin/sh\n",
        "link": b"b",
        "empty": b"",
    } == await repository.files()
    assert {
        "b": "100644",
        'd i"r\\/é\n.txt': "100644",
        "run.sh": "100755",
        "link": "120000",
        "empty": "100644",
    } == await repository.modes()


async def test_commit_is_added_to_a_branch(repos: Repos) -> None:
    """A commit adds, changes and deletes files, on an existing or a new branch."""
    repository = await repos.create("a", {"unchanged": "1", "changed": "1", "deleted": "1"})
    first = await repository.sha()
    second = await repository.commit({"changed": "2", "deleted": None}, message="Second\n\nWith a body.")
    assert {"unchanged": b"1", "changed": b"2"} == await repository.files()
    assert [(second, (first,)), (first, ())] == [(commit.sha, commit.parents) for commit in await repository.log()]
    assert (OTHER_AUTHOR, OTHER_AUTHOR, "Second\n\nWith a body.") == (
        (latest := (await repository.log())[0]).author,
        latest.committer,
        latest.message,
    )
    other = await repository.commit({"unchanged": "3"}, branch="other")
    assert {"main": second, "other": other} == await repository.branches()
    assert {"unchanged": b"3"} == await repository.files("other")
    assert await repository.tree() != await repository.tree("other")


async def test_equal_commits_have_equal_ids(repos: Repos) -> None:
    """The ID of a commit depends only on its content."""
    one, two = await repos.create("one", {"a": "1"}), await repos.create("two", {"a": "1"})
    assert await one.sha() == await two.sha()
    assert DATE == await one.git("log", "--format=%ad", "--date=raw")


async def test_branches_and_tags_are_created(repos: Repos) -> None:
    """Branches and tags point to the given commits."""
    repository = await repos.create("a", {"a": "1"}, branch="trunk")
    first = await repository.sha()
    assert first is not None
    await repository.commit({"a": "2"})
    await repository.make_branch("old", first)
    await repository.make_tag("v1", first)
    await repository.make_tag("v2", message="The second")
    assert {"refs/heads/trunk", "refs/heads/old", "refs/tags/v1", "refs/tags/v2"} == set(await repository.refs())
    assert (first, first, await repository.sha()) == tuple([await repository.sha(name) for name in ("old", "v1", "v2")])
    await repository.delete_branch("old")
    assert {"trunk"} == set(await repository.branches())


async def test_empty_repository_has_no_commit(repos: Repos) -> None:
    """A repository without files has no commit and no refs."""
    repository = await repos.create("a")
    assert (None, {}) == (await repository.sha(), await repository.refs())


async def test_submodules_are_cloned(repos: Repos, tmp_path: Path) -> None:
    """Git clones a submodule at its commit."""
    part = await repos.create("part", {"p": "1"})
    sha = await part.sha()
    assert sha is not None
    whole = await repos.create("whole", {"a": "1", "lib/part": Submodule(str(part.path), sha)})
    assert "160000" == (await whole.modes())["lib/part"]
    assert sha.encode() == (await whole.files())["lib/part"]
    allow = ("-c", "protocol.file.allow=always")
    await git(*allow, "clone", "--quiet", "--recurse-submodules", whole.path, tmp_path / "work")
    assert (tmp_path / "work" / "lib" / "part" / "p").read_text() == "1"


@pytest.mark.parametrize(("hook", "arrived"), [("update", {"main", "free"}), ("pre-receive", {"main"})])
async def test_push_to_a_protected_branch_is_rejected(
    repos: Repos, tmp_path: Path, hook: str, arrived: set[str]
) -> None:
    """A protected branch does not change, and git prints the reason."""
    repository = await repos.create("a", {"a": "1"})
    before = await repository.sha()
    repository.protect("main", hook=hook)
    work = tmp_path / "work"
    await git("clone", "--quiet", repository.path, work)
    await git("commit", "--quiet", "--allow-empty", "-m", "Ours", cwd=work)
    result = await run_git("push", "origin", "HEAD:main", "HEAD:free", cwd=work)
    assert result.code == 1
    assert "remote: error: GH006: Protected branch update failed for refs/heads/main." in result.stderr
    assert before == await repository.sha()
    assert arrived == set(await repository.branches())


async def test_history_can_be_protected(repos: Repos, tmp_path: Path) -> None:
    """A forced push rewrites history, unless the repository denies it."""
    for name, code in (("free", 0), ("strict", 1)):
        repository = await repos.create(name, {"a": "1"}, deny_non_fast_forwards=name == "strict")
        work = tmp_path / name
        await git("clone", "--quiet", repository.path, work)
        await git("commit", "--quiet", "--amend", "-m", "Another", cwd=work)
        assert code == (await run_git("push", "--force", "origin", "HEAD:main", cwd=work)).code


async def test_filters_and_unnamed_commits_need_permission(repos: Repos, tmp_path: Path) -> None:
    """Partial clones, and fetches of commits that no ref names, succeed only if the repository allows them."""
    for name, allowed in (("plain", False), ("free", True)):
        repository = await repos.create(name, {"a": "1"}, allow_filter=allowed, allow_any_sha1=allowed)
        first = await repository.sha()
        await repository.commit({"a": "2"})
        work = tmp_path / name
        result = await run_git("clone", "--quiet", "--bare", "--filter=blob:none", f"file://{repository.path}", work)
        assert allowed == ("filtering not recognized" not in result.stderr)
        await git("init", "--quiet", "--bare", tmp_path / f"{name}-other")
        # Version 2 of the protocol allows every object.
        fetch = ("-c", "protocol.version=0", "fetch", "--quiet", "--depth=1", f"file://{repository.path}", str(first))
        assert allowed == ((await run_git(*fetch, cwd=tmp_path / f"{name}-other")).code == 0)


async def test_hanging_git_is_killed() -> None:
    """A git command that exceeds its timeout is killed, and one that fails raises `GitFailed`."""
    with pytest.raises(TimeoutError):
        await git("-c", "alias.sleep=!sleep 3600", "sleep", seconds=0.2)
    with pytest.raises(GitFailed, match="not a git command"):
        await git("nonsense")

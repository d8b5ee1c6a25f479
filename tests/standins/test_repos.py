from __future__ import annotations

from pathlib import Path

import pytest
from standins.repos import DATE, SOMEBODY, Executable, GitFailed, Link, Repos, Submodule, git, run_git


@pytest.fixture
def repos(tmp_path: Path) -> Repos:
    """Return an empty folder of repositories."""
    return Repos(tmp_path / "repos")


async def test_files_are_read_back(repos: Repos) -> None:
    """Files of every kind and name come back as they were given."""
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


async def test_commits_come_on_top(repos: Repos) -> None:
    """A commit adds, changes and takes away, on a branch that is there or new."""
    repository = await repos.create("a", {"kept": "1", "changed": "1", "gone": "1"})
    first = await repository.sha()
    second = await repository.commit({"changed": "2", "gone": None}, message="Second\n\nWith a body.")
    assert {"kept": b"1", "changed": b"2"} == await repository.files()
    assert [(second, (first,)), (first, ())] == [(commit.sha, commit.parents) for commit in await repository.log()]
    assert (SOMEBODY, SOMEBODY, "Second\n\nWith a body.") == (
        (latest := (await repository.log())[0]).author,
        latest.committer,
        latest.message,
    )
    other = await repository.commit({"kept": "3"}, branch="other")
    assert {"main": second, "other": other} == await repository.branches()
    assert {"kept": b"3"} == await repository.files("other")
    assert await repository.tree() != await repository.tree("other")


async def test_same_content_has_the_same_id(repos: Repos) -> None:
    """Commits differ by what is in them and by nothing else."""
    one, two = await repos.create("one", {"a": "1"}), await repos.create("two", {"a": "1"})
    assert await one.sha() == await two.sha()
    assert DATE == await one.git("log", "--format=%ad", "--date=raw")


async def test_refs_are_made(repos: Repos) -> None:
    """Branches and tags stand where they are put."""
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


async def test_empty_repositories_are_empty(repos: Repos) -> None:
    """A repository without files has no commit, and takes a first push."""
    repository = await repos.create("a")
    assert (None, {}) == (await repository.sha(), await repository.refs())


async def test_submodules_are_cloned(repos: Repos, tmp_path: Path) -> None:
    """A submodule is found by git at its commit."""
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
async def test_protected_branches_are_not_pushed_to(repos: Repos, tmp_path: Path, hook: str, arrived: set[str]) -> None:
    """A protected branch stays where it is, and git prints why."""
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


async def test_history_may_be_protected(repos: Repos, tmp_path: Path) -> None:
    """History is rewritten by force, unless the repository denies it."""
    for name, code in (("free", 0), ("strict", 1)):
        repository = await repos.create(name, {"a": "1"}, deny_non_fast_forwards=name == "strict")
        work = tmp_path / name
        await git("clone", "--quiet", repository.path, work)
        await git("commit", "--quiet", "--amend", "-m", "Another", cwd=work)
        assert code == (await run_git("push", "--force", "origin", "HEAD:main", cwd=work)).code


async def test_clients_get_what_refs_name(repos: Repos, tmp_path: Path) -> None:
    """Parts of objects and commits without a ref are handed out only where that is allowed."""
    for name, allowed in (("plain", False), ("free", True)):
        repository = await repos.create(name, {"a": "1"}, allow_filter=allowed, allow_any_sha1=allowed)
        first = await repository.sha()
        await repository.commit({"a": "2"})
        work = tmp_path / name
        result = await run_git("clone", "--quiet", "--bare", "--filter=blob:none", f"file://{repository.path}", work)
        assert allowed == ("filtering not recognized" not in result.stderr)
        await git("init", "--quiet", "--bare", tmp_path / f"{name}-other")
        # The second version of the protocol hands out everything.
        fetch = ("-c", "protocol.version=0", "fetch", "--quiet", "--depth=1", f"file://{repository.path}", str(first))
        assert allowed == ((await run_git(*fetch, cwd=tmp_path / f"{name}-other")).code == 0)


async def test_git_that_hangs_is_ended() -> None:
    """A git that takes too long is ended, and one that fails does not go unnoticed."""
    with pytest.raises(TimeoutError):
        await git("-c", "alias.sleep=!sleep 3600", "sleep", seconds=0.2)
    with pytest.raises(GitFailed, match="not a git command"):
        await git("nonsense")

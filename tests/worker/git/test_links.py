from __future__ import annotations

from pathlib import Path

import pytest
from helpers.git import SECONDS, GitSetup, git_setup, http, http_access, ssh, ssh_access
from standins.githttp import TOKEN, GitHttp, Mode
from standins.gitssh import GitSsh, needs_ssh

from ccrun.worker.git import links
from ccrun.worker.git.links import Link, absolute_url, unconfirmed
from ccrun.worker.git.remote import Access
from ccrun.worker.git.run import Git

__all__ = ["git_setup", "http", "ssh"]
pytestmark = needs_ssh

MISSING = "1234567890" * 4


@pytest.fixture
def git(git_setup: GitSetup, tmp_path: Path) -> Git:
    """Git as the worker's user, in an empty directory."""
    (tmp_path / "empty").mkdir()
    return git_setup.git.at(tmp_path / "empty")


async def reason_of(git: Git, access: Access, url: str | None, commit: str, *, seconds: float = SECONDS) -> str | None:
    """Return why one link is not confirmed."""
    found = await unconfirmed(git, access, [Link(path="lib", commit=commit, url=url)], seconds=seconds)
    return found.get("lib")


async def lib_commits(git_setup: GitSetup) -> tuple[str, str]:
    """Create the repository of a submodule, and return its first and its last commit."""
    lib = await git_setup.repos.create("group/lib", {"a": "1"})
    first = await lib.sha()
    assert first is not None
    return first, await lib.commit({"a": "2"})


# --- commits ---------------------------------------------------------------------------------------------------------


async def test_commits_of_the_server_are_confirmed(git: Git, git_setup: GitSetup, http: GitHttp) -> None:
    """The last commit and older ones are."""
    access = http_access(http.url("group/demo"))
    commits = await lib_commits(git_setup)
    asked = [Link(path=commit, commit=commit, url=http.url("group/lib")) for commit in commits]
    assert {} == await unconfirmed(git, access, asked, seconds=SECONDS)


async def test_missing_commit_is_not_confirmed(git: Git, git_setup: GitSetup, http: GitHttp) -> None:
    """The reason says that the server does not have it."""
    await lib_commits(git_setup)
    reason = await reason_of(git, http_access(http.url("group/demo")), http.url("group/lib"), MISSING)
    assert "its server does not have it" == reason


async def test_object_that_is_no_commit_is_not_confirmed(git: Git, git_setup: GitSetup, http: GitHttp) -> None:
    """The server has a tree with the ID."""
    lib = await git_setup.repos.create("group/lib", {"a": "1"}, allow_any_sha1=True)
    reason = await reason_of(git, http_access(http.url("group/demo")), http.url("group/lib"), await lib.tree())
    assert reason is not None
    assert "not a commit" in reason or "not have it" in reason or reason.startswith("git fetch: ")


async def test_each_link_is_checked_at_its_own_server(git: Git, git_setup: GitSetup, http: GitHttp) -> None:
    """A commit that one server has is not confirmed for a submodule of another repository."""
    commit, _ = await lib_commits(git_setup)
    await git_setup.repos.create("group/other", {"a": "other"})
    found = await unconfirmed(
        git,
        http_access(http.url("group/demo")),
        [Link(path=name, commit=commit, url=f"../{name}.git") for name in ("lib", "other")],
        seconds=SECONDS,
    )
    assert {"other": "its server does not have it"} == found


async def test_relative_url_is_checked_over_ssh(git: Git, git_setup: GitSetup, ssh: GitSsh) -> None:
    """The key of the request is used for the host of the repository."""
    commit, _ = await lib_commits(git_setup)
    assert None is await reason_of(git, ssh_access(ssh.url("group/demo")), "../lib.git", commit)


# --- what is not asked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (None, "it has no URL in .gitmodules"),
        ("file:///srv/lib", "its URL in .gitmodules must be an https or SSH URL"),
        ("/srv/lib", "its URL in .gitmodules must be an https or SSH URL or git@host:path"),
        ("ext::sh -c true", "its URL in .gitmodules must be an https or SSH URL or git@host:path"),
        ("--upload-pack=true", "its URL in .gitmodules must be an https or SSH URL or git@host:path"),
        ("../" * links.MAX_URL_CHARS, f"its URL in .gitmodules has more than {links.MAX_URL_CHARS} characters"),
    ],
)
async def test_url_that_is_not_of_a_server_confirms_nothing(git: Git, url: str | None, expected: str) -> None:
    """The reason names the rule."""
    assert expected == await reason_of(git, http_access("http://127.0.0.1:9/group/demo.git"), url, MISSING)


async def test_what_is_no_commit_id_is_not_asked_for(git: Git) -> None:
    """It could be an option or a ref."""
    access = http_access("http://127.0.0.1:9/group/demo.git")
    assert "it is not a commit ID" == await reason_of(git, access, "../lib.git", "refs/heads/main")


async def test_other_servers_do_not_get_the_token(git: Git, git_setup: GitSetup, http: GitHttp) -> None:
    """Another port of the same host is another server."""
    commit, _ = await lib_commits(git_setup)
    async with GitHttp(git_setup.repos) as other:
        reason = await reason_of(git, http_access(http.url("group/demo")), other.url("group/lib"), commit)
        assert [None] == list({request.authorization for request in other.requests})
    assert reason is not None
    assert TOKEN not in reason


async def test_other_servers_do_not_get_the_key(git: Git, git_setup: GitSetup, ssh: GitSsh) -> None:
    """A submodule of another host is asked for without it."""
    commit, _ = await lib_commits(git_setup)
    url = ssh.url("group/lib").replace("127.0.0.1", "localhost")
    reason = await reason_of(git, ssh_access(ssh.url("group/demo")), url, commit)
    assert reason is not None
    assert reason.startswith("git fetch: ")


async def test_server_that_does_not_respond_confirms_nothing(git: Git, git_setup: GitSetup, http: GitHttp) -> None:
    """The wait is bounded."""
    http.mode = Mode.HANG
    reason = await reason_of(git, http_access(http.url("group/demo")), "../lib.git", MISSING, seconds=0.3)
    assert "the servers of the submodules did not respond within 0.3 s" == reason


async def test_number_of_checked_links_is_limited(git: Git) -> None:
    """Those beyond the limit are not confirmed."""
    many = [Link(path=str(number), commit=MISSING, url=None) for number in range(links.MAX_CHECKED_LINKS + 1)]
    found = await unconfirmed(git, http_access("http://127.0.0.1:9/a.git"), many, seconds=SECONDS)
    assert f"only {links.MAX_CHECKED_LINKS} links are checked" == found[str(links.MAX_CHECKED_LINKS)]
    assert len(many) == len(found)


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repository", "url", "expected"),
    [
        ("https://host/group/demo.git", "https://other/lib", "https://other/lib"),
        ("https://host/group/demo.git", "../lib.git", "https://host/group/lib.git"),
        ("https://host/group/demo.git/", "../../lib", "https://host/lib"),
        ("https://host/group/demo", "./lib", "https://host/group/demo/lib"),
        ("git@host:group/demo.git", "../lib.git", "git@host:group/lib.git"),
        ("git@host:demo.git", "../lib.git", "git@host:lib.git"),
        ("ssh://git@host:22/a/b", ".././../lib", "ssh://git@host:22/lib"),
    ],
)
def test_relative_url_is_that_of_git(repository: str, url: str, expected: str) -> None:
    """It is relative to the URL of the repository, see gitmodules(5)."""
    assert expected == absolute_url(repository, url)

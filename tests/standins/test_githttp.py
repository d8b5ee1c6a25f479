from __future__ import annotations

import asyncio
import contextlib
import gzip
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
from standins.githttp import TOKEN, GitHttp, Mode, Redirect, needs_backend
from standins.repos import GIT_SECONDS, Repos, Repository, descendants, environment, git, is_at_work, run_git

pytestmark = needs_backend

FILES = {"README.md": "Hello.\n"}
#: More than any buffer on the way holds, and more than git sends in one piece (http.postBuffer).
BIG = bytes(range(256)) * 8192
USER = f"x-access-token:{TOKEN}"
AUTHORIZATION = {"Authorization": aiohttp.encode_basic_auth("git", TOKEN)}


@pytest.fixture
def repos(tmp_path: Path) -> Repos:
    """Return an empty folder of repositories."""
    return Repos(tmp_path / "repos")


@pytest.fixture
async def repository(repos: Repos) -> Repository:
    """Return a repository with one file."""
    return await repos.create("group/sub/repo", FILES)


@pytest.fixture
async def server(repos: Repos) -> AsyncIterator[GitHttp]:
    """Return a private server."""
    async with GitHttp(repos) as running:
        yield running


async def refused(*args: str | Path, env: dict[str, str] | None = None) -> str:
    """Return what git prints when it fails."""
    result = await run_git(*args, env=env)
    assert result.code != 0
    return result.stderr


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(GIT_SECONDS):
        while not holds():
            await asyncio.sleep(0.01)


async def test_clone_commit_and_push(server: GitHttp, repository: Repository, tmp_path: Path) -> None:
    """Git clones, and what it pushes arrives, in a body with a length or in pieces."""
    work = tmp_path / "work"
    await git("clone", "--quiet", server.url(repository.name, user=USER), work)
    assert (work / "README.md").read_text() == "Hello.\n"
    await git("push", "--quiet", "origin", "HEAD:refs/heads/same", cwd=work)
    (work / "big.bin").write_bytes(BIG)
    await git("add", ".", cwd=work)
    await git("commit", "--quiet", "-m", "Ours", cwd=work)
    server.forget()
    # Packed, it would go in one piece.
    await git("-c", "pack.compression=0", "push", "--quiet", "origin", "HEAD:refs/heads/new", cwd=work)
    assert {"README.md": b"Hello.\n", "big.bin": BIG} == await repository.files("new")
    assert {"README.md": b"Hello.\n"} == await repository.files("same")
    assert ["Ours", "The first commit"] == [commit.message for commit in await repository.log("new")]
    assert "chunked" in [request.headers.get("Transfer-Encoding") for request in server.requests]


async def test_much_is_fetched_whole(server: GitHttp, repos: Repos, tmp_path: Path) -> None:
    """What no buffer on the way holds comes whole."""
    await repos.create("big", {"big.bin": BIG})
    await git("clone", "--quiet", server.url("big", user=USER), tmp_path / "work")
    assert (tmp_path / "work" / "big.bin").read_bytes() == BIG


async def test_packed_bodies_are_unpacked(server: GitHttp, repos: Repos, tmp_path: Path) -> None:
    """What git sends packed with gzip, as it does with a long list of what it wants, is understood."""
    repository = await repos.create("many", FILES)
    for number in range(30):
        await repository.commit({"number": str(number)}, branch=f"branch-{number}")
    await git("clone", "--quiet", "--mirror", server.url("many", user=USER), tmp_path / "mirror")
    assert "gzip" in [request.headers.get("Content-Encoding") for request in server.requests]
    assert await repository.sha("branch-29") == await git("rev-parse", "branch-29", cwd=tmp_path / "mirror")


@pytest.mark.parametrize("suffix", ["", ".git", "/"])
async def test_paths_have_many_spellings(server: GitHttp, repository: Repository, suffix: str) -> None:
    """A repository is found with `.git` and without."""
    url = server.url(repository.name, user=USER, suffix=suffix)
    assert f"{await repository.sha()}\tHEAD" == await git("ls-remote", url, "HEAD")


async def test_second_version_of_the_protocol(server: GitHttp, repository: Repository, tmp_path: Path) -> None:
    """The version that a client asks for is the version that git speaks to it."""
    trace = tmp_path / "trace"
    await git("ls-remote", server.url(repository.name, user=USER), env=environment(GIT_TRACE_PACKET=str(trace)))
    assert re.search(r"packet: .*< version 2$", trace.read_text(), re.MULTILINE)
    assert {"version=2"} == {request.headers.get("Git-Protocol") for request in server.requests}


async def test_requests_are_noted(server: GitHttp, repository: Repository) -> None:
    """The server notes which request brought which credential."""
    await git("ls-remote", server.url(repository.name, user=USER))
    seen = [(request.method, request.path, request.credential) for request in server.requests]
    credential = ("x-access-token", TOKEN)
    assert [
        # Git asks without one first.
        ("GET", "/group/sub/repo.git/info/refs?service=git-upload-pack", None),
        ("GET", "/group/sub/repo.git/info/refs?service=git-upload-pack", credential),
        ("POST", "/group/sub/repo.git/git-upload-pack", credential),
    ] == seen


@pytest.mark.parametrize(
    ("user", "words"),
    [(None, "could not read Username"), ("git:wrong", "Authentication failed"), ("git", "could not read Password")],
)
async def test_without_the_token_nobody_comes_in(
    server: GitHttp, repository: Repository, user: str | None, words: str
) -> None:
    """A private repository asks for a token, and takes no other."""
    assert words in await refused("ls-remote", server.url(repository.name, user=user))
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{server.url(repository.name)}/info/refs?service=git-upload-pack") as answer,
    ):
        assert (401, 'Basic realm="Git"') == (answer.status, answer.headers["WWW-Authenticate"])


async def test_public_repositories_are_fetched_by_everybody(
    repos: Repos, repository: Repository, tmp_path: Path
) -> None:
    """A public repository is fetched without a token, and pushed to with it alone."""
    async with GitHttp(repos, public=True) as server:
        await git("clone", "--quiet", server.url(repository.name), tmp_path / "work")
        assert {None} == {request.authorization for request in server.requests}
        push = ("-C", tmp_path / "work", "push", "--quiet")
        assert "could not read Username" in await refused(*push, server.url(repository.name), "HEAD:refs/heads/new")
        await git(*push, server.url(repository.name, user=USER), "HEAD:refs/heads/new")
        assert {"main", "new"} == set(await repository.branches())


async def test_open_servers_ask_nobody(repos: Repos, repository: Repository, tmp_path: Path) -> None:
    """A server without a token is open to everybody, for pushing too."""
    async with GitHttp(repos, token=None) as server:
        await git("clone", "--quiet", server.url(repository.name), tmp_path / "work")
        await git("push", "--quiet", "origin", "HEAD:refs/heads/new", cwd=tmp_path / "work")
        assert {"main", "new"} == set(await repository.branches())


@pytest.mark.parametrize("path", ["group/other", "group", "../outside", "%2e%2e/outside", "link"])
async def test_nothing_else_is_served(
    server: GitHttp, repository: Repository, repos: Repos, tmp_path: Path, path: str
) -> None:
    """What is not there is not found, and what is outside of the root is not there."""
    outside = await Repos(tmp_path).create("outside", FILES)
    (repos.root / "link.git").symlink_to(outside.path)
    assert "not found" in await refused("ls-remote", server.url(path, user=USER))


@pytest.mark.parametrize("path", ["HEAD", "info/refs", "objects/info/packs", "config"])
async def test_dumb_protocol_is_not_spoken(server: GitHttp, repository: Repository, path: str) -> None:
    """Files of a repository are not served as such."""
    async with (
        aiohttp.ClientSession(headers=AUTHORIZATION) as http,
        http.get(f"{server.url(repository.name)}/{path}") as answer,
    ):
        assert answer.status == 404


async def test_servers_may_forbid(server: GitHttp, repository: Repository) -> None:
    """A server may answer everything with a status of the test's choice."""
    server.status = 403
    assert "error: 403" in await refused("ls-remote", server.url(repository.name, user=USER))


async def test_repositories_move(server: GitHttp, repository: Repository) -> None:
    """A repository that has moved is found under its new name."""
    server.moved["old/name"] = repository.name
    assert f"{await repository.sha()}\tHEAD" == await git("ls-remote", server.url("old/name", user=USER), "HEAD")
    assert "/group/sub/repo.git/git-upload-pack" == server.requests[-1].path


async def test_redirects_lead_elsewhere(server: GitHttp, repository: Repository, repos: Repos) -> None:
    """A redirect leads to another server, where git is asked for a token anew."""
    async with GitHttp(repos) as other:
        server.redirect = Redirect(base=other.base_at("localhost"))
        await refused("ls-remote", server.url(repository.name, user=USER))
        assert ["/group/sub/repo.git/info/refs?service=git-upload-pack"] == [request.path for request in other.requests]
        assert [None] == [request.authorization for request in other.requests]


async def test_silence_lasts_until_somebody_leaves(server: GitHttp, repository: Repository) -> None:
    """A silent server answers nothing, and is closed at once all the same."""
    server.mode = Mode.HANG
    asking = asyncio.create_task(run_git("ls-remote", server.url(repository.name, user=USER)))
    await until(lambda: bool(server.requests))
    done, _ = await asyncio.wait({asking}, timeout=0.2)
    assert set() == done
    asking.cancel()
    await asyncio.wait({asking})


async def test_connections_break_in_mid_transfer(server: GitHttp, repos: Repos, tmp_path: Path) -> None:
    """A broken connection fails a clone, and leaves no git at work."""
    before = descendants()
    await repos.create("big", {"big.bin": BIG})
    server.drop_after_bytes = 5000
    errors = await refused("clone", server.url("big", user=USER), tmp_path / "work")
    assert re.search(r"early EOF|unexpected disconnect|Recv failure|curl", errors)
    await until(lambda: not descendants() - before)


@pytest.mark.parametrize("leaves", ["server", "client"])
async def test_nothing_is_left(repos: Repos, repository: Repository, leaves: str) -> None:
    """Whoever leaves in the middle of a request, no git stays at work."""
    before = descendants()

    async def body() -> AsyncIterator[bytes]:
        yield b"0014command=ls-refs\n"
        await asyncio.Event().wait()

    async with contextlib.AsyncExitStack() as servers, contextlib.AsyncExitStack() as clients:
        server = await servers.enter_async_context(GitHttp(repos, token=None))
        http = await clients.enter_async_context(aiohttp.ClientSession())
        url = f"{server.url(repository.name)}/git-upload-pack"
        headers = {"Content-Type": "application/x-git-upload-pack-request", "Git-Protocol": "version=2"}
        asking = asyncio.create_task(http.post(url, data=body(), headers=headers).__aenter__())
        await until(lambda: is_at_work("upload-pack"))
        await (servers if leaves == "server" else clients).aclose()
        await until(lambda: not descendants() - before)
        asking.cancel()
        await asyncio.wait({asking})


async def test_https_is_spoken_to_who_trusts_the_certificate(repos: Repos, repository: Repository) -> None:
    """Over https git fetches with the certificate, and refuses without."""
    async with GitHttp(repos, tls=True) as server:
        url = server.url(repository.name, user=USER)
        env = environment(GIT_SSL_CAINFO=str(server.ca_file))
        assert f"{await repository.sha()}\tHEAD" == await git("ls-remote", url, "HEAD", env=env)
        assert "certificate" in await refused("ls-remote", url)


async def test_bodies_may_be_packed_by_hand(server: GitHttp, repository: Repository) -> None:
    """A packed body with a length is understood as one without."""
    wanted = gzip.compress(b"0014command=ls-refs\n00010009peel\n0000")
    headers = {
        "Content-Type": "application/x-git-upload-pack-request",
        "Content-Encoding": "gzip",
        "Git-Protocol": "version=2",
        **AUTHORIZATION,
    }
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{server.url(repository.name)}/git-upload-pack", data=wanted, headers=headers) as answer,
    ):
        assert answer.status == 200
        assert f"{await repository.sha()} HEAD".encode() in await answer.read()

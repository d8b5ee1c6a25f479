from __future__ import annotations

import asyncio
import contextlib
import gzip
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
from standins.git_process import GIT_SECONDS, descendants, environment, git, is_running, run_git
from standins.githttp import TOKEN, GitHttp, Mode, Redirect, needs_backend
from standins.repos import Repos, Repository

pytestmark = needs_backend

FILES = {"README.md": "Hello.\n"}
#: More than fits into any buffer, and more than git sends in one part (http.postBuffer).
BIG = bytes(range(256)) * 8192
USER = f"x-access-token:{TOKEN}"
AUTHORIZATION = {"Authorization": aiohttp.encode_basic_auth("git", TOKEN)}


@pytest.fixture
def repos(tmp_path: Path) -> Repos:
    """Return an empty directory of repositories."""
    return Repos(tmp_path / "repos")


@pytest.fixture
async def repository(repos: Repos) -> Repository:
    """Return a repository with one file."""
    return await repos.create("group/sub/repo", FILES)


@pytest.fixture
async def server(repos: Repos) -> AsyncIterator[GitHttp]:
    """Return a server that requires the token."""
    async with GitHttp(repos) as running:
        yield running


async def failed_git(*args: str | Path, env: dict[str, str] | None = None) -> str:
    """Run git, which must fail, and return its stderr."""
    result = await run_git(*args, env=env)
    assert result.code != 0
    return result.stderr


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(GIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


async def test_clone_and_push(server: GitHttp, repository: Repository, tmp_path: Path) -> None:
    """Git clones and pushes, with a body that has a length or is chunked."""
    work = tmp_path / "work"
    await git("clone", "--quiet", server.url(repository.name, user=USER), work)
    assert (work / "README.md").read_text() == "Hello.\n"
    await git("push", "--quiet", "origin", "HEAD:refs/heads/same", cwd=work)
    (work / "big.bin").write_bytes(BIG)
    await git("add", ".", cwd=work)
    await git("commit", "--quiet", "-m", "Ours", cwd=work)
    server.clear_requests()
    # Compressed, the content would be sent in one part.
    await git("-c", "pack.compression=0", "push", "--quiet", "origin", "HEAD:refs/heads/new", cwd=work)
    assert {"README.md": b"Hello.\n", "big.bin": BIG} == await repository.files("new")
    assert {"README.md": b"Hello.\n"} == await repository.files("same")
    assert ["Ours", "The first commit"] == [commit.message for commit in await repository.log("new")]
    assert "chunked" in [request.headers.get("Transfer-Encoding") for request in server.requests]


async def test_large_repository_is_cloned(server: GitHttp, repos: Repos, tmp_path: Path) -> None:
    """A clone of more data than fits into any buffer is complete."""
    await repos.create("big", {"big.bin": BIG})
    await git("clone", "--quiet", server.url("big", user=USER), tmp_path / "work")
    assert (tmp_path / "work" / "big.bin").read_bytes() == BIG


async def test_compressed_bodies_are_accepted(server: GitHttp, repos: Repos, tmp_path: Path) -> None:
    """A request body that git compresses with gzip, as it does with a long list of refs, is decompressed."""
    repository = await repos.create("many", FILES)
    for number in range(30):
        await repository.commit({"number": str(number)}, branch=f"branch-{number}")
    await git("clone", "--quiet", "--mirror", server.url("many", user=USER), tmp_path / "mirror")
    assert "gzip" in [request.headers.get("Content-Encoding") for request in server.requests]
    assert await repository.sha("branch-29") == await git("rev-parse", "branch-29", cwd=tmp_path / "mirror")


@pytest.mark.parametrize("suffix", ["", ".git", "/"])
async def test_repository_is_found_with_and_without_suffix(
    server: GitHttp, repository: Repository, suffix: str
) -> None:
    """A repository is found with `.git`, without it, and with a trailing slash."""
    url = server.url(repository.name, user=USER, suffix=suffix)
    assert f"{await repository.sha()}\tHEAD" == await git("ls-remote", url, "HEAD")


async def test_protocol_version_2_is_supported(server: GitHttp, repository: Repository, tmp_path: Path) -> None:
    """The server uses the protocol version that the client requests."""
    trace = tmp_path / "trace"
    await git("ls-remote", server.url(repository.name, user=USER), env=environment(GIT_TRACE_PACKET=str(trace)))
    assert re.search(r"packet: .*< version 2$", trace.read_text(), re.MULTILINE)
    assert {"version=2"} == {request.headers.get("Git-Protocol") for request in server.requests}


async def test_requests_are_recorded(server: GitHttp, repository: Repository) -> None:
    """The server records each request with its credential."""
    await git("ls-remote", server.url(repository.name, user=USER))
    seen = [(request.method, request.path, request.credential) for request in server.requests]
    credential = ("x-access-token", TOKEN)
    assert [
        # Git sends the first request without a credential.
        ("GET", "/group/sub/repo.git/info/refs?service=git-upload-pack", None),
        ("GET", "/group/sub/repo.git/info/refs?service=git-upload-pack", credential),
        ("POST", "/group/sub/repo.git/git-upload-pack", credential),
    ] == seen


@pytest.mark.parametrize(
    ("user", "message"),
    [(None, "could not read Username"), ("git:wrong", "Authentication failed"), ("git", "could not read Password")],
)
async def test_token_is_required(server: GitHttp, repository: Repository, user: str | None, message: str) -> None:
    """A private repository requires the token and accepts no other."""
    assert message in await failed_git("ls-remote", server.url(repository.name, user=user))
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{server.url(repository.name)}/info/refs?service=git-upload-pack") as response,
    ):
        assert (401, 'Basic realm="Git"') == (response.status, response.headers["WWW-Authenticate"])


async def test_public_repository_needs_the_token_only_for_pushing(
    repos: Repos, repository: Repository, tmp_path: Path
) -> None:
    """A public repository is fetched without a token, and a push requires it."""
    async with GitHttp(repos, public=True) as server:
        await git("clone", "--quiet", server.url(repository.name), tmp_path / "work")
        assert {None} == {request.authorization for request in server.requests}
        push = ("-C", tmp_path / "work", "push", "--quiet")
        assert "could not read Username" in await failed_git(*push, server.url(repository.name), "HEAD:refs/heads/new")
        await git(*push, server.url(repository.name, user=USER), "HEAD:refs/heads/new")
        assert {"main", "new"} == set(await repository.branches())


async def test_server_without_a_token_requires_none(repos: Repos, repository: Repository, tmp_path: Path) -> None:
    """A server without a token allows fetching and pushing without authentication."""
    async with GitHttp(repos, token=None) as server:
        await git("clone", "--quiet", server.url(repository.name), tmp_path / "work")
        await git("push", "--quiet", "origin", "HEAD:refs/heads/new", cwd=tmp_path / "work")
        assert {"main", "new"} == set(await repository.branches())


@pytest.mark.parametrize("path", ["group/other", "group", "../outside", "%2e%2e/outside", "link"])
async def test_other_paths_are_not_found(
    server: GitHttp, repository: Repository, repos: Repos, tmp_path: Path, path: str
) -> None:
    """A missing repository and one outside the root are not found."""
    outside = await Repos(tmp_path).create("outside", FILES)
    (repos.root / "link.git").symlink_to(outside.path)
    assert "not found" in await failed_git("ls-remote", server.url(path, user=USER))


@pytest.mark.parametrize("path", ["HEAD", "info/refs", "objects/info/packs", "config"])
async def test_dumb_protocol_is_not_supported(server: GitHttp, repository: Repository, path: str) -> None:
    """The files of a repository are not served."""
    async with (
        aiohttp.ClientSession(headers=AUTHORIZATION) as http,
        http.get(f"{server.url(repository.name)}/{path}") as response,
    ):
        assert response.status == 404


async def test_status_can_be_set(server: GitHttp, repository: Repository) -> None:
    """A test can set the status of every response."""
    server.status = 403
    assert "error: 403" in await failed_git("ls-remote", server.url(repository.name, user=USER))


async def test_moved_repository_is_redirected(server: GitHttp, repository: Repository) -> None:
    """A moved repository is found through its old name."""
    server.moved["old/name"] = repository.name
    assert f"{await repository.sha()}\tHEAD" == await git("ls-remote", server.url("old/name", user=USER), "HEAD")
    assert "/group/sub/repo.git/git-upload-pack" == server.requests[-1].path


async def test_redirect_leads_to_another_server(server: GitHttp, repository: Repository, repos: Repos) -> None:
    """Git follows a redirect to another server without sending the credential."""
    async with GitHttp(repos) as other:
        server.redirect = Redirect(base=other.base_at("localhost"))
        await failed_git("ls-remote", server.url(repository.name, user=USER))
        assert ["/group/sub/repo.git/info/refs?service=git-upload-pack"] == [request.path for request in other.requests]
        assert [None] == [request.authorization for request in other.requests]


async def test_hanging_server_can_be_closed(server: GitHttp, repository: Repository) -> None:
    """A server in mode `HANG` never responds, and can still be closed immediately."""
    server.mode = Mode.HANG
    running_git = asyncio.create_task(run_git("ls-remote", server.url(repository.name, user=USER)))
    await until(lambda: bool(server.requests))
    done, _ = await asyncio.wait({running_git}, timeout=0.2)
    assert set() == done
    running_git.cancel()
    await asyncio.wait({running_git})


async def test_connection_can_be_reset_during_a_response(server: GitHttp, repos: Repos, tmp_path: Path) -> None:
    """A connection that is reset makes the clone fail and leaves no git process."""
    before = descendants()
    await repos.create("big", {"big.bin": BIG})
    server.drop_after_bytes = 5000
    errors = await failed_git("clone", server.url("big", user=USER), tmp_path / "work")
    assert re.search(r"early EOF|unexpected disconnect|Recv failure|curl", errors)
    await until(lambda: not descendants() - before)


@pytest.mark.parametrize("closed", ["server", "client"])
async def test_no_process_is_left(repos: Repos, repository: Repository, closed: str) -> None:
    """When the server or the client closes in the middle of a request, no git process remains."""
    before = descendants()

    async def body() -> AsyncIterator[bytes]:
        yield b"0014command=ls-refs\n"
        await asyncio.Event().wait()

    async with contextlib.AsyncExitStack() as servers, contextlib.AsyncExitStack() as clients:
        server = await servers.enter_async_context(GitHttp(repos, token=None))
        http = await clients.enter_async_context(aiohttp.ClientSession())
        url = f"{server.url(repository.name)}/git-upload-pack"
        headers = {"Content-Type": "application/x-git-upload-pack-request", "Git-Protocol": "version=2"}
        running_git = asyncio.create_task(http.post(url, data=body(), headers=headers).__aenter__())
        await until(lambda: is_running("upload-pack"))
        await (servers if closed == "server" else clients).aclose()
        await until(lambda: not descendants() - before)
        running_git.cancel()
        await asyncio.wait({running_git})


async def test_https_requires_the_certificate(repos: Repos, repository: Repository) -> None:
    """Git fetches over https if it trusts the certificate, and fails otherwise."""
    async with GitHttp(repos, tls=True) as server:
        url = server.url(repository.name, user=USER)
        env = environment(GIT_SSL_CAINFO=str(server.ca_file))
        assert f"{await repository.sha()}\tHEAD" == await git("ls-remote", url, "HEAD", env=env)
        assert "certificate" in await failed_git("ls-remote", url)


async def test_compressed_body_with_a_length_is_accepted(server: GitHttp, repository: Repository) -> None:
    """A gzip body with a Content-Length is decompressed."""
    body = gzip.compress(b"0014command=ls-refs\n00010009peel\n0000")
    headers = {
        "Content-Type": "application/x-git-upload-pack-request",
        "Content-Encoding": "gzip",
        "Git-Protocol": "version=2",
        **AUTHORIZATION,
    }
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{server.url(repository.name)}/git-upload-pack", data=body, headers=headers) as response,
    ):
        assert response.status == 200
        assert f"{await repository.sha()} HEAD".encode() in await response.read()

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from standins.gitssh import GitSsh, KeyPair, Mode, key_pair, needs_ssh, new_host_key
from standins.repos import GIT_SECONDS, Repos, Repository, backend, descendants, environment, git, is_at_work, run_git

pytestmark = needs_ssh

FILES = {"README.md": "Hello.\n"}
#: More than any buffer on the way holds.
BIG = bytes(range(256)) * 8192


@pytest.fixture
def repos(tmp_path: Path) -> Repos:
    """Return an empty folder of repositories."""
    return Repos(tmp_path / "repos")


@pytest.fixture
async def repository(repos: Repos) -> Repository:
    """Return a repository with one file."""
    return await repos.create("group/sub/repo", FILES)


@pytest.fixture
async def server(repos: Repos) -> AsyncIterator[GitSsh]:
    """Return a server that `key_pair()` opens."""
    async with GitSsh(repos) as running:
        yield running


async def refused(
    server: GitSsh, tmp_path: Path, *args: str, key: str | None = None, known_hosts: str | None = None
) -> str:
    """Return what git prints when it fails."""
    result = await run_git(*args, env=server.client_environment(tmp_path / "client", key, known_hosts=known_hosts))
    assert result.code != 0
    return result.stderr


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(GIT_SECONDS):
        while not holds():
            await asyncio.sleep(0.01)


async def test_clone_commit_and_push(server: GitSsh, repository: Repository, tmp_path: Path) -> None:
    """Git clones, and what it pushes arrives."""
    env = server.client_environment(tmp_path / "client")
    await git("clone", "--quiet", server.url(repository.name), tmp_path / "work", env=env)
    assert (tmp_path / "work" / "README.md").read_text() == "Hello.\n"
    (tmp_path / "work" / "big.bin").write_bytes(BIG)
    await git("add", ".", cwd=tmp_path / "work")
    await git("commit", "--quiet", "-m", "Ours", cwd=tmp_path / "work")
    await git("push", "--quiet", "origin", "HEAD:refs/heads/new", env=env, cwd=tmp_path / "work")
    assert {"README.md": b"Hello.\n", "big.bin": BIG} == await repository.files("new")
    assert ["Ours", "The first commit"] == [commit.message for commit in await repository.log("new")]


async def test_much_is_fetched_whole(server: GitSsh, repos: Repos, tmp_path: Path) -> None:
    """What no buffer on the way holds comes whole."""
    await repos.create("big", {"big.bin": BIG})
    env = server.client_environment(tmp_path / "client")
    await git("clone", "--quiet", server.url("big"), tmp_path / "work", env=env)
    assert (tmp_path / "work" / "big.bin").read_bytes() == BIG


@pytest.mark.parametrize(
    "path",
    ["group/sub/repo", "group/sub/repo.git", "/group/sub/repo.git/"],
)
async def test_paths_have_many_spellings(server: GitSsh, repository: Repository, tmp_path: Path, path: str) -> None:
    """A repository is found with `.git` and without."""
    env = server.client_environment(tmp_path / "client")
    url = f"ssh://git@127.0.0.1:{server.port}/{path}"
    assert f"{await repository.sha()}\tHEAD" == await git("ls-remote", url, "HEAD", env=env)


async def test_second_version_of_the_protocol(server: GitSsh, repository: Repository, tmp_path: Path) -> None:
    """The version that a client asks for is the version that git speaks to it."""
    trace = tmp_path / "trace"
    env = {**server.client_environment(tmp_path / "client"), "GIT_TRACE_PACKET": str(trace)}
    await git("ls-remote", server.url(repository.name), env=env)
    assert re.search(r"packet: .*< version 2$", trace.read_text(), re.MULTILINE)
    assert [{"GIT_PROTOCOL": "version=2"}] == [session.environment for session in server.sessions]


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
async def test_keys_of_both_kinds_open(repos: Repos, repository: Repository, tmp_path: Path, kind: str) -> None:
    """OpenSSH logs in with either key, and the server notes under which name and with which key."""
    pair: KeyPair = key_pair("rsa") if kind == "rsa" else key_pair("ed25519")
    async with GitSsh(repos, authorized=(pair.public,)) as server:
        env = server.client_environment(tmp_path / "client", pair.openssh)
        await git("ls-remote", server.url(repository.name, user="somebody"), env=env)
        assert {"somebody"} == set(server.users)
        assert {" ".join(pair.public.split()[:2])} == set(server.offered_keys)
        assert ["somebody"] == [session.user for session in server.sessions]
        assert ["git-upload-pack '/group/sub/repo.git'"] == server.commands


async def test_pem_opens(repos: Repos, repository: Repository, tmp_path: Path) -> None:
    """OpenSSH logs in with an RSA key in either older form."""
    pair = key_pair("rsa")
    async with GitSsh(repos, authorized=(pair.public,)) as server:
        for key in (pair.pem, pair.pkcs8):
            await git("ls-remote", server.url(repository.name), env=server.client_environment(tmp_path / "client", key))


async def test_other_keys_are_refused(server: GitSsh, repository: Repository, tmp_path: Path) -> None:
    """A key that is not authorized does not open."""
    other = key_pair("ed25519", 1)
    errors = await refused(server, tmp_path, "ls-remote", server.url(repository.name), key=other.openssh)
    assert "Permission denied (publickey)" in errors
    assert [" ".join(other.public.split()[:2])] == server.offered_keys
    assert [] == server.sessions


async def test_no_key_is_good_enough(server: GitSsh, repository: Repository, tmp_path: Path) -> None:
    """A server may refuse every key."""
    server.mode = Mode.REFUSE_KEYS
    assert "Permission denied (publickey)" in await refused(server, tmp_path, "ls-remote", server.url(repository.name))


async def test_another_host_key_is_noticed(repos: Repos, repository: Repository, tmp_path: Path) -> None:
    """A client that knows another key of the server does not go on."""
    async with GitSsh(repos, host_key=(key := new_host_key())) as server, GitSsh(repos, host_key=key) as same:
        assert same.host_key == server.host_key
        async with GitSsh(repos) as other:
            assert other.host_key != server.host_key
            known = server.known_hosts.replace(server.host_key, other.host_key)
        errors = await refused(server, tmp_path, "ls-remote", server.url(repository.name), known_hosts=known)
        assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in errors
        assert [] == server.users


@pytest.mark.parametrize(
    "command", ["ls -l /", "", "git-upload-archive '/group/sub/repo.git'", "git gc", "git-upload-pack '"]
)
async def test_nothing_else_runs(server: GitSsh, repository: Repository, tmp_path: Path, command: str) -> None:
    """Neither a shell nor any other command runs."""
    ssh = server.client_environment(tmp_path / "client")["GIT_SSH_COMMAND"]
    # By git, which ends what it has started, as an alias of its own.
    result = await run_git(
        "-c", f"alias.go=!{ssh} -T -p {server.port} git@127.0.0.1", "go", *([command] if command else [])
    )
    assert result.code == 1
    assert "does not provide shell access" in result.stderr
    assert [command or None] == server.commands


@pytest.mark.parametrize(
    "path", ["group/other", "group", "../outside", "group/sub/repo.git/../../../../outside", "link"]
)
async def test_nothing_else_is_served(
    server: GitSsh, repository: Repository, repos: Repos, tmp_path: Path, path: str
) -> None:
    """What is not there is not found, and what is outside of the root is not there."""
    outside = await Repos(tmp_path).create("outside", FILES)
    (repos.root / "link.git").symlink_to(outside.path)
    url = f"ssh://git@127.0.0.1:{server.port}/{path}"
    assert "ERROR: Repository not found." in await refused(server, tmp_path, "ls-remote", url)


async def test_read_only_keys_fetch(repos: Repos, repository: Repository, tmp_path: Path) -> None:
    """With a deploy key one may fetch and not push."""
    async with GitSsh(repos, read_only=True) as server:
        env = server.client_environment(tmp_path / "client")
        url = server.url(repository.name)
        await git("clone", "--quiet", url, tmp_path / "work", env=env)
        errors = await refused(server, tmp_path, "-C", str(tmp_path / "work"), "push", url, "HEAD:refs/heads/new")
        assert "marked as read only" in errors


async def test_agents_are_noticed(server: GitSsh, repository: Repository, tmp_path: Path) -> None:
    """The server notes a client that offers its agent."""
    env = server.client_environment(tmp_path / "client")
    # OpenSSH offers none where there is none to reach.
    offering = (
        env["GIT_SSH_COMMAND"].replace("IdentityAgent=none", "IdentityAgent=SSH_AUTH_SOCK") + " -oForwardAgent=yes"
    )
    await git("ls-remote", server.url(repository.name), env=env)
    async with await asyncio.start_unix_server(lambda reader, writer: writer.close(), tmp_path / "agent"):
        with_agent = {**env, "GIT_SSH_COMMAND": offering, "SSH_AUTH_SOCK": str(tmp_path / "agent")}
        await git("ls-remote", server.url(repository.name), env=with_agent)
    assert [False, True] == [session.agent_forwarded for session in server.sessions]


@pytest.mark.parametrize("mode", [Mode.SILENT, Mode.HANG])
async def test_silence_lasts_until_somebody_leaves(
    server: GitSsh, repository: Repository, tmp_path: Path, mode: Mode
) -> None:
    """A silent server answers nothing, and is closed at once all the same."""
    server.mode = mode
    env = server.client_environment(tmp_path / "client")
    asking = asyncio.create_task(git("ls-remote", server.url(repository.name), env=env))
    await until(lambda: bool(server.connections if mode is Mode.SILENT else server.sessions))
    done, _ = await asyncio.wait({asking}, timeout=0.2)
    assert set() == done
    asking.cancel()
    await asyncio.wait({asking})
    assert ([] if mode is Mode.SILENT else ["git-upload-pack '/group/sub/repo.git'"]) == server.commands


async def test_connections_break_in_mid_transfer(server: GitSsh, repos: Repos, tmp_path: Path) -> None:
    """A broken connection fails a clone, and leaves no git at work."""
    await repos.create("big", {"big.bin": BIG})
    server.drop_after_bytes = 5000
    errors = await refused(server, tmp_path, "clone", server.url("big"), str(tmp_path / "work"))
    assert re.search(r"early EOF|unexpected disconnect|hung up|eof|Connection reset", errors)
    server.drop_after_bytes = None
    env = server.client_environment(tmp_path / "client")
    await git("clone", "--quiet", server.url("big"), tmp_path / "work", env=env)


@pytest.mark.parametrize("leaves", ["server", "client"])
async def test_nothing_is_left(repos: Repos, repository: Repository, tmp_path: Path, leaves: str) -> None:
    """Whoever leaves in the middle of a clone, no git stays at work."""
    before = descendants()
    async with contextlib.AsyncExitStack() as servers, contextlib.AsyncExitStack() as clients:
        server = await servers.enter_async_context(GitSsh(repos))
        # Git waits for the client's word, and the client for the end of its input.
        ssh = server.client_environment(tmp_path / "client")["GIT_SSH_COMMAND"]
        command = f"alias.go=!{ssh} -T -p {server.port} git@127.0.0.1 \"git-upload-pack 'group/sub/repo'\""
        client = await clients.enter_async_context(backend(["git", "-c", command, "go"], env=environment()))
        await until(lambda: is_at_work("upload-pack"))
        await (servers if leaves == "server" else clients).aclose()
        await until(lambda: not is_at_work("upload-pack"))
        assert (255 if leaves == "server" else -signal.SIGKILL) == await client.wait()
    await until(lambda: not descendants() - before)


async def test_somebody_is_faster(server: GitSsh, repository: Repository, tmp_path: Path) -> None:
    """What happens before git starts is seen by the client that comes then."""
    env = server.client_environment(tmp_path / "client")
    await git("clone", "--quiet", server.url(repository.name), tmp_path / "work", env=env)
    await git("commit", "--quiet", "--allow-empty", "-m", "Ours", cwd=tmp_path / "work")

    async def be_faster(command: str) -> None:
        assert "git-receive-pack /group/sub/repo.git" == command
        await repository.commit({"other.txt": "faster"})

    server.before = be_faster
    errors = await refused(server, tmp_path, "-C", str(tmp_path / "work"), "push", "origin", "HEAD:main")
    assert "(fetch first)" in errors
    assert ["Somebody else's commit", "The first commit"] == [commit.message for commit in await repository.log()]

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from standins.git_process import GIT_SECONDS, backend, descendants, environment, git, is_running, run_git
from standins.gitssh import GitSsh, KeyPair, Mode, key_pair, needs_ssh, new_host_key
from standins.repos import Repos, Repository

pytestmark = needs_ssh

FILES = {"README.md": "Hello.\n"}
#: More than fits into any buffer.
BIG = bytes(range(256)) * 8192


@pytest.fixture
def repos(tmp_path: Path) -> Repos:
    """Return an empty directory of repositories."""
    return Repos(tmp_path / "repos")


@pytest.fixture
async def repository(repos: Repos) -> Repository:
    """Return a repository with one file."""
    return await repos.create("group/sub/repo", FILES)


@pytest.fixture
async def server(repos: Repos) -> AsyncIterator[GitSsh]:
    """Return a server that accepts `key_pair()`."""
    async with GitSsh(repos) as running:
        yield running


async def failed_git(
    server: GitSsh, tmp_path: Path, *args: str, key: str | None = None, known_hosts: str | None = None
) -> str:
    """Run git, which must fail, and return its stderr."""
    result = await run_git(*args, env=server.client_environment(tmp_path / "client", key, known_hosts=known_hosts))
    assert result.code != 0
    return result.stderr


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(GIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


async def test_clone_and_push(server: GitSsh, repository: Repository, tmp_path: Path) -> None:
    """Git clones and pushes."""
    env = server.client_environment(tmp_path / "client")
    await git("clone", "--quiet", server.url(repository.name), tmp_path / "work", env=env)
    assert (tmp_path / "work" / "README.md").read_text() == "Hello.\n"
    (tmp_path / "work" / "big.bin").write_bytes(BIG)
    await git("add", ".", cwd=tmp_path / "work")
    await git("commit", "--quiet", "-m", "Ours", cwd=tmp_path / "work")
    await git("push", "--quiet", "origin", "HEAD:refs/heads/new", env=env, cwd=tmp_path / "work")
    assert {"README.md": b"Hello.\n", "big.bin": BIG} == await repository.files("new")
    assert ["Ours", "The first commit"] == [commit.message for commit in await repository.log("new")]


async def test_large_repository_is_cloned(server: GitSsh, repos: Repos, tmp_path: Path) -> None:
    """A clone of more data than fits into any buffer is complete."""
    await repos.create("big", {"big.bin": BIG})
    env = server.client_environment(tmp_path / "client")
    await git("clone", "--quiet", server.url("big"), tmp_path / "work", env=env)
    assert (tmp_path / "work" / "big.bin").read_bytes() == BIG


@pytest.mark.parametrize(
    "path",
    ["group/sub/repo", "group/sub/repo.git", "/group/sub/repo.git/"],
)
async def test_repository_is_found_with_and_without_suffix(
    server: GitSsh, repository: Repository, tmp_path: Path, path: str
) -> None:
    """A repository is found with `.git` and without it."""
    env = server.client_environment(tmp_path / "client")
    url = f"ssh://git@127.0.0.1:{server.port}/{path}"
    assert f"{await repository.sha()}\tHEAD" == await git("ls-remote", url, "HEAD", env=env)


async def test_protocol_version_2_is_supported(server: GitSsh, repository: Repository, tmp_path: Path) -> None:
    """The server uses the protocol version that the client requests."""
    trace = tmp_path / "trace"
    env = {**server.client_environment(tmp_path / "client"), "GIT_TRACE_PACKET": str(trace)}
    await git("ls-remote", server.url(repository.name), env=env)
    assert re.search(r"packet: .*< version 2$", trace.read_text(), re.MULTILINE)
    assert [{"GIT_PROTOCOL": "version=2"}] == [session.environment for session in server.sessions]


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
async def test_both_kinds_of_keys_are_accepted(repos: Repos, repository: Repository, tmp_path: Path, kind: str) -> None:
    """OpenSSH logs in with either kind of key, and the server records the user name and the key."""
    pair: KeyPair = key_pair("rsa") if kind == "rsa" else key_pair("ed25519")
    async with GitSsh(repos, authorized=(pair.public,)) as server:
        env = server.client_environment(tmp_path / "client", pair.openssh)
        await git("ls-remote", server.url(repository.name, user="someone"), env=env)
        assert {"someone"} == set(server.users)
        assert {" ".join(pair.public.split()[:2])} == set(server.offered_keys)
        assert ["someone"] == [session.user for session in server.sessions]
        assert ["git-upload-pack '/group/sub/repo.git'"] == server.commands


async def test_pem_keys_are_accepted(repos: Repos, repository: Repository, tmp_path: Path) -> None:
    """OpenSSH logs in with an RSA key in either PEM format."""
    pair = key_pair("rsa")
    async with GitSsh(repos, authorized=(pair.public,)) as server:
        for key in (pair.pem, pair.pkcs8):
            await git("ls-remote", server.url(repository.name), env=server.client_environment(tmp_path / "client", key))


async def test_unauthorized_key_is_rejected(server: GitSsh, repository: Repository, tmp_path: Path) -> None:
    """A key that is not authorized is rejected."""
    other = key_pair("ed25519", 1)
    errors = await failed_git(server, tmp_path, "ls-remote", server.url(repository.name), key=other.openssh)
    assert "Permission denied (publickey)" in errors
    assert [" ".join(other.public.split()[:2])] == server.offered_keys
    assert [] == server.sessions


async def test_all_keys_can_be_rejected(server: GitSsh, repository: Repository, tmp_path: Path) -> None:
    """A server in mode `REFUSE_KEYS` rejects every key."""
    server.mode = Mode.REFUSE_KEYS
    assert "Permission denied (publickey)" in await failed_git(
        server, tmp_path, "ls-remote", server.url(repository.name)
    )


async def test_other_host_key_is_detected(repos: Repos, repository: Repository, tmp_path: Path) -> None:
    """A client that knows another host key of the server does not connect."""
    async with GitSsh(repos, host_key=(key := new_host_key())) as server, GitSsh(repos, host_key=key) as same:
        assert same.host_key == server.host_key
        async with GitSsh(repos) as other:
            assert other.host_key != server.host_key
            known_hosts = server.known_hosts.replace(server.host_key, other.host_key)
        errors = await failed_git(server, tmp_path, "ls-remote", server.url(repository.name), known_hosts=known_hosts)
        assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in errors
        assert [] == server.users


@pytest.mark.parametrize(
    "command", ["ls -l /", "", "git-upload-archive '/group/sub/repo.git'", "git gc", "git-upload-pack '"]
)
async def test_other_commands_are_rejected(
    server: GitSsh, repository: Repository, tmp_path: Path, command: str
) -> None:
    """The server runs neither a shell nor another command."""
    ssh = server.client_environment(tmp_path / "client")["GIT_SSH_COMMAND"]
    # Run as an alias of git, because `run_git` stops what it started.
    result = await run_git(
        "-c", f"alias.go=!{ssh} -T -p {server.port} git@127.0.0.1", "go", *([command] if command else [])
    )
    assert result.code == 1
    assert "does not provide shell access" in result.stderr
    assert [command or None] == server.commands


@pytest.mark.parametrize(
    "path", ["group/other", "group", "../outside", "group/sub/repo.git/../../../../outside", "link"]
)
async def test_other_paths_are_not_found(
    server: GitSsh, repository: Repository, repos: Repos, tmp_path: Path, path: str
) -> None:
    """A missing repository and one outside the root are not found."""
    outside = await Repos(tmp_path).create("outside", FILES)
    (repos.root / "link.git").symlink_to(outside.path)
    url = f"ssh://git@127.0.0.1:{server.port}/{path}"
    assert "ERROR: Repository not found." in await failed_git(server, tmp_path, "ls-remote", url)


async def test_read_only_key_cannot_push(repos: Repos, repository: Repository, tmp_path: Path) -> None:
    """With a read-only key, fetching works and pushing is rejected."""
    async with GitSsh(repos, read_only=True) as server:
        env = server.client_environment(tmp_path / "client")
        url = server.url(repository.name)
        await git("clone", "--quiet", url, tmp_path / "work", env=env)
        errors = await failed_git(server, tmp_path, "-C", str(tmp_path / "work"), "push", url, "HEAD:refs/heads/new")
        assert "marked as read only" in errors


async def test_forwarded_agent_is_recorded(server: GitSsh, repository: Repository, tmp_path: Path) -> None:
    """The server records whether a client forwards its SSH agent."""
    env = server.client_environment(tmp_path / "client")
    # OpenSSH forwards an agent only if it can connect to it.
    ssh_command = (
        env["GIT_SSH_COMMAND"].replace("IdentityAgent=none", "IdentityAgent=SSH_AUTH_SOCK") + " -oForwardAgent=yes"
    )
    await git("ls-remote", server.url(repository.name), env=env)
    async with await asyncio.start_unix_server(lambda reader, writer: writer.close(), tmp_path / "agent"):
        with_agent = {**env, "GIT_SSH_COMMAND": ssh_command, "SSH_AUTH_SOCK": str(tmp_path / "agent")}
        await git("ls-remote", server.url(repository.name), env=with_agent)
    assert [False, True] == [session.agent_forwarded for session in server.sessions]


@pytest.mark.parametrize("mode", [Mode.SILENT, Mode.HANG])
async def test_hanging_server_can_be_closed(server: GitSsh, repository: Repository, tmp_path: Path, mode: Mode) -> None:
    """A server in mode `SILENT` or `HANG` never responds, and can still be closed immediately."""
    server.mode = mode
    env = server.client_environment(tmp_path / "client")
    running_git = asyncio.create_task(git("ls-remote", server.url(repository.name), env=env))
    await until(lambda: bool(server.connections if mode is Mode.SILENT else server.sessions))
    done, _ = await asyncio.wait({running_git}, timeout=0.2)
    assert set() == done
    running_git.cancel()
    await asyncio.wait({running_git})
    assert ([] if mode is Mode.SILENT else ["git-upload-pack '/group/sub/repo.git'"]) == server.commands


async def test_connection_can_be_reset_during_a_response(server: GitSsh, repos: Repos, tmp_path: Path) -> None:
    """A connection that is reset makes the clone fail, and a later clone succeeds."""
    await repos.create("big", {"big.bin": BIG})
    server.drop_after_bytes = 5000
    errors = await failed_git(server, tmp_path, "clone", server.url("big"), str(tmp_path / "work"))
    assert re.search(r"early EOF|unexpected disconnect|hung up|eof|Connection reset", errors)
    server.drop_after_bytes = None
    env = server.client_environment(tmp_path / "client")
    await git("clone", "--quiet", server.url("big"), tmp_path / "work", env=env)


@pytest.mark.parametrize("closed", ["server", "client"])
async def test_no_process_is_left(repos: Repos, repository: Repository, tmp_path: Path, closed: str) -> None:
    """When the server or the client closes in the middle of a clone, no git process remains."""
    before = descendants()
    async with contextlib.AsyncExitStack() as servers, contextlib.AsyncExitStack() as clients:
        server = await servers.enter_async_context(GitSsh(repos))
        # Git waits for the client's request, and the client waits for the end of its input.
        ssh = server.client_environment(tmp_path / "client")["GIT_SSH_COMMAND"]
        command = f"alias.go=!{ssh} -T -p {server.port} git@127.0.0.1 \"git-upload-pack 'group/sub/repo'\""
        client = await clients.enter_async_context(backend(["git", "-c", command, "go"], env=environment()))
        await until(lambda: is_running("upload-pack"))
        await (servers if closed == "server" else clients).aclose()
        await until(lambda: not is_running("upload-pack"))
        assert (255 if closed == "server" else -signal.SIGKILL) == await client.wait()
    await until(lambda: not descendants() - before)


async def test_hook_runs_before_git(server: GitSsh, repository: Repository, tmp_path: Path) -> None:
    """What `before` changes is visible to the client whose command it delays."""
    env = server.client_environment(tmp_path / "client")
    await git("clone", "--quiet", server.url(repository.name), tmp_path / "work", env=env)
    await git("commit", "--quiet", "--allow-empty", "-m", "Ours", cwd=tmp_path / "work")

    async def commit_first(command: str) -> None:
        assert "git-receive-pack /group/sub/repo.git" == command
        await repository.commit({"other.txt": "first"})

    server.before = commit_first
    errors = await failed_git(server, tmp_path, "-C", str(tmp_path / "work"), "push", "origin", "HEAD:main")
    assert "(fetch first)" in errors
    assert ["Another commit", "The first commit"] == [commit.message for commit in await repository.log()]

from __future__ import annotations

import pytest
from helpers.git import GitSetup, git_setup, http, http_access, ssh, ssh_access
from standins.githttp import GitHttp
from standins.githttp import Mode as HttpMode
from standins.gitssh import GitSsh, Mode, key_pair, needs_ssh

from ccrun.worker.git.clone import CloneOptions, clone
from ccrun.worker.git.run import GitError

__all__ = ["git_setup", "http", "ssh"]
pytestmark = needs_ssh


async def test_error_names_a_missing_branch(git_setup: GitSetup, ssh: GitSsh) -> None:
    """The repository is not considered empty."""
    repository = await git_setup.repos.create("demo", {"a.txt": "one"})
    await repository.make_branch("dev")
    message = r"^The repository has no branch or tag of the name in gitBranch: missing\. Its branches: dev, main\.$"
    with pytest.raises(GitError, match=message):
        await git_setup.clone(ssh_access(ssh.url("demo")), revision="missing")


async def test_head_of_a_missing_branch_is_an_error(git_setup: GitSetup, ssh: GitSsh) -> None:
    """The agent would find an empty directory. The error names the branches that there are."""
    repository = await git_setup.repos.create("demo", {"a.txt": "one"})
    await repository.git("symbolic-ref", "HEAD", "refs/heads/gone")
    message = r"^The HEAD of the repository names a branch that does not exist: give gitBranch\. Its branches: main\.$"
    with pytest.raises(GitError, match=message):
        await git_setup.clone(ssh_access(ssh.url("demo")))


async def test_error_names_a_missing_commit(git_setup: GitSetup, ssh: GitSsh) -> None:
    """The error has the ID of the commit."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    with pytest.raises(GitError, match=r"^The repository has no commit 1234567890123456789012345678901234567890, or"):
        await git_setup.clone(ssh_access(ssh.url("demo")), revision="1234567890" * 4)


async def test_missing_repository_is_reported(git_setup: GitSetup, ssh: GitSsh, http: GitHttp) -> None:
    """The error is the same over SSH and HTTP."""
    for access in (ssh_access(ssh.url("missing")), http_access(http.url("missing"))):
        with pytest.raises(
            GitError, match=r"^127\.0\.0\.1 does not have the repository in gitRepo, or hides it from this login"
        ):
            await git_setup.clone(access)


async def test_rejected_key_is_reported(git_setup: GitSetup, ssh: GitSsh) -> None:
    """The error names the field to check."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    with pytest.raises(GitError, match=r"^127\.0\.0\.1 rejected the SSH login: check sshKey\.$"):
        await git_setup.clone(ssh_access(ssh.url("demo"), key_pair(number=1)))


async def test_missing_key_is_reported(git_setup: GitSetup, ssh: GitSsh) -> None:
    """The error states that the request has no key."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    access = ssh_access(ssh.url("demo"))
    access.ssh_key = None
    with pytest.raises(GitError, match=r"^127\.0\.0\.1 rejected the SSH login: the request has no sshKey\.$"):
        await git_setup.clone(access)


@pytest.mark.parametrize("token", [None, "wrong-token"])
async def test_rejected_token_is_reported(git_setup: GitSetup, http: GitHttp, token: str | None) -> None:
    """A token is wrong or missing. git does not prompt for another."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    hint = "check gitToken" if token else "the request has no gitToken"
    with pytest.raises(
        GitError, match=rf"^127\.0\.0\.1 rejected the login: {hint}\.( The server says: Authentication required\.)?$"
    ):
        await git_setup.clone(http_access(http.url("demo"), token))


async def test_unusable_key_is_reported(git_setup: GitSetup, ssh: GitSsh) -> None:
    """A key has a passphrase, or is not a key. The error does not contain it."""
    with pytest.raises(GitError, match=r"^sshKey is not a private key in the PEM or OpenSSH format\.$"):
        await git_setup.clone(ssh_access(ssh.url("demo"), "made-up text"))
    with pytest.raises(GitError, match=r"^sshKey is protected by a passphrase: give a key without one\.$"):
        await git_setup.clone(ssh_access(ssh.url("demo"), key_pair().encrypted))


async def test_unreachable_host_is_reported(git_setup: GitSetup) -> None:
    """The name of a host is unknown, or its port is closed."""
    with pytest.raises(GitError, match=r"^The host of gitRepo was not found: nowhere\.invalid\.$"):
        await git_setup.clone(ssh_access("ssh://git@nowhere.invalid/a/b.git"))
    with pytest.raises(GitError, match=r"^127\.0\.0\.1 could not be reached"):
        await git_setup.clone(ssh_access("ssh://git@127.0.0.1:9/a/b.git"))


@pytest.mark.parametrize("mode", [Mode.SILENT, Mode.HANG])
async def test_clone_from_an_ssh_server_that_hangs_is_stopped(git_setup: GitSetup, ssh: GitSsh, mode: Mode) -> None:
    """The clone has a timeout, and the error states it."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    ssh.mode = mode
    git_setup.into.mkdir(parents=True)
    with pytest.raises(
        GitError, match=r"^The repository was not cloned within 1 s: 127\.0\.0\.1 is too slow or does not respond\.$"
    ):
        await clone(
            git_setup.git,
            ssh_access(ssh.url("demo")),
            git_setup.into,
            CloneOptions(),
            seconds=1,
        )


async def test_clone_from_an_http_server_that_hangs_is_stopped(git_setup: GitSetup, http: GitHttp) -> None:
    """The timeout also applies to HTTP."""
    http.mode = HttpMode.HANG
    git_setup.into.mkdir(parents=True)
    with pytest.raises(GitError, match="not cloned within 1 s"):
        await clone(
            git_setup.git,
            http_access(http.url("demo")),
            git_setup.into,
            CloneOptions(),
            seconds=1,
        )


async def test_closed_connection_is_reported(git_setup: GitSetup, ssh: GitSsh) -> None:
    """The server closes the connection during the transfer."""
    await git_setup.repos.create("demo", {"a.bin": bytes(range(256)) * 4000})
    ssh.drop_after_bytes = 100
    with pytest.raises(GitError, match=r"could not be"):
        await git_setup.clone(ssh_access(ssh.url("demo")))


async def test_other_protocols_are_rejected(git_setup: GitSetup) -> None:
    """`ext::` would run a command. The validation of the request rejects it earlier; this is a second check."""
    marker = git_setup.folder / "created"
    access = ssh_access("ssh://git@127.0.0.1/x")
    for url in (f"ext::sh -c 'touch {marker}'", f"-cfoo=bar;touch {marker}", f"--upload-pack=touch {marker}"):
        access.remote = type(access.remote)(url=url, scheme="ssh", host="x")
        with pytest.raises(GitError):
            await git_setup.clone(access)
    assert not marker.exists()

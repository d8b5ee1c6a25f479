from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest
from helpers.git import GitSetup, git_setup, http, http_access, ssh, ssh_access
from standins.githttp import TOKEN, GitHttp, Redirect
from standins.githttp import Mode as HttpMode
from standins.gitssh import GitSsh, Mode, key_pair, needs_ssh, new_host_key
from standins.repos import Link, Submodule

from ccrun.worker.git.clone import PackSnapshot, clone
from ccrun.worker.git.run import GitError

__all__ = ["git_setup", "http", "ssh"]
pytestmark = needs_ssh


async def read(git_setup: GitSetup, *arguments: str) -> str:
    """Return what git says of the clone."""
    return (await git_setup.git.at(git_setup.into)(*arguments)).decode().strip()


# --- what is cloned --------------------------------------------------------------------------------------------------


async def test_a_repository_comes_over_ssh(git_setup: GitSetup, ssh: GitSsh) -> None:
    """With the key, as deep as asked, at the branch that the server calls its HEAD."""
    repository = await git_setup.repos.create("group/sub/demo", {"a.txt": "one"})
    tip = await repository.commit({"a.txt": "two"})
    cloned = await git_setup.clone(ssh_access(ssh.url("group/sub/demo")))
    assert tip == cloned.base
    assert "two" == (git_setup.into / "a.txt").read_text()
    assert "main" == await read(git_setup, "symbolic-ref", "--short", "HEAD")
    assert f"{tip}\n".encode() == cloned.shallow


async def test_a_repository_comes_over_http(git_setup: GitSetup, http: GitHttp) -> None:
    """With the token, which goes to the server as a password and stands nowhere in the clone."""
    repository = await git_setup.repos.create("demo", {"a.txt": "one"})
    cloned = await git_setup.clone(http_access(http.url("demo")))
    assert await repository.sha() == cloned.base
    assert ("x-access-token", TOKEN) in {request.credential for request in http.requests}
    assert http.url("demo") == await read(git_setup, "remote", "get-url", "origin")
    for path in git_setup.into.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


async def test_the_token_is_in_no_argument(git_setup: GitSetup, http: GitHttp) -> None:
    """While git talks to the server, the list of processes does not tell it."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    seen: list[bytes] = []

    async def look(request: str) -> None:
        for arguments in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                seen.append(arguments.read_bytes())

    http.before = look
    await git_setup.clone(http_access(http.url("demo")))
    assert any(b"git-remote-http" in arguments for arguments in seen)
    assert not [arguments for arguments in seen if TOKEN.encode() in arguments]


async def test_a_token_may_bring_its_own_user(git_setup: GitSetup, http: GitHttp) -> None:
    """`user:token` for servers that want a certain one."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    await git_setup.clone(http_access(http.url("demo"), f"gitlab-ci-token:{TOKEN}"))
    assert ("gitlab-ci-token", TOKEN) in {request.credential for request in http.requests}


async def test_what_needs_no_login_comes_without_one(git_setup: GitSetup) -> None:
    """A public repository is cloned without key and token."""
    repository = await git_setup.repos.create("demo", {"a.txt": "one"})
    async with GitHttp(git_setup.repos, public=True) as server:
        cloned = await git_setup.clone(http_access(server.url("demo"), None))
    assert await repository.sha() == cloned.base


@pytest.mark.parametrize("kind", ["branch", "tag", "annotated", "commit"])
async def test_a_revision_is_a_branch_a_tag_or_a_commit(git_setup: GitSetup, ssh: GitSsh, kind: str) -> None:
    """`gitBranch` takes all three; of a tag and a commit the head is detached."""
    repository = await git_setup.repos.create("demo", {"a.txt": "one"}, allow_any_sha1=True)
    wanted = await repository.sha()
    await repository.make_branch("topic/é")
    await repository.make_tag("v1")
    await repository.make_tag("v2", message="A release")
    await repository.commit({"a.txt": "two"})
    revision = {"branch": "topic/é", "tag": "v1", "annotated": "v2", "commit": wanted}[kind]
    cloned = await git_setup.clone(ssh_access(ssh.url("demo")), revision=revision)
    assert wanted == cloned.base
    assert "one" == (git_setup.into / "a.txt").read_text()
    expected = "topic/é" if kind == "branch" else "HEAD"
    assert expected == await read(git_setup, "rev-parse", "--abbrev-ref", "HEAD")


async def test_the_depth_is_as_asked(git_setup: GitSetup, ssh: GitSsh) -> None:
    """Two commits of four with a depth of two; all of them with a large one, and then nothing is cut off."""
    repository = await git_setup.repos.create("demo", {"a.txt": "1"})
    for number in "234":
        await repository.commit({"a.txt": number})
    cloned = await git_setup.clone(ssh_access(ssh.url("demo")), depth=2)
    assert "2" == await read(git_setup, "rev-list", "--count", "HEAD")
    assert cloned.shallow
    other = GitSetup(repos=git_setup.repos, folder=git_setup.folder / "deep")
    assert b"" == (await other.clone(ssh_access(ssh.url("demo")), depth=2**31 - 1)).shallow


@pytest.mark.parametrize("revision", [None, "main", "trunk"])
async def test_an_empty_repository_is_cloned(git_setup: GitSetup, ssh: GitSsh, revision: str | None) -> None:
    """There is no base, and the branch that was asked for is the one that the first commit makes."""
    await git_setup.repos.create("empty")
    cloned = await git_setup.clone(ssh_access(ssh.url("empty")), revision=revision)
    assert (None, b"") == (cloned.base, cloned.shallow)
    assert (revision or "main") == await read(git_setup, "symbolic-ref", "--short", "HEAD")


@pytest.mark.parametrize("asked", [False, True])
async def test_submodules_come_when_asked_for(git_setup: GitSetup, ssh: GitSsh, asked: bool) -> None:
    """Off unless the request wants them."""
    inner = await git_setup.repos.create("inner", {"inside.txt": "in"})
    sha = await inner.sha()
    assert sha is not None
    await git_setup.repos.create("outer", {"a.txt": "a", "lib": Submodule(ssh.url("inner"), sha)})
    await git_setup.clone(ssh_access(ssh.url("outer")), submodules=asked)
    assert asked == (git_setup.into / "lib" / "inside.txt").exists()


async def test_links_and_names_of_any_kind_are_checked_out(git_setup: GitSetup, ssh: GitSsh) -> None:
    """Non-ASCII names and links come as they are."""
    await git_setup.repos.create("demo", {"äöü/☃.txt": "snow", "link": Link("äöü/☃.txt")})
    await git_setup.clone(ssh_access(ssh.url("demo")))
    assert "snow" == (git_setup.into / "link").read_text()


# --- how it gets in --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
@pytest.mark.parametrize("form", ["openssh", "pkcs8"])
@pytest.mark.parametrize("ending", ["as is", "none", "crlf", "escaped"])
async def test_a_key_comes_in_any_usual_form(git_setup: GitSetup, kind: str, form: str, ending: str) -> None:
    """PEM or OpenSSH, with or without a last line break, with those of Windows, or with breaks that were escaped."""
    pair = key_pair(kind)
    text = str(getattr(pair, form))
    text = {
        "as is": text,
        "none": text.rstrip("\n"),
        "crlf": text.replace("\n", "\r\n"),
        "escaped": text.strip().replace("\n", "\\n"),
    }[ending]
    await git_setup.repos.create("demo", {"a.txt": "one"})
    async with GitSsh(git_setup.repos, authorized=(pair.public,)) as server:
        assert (await git_setup.clone(ssh_access(server.url("demo"), text))).base is not None


async def test_the_key_is_in_no_file_and_not_forwarded(git_setup: GitSetup, ssh: GitSsh, tmp_path: Path) -> None:
    """While git talks to the server, no file below the temporary folder holds it, and the server sees no agent."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    body = key_pair().openssh.splitlines()[2].encode()
    seen: list[Path] = []

    async def look(command: str) -> None:
        for room in (*Path(tempfile.gettempdir()).glob("ccrun-*"), tmp_path):
            seen.extend(path for path in room.rglob("*") if path.is_file() and body in path.read_bytes())
        for arguments in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                assert body not in arguments.read_bytes()
            except OSError:
                continue

    ssh.before = look
    await git_setup.clone(ssh_access(ssh.url("demo")))
    assert [] == seen
    assert [False] == [session.agent_forwarded for session in ssh.sessions]


async def test_a_server_that_was_new_has_to_stay_the_same(git_setup: GitSetup) -> None:
    """The first host key is taken; another one later, at the same address, is refused."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    async with GitSsh(git_setup.repos) as server:
        access, port = ssh_access(server.url("demo")), server.port
        await git_setup.clone(access)
    async with GitSsh(git_setup.repos, host_key=new_host_key()) as other:
        # As if it listened where the first one did.
        access._seen = access._seen.replace(str(port).encode(), str(other.port).encode())
        access.remote = ssh_access(other.url("demo")).remote
        with pytest.raises(GitError, match=r"^The SSH host key of 127\.0\.0\.1 is not the known one"):
            await GitSetup(repos=git_setup.repos, folder=git_setup.folder / "again").clone(access)


async def test_no_credential_follows_a_redirection_to_another_host(git_setup: GitSetup) -> None:
    """The token is for the host of the request alone."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    async with GitHttp(git_setup.repos) as evil, GitHttp(git_setup.repos) as server:
        server.redirect = Redirect(base=evil.base, status=302)
        with pytest.raises(GitError, match="refused the login"):
            await git_setup.clone(http_access(server.url("demo")))
        assert {None} == {request.credential for request in evil.requests}


# --- what goes wrong: one sentence each ----------------------------------------------------------------------------------


async def test_a_missing_branch_is_named(git_setup: GitSetup, ssh: GitSsh) -> None:
    """Not taken for an empty repository."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    with pytest.raises(GitError, match=r"^The repository has no branch or tag of the name in gitBranch: nope\.$"):
        await git_setup.clone(ssh_access(ssh.url("demo")), revision="nope")


async def test_a_missing_commit_is_named(git_setup: GitSetup, ssh: GitSsh) -> None:
    """By its ID."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    with pytest.raises(GitError, match=r"^The repository has no commit 1234567890123456789012345678901234567890, or"):
        await git_setup.clone(ssh_access(ssh.url("demo")), revision="1234567890" * 4)


async def test_a_missing_repository_is_told(git_setup: GitSetup, ssh: GitSsh, http: GitHttp) -> None:
    """Over either protocol."""
    for access in (ssh_access(ssh.url("nope")), http_access(http.url("nope"))):
        with pytest.raises(
            GitError, match=r"^127\.0\.0\.1 does not have the repository in gitRepo, or not for this login"
        ):
            await git_setup.clone(access)


async def test_a_refused_key_is_told(git_setup: GitSetup, ssh: GitSsh) -> None:
    """And which field to check."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    with pytest.raises(GitError, match=r"^127\.0\.0\.1 refused the SSH login: check sshKey\.$"):
        await git_setup.clone(ssh_access(ssh.url("demo"), key_pair(number=1)))


async def test_no_key_is_told(git_setup: GitSetup, ssh: GitSsh) -> None:
    """That the request brings none."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    access = ssh_access(ssh.url("demo"))
    access.ssh_key = None
    with pytest.raises(GitError, match=r"^127\.0\.0\.1 refused the SSH login: the request brings no sshKey\.$"):
        await git_setup.clone(access)


@pytest.mark.parametrize("token", [None, "wrong-token"])
async def test_a_refused_token_is_told(git_setup: GitSetup, http: GitHttp, token: str | None) -> None:
    """Wrong or missing; nobody is asked for another."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    hint = "check gitToken" if token else "the request brings no gitToken"
    with pytest.raises(GitError, match=rf"^127\.0\.0\.1 refused the login: {hint}\.$"):
        await git_setup.clone(http_access(http.url("demo"), token))


async def test_what_is_no_key_is_told_without_showing_it(git_setup: GitSetup, ssh: GitSsh) -> None:
    """A key with a passphrase, and a text that is no key."""
    with pytest.raises(GitError, match=r"^sshKey is not a private key in the PEM or OpenSSH format\.$"):
        await git_setup.clone(ssh_access(ssh.url("demo"), "made-up text"))
    with pytest.raises(GitError, match=r"^sshKey is protected by a passphrase: give a key without one\.$"):
        await git_setup.clone(ssh_access(ssh.url("demo"), key_pair().encrypted))


async def test_a_host_that_is_not_there_is_told(git_setup: GitSetup) -> None:
    """By name and by port."""
    with pytest.raises(GitError, match=r"^The host of gitRepo was not found: nowhere\.invalid\.$"):
        await git_setup.clone(ssh_access("ssh://git@nowhere.invalid/a/b.git"))
    with pytest.raises(GitError, match=r"^127\.0\.0\.1 could not be reached"):
        await git_setup.clone(ssh_access("ssh://git@127.0.0.1:9/a/b.git"))


@pytest.mark.parametrize("mode", [Mode.SILENT, Mode.HANG])
async def test_a_server_that_hangs_is_given_up(git_setup: GitSetup, ssh: GitSsh, mode: Mode) -> None:
    """After the time that the clone has, with a sentence that says so."""
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
            revision=None,
            depth=1,
            submodules=False,
            seconds=1,
        )


async def test_a_server_over_http_that_hangs_is_given_up(git_setup: GitSetup, http: GitHttp) -> None:
    """As over SSH."""
    http.mode = HttpMode.HANG
    git_setup.into.mkdir(parents=True)
    with pytest.raises(GitError, match="not cloned within 1 s"):
        await clone(
            git_setup.git,
            http_access(http.url("demo")),
            git_setup.into,
            revision=None,
            depth=1,
            submodules=False,
            seconds=1,
        )


async def test_a_connection_that_breaks_is_told(git_setup: GitSetup, ssh: GitSsh) -> None:
    """In the middle of the transfer."""
    await git_setup.repos.create("demo", {"a.bin": bytes(range(256)) * 4000})
    ssh.drop_after_bytes = 100
    with pytest.raises(GitError, match=r"could not be"):
        await git_setup.clone(ssh_access(ssh.url("demo")))


async def test_other_protocols_are_refused(git_setup: GitSetup) -> None:
    """`ext::` runs a command; not even when the check of the request had let it pass."""
    marker = git_setup.folder / "was-here"
    access = ssh_access("ssh://git@127.0.0.1/x")
    for url in (f"ext::sh -c 'touch {marker}'", f"-cfoo=bar;touch {marker}", f"--upload-pack=touch {marker}"):
        access.remote = type(access.remote)(url=url, scheme="ssh", host="x")
        with pytest.raises(GitError):
            await git_setup.clone(access)
    assert not marker.exists()


# --- what is kept for the push -------------------------------------------------------------------------------------------


async def test_a_keepsake_is_what_was_cloned_whatever_becomes_of_the_clone(git_setup: GitSetup, ssh: GitSsh) -> None:
    """A fresh repository gets the very objects back after the clone's own were overwritten."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    cloned = await git_setup.clone(ssh_access(ssh.url("demo")))
    snapshot = await PackSnapshot.of(git_setup.into)
    for path in (git_setup.into / ".git" / "objects" / "pack").iterdir():
        path.chmod(0o600)
        path.write_bytes(b"overwritten")
    fresh = git_setup.folder / "fresh"
    await git_setup.git("init", "--quiet", "--bare", str(fresh))
    await snapshot.restore(fresh)
    (fresh / "shallow").write_bytes(cloned.shallow)
    snapshot.close()
    there = git_setup.git.at(fresh)
    await there("fsck", "--connectivity-only", str(cloned.base))
    assert b"one" == await there("cat-file", "-p", f"{cloned.base}:a.txt")

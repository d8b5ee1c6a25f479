from __future__ import annotations

import base64
import contextlib
import tempfile
from pathlib import Path

import attrs
import pytest
from helpers.git import GitSetup, git_setup, http, http_access, ssh, ssh_access
from standins.githttp import TOKEN, GitHttp, Redirect
from standins.gitssh import GitSsh, key_pair, needs_ssh, new_host_key
from standins.repos import Link, Submodule

from ccrun.worker.git.clone import PackSnapshot
from ccrun.worker.git.run import GitError

__all__ = ["git_setup", "http", "ssh"]
pytestmark = needs_ssh


async def git_output(git_setup: GitSetup, *arguments: str) -> str:
    """Return the output of a git command in the clone."""
    return (await git_setup.git.at(git_setup.into)(*arguments)).decode().strip()


# --- cloning ---------------------------------------------------------------------------------------------------------


async def test_clone_over_ssh(git_setup: GitSetup, ssh: GitSsh) -> None:
    """The clone has one commit, of the default branch of the server."""
    repository = await git_setup.repos.create("group/sub/demo", {"a.txt": "one"})
    tip = await repository.commit({"a.txt": "two"})
    cloned = await git_setup.clone(ssh_access(ssh.url("group/sub/demo")))
    assert tip == cloned.base
    assert "two" == (git_setup.into / "a.txt").read_text()
    assert "main" == await git_output(git_setup, "symbolic-ref", "--short", "HEAD")
    assert f"{tip}\n".encode() == cloned.shallow


async def test_clone_over_http(git_setup: GitSetup, http: GitHttp) -> None:
    """The token is sent to the server as a password and is not stored in the clone."""
    repository = await git_setup.repos.create("demo", {"a.txt": "one"})
    cloned = await git_setup.clone(http_access(http.url("demo")))
    assert await repository.sha() == cloned.base
    assert ("x-access-token", TOKEN) in {request.credential for request in http.requests}
    assert http.url("demo") == await git_output(git_setup, "remote", "get-url", "origin")
    for path in git_setup.into.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


async def test_token_is_not_in_process_arguments(git_setup: GitSetup, http: GitHttp) -> None:
    """During the connection to the server, no process has the token in its arguments."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    found: list[bytes] = []

    async def inspect(request: str) -> None:
        for arguments in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found.append(arguments.read_bytes())

    http.before = inspect
    await git_setup.clone(http_access(http.url("demo")))
    assert any(b"git-remote-http" in arguments for arguments in found)
    assert not [arguments for arguments in found if TOKEN.encode() in arguments]


async def test_token_may_have_a_user(git_setup: GitSetup, http: GitHttp) -> None:
    """Some servers require a specific user, so the token may be `user:token`."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    await git_setup.clone(http_access(http.url("demo"), f"gitlab-ci-token:{TOKEN}"))
    assert ("gitlab-ci-token", TOKEN) in {request.credential for request in http.requests}


async def test_public_repository_needs_no_credential(git_setup: GitSetup) -> None:
    """It is cloned without key and token."""
    repository = await git_setup.repos.create("demo", {"a.txt": "one"})
    async with GitHttp(git_setup.repos, public=True) as server:
        cloned = await git_setup.clone(http_access(server.url("demo"), None))
    assert await repository.sha() == cloned.base


@pytest.mark.parametrize("kind", ["branch", "tag", "annotated", "commit"])
async def test_revision_is_a_branch_a_tag_or_a_commit(git_setup: GitSetup, ssh: GitSsh, kind: str) -> None:
    """`gitBranch` may be any of them. For a tag or a commit, HEAD is detached."""
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
    assert expected == await git_output(git_setup, "rev-parse", "--abbrev-ref", "HEAD")


@pytest.mark.parametrize("ref", ["refs/tags/v1", "refs/pull/7/head", "refs/merge-requests/7/head"])
async def test_revision_is_a_ref(git_setup: GitSetup, ssh: GitSsh, ref: str) -> None:
    """A pull request is checked out by its ref, which is no branch."""
    repository = await git_setup.repos.create("demo", {"a.txt": "one"})
    sha = await repository.commit({"a.txt": "changed"}, branch="topic")
    await repository.git("update-ref", ref, sha)
    cloned = await git_setup.clone(ssh_access(ssh.url("demo")), revision=ref)
    assert (sha, "changed") == (cloned.base, (git_setup.into / "a.txt").read_text())
    with pytest.raises(GitError, match=r"^The repository has no ref refs/pull/8/head, or does not serve it\.$"):
        await attrs.evolve(git_setup, folder=git_setup.folder / "other").clone(
            ssh_access(ssh.url("demo")), revision="refs/pull/8/head"
        )


@pytest.mark.parametrize("commits", [0, 3, 120])
@pytest.mark.parametrize("by_ref", [False, True])
async def test_base_is_fetched_with_the_common_history(
    git_setup: GitSetup, ssh: GitSsh, commits: int, by_ref: bool
) -> None:
    """The agent can compare a branch with its base, although the clone is shallow and both have moved on."""
    repository = await git_setup.repos.create("demo", {"a.txt": "one"})
    ancestor = await repository.sha()
    await repository.make_branch("topic")
    history = "".join(
        f"commit refs/heads/{branch}\ncommitter a <a@b> {1_700_000_000 + number} +0000\ndata 1\nx\n"
        + (f"from refs/heads/{branch}^0\n" if number == 0 else "")
        + f"M 100644 inline {branch}.txt\ndata {len(str(number))}\n{number}\n"
        for branch in ("main", "topic")
        for number in range(commits)
    )
    await repository.git("fast-import", "--quiet", stdin=history.encode())
    await repository.git("update-ref", "refs/pull/7/head", "topic")
    revision = "refs/pull/7/head" if by_ref else "topic"
    await git_setup.clone(ssh_access(ssh.url("demo")), revision=revision, review_base="main")
    assert ancestor == await git_output(git_setup, "merge-base", "HEAD", "origin/main")
    changed = await git_output(git_setup, "diff", "--name-only", "origin/main...HEAD")
    assert ("topic.txt" if commits else "") == changed


async def test_base_without_common_history_is_fetched(git_setup: GitSetup, ssh: GitSsh) -> None:
    """Unrelated branches have no common ancestor; the task starts nevertheless."""
    repository = await git_setup.repos.create("demo", {"a.txt": "one"})
    await repository.commit({"b.txt": "other"}, branch="unrelated")
    await git_setup.clone(ssh_access(ssh.url("demo")), review_base="unrelated")
    assert "b.txt" == await git_output(git_setup, "ls-tree", "--name-only", "origin/unrelated")


async def test_error_names_a_missing_base(git_setup: GitSetup, ssh: GitSsh) -> None:
    """The error has the name of the field and of the branch."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    with pytest.raises(GitError, match=r"^The repository has no branch of the name in gitBase: missing\.$"):
        await git_setup.clone(ssh_access(ssh.url("demo")), review_base="missing")


async def test_depth_limits_the_history(git_setup: GitSetup, ssh: GitSsh) -> None:
    """A depth of two fetches two of four commits. A large depth fetches all, and the clone is not shallow."""
    repository = await git_setup.repos.create("demo", {"a.txt": "1"})
    for number in "234":
        await repository.commit({"a.txt": number})
    cloned = await git_setup.clone(ssh_access(ssh.url("demo")), depth=2)
    assert "2" == await git_output(git_setup, "rev-list", "--count", "HEAD")
    assert cloned.shallow
    other = GitSetup(repos=git_setup.repos, folder=git_setup.folder / "deep")
    assert b"" == (await other.clone(ssh_access(ssh.url("demo")), depth=2**31 - 1)).shallow


@pytest.mark.parametrize("revision", [None, "main", "trunk"])
async def test_empty_repository_is_cloned(git_setup: GitSetup, ssh: GitSsh, revision: str | None) -> None:
    """The clone has no base. The first commit will create the branch of the request."""
    await git_setup.repos.create("empty")
    cloned = await git_setup.clone(ssh_access(ssh.url("empty")), revision=revision)
    assert (None, b"") == (cloned.base, cloned.shallow)
    assert (revision or "main") == await git_output(git_setup, "symbolic-ref", "--short", "HEAD")


@pytest.mark.parametrize("requested", [False, True])
async def test_submodules_are_cloned_on_request(git_setup: GitSetup, ssh: GitSsh, requested: bool) -> None:
    """By default, they are not."""
    inner = await git_setup.repos.create("inner", {"inside.txt": "in"})
    sha = await inner.sha()
    assert sha is not None
    await git_setup.repos.create("outer", {"a.txt": "a", "lib": Submodule(ssh.url("inner"), sha)})
    await git_setup.clone(ssh_access(ssh.url("outer")), submodules=requested)
    assert requested == (git_setup.into / "lib" / "inside.txt").exists()


async def test_links_and_non_ascii_names_are_checked_out(git_setup: GitSetup, ssh: GitSsh) -> None:
    """The link and its target have their original names."""
    await git_setup.repos.create("demo", {"äöü/☃.txt": "snow", "link": Link("äöü/☃.txt")})
    await git_setup.clone(ssh_access(ssh.url("demo")))
    assert "snow" == (git_setup.into / "link").read_text()


# --- credentials -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
@pytest.mark.parametrize("form", ["openssh", "pkcs8"])
@pytest.mark.parametrize("newlines", ["original", "no final", "crlf", "escaped", "escaped crlf", "base64"])
async def test_key_formats(git_setup: GitSetup, kind: str, form: str, newlines: str) -> None:
    """A key may be PEM or OpenSSH, without a final newline, with CRLF, with escaped newlines, or encoded in base64."""
    pair = key_pair(kind)
    text = str(getattr(pair, form))
    text = {
        "original": text,
        "no final": text.rstrip("\n"),
        "crlf": text.replace("\n", "\r\n"),
        "escaped": text.strip().replace("\n", "\\n"),
        "escaped crlf": text.strip().replace("\n", "\\r\\n"),
        "base64": base64.encodebytes(text.encode()).decode(),
    }[newlines]
    await git_setup.repos.create("demo", {"a.txt": "one"})
    async with GitSsh(git_setup.repos, authorized=(pair.public,)) as server:
        assert (await git_setup.clone(ssh_access(server.url("demo"), text))).base is not None


async def test_key_is_not_in_files_or_arguments_and_not_forwarded(
    git_setup: GitSetup, ssh: GitSsh, tmp_path: Path
) -> None:
    """During the connection, no temporary file and no argument contains it, and no agent is forwarded."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    body = key_pair().openssh.splitlines()[2].encode()
    found: list[Path] = []

    async def inspect(command: str) -> None:
        for directory in (*Path(tempfile.gettempdir()).glob("ccrun-*"), tmp_path):
            found.extend(path for path in directory.rglob("*") if path.is_file() and body in path.read_bytes())
        for arguments in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                assert body not in arguments.read_bytes()
            except OSError:
                continue

    ssh.before = inspect
    await git_setup.clone(ssh_access(ssh.url("demo")))
    assert [] == found
    assert [False] == [session.agent_forwarded for session in ssh.sessions]


async def test_changed_host_key_is_rejected(git_setup: GitSetup) -> None:
    """The first host key is accepted; another one at the same address is rejected."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    async with GitSsh(git_setup.repos) as server:
        access, port = ssh_access(server.url("demo")), server.port
        await git_setup.clone(access)
    async with GitSsh(git_setup.repos, host_key=new_host_key()) as other:
        # Make it look as if it listened on the port of the first server.
        access._seen = access._seen.replace(str(port).encode(), str(other.port).encode())
        access.remote = ssh_access(other.url("demo")).remote
        with pytest.raises(GitError, match=r"^The SSH host key of 127\.0\.0\.1 is not the known one"):
            await GitSetup(repos=git_setup.repos, folder=git_setup.folder / "again").clone(access)


async def test_credential_is_not_sent_to_a_redirect_target(git_setup: GitSetup) -> None:
    """The token is sent to the host of the request only."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    async with GitHttp(git_setup.repos) as other_host, GitHttp(git_setup.repos) as server:
        server.redirect = Redirect(base=other_host.base, status=302)
        with pytest.raises(GitError, match="rejected the login"):
            await git_setup.clone(http_access(server.url("demo")))
        assert {None} == {request.credential for request in other_host.requests}


# --- the snapshot for the push ---------------------------------------------------------------------------------------


async def test_snapshot_restores_the_objects_of_the_clone(git_setup: GitSetup, ssh: GitSsh) -> None:
    """A new repository gets the original objects, although those of the clone were overwritten."""
    await git_setup.repos.create("demo", {"a.txt": "one"})
    cloned = await git_setup.clone(ssh_access(ssh.url("demo")))
    snapshot = await PackSnapshot.of(git_setup.into)
    for path in (git_setup.into / ".git" / "objects" / "pack").iterdir():
        path.chmod(0o600)
        path.write_bytes(b"overwritten")
    restored = git_setup.folder / "restored"
    await git_setup.git("init", "--quiet", "--bare", str(restored))
    await snapshot.restore(restored)
    (restored / "shallow").write_bytes(cloned.shallow)
    snapshot.close()
    git = git_setup.git.at(restored)
    await git("fsck", "--connectivity-only", str(cloned.base))
    assert b"one" == await git("cat-file", "-p", f"{cloned.base}:a.txt")


async def test_clone_is_retried_after_a_transient_error(git_setup: GitSetup, http: GitHttp) -> None:
    """A host that responds with 503 once does not fail the task."""
    await git_setup.repos.create("demo", {"a.txt": "a"})
    http.status, http.status_times = 503, 1
    await git_setup.clone(http_access(http.url("demo")))
    assert "a" == (git_setup.into / "a.txt").read_text()


async def test_lasting_error_is_reported_after_three_attempts(git_setup: GitSetup, http: GitHttp) -> None:
    """The error of the last attempt has the words of the server."""
    http.status, http.message, http.headers = 503, "Down for maintenance.", {"Content-Type": "text/plain"}
    with pytest.raises(GitError, match=r"returned error: 503\. The server says: Down for maintenance\.$"):
        await git_setup.clone(http_access(http.url("demo")))
    assert 3 == len(http.requests)


@pytest.mark.parametrize("form", ["git@127.0.0.1:lib.git", "ssh://git@127.0.0.1/lib.git"])
async def test_token_opens_submodules_with_an_ssh_url(git_setup: GitSetup, http: GitHttp, form: str) -> None:
    """A submodule on the same host is cloned with the token, whichever form its URL has."""
    library = await git_setup.repos.create("lib", {"lib.txt": "lib"})
    sha = await library.sha()
    assert sha is not None
    await git_setup.repos.create("demo", {"lib": Submodule(url=form, sha=sha)})
    await git_setup.clone(http_access(http.url("demo")), submodules=True)
    assert "lib" == (git_setup.into / "lib" / "lib.txt").read_text()


async def test_key_opens_submodules_with_an_https_url(git_setup: GitSetup, ssh: GitSsh) -> None:
    """A submodule on the same host is cloned with the key."""
    library = await git_setup.repos.create("lib", {"lib.txt": "lib"})
    sha = await library.sha()
    assert sha is not None
    await git_setup.repos.create("demo", {"lib": Submodule(url="https://127.0.0.1/lib.git", sha=sha)})
    await git_setup.clone(ssh_access(ssh.url("demo")), submodules=True)
    assert "lib" == (git_setup.into / "lib" / "lib.txt").read_text()

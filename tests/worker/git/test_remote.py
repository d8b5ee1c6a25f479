"""Where a repository is, and what a refusal means; how to get in is tested with real servers, in `test_clone`."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccrun.process.capture import ProcessResult
from ccrun.process.exit import Exit
from ccrun.task import Secret
from ccrun.worker.git.remote import Access, Remote, _ssh_config, network_error, refusal, remote_of


@pytest.mark.parametrize(
    ("url", "expected", "host"),
    [
        ("https://github.com/org/repo", "ssh://git@github.com/org/repo", "github.com"),
        ("https://github.com/org/repo.git", "ssh://git@github.com/org/repo.git", "github.com"),
        ("https://github.com/org/repo/", "ssh://git@github.com/org/repo", "github.com"),
        ("https://gitlab.com/group/sub/deep/repo.git", "ssh://git@gitlab.com/group/sub/deep/repo.git", "gitlab.com"),
        ("https://bitbucket.org/team/repo", "ssh://git@ssh.bitbucket.org/team/repo", "ssh.bitbucket.org"),
        ("https://Git.Example.com:8443/a/b.git", "ssh://git@git.example.com/a/b.git", "git.example.com"),
        ("https://[2001:db8::1]/a/b.git", "ssh://git@[2001:db8::1]/a/b.git", "2001:db8::1"),
        ("https://example.com/a%20b/c.git", "ssh://git@example.com/a b/c.git", "example.com"),
        ("ssh://alice@example.com:2222/a/b.git", "ssh://alice@example.com:2222/a/b.git", "example.com"),
        ("ssh://example.com/a/b.git", "ssh://example.com/a/b.git", "example.com"),
        ("git@github.com:org/repo.git", "git@github.com:org/repo.git", "github.com"),
        ("deploy@Example.com:org/repo", "deploy@Example.com:org/repo", "example.com"),
    ],
)
def test_with_a_key_a_repository_is_reached_over_ssh(url: str, expected: str, host: str) -> None:
    """Https URLs in their SSH form: groups of any depth, without the port of https; those of SSH as they are."""
    assert Remote(url=expected, scheme="ssh", host=host) == remote_of(url, prefers_ssh=True)


@pytest.mark.parametrize("url", ["https://github.com/org/repo", "http://127.0.0.1:80/x.git", "file:///srv/x.git"])
def test_without_a_key_a_url_stays_as_it_is(url: str) -> None:
    """And is no matter of SSH."""
    remote = remote_of(url, prefers_ssh=False)
    assert (url, False) == (remote.url, remote.is_ssh)


def test_a_credential_is_for_scheme_host_and_port() -> None:
    """Nothing else of the URL decides who gets it."""
    assert "https://example.com:8443" == remote_of("https://example.com:8443/a/b?x#y", prefers_ssh=False).origin


@pytest.mark.parametrize(
    ("stderr", "sentence"),
    [
        (b"ssh: Could not resolve hostname h: Name or service not known", "The host of gitRepo was not found: h."),
        (b"fatal: unable to access 'https://h/': Could not resolve host: h", "The host of gitRepo was not found: h."),
        (
            b"Host key verification failed.",
            "The SSH host key of h is not the one that it is known by, so nothing was sent to it.",
        ),
        (b"git@h: Permission denied (publickey).", "h refused the SSH login: check sshKey."),
        (
            b"fatal: could not read Username for 'https://h': terminal prompts disabled",
            "h refused the login: check sshKey.",
        ),
        (b"error: The requested URL returned error: 403", "h does not allow this: check sshKey."),
        (
            b"remote: Repository not found.",
            "h has no repository of the name in gitRepo, or not for this login: check sshKey.",
        ),
        (
            b"ERROR: Repository not found.",
            "h has no repository of the name in gitRepo, or not for this login: check sshKey.",
        ),
        (b"SSL certificate problem: self-signed certificate", "The certificate of h is not to be trusted."),
        (b"ssh: connect to host h port 22: Connection refused", "h could not be reached, or broke the connection off."),
        (b"fatal: transport 'ext' not allowed", "gitRepo names a protocol that is not allowed."),
        (b"fatal: something new", "The repository could not be cloned: something new"),
        (b"", "The repository could not be cloned: git ended with exit code 128"),
    ],
)
def test_a_refusal_is_one_clear_sentence(stderr: bytes, sentence: str) -> None:
    """Which says what to check, and repeats no URL."""
    remote = Remote(url="ssh://git@h/x", scheme="ssh", host="h")
    access = Access(remote=remote, ssh_key=Secret("made-up"))
    ran = ProcessResult(exit=Exit(code=128), stdout=b"", stderr=stderr)
    assert sentence == refusal(remote, ran, access, "cloned").message


def test_the_field_that_is_missing_is_named() -> None:
    """The token for https, the key for SSH."""
    ran = ProcessResult(exit=Exit(code=128), stdout=b"", stderr=b"fatal: Authentication failed for 'x'")
    remote = remote_of("https://h/x", prefers_ssh=False)
    access = Access(remote=remote)
    assert "h refused the login: the request brings no gitToken." == refusal(remote, ran, access, "cloned").message


@pytest.mark.parametrize(("seconds", "bound"), [(300.0, "5 minutes"), (0.5, "0.5 s")])
def test_an_exchange_that_takes_too_long_is_told(seconds: float, bound: str) -> None:
    """With the time that it had."""
    remote = remote_of("https://h/x", prefers_ssh=False)
    expected = f"The repository was not pushed within {bound}: h is too slow, or hangs."
    assert expected == network_error(remote, "pushed", seconds).message


@pytest.mark.parametrize(("host", "checking"), [("github.com", "yes"), ("git.example.com", "accept-new")])
def test_only_unknown_hosts_may_show_a_new_key(host: str, checking: str) -> None:
    """A well-known host has the keys that ccrun brings, of every type, and no others."""
    config = _ssh_config(host, Path("/r/seen"), None)
    assert f"StrictHostKeyChecking {checking}\n" in config
    assert "IdentityAgent none\n" in config
    assert "ForwardAgent no\n" in config


def test_a_key_shows_itself_nowhere() -> None:
    """Not in what a debugger or a log would print of the access."""
    access = Access(remote=remote_of("git@h:x", prefers_ssh=False), ssh_key=Secret("made-up"))
    assert "made-up" not in repr(access)

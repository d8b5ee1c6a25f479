"""The messages for errors of git, and the configuration of SSH. `test_clone` tests access with real servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccrun.process.capture import ProcessResult
from ccrun.process.exit import Exit
from ccrun.task import Secret
from ccrun.urls import parse_git_url
from ccrun.worker.git.remote import Access, _ssh_config, exchange_error, timeout_error


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (b"ssh: Could not resolve hostname h: Name or service not known", "The host of gitRepo was not found: h."),
        (b"fatal: unable to access 'https://h/': Could not resolve host: h", "The host of gitRepo was not found: h."),
        (
            b"Host key verification failed.",
            "The SSH host key of h is not the known one, so nothing was sent to it.",
        ),
        (b"git@h: Permission denied (publickey).", "h rejected the SSH login: check sshKey."),
        (
            b"fatal: could not read Username for 'https://h': terminal prompts disabled",
            "h rejected the login: check sshKey.",
        ),
        (b"error: The requested URL returned error: 403", "h does not allow this: check sshKey."),
        (
            b"remote: Repository not found.",
            "h does not have the repository in gitRepo, or hides it from this login: check sshKey.",
        ),
        (
            b"ERROR: Repository not found.",
            "h does not have the repository in gitRepo, or hides it from this login: check sshKey.",
        ),
        (b"SSL certificate problem: self-signed certificate", "The certificate of h is not trusted."),
        (b"ssh: connect to host h port 22: Connection refused", "h could not be reached, or closed the connection."),
        (b"fatal: transport 'ext' not allowed", "gitRepo uses a protocol that is not allowed."),
        (b"fatal: something new", "The repository could not be cloned: something new"),
        (b"", "The repository could not be cloned: git failed with exit code 128"),
    ],
)
def test_message_of_an_error(stderr: bytes, message: str) -> None:
    """It states what to check, and has no URL."""
    remote = parse_git_url("ssh://git@h/x")
    access = Access(remote=remote, ssh_key=Secret("made-up"))
    result = ProcessResult(exit=Exit(code=128), stdout=b"", stderr=stderr)
    assert message == exchange_error(remote, result, access, "cloned").message


def test_message_names_the_missing_field() -> None:
    """For HTTPS, this is the token."""
    result = ProcessResult(exit=Exit(code=128), stdout=b"", stderr=b"fatal: Authentication failed for 'x'")
    remote = parse_git_url("https://h/x")
    access = Access(remote=remote)
    assert (
        "h rejected the login: the request has no gitToken." == exchange_error(remote, result, access, "cloned").message
    )


@pytest.mark.parametrize(("seconds", "formatted"), [(300.0, "5 minutes"), (0.5, "0.5 s")])
def test_message_of_a_timeout(seconds: float, formatted: str) -> None:
    """It has the timeout and the host."""
    remote = parse_git_url("https://h/x")
    expected = f"The repository was not pushed within {formatted}: h is too slow or does not respond."
    assert expected == timeout_error(remote, "pushed", seconds).message


@pytest.mark.parametrize(("host", "checking"), [("github.com", "yes"), ("git.example.com", "accept-new")])
def test_new_keys_are_accepted_of_unknown_hosts_only(host: str, checking: str) -> None:
    """A well-known host must have a key from the `known_hosts` file of ccrun."""
    config = _ssh_config(host, Path("/r/seen"), None)
    assert f"StrictHostKeyChecking {checking}\n" in config
    assert "IdentityAgent none\n" in config
    assert "ForwardAgent no\n" in config


def test_repr_does_not_have_the_key() -> None:
    """A debugger or a log may print the `repr` of the access."""
    access = Access(remote=parse_git_url("git@h:x"), ssh_key=Secret("made-up"))
    assert "made-up" not in repr(access)

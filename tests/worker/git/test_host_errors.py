"""The messages for errors of git servers. `test_clone` and `test_push` have the errors of real servers."""

from __future__ import annotations

import tempfile
from typing import Final

import pytest

from ccrun.process.capture import ProcessResult
from ccrun.process.exit import Exit
from ccrun.task import Secret
from ccrun.urls import parse_git_url
from ccrun.worker.git.host_errors import RemoteError, exchange_error, timeout_error
from ccrun.worker.git.remote import Access

NOT_FOUND: Final = (
    "h does not have the repository in gitRepo, or hides it from this login: check sshKey. "
    "The server says: Repository not found."
)


def error_for(stderr: bytes, url: str = "https://h/x") -> RemoteError:
    """Return the error for what git has printed."""
    remote = parse_git_url(url)
    result = ProcessResult(exit=Exit(code=128), stdout=b"", stderr=stderr)
    return exchange_error(remote, result, Access(remote=remote), "cloned")


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
            NOT_FOUND,
        ),
        (
            b"ERROR: Repository not found.",
            NOT_FOUND,
        ),
        (b"SSL certificate problem: self-signed certificate", "The certificate of h is not trusted."),
        (b"ssh: connect to host h port 22: Connection refused", "h could not be reached, or closed the connection."),
        (b"fatal: transport 'ext' not allowed", "gitRepo names a protocol that is not allowed."),
        (b"fatal: something new", "The repository could not be cloned: something new"),
        (b"", "The repository could not be cloned: git exited with code 128"),
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


def test_words_of_the_server_are_quoted() -> None:
    """They say what the caller must do; lines about the progress are left out."""
    stderr = (
        b"remote: Enumerating objects: 5, done.\nremote: The `acme' organization has enabled or enforced SAML SSO.\n"
        b"remote: Re-authorize the token.\nfatal: unable to access 'https://h/x/': The requested URL returned error: 403\n"
    )
    assert (
        "h does not allow this: the request has no gitToken. "
        "The server says: The `acme' organization has enabled or enforced SAML SSO. Re-authorize the token."
    ) == error_for(stderr).message


def test_moved_repository_is_named() -> None:
    """The new URL is named without a credential."""
    stderr = (
        b"warning: redirecting to https://user:secret@new.example/y/?key=secret\n"
        b"fatal: could not read Username for 'https://new.example': terminal prompts disabled\n"
    )
    assert (
        "h rejected the login: the request has no gitToken. The repository has moved to https://new.example/y/: give that URL."
    ) == error_for(stderr).message


@pytest.mark.parametrize(
    ("stderr", "is_transient"),
    [
        (b"error: The requested URL returned error: 503", True),
        (b"error: RPC failed; HTTP 502\nfatal: early EOF", True),
        (b"fatal: the remote end hung up unexpectedly", True),
        (b"ssh: connect to host h port 22: Connection refused", True),
        (b"ERROR: Repository not found.\nfatal: The remote end hung up unexpectedly", False),
        (b"git@h: Permission denied (publickey).\nConnection closed by 1.2.3.4", False),
        (b"error: The requested URL returned error: 403", False),
        (b"ssh: Could not resolve hostname h: Name or service not known", False),
        (b"fatal: something new", False),
    ],
)
def test_transient_errors(stderr: bytes, *, is_transient: bool) -> None:
    """Only an error that may be gone soon is worth another attempt."""
    assert is_transient is error_for(stderr).is_transient


def test_paths_of_the_worker_are_not_shown() -> None:
    """Git quotes the directory that it clones into, which says nothing to a caller."""
    directory = f"{tempfile.gettempdir()}/ws-task-1/repository"
    stderr = f"fatal: clone of 'https://h/lib' into submodule path '{directory}/lib' failed".encode()
    message = "The repository could not be cloned: clone of 'https://h/lib' into submodule path 'lib' failed"
    assert message == error_for(stderr).message

"""What the errors of a git server mean, with its own words."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from ccrun.process.capture import ProcessResult
from ccrun.urls import GitUrl
from ccrun.worker.git.remote import Access
from ccrun.worker.git.run import GitError, first_error, last_error, shortened


class RemoteError(GitError):
    """The server of the repository rejected a request, or could not be reached.

    Args:
        is_transient: Whether the same request may succeed when it is repeated.
    """

    def __init__(self, message: str, *, is_transient: bool = False) -> None:
        self.is_transient = is_transient
        super().__init__(message)


def exchange_error(remote: GitUrl, ran: ProcessResult, access: Access, doing: str) -> RemoteError:
    """Return the error for a failed exchange with the server.

    Args:
        doing: What failed: `cloned` or `pushed`.
    """
    text = ran.stderr.decode(errors="replace")
    host = remote.host or "this machine"
    found = next((each for each in _ERRORS if each[0].search(text)), None)
    if found is not None:
        sentences = [found[1].format(host=host, hint=_credential_hint(remote, access))]
    else:
        message = last_error(ran.stderr) or f"git exited with code {ran.exit.code}"
        sentences = [f"The repository could not be {doing}: {message}"]
    words = server_words(ran.stderr)
    if words and words not in sentences[0]:
        sentences.append(f"The server says: {words}")
    if moved := _REDIRECT.search(text):
        sentences.append(f"The repository has moved to {_plain_url(moved[1])}: give that URL.")
    is_transient = _TRANSIENT.search(text) is not None and (found is None or found[1] is _UNREACHABLE)
    if len(sentences) > 1:
        sentences[0] = sentences[0].rstrip(".") + "."
    return RemoteError(" ".join(sentences), is_transient=is_transient)


def lfs_error(ran: ProcessResult, doing: str) -> RemoteError:
    """Return the error for a failed transfer of files of Git LFS.

    Args:
        doing: What failed: `downloaded` or `uploaded`.
    """
    is_transient = _TRANSIENT.search(ran.stderr.decode(errors="replace")) is not None
    return RemoteError(
        f"The files of Git LFS could not be {doing}: {first_error(ran.stderr)}", is_transient=is_transient
    )


def timeout_error(remote: GitUrl, doing: str, seconds: float) -> RemoteError:
    """Return the error for an exchange that timed out."""
    bound = f"{round(seconds / 60, 1):g} minutes" if seconds >= 60 else f"{round(seconds, 1):g} s"
    return RemoteError(
        f"The repository was not {doing} within {bound}: {remote.host or 'this machine'} is too slow or does not respond."
    )


def server_words(stderr: bytes) -> str:
    """Return what the server itself has written, on one line; empty if it has written nothing."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines()]
    # Over SSH, the server's messages come as they are; GitHub starts them with ERROR.
    own = [
        re.sub(r"^(?:remote:\s*(?:error:\s*|fatal:\s*)?|ERROR:\s*)", "", line)
        for line in lines
        if line.startswith(("remote:", "ERROR:"))
    ]
    return shortened(" ".join(line for line in own if line.strip("=- ") and not _PROGRESS.match(line)))


def _plain_url(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _credential_hint(remote: GitUrl, access: Access) -> str:
    name, given = ("sshKey", access.ssh_key) if remote.is_ssh else ("gitToken", access.git_token)
    return f"check {name}" if given is not None else f"the request has no {name}"


_REDIRECT: Final = re.compile(r"^warning: redirecting to (\S+)", re.MULTILINE)
_PROGRESS: Final = re.compile(r"(?:Enumerating|Counting|Compressing|Resolving|Total|Writing|Receiving) ")
_UNREACHABLE: Final = "{host} could not be reached, or closed the connection."
#: Messages of git, curl and ssh that may be gone a few seconds later.
_TRANSIENT: Final = re.compile(
    r"returned error: (?:429|5\d\d)|Temporary failure in name resolution|Connection (?:refused|timed out|reset|closed)"
    r"|Failed to connect|Operation timed out|Could not connect|kex_exchange_identification|Timeout, server|RPC failed"
    r"|early EOF|unexpected disconnect|hung up unexpectedly|Empty reply from server|transfer closed"
)
#: Messages of git and ssh (in the locale C), and what they mean. The first that matches counts.
_ERRORS: Final = (
    (
        re.compile(r"Could not resolve host(?:name)?|Name or service not known|Temporary failure in name resolution"),
        "The host of gitRepo was not found: {host}.",
    ),
    (
        re.compile(r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED|No .* host key is known"),
        "The SSH host key of {host} is not the known one, so nothing was sent to it.",
    ),
    (re.compile(r"Permission denied \("), "{host} rejected the SSH login: {hint}."),
    (
        re.compile(
            r"Authentication failed|could not read (?:Username|Password)|returned error: 401|HTTP Basic: Access denied"
        ),
        "{host} rejected the login: {hint}.",
    ),
    (re.compile(r"returned error: 403"), "{host} does not allow this: {hint}."),
    (
        re.compile(
            r"[Rr]epository .*not found|returned error: 404|does not appear to be a git repository|Repository not found"
            r"|project you were looking for could not be found|not a git repository|does not exist"
        ),
        "{host} does not have the repository in gitRepo, or hides it from this login: {hint}.",
    ),
    (
        re.compile(
            r"SSL certificate problem|server certificate verification failed|certificate (?:verify|has expired)"
        ),
        "The certificate of {host} is not trusted.",
    ),
    (
        re.compile(
            r"Connection (?:refused|timed out|reset|closed)|Failed to connect|No route to host|Network is unreachable"
            r"|Operation timed out|Could not connect|kex_exchange_identification|Timeout, server"
        ),
        _UNREACHABLE,
    ),
    (
        re.compile(r"transport '.*' not allowed"),
        "gitRepo names a protocol that is not allowed.",
    ),
)

"""The URLs that a request may contain: one grammar for the request, the sealed payload and git. Does no I/O."""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import unquote, urlsplit

import attrs

#: urlsplit silently drops line breaks and tabs, and parsers disagree about backslashes.
_INVALID_IN_URL: Final = re.compile(r"[\s\x00-\x1f\x7f-\x9f\\]")
#: What a path or a query consists of (RFC 3986, appendix A, and for other alphabets RFC 3987).
_PATH: Final = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?|\[\]\u00a0-\U0010ffff-]|%[0-9A-Fa-f]{2})*")
#: `git@host:path`. Neither user nor host nor path may look like an option of ssh or git.
_SCP_LIKE: Final = re.compile(
    r"(?P<user>\w[\w.-]*)@(?P<host>[a-z0-9][a-z0-9.-]*):(?![-:])(?P<path>\S+)", re.ASCII | re.IGNORECASE
)
#: Characters of a user name in a URL: the limit of GitHub and Azure DevOps. Tokens are longer.
MAX_USER_CHARS: Final = 39
#: Hosts whose clone buttons add no user name.
_HOSTS_WITHOUT_USER: Final = frozenset({"github.com", "gitlab.com"})
_TOKEN: Final = re.compile(r"gh[opsur]_|github_pat_|gl[a-z]+-|AT[A-Z]+|x-")
#: Hosts whose SSH server has another name. Bitbucket moves by November 2026:
#: https://support.atlassian.com/bitbucket-cloud/docs/configure-ssh-and-two-step-verification/
_SSH_HOSTS: Final = {"bitbucket.org": "ssh.bitbucket.org"}


class InvalidGitUrl(ValueError):
    """The URL is not one of a git repository. The message is the violated rule and does not repeat the URL."""


class CredentialInGitUrl(InvalidGitUrl):
    """The URL of a git repository contains a credential. The message names the field for it."""


class ForbiddenInGitUrl(InvalidGitUrl):
    """The URL is one of a git repository, but it has a part that is not allowed. The message says what to do instead."""


@attrs.frozen(kw_only=True)
class GitUrl:
    """The URL of a git repository, without a credential.

    Args:
        url: The URL as git gets it.
        scheme: `https`, `http`, `ssh` or `file`.
        host: In lower case; empty for a file.
    """

    url: str
    scheme: str
    host: str

    @property
    def is_ssh(self) -> bool:
        """Whether git connects by SSH."""
        return self.scheme == "ssh"

    @property
    def origin(self) -> str:
        """Scheme, host and port, which a credential is limited to. Not for a URL in the `git@host:path` form."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    @property
    def ssh_address(self) -> str:
        """Host and port of an SSH URL."""
        return urlsplit(self.url).netloc.rpartition("@")[2] if "://" in self.url else self.host

    def over_ssh(self) -> GitUrl:
        """Return the SSH form of an https URL, without its port; any other URL as it is."""
        if self.scheme != "https":
            return self
        # An SSH server does not decode the path.
        path = unquote(urlsplit(self.url).path).rstrip("/")
        host = _SSH_HOSTS.get(self.host, self.host)
        literal = f"[{host}]" if ":" in host else host
        return GitUrl(url=f"ssh://git@{literal}{path}", scheme="ssh", host=host)


def parse_git_url(text: str) -> GitUrl:
    """Return the URL of a repository: https, http, ssh, file or `git@host:path`.

    The user name of an https URL is dropped: the clone buttons of some hosts add one (`https://org@dev.azure.com/…`).

    Raises:
        InvalidGitUrl: It is none of these, or it has a credential.
    """
    if "://" not in text and (match := _SCP_LIKE.fullmatch(text)):
        if re.match(r"[0-9]+/", match["path"]):
            # git takes the number for a directory; most people mean a port.
            raise ForbiddenInGitUrl(
                "must have the form ssh://user@host:port/path if the number after the host is a port, "
                "or ssh://user@host/path if it is a directory"
            )
        return GitUrl(url=text, scheme="ssh", host=match["host"].lower())
    invalid = InvalidGitUrl("must be an https or SSH URL or git@host:path")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise invalid from None
    if _INVALID_IN_URL.search(text) or not re.match(r"/[^-]", parts.path):
        raise invalid
    match parts.scheme:
        case "https" | "http" if parts.password is not None or _may_be_token(parts.username, host):
            raise ForbiddenInGitUrl("must not have a password or token: put the token into gitToken")
        case "ssh" if parts.password is not None:
            raise ForbiddenInGitUrl("must not have a password: put the key into sshKey")
        # git decodes %2d in the user or host of an SSH URL to a hyphen, so both must be plain names.
        case "ssh" if not re.fullmatch(r"(\w[\w.-]*)?", parts.username or "", re.ASCII):
            raise invalid
        case "https" | "http" | "ssh" if port == 0 or not _is_host(host):
            raise invalid
        case "file" if parts.netloc:
            raise invalid
        case "https" | "http" | "ssh" | "file":
            # git accepts schemes in lower case only.
            url = parts.scheme + text[len(parts.scheme) :]
            if parts.scheme != "ssh":
                user, at, _ = parts.netloc.rpartition("@")
                url = url.replace(user + at, "", 1)
            return GitUrl(url=url, scheme=parts.scheme, host=host.lower())
        case _:
            raise invalid


def _may_be_token(user: str | None, host: str) -> bool:
    """Return whether a user name may be a token rather than the name of a person or an organization."""
    if user is None:
        return False
    return host in _HOSTS_WITHOUT_USER or len(user) > MAX_USER_CHARS or _TOKEN.match(user) is not None


def is_http_url(url: str) -> bool:
    """Return whether this is an http or https URL with a valid host name, in Unicode or ASCII, or an IP address.

    Its path and query have only what RFC 3986 allows there, and square brackets and `|`, which many servers put into URLs.
    """
    if _INVALID_IN_URL.search(url):
        return False
    try:
        parts = urlsplit(url)
        if not _PATH.fullmatch(parts.path) or not _PATH.fullmatch(parts.query):
            return False
        return parts.scheme in ("http", "https") and parts.port != 0 and _is_host(parts.hostname or "")
    except ValueError:
        return False


def _is_host(host: str) -> bool:
    try:
        if ":" in host:
            return ipaddress.IPv6Address(host).scope_id is None
        in_ascii = host.encode("idna")
        in_ascii.decode("idna")
    except ValueError:
        return False
    return re.fullmatch(rb"[A-Za-z0-9_][A-Za-z0-9._-]*", in_ascii) is not None

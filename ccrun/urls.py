"""The URLs that a request may contain: one grammar for the request, the sealed payload and git. Does no I/O."""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import unquote, urlsplit

import attrs

#: urlsplit silently drops line breaks and tabs, and parsers disagree about backslashes.
_INVALID_IN_URL: Final = re.compile(r"[\s\x00-\x1f\x7f-\x9f\\]")
#: `git@host:path`. Neither user nor host nor path may look like an option of ssh or git.
_SCP_LIKE: Final = re.compile(r"\w[\w.-]*@(?P<host>[a-z0-9][a-z0-9.-]*):(?![-:])\S+", re.ASCII | re.IGNORECASE)
#: Hosts whose SSH server has another name. Bitbucket moves by November 2026:
#: https://support.atlassian.com/bitbucket-cloud/docs/configure-ssh-and-two-step-verification/
_SSH_HOSTS: Final = {"bitbucket.org": "ssh.bitbucket.org"}


class InvalidGitUrl(ValueError):
    """The URL is not one of a git repository. The message is the violated rule and does not repeat the URL."""


class CredentialInGitUrl(InvalidGitUrl):
    """The URL of a git repository contains a credential. The message names the field for it."""


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

    Raises:
        CredentialInGitUrl: It contains a credential.
        InvalidGitUrl: It is none of these.
    """
    if "://" not in text and (match := _SCP_LIKE.fullmatch(text)):
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
        case "https" | "http" if "@" in parts.netloc:
            raise CredentialInGitUrl("may not contain a user name, password or token: put the token into gitToken")
        case "ssh" if parts.password is not None:
            raise CredentialInGitUrl("may not contain a password: put the key into sshKey")
        # git decodes %2d in the user or host of an SSH URL to a hyphen, so both must be plain names.
        case "ssh" if not re.fullmatch(r"(\w[\w.-]*)?", parts.username or "", re.ASCII):
            raise invalid
        case "https" | "http" | "ssh" if port == 0 or not _is_host(host):
            raise invalid
        case "file" if parts.netloc:
            raise invalid
        case "https" | "http" | "ssh" | "file":
            return GitUrl(url=text, scheme=parts.scheme, host=host.lower())
        case _:
            raise invalid


def is_http_url(url: str) -> bool:
    """Return whether this is an http or https URL with a valid host name, in Unicode or ASCII, or an IP address."""
    if _INVALID_IN_URL.search(url):
        return False
    try:
        parts = urlsplit(url)
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

"""Checks of the fields of a request that name a git repository, what to clone of it and what to push to."""

from __future__ import annotations

import re
from typing import Any, Final

from ccrun.api.checks import MAX_URL_CHARS, InvalidValue, Location, as_string, relative_path
from ccrun.urls import ForbiddenInGitUrl, GitUrl, InvalidGitUrl, parse_git_url

#: Linux limits a file name to 255 bytes, and git appends `.lock` to the last part of a branch.
MAX_BRANCH_BYTES: Final = 240
#: What git-check-ref-format(1) rejects anywhere in a name, and what it rejects at its start and end.
INVALID_IN_BRANCH: Final = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(/|$)|^[-./]|[./]$|^(@|HEAD)$")


def branch(value: Any, location: Location) -> str:
    """Check the name of a branch, with or without `refs/heads/`, which is removed."""
    name = _ref(value).removeprefix("refs/heads/")
    if name.startswith("refs/"):
        raise InvalidValue("must be the name of a branch, with or without refs/heads/")
    return name


def push_target(value: Any, location: Location) -> str:
    """Check what to push to: a branch, or `refs/for/BRANCH`, which is a review on a Gerrit server."""
    name = _ref(value).removeprefix("refs/heads/")
    if name.startswith("refs/") and not name.startswith("refs/for/"):
        raise InvalidValue(
            "must be the name of a branch, with or without refs/heads/, or refs/for/BRANCH for a Gerrit server"
        )
    return name


def revision(value: Any, location: Location) -> str:
    """Check what to clone: a branch, a tag, a commit ID, or a complete ref such as `refs/pull/7/head`."""
    return _ref(value).removeprefix("refs/heads/")


def directory(value: Any, location: Location) -> str:
    """Check a directory of a repository, and return it without a slash at its end."""
    path = relative_path(value, location).rstrip("/")
    if any(part in ("", ".") for part in path.split("/")):
        raise InvalidValue("must be a directory below the top of the repository, such as docs or src/lib")
    return path


def _ref(value: Any) -> str:
    name = as_string(value, max_bytes=MAX_BRANCH_BYTES)
    if INVALID_IN_BRANCH.search(name) or INVALID_IN_BRANCH.search(name.removeprefix("refs/heads/")):
        raise InvalidValue("is not a valid branch name")
    return name


def git_repo(value: Any, location: Location, *, local: bool) -> GitUrl:
    """Check the URL of a repository. No error repeats it, since it may contain a token.

    Args:
        local: Whether http and file URLs are allowed.
    """
    allowed = "must be an https or SSH URL or git@host:path" + (", or an http or file URL" if local else "")
    try:
        url = parse_git_url(as_string(value, max_bytes=MAX_URL_CHARS))
    except ForbiddenInGitUrl as error:
        raise InvalidValue(str(error)) from None
    except InvalidGitUrl:
        raise InvalidValue(allowed) from None
    if not local and url.scheme in ("http", "file"):
        raise InvalidValue(allowed)
    return url

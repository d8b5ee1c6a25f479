"""Submodule links: whether the server of a submodule has the commit that a link names.

A link to a commit that no server has makes the repository impossible to clone with its submodules. The URLs come from the
agent's `.gitmodules`: the credential of the request is used for its own host only.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Final

import attrs

from ccrun.urls import GitUrl, InvalidGitUrl, parse_git_url
from ccrun.worker.git.clone import COMMIT
from ccrun.worker.git.remote import Access
from ccrun.worker.git.run import Git, GitError, last_error

#: Links that are checked, each with a connection to a server. A commit of an agent changes a few.
MAX_CHECKED_LINKS: Final = 20
#: Characters of a URL in `.gitmodules`. Servers limit theirs to a few thousand.
MAX_URL_CHARS: Final = 4096
#: Messages of git when a server does not have a commit.
_ABSENT: Final = re.compile(rb"not our ref|unadvertised object|couldn't find remote ref")


@attrs.frozen(kw_only=True)
class Link:
    """A submodule link of a commit.

    Args:
        url: The URL in `.gitmodules`, which may be relative; None when there is none.
    """

    path: str
    commit: str
    url: str | None


async def unconfirmed(git: Git, access: Access, links: Iterable[Link], *, seconds: float) -> dict[str, str]:
    """Return the paths of the links whose commit no server has confirmed, each with the reason.

    Args:
        git: git as the worker's user, in an empty directory.
        access: The access to the repository that has the links.
        seconds: The timeout for all links.
    """
    until = asyncio.get_running_loop().time() + seconds
    reasons = {}
    for number, link in enumerate(links):
        reason: str | None = f"only {MAX_CHECKED_LINKS} links are checked"
        if number < MAX_CHECKED_LINKS:
            try:
                async with asyncio.timeout_at(until):
                    reason = await _reason(git, f"link-{number}", access, link)
            except TimeoutError:
                reason = f"the servers of the submodules did not respond within {seconds:g} s"
            except GitError as error:
                reason = error.message.removesuffix(".")
        if reason is not None:
            reasons[link.path] = reason
    return reasons


async def _reason(git: Git, name: str, access: Access, link: Link) -> str | None:
    """Return why the commit is not confirmed, None when the server has it."""
    if COMMIT.fullmatch(link.commit) is None:
        return "it is not a commit ID"
    if link.url is None:
        return "it has no URL in .gitmodules"
    if len(link.url) > MAX_URL_CHARS:
        return f"its URL in .gitmodules has more than {MAX_URL_CHARS} characters"
    try:
        url = parse_git_url(absolute_url(access.remote.url, link.url))
    except InvalidGitUrl as error:
        return f"its URL in .gitmodules {error}"
    if url.scheme == "file":
        return "its URL in .gitmodules must be an https or SSH URL"
    # New for each link: git does not ask a server for a commit that it has.
    await git("init", "--quiet", "--bare", "--template=", name)
    ours = git.at(git.cwd / name)
    chosen, url = _access(access, url)
    async with chosen.opened(ours) as opened:
        ran = await opened.run("fetch", *_OPTIONS, "--", url.url, link.commit, seconds=None)
    if not ran.exit.ok:
        return "its server does not have it" if _ABSENT.search(ran.stderr) else f"git fetch: {last_error(ran.stderr)}"
    kind = await ours.run("cat-file", "-t", link.commit)
    return None if kind.stdout.strip() == b"commit" else "it is not a commit"


#: Only the commit itself is fetched, where the server can leave out its tree.
_OPTIONS: Final = (
    *("--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--no-recurse-submodules"),
    *("--depth=1", "--filter=tree:0"),
)


def _access(access: Access, url: GitUrl) -> tuple[Access, GitUrl]:
    """Return the access for the URL of a submodule, with a credential only for the host of the repository."""
    if access.ssh_key is not None and url.over_ssh().host == access.remote.host:
        url = url.over_ssh()
    if url.host == access.remote.host and url.is_ssh == access.remote.is_ssh:
        # git limits a token to scheme, host and port of the repository.
        return access, url
    return Access(remote=url), url


def absolute_url(repository: str, url: str) -> str:
    """Return the URL of a submodule, which may be relative to that of the repository (gitmodules(5))."""
    if not url.startswith(("./", "../")):
        return url
    base, separator = repository.rstrip("/"), "/"
    while url.startswith(("./", "../")):
        step, _, url = url.partition("/")
        if step == "..":
            separator = "/" if "/" in base else ":"
            base = base.rpartition(separator)[0]
    return f"{base}{separator}{url}"

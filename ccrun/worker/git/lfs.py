"""Git LFS: large files that git has as pointers, whose contents are objects on another server of the same host.

git-lfs does the transfers. It asks the server of the repository only, whatever `.lfsconfig` says. A pointer is pushed only if its
object is on the server, and no content that a pattern of Git LFS has is pushed without a pointer.
See https://github.com/git-lfs/git-lfs/tree/main/docs, spec.md and api/.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import attrs

from ccrun.process.child import spawn
from ccrun.urls import GitUrl
from ccrun.worker.git.changes import Changes
from ccrun.worker.git.host_errors import lfs_error, timeout_error
from ccrun.worker.git.remote import Access
from ccrun.worker.git.run import LOCAL_SECONDS, Git, GitError
from ccrun.worker.git.tree_changes import TreeChange

#: The settings with which git converts between files and pointers. Nothing is downloaded then: only ccrun has the credential.
FILTER_SETTINGS: Final = {
    "filter.lfs.clean": "git-lfs clean -- %f",
    "filter.lfs.smudge": "git-lfs smudge --skip -- %f",
    "filter.lfs.process": "git-lfs filter-process --skip",
    "filter.lfs.required": "true",
}
#: Bytes: pointers are shorter, by spec.md.
MAX_POINTER_BYTES: Final = 1024
#: Bytes of the objects of one push, which are copied once more. The limit of GitHub for a file is 2 or 5 GB.
MAX_OBJECT_BYTES: Final = 4 * 1024**3
#: Object IDs in one command.
_BATCH: Final = 500

_POINTER: Final = re.compile(
    rb"version https://[!-~]+\n(?:[a-z0-9.-]+ [^\n]*\n)*?oid sha256:([0-9a-f]{64})\nsize ([0-9]{1,18})\n"
)


def is_installed(path: str) -> bool:
    """Return whether git-lfs is on this PATH. Reads the disk, so it blocks."""
    return shutil.which("git-lfs", path=path) is not None


# --- after the clone -------------------------------------------------------------------------------------------------


async def is_used(here: Git) -> bool:
    """Return whether a file of the repository is stored with Git LFS, by the patterns in `.gitattributes`."""
    patterns = ("--", ".gitattributes", ":(glob)**/.gitattributes")
    return (await here.run("grep", "--cached", "--quiet", "-e", "filter=lfs", *patterns)).exit.ok


async def names_other_server(here: Git, remote: GitUrl) -> bool:
    """Return whether the repository has its objects on a server with another host name."""
    ran = await here.run("config", "--blob=:.lfsconfig", "--get", "lfs.url")
    host = urlsplit(ran.stdout.decode(errors="replace").strip()).hostname
    return ran.exit.ok and host is not None and host != remote.host


async def pull(here: Git, access: Access) -> None:
    """Replace the pointers in the work tree by their contents, and configure the repository so that git knows them.

    Args:
        here: git in the clone, connected to the server.

    Raises:
        GitError: An object cannot be downloaded.
    """
    for name, value in FILTER_SETTINGS.items():
        await here("config", "--local", name, value)
    ran = await _at_server(here, access).run("lfs", "pull", "origin", seconds=None)
    if not ran.exit.ok:
        raise lfs_error(ran, "downloaded")


def _at_server(git: Git, access: Access) -> Git:
    """Return git-lfs that asks the server of the repository only."""
    url = access.remote.url
    if not access.remote.is_ssh:
        url = f"{url.removesuffix('/').removesuffix('.git')}.git/info/lfs"
    settings = (
        f"lfs.url={url}",
        f"lfs.pushurl={url}",
        "lfs.locksverify=false",
        "lfs.fetchinclude=",
        "lfs.fetchexclude=",
        "lfs.skipdownloaderrors=false",
        # By default, a rejected object takes 37 s.
        "lfs.transfer.maxretries=3",
        "lfs.transfer.maxretrydelay=2",
        f"remote.origin.url={access.remote.url}",
    )
    return git.at(git.cwd, *settings, GIT_LFS_SET_LOCKABLE_READONLY="0")


# --- before the push -------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class LfsObject:
    """The content of a file, as its pointer names it."""

    oid: str
    size: int


@attrs.frozen(kw_only=True)
class LfsFiles:
    """The changed files of a tree that patterns of Git LFS have.

    Args:
        objects: The objects that the push needs, with their paths.
        left_out: The files that must not be pushed, with the reasons.
    """

    objects: dict[str, LfsObject]
    left_out: tuple[tuple[TreeChange, str], ...]


async def examine_tree(found: Changes, tree: str, stores: Sequence[Path], *, is_installed: bool) -> LfsFiles:
    """Return which changed files of a tree are stored with Git LFS, and whether they can be.

    Args:
        stores: The directories in which the agent's user has objects.
        is_installed: Whether git-lfs is.
    """
    objects, left_out = {}, []
    entries = await found.filtered(tree, "lfs")
    contents = await _small_blobs(found.git, [entry.blob for entry in entries])
    for entry in entries:
        match = _POINTER.fullmatch(contents.get(entry.blob, b""))
        if match is None:
            reason = "it was committed without git-lfs" if is_installed else "git-lfs is not installed"
            left_out.append((entry, reason))
            continue
        wanted = LfsObject(oid=match[1].decode(), size=int(match[2]))
        if any([await _is_file(found.git, _path(store, wanted.oid)) for store in stores]):
            objects[entry.path] = wanted
        elif not await found.base_has_blob(entry.blob):
            left_out.append((entry, "the object that its pointer names is missing"))
    return LfsFiles(objects=objects, left_out=tuple(left_out))


async def _small_blobs(git: Git, blobs: Sequence[str]) -> dict[str, bytes]:
    """Return the contents of those blobs that may be pointers."""
    if not blobs:
        return {}
    listed = "".join(f"{blob}\n" for blob in blobs).encode()
    sizes = (await git("cat-file", "--batch-check=%(objectname) %(objectsize)", stdin=listed)).decode().splitlines()
    small = [name for name, _, size in (line.partition(" ") for line in sizes) if int(size) < MAX_POINTER_BYTES]
    return {blob: await git("cat-file", "blob", blob) for blob in dict.fromkeys(small)}


async def _is_file(git: Git, path: Path) -> bool:
    async with spawn(["test", "-f", str(path)], env=git.environment, cwd=git.cwd, confinement=git.confinement) as child:
        return (await child.wait()).ok


def _path(store: Path, oid: str) -> Path:
    return store / oid[:2] / oid[2:4] / oid


async def import_objects(git: Git, stores: Sequence[Path], objects: Sequence[LfsObject], bare_repo: Path) -> None:
    """Copy objects from the agent's directories into a repository of the worker, as data.

    Args:
        git: git as the agent's user.

    Raises:
        GitError: An object is not what its name says, or they are too large.
    """
    if sum(wanted.size for wanted in objects) > MAX_OBJECT_BYTES:
        raise GitError(f"The files of Git LFS are larger than {MAX_OBJECT_BYTES // 1024**3} GiB.")
    for wanted in objects:
        target = _path(bare_repo / "lfs" / "objects", wanted.oid)
        await asyncio.to_thread(target.parent.mkdir, parents=True, exist_ok=True)
        for store in stores:
            if await _copy(git, _path(store, wanted.oid), target, wanted):
                break
        else:
            raise GitError(f"The object {wanted.oid[:12]} of Git LFS is damaged.")


async def _copy(git: Git, source: Path, target: Path, wanted: LfsObject) -> bool:
    """Copy one object. Return whether it is the wanted one."""
    digest, left = hashlib.sha256(), wanted.size
    async with spawn(
        ["cat", "--", str(source)], env=git.environment, cwd=git.cwd, confinement=git.confinement
    ) as child:
        with await asyncio.to_thread(target.open, "wb") as file:
            try:
                async with asyncio.timeout(LOCAL_SECONDS):
                    async for chunk in child.chunks():
                        left -= len(chunk)
                        if left < 0:
                            return False
                        digest.update(chunk)
                        await asyncio.to_thread(file.write, chunk)
            except TimeoutError:
                raise GitError(f"The object {wanted.oid[:12]} of Git LFS cannot be read.") from None
            except OSError as error:
                raise GitError(f"The objects of Git LFS cannot be stored: {error.strerror}.") from None
    return left == 0 and digest.hexdigest() == wanted.oid


async def upload(bare_repo: Git, access: Access, objects: Sequence[LfsObject], *, seconds: float) -> None:
    """Upload objects that the server does not have.

    Args:
        bare_repo: git in the repository that has the objects.
        seconds: The timeout.

    Raises:
        GitError: The server has rejected an object, or cannot be reached.
    """
    try:
        async with asyncio.timeout(seconds), access.opened(bare_repo) as opened:
            server = _at_server(opened, access)
            oids = sorted({wanted.oid for wanted in objects})
            for start in range(0, len(oids), _BATCH):
                ran = await server.run(
                    "lfs", "push", "--object-id", "origin", *oids[start : start + _BATCH], seconds=None
                )
                if not ran.exit.ok:
                    raise lfs_error(ran, "uploaded")
    except TimeoutError:
        raise timeout_error(access.remote, "pushed", seconds) from None


def stores_of(found: Changes, repository: Path) -> tuple[Path, Path]:
    """Return the directories in which the agent's user has objects: of this examination, and of the agent's repository."""
    return Path(os.fspath(found.git.cwd)) / "lfs" / "objects", repository / ".git" / "lfs" / "objects"

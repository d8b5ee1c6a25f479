from __future__ import annotations

import asyncio
import os
import resource
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

import pytest
from helpers.uploads import SECRET, UploadSetup, open_descriptors, paths, setup

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.removal import remove_tree
from ccrun.store import Store
from ccrun.worker import upload_search
from ccrun.worker.upload_search import MAX_FILES, MAX_UPLOAD_ERRORS
from ccrun.worker.uploads import Uploads

__all__ = ["setup"]


needs_root: Final = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do this")


needs_non_root: Final = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


@pytest.mark.parametrize("git", [".git", ".GIT", "a/.git", "a/.Git"])
@pytest.mark.parametrize("is_file", [False, True], ids=["directory", "file"])
async def test_git_is_never_uploaded(setup: UploadSetup, git: str, is_file: bool) -> None:
    """No `.git` directory or file is uploaded, in any case and at any depth. One that a pattern names is reported."""
    setup.write(git if is_file else f"{git}/config", "ok", ".github/x")
    assert [".github/x", "ok"] == paths(await setup.upload())
    result = await setup.upload(git)
    assert Uploads(errors=(f"{git}: is never uploaded.",)) == result


async def test_links_are_not_followed(setup: UploadSetup) -> None:
    """Symbolic links are skipped, also those within the workspace. One that a pattern names is reported."""
    setup.write("real/file")
    links = {"file": setup.outside / "secret", "files": setup.outside, "inside": setup.root / "real"}
    for name, target in links.items():
        (setup.root / name).symlink_to(target)
    result = await setup.upload("**", "*/secret", "f*/*")
    assert (["real/file"], ()) == (paths(result), result.errors)
    result = await setup.upload("file", "files/secret", "inside/")
    assert Uploads(errors=tuple(f"{name}: is a link: links are not followed." for name in links)) == result
    assert SECRET not in setup.objects().values()


def create_fifo(path: Path) -> None:
    """Create a FIFO without a writer."""
    os.mkfifo(path)


def create_socket(path: Path) -> None:
    """Create a socket without a listener. It is bound by a short path, since the length is limited."""
    with socket.socket(socket.AF_UNIX) as unix_socket:
        directory = os.open(path.parent, os.O_RDONLY)
        unix_socket.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.close(directory)


def create_device(path: Path) -> None:
    """Create a device like /dev/zero."""
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))


@pytest.mark.parametrize("create", [create_fifo, create_socket, pytest.param(create_device, marks=needs_root)])
async def test_special_files_are_not_opened(setup: UploadSetup, create: Callable[[Path], None]) -> None:
    """FIFOs, sockets and devices do not block the upload. One that a pattern names is reported."""
    setup.write("file")
    create(setup.root / "special")
    result = await asyncio.wait_for(setup.upload(), 10)
    assert (["file"], ()) == (paths(result), result.errors)
    assert ("special: is not a regular file.",) == (await setup.upload("special")).errors


async def test_hard_link_to_a_file_outside_is_not_uploaded(setup: UploadSetup) -> None:
    """A file with another name outside the workspace or in `.git` may have any content, so it is reported instead."""
    setup.write("ok", ".git/config")
    (setup.root / "a").hardlink_to(setup.outside / "secret")
    (setup.root / "b").hardlink_to(setup.root / ".git" / "config")
    result = await setup.upload()
    error = "has another hard link outside the workspace or in .git."
    assert (["ok"], (f"a: {error}", f"b: {error}")) == (paths(result), result.errors)


async def test_hard_links_within_the_workspace_are_uploaded(setup: UploadSetup) -> None:
    """A file with all its names in the workspace is uploaded under each name that matches."""
    setup.write("a")
    (setup.root / "deep" / "er").mkdir(parents=True)
    for name in ("b", "deep/er/c"):
        (setup.root / name).hardlink_to(setup.root / "a")
    result = await setup.upload("a", "b")
    assert (["a", "b"], ()) == (paths(result), result.errors)


@needs_non_root
async def test_unreadable_file_is_reported(setup: UploadSetup) -> None:
    """The errors name the file and the directory, and the other files are uploaded."""
    setup.write("closed/file", "file", "ok")
    (setup.root / "file").chmod(0)
    (setup.root / "closed").chmod(0)
    try:
        result = await setup.upload()
    finally:
        (setup.root / "closed").chmod(0o700)
    assert ["ok"] == paths(result)
    assert {"closed: cannot be read: Permission denied.", "file: cannot be read: Permission denied."} == set(
        result.errors
    )


@pytest.mark.parametrize("name", [b"line\nbreak", b"back\\slash", b"\xff\xfe", b"del\x7f", b"\xe2\x80\xae\n"])
async def test_name_that_is_invalid_for_objects_is_reported(setup: UploadSetup, name: bytes) -> None:
    """The error is printable and valid UTF-8, and the other files are uploaded."""
    setup.write("ok")
    Path(os.fsdecode(os.fsencode(setup.root) + b"/" + name)).write_bytes(b"")
    result = await setup.upload()
    assert ["ok"] == paths(result)
    (error,) = result.errors
    assert error.endswith(
        ": is not a valid object name: it is too long, not UTF-8, or contains a control character or a backslash."
    )
    assert error.isprintable()
    error.encode()


async def test_path_that_is_too_long_is_reported(setup: UploadSetup) -> None:
    """A file or directory with an object name that is too long is skipped; others in the same directory are not."""
    inner = "/".join(["x" * 200] * 4)
    setup.write(f"{inner}/{'y' * 200}", f"{inner}/ok", f"{inner}/{'z' * 190}/file")
    result = await setup.upload(prefix="p" * 30)
    assert [f"{inner}/ok"] == paths(result)
    assert [
        "is nested too deeply: an object name has at most 1024 bytes.",
        "is not a valid object name: it is too long, not UTF-8, or contains a control character or a backslash.",
    ] == [error.partition("…: ")[2] for error in result.errors]


async def test_very_deep_tree_is_skipped(setup: UploadSetup) -> None:
    """Of 3000 nested directories, those with names that are too long are skipped. The search needs few descriptors."""
    setup.write("ok")
    directory = os.open(setup.root, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=directory)
        inner = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = inner
    os.close(directory)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 20, limit[1]))
    try:
        result = await setup.upload()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        # It is too deep for pytest to remove.
        await asyncio.to_thread(remove_tree, setup.root)
    assert ["ok"] == paths(result)
    assert 1 == len(result.errors)
    assert result.errors[0].endswith("is nested too deeply: an object name has at most 1024 bytes.")


async def test_number_of_files_is_limited(setup: UploadSetup) -> None:
    """The first `MAX_FILES` of 10,000 files are uploaded, and the error has the number of the others."""
    for number in range(10_000):
        (setup.root / f"{number:05}").touch()
    setup.store = Store(DiscardingBlobs(setup.data))
    result = await setup.upload()
    assert [f"{number:05}" for number in range(MAX_FILES)] == paths(result)
    assert (f"{10_000 - MAX_FILES} more files match: at most {MAX_FILES} are uploaded.",) == result.errors


async def test_number_of_errors_is_limited(setup: UploadSetup) -> None:
    """The last error has the number of those that were omitted."""
    for number in range(MAX_UPLOAD_ERRORS + 7):
        (setup.root / f"{number:02}\n").touch()
    errors = (await setup.upload()).errors
    assert (MAX_UPLOAD_ERRORS + 1, "And 7 more.") == (len(errors), errors[-1])


async def test_search_is_limited(setup: UploadSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the search stops at its limit, this is reported, and the files until then are uploaded."""
    setup.write("a/1", "b/1", "c/1")
    monkeypatch.setattr(upload_search, "MAX_ENTRIES", 4)
    result = await setup.upload()
    assert ["a/1"] == paths(result)
    assert ("The workspace has too many files: the search was stopped early.",) == result.errors


async def test_search_can_be_cancelled(setup: UploadSetup) -> None:
    """A search that would take long stops soon after its cancellation."""
    for number in range(300):
        (setup.root / f"d{number}" / "a" / "a").mkdir(parents=True)
    patterns = [f"**/a*/**/*{number}*/**/b" for number in range(250)]
    before = threading.active_count()
    upload_task = asyncio.create_task(setup.upload(*patterns))
    async with asyncio.timeout(10):
        while threading.active_count() == before and not upload_task.done():
            await asyncio.sleep(0)
    start = time.monotonic()
    upload_task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload_task
    assert 1.0 > time.monotonic() - start


class DiscardingBlobs(DirectoryBlobs):
    """Discards all files, since writing thousands would take long."""

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        return 1


async def test_uploads_are_limited_in_bytes(setup: UploadSetup) -> None:
    """A file counts with its length, also when it is sparse. Smaller ones are uploaded as far as they fit."""
    for name, size in (("a", 600), ("b", 2**40), ("c", 600), ("d", 400)):
        with (setup.root / name).open("wb") as file:
            file.truncate(size)
    result = await setup.upload("[abcd]", max_bytes=1000)
    assert ["a", "d"] == paths(result)
    assert 2 == len(result.errors)
    assert result.errors[0].startswith("b: is too large: 1099511627776 bytes")
    assert result.errors[1].startswith("c: is too large: 600 bytes")

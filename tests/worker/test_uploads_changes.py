from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

import pytest
from helpers.uploads import SECRET, TASK, UploadSetup, open_descriptors, paths, setup

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.store import Store
from ccrun.worker.uploads import PARALLEL_UPLOADS

__all__ = ["setup"]


class HookedBlobs(DirectoryBlobs):
    """Calls a function at the first upload, before the other files are opened."""

    def __init__(self, root: Path, on_first: Callable[[], None]) -> None:
        super().__init__(root)
        self._on_first = on_first
        self._is_started = False
        self._is_hook_done = asyncio.Event()

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        if not self._is_started:
            self._is_started = True
            await asyncio.to_thread(self._on_first)
            self._is_hook_done.set()
        await self._is_hook_done.wait()
        return await super().create_from(name, file, size=size)


def replace_with_link(path: Path, outside: Path) -> None:
    """Replace the file with a symbolic link to the secret."""
    path.unlink()
    path.symlink_to(outside / "secret")


def replace_directory_with_link(path: Path, outside: Path) -> None:
    """Replace the directory of the file with a symbolic link to the directory outside."""
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.symlink_to(outside)


def replace_with_hard_link(path: Path, outside: Path) -> None:
    """Replace the file with a hard link to the secret."""
    path.unlink()
    path.hardlink_to(outside / "secret")


def replace_with_directory(path: Path, outside: Path) -> None:
    """Replace the file with a directory."""
    path.unlink()
    path.mkdir()


def replace_with_fifo(path: Path, outside: Path) -> None:
    """Replace the file with a FIFO."""
    path.unlink()
    os.mkfifo(path)


def remove_file(path: Path, outside: Path) -> None:
    """Remove the file."""
    path.unlink()


CHANGED: Final = "z/secret: changed before it could be read."


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (replace_with_link, CHANGED),
        (replace_directory_with_link, CHANGED),
        (replace_with_hard_link, "z/secret: has another hard link outside the workspace or in .git."),
        (replace_with_directory, CHANGED),
        (replace_with_fifo, CHANGED),
        (remove_file, CHANGED),
    ],
)
async def test_file_replaced_after_the_search_is_not_uploaded(
    setup: UploadSetup, change: Callable[[Path, Path], None], error: str
) -> None:
    """The replacement is not read, an error names the file, and the other files are uploaded."""
    # So many that the last file is opened only after one of them was uploaded.
    others = [f"{number}" for number in range(PARALLEL_UPLOADS)]
    setup.write(*others, "z/secret")
    setup.store = Store(HookedBlobs(setup.data, lambda: change(setup.root / "z" / "secret", setup.outside)))
    result = await asyncio.wait_for(setup.upload(), 10)
    assert (others, (error,)) == (paths(result), result.errors)
    assert SECRET not in setup.objects().values()


async def test_concurrent_replacement_never_uploads_files_outside(setup: UploadSetup) -> None:
    """While a thread replaces files and directories with links, only files of the workspace are uploaded."""
    setup.write("directory/secret", "file")
    links = {"directory": setup.outside, "file": setup.outside / "secret"}
    stopped = threading.Event()

    def swap() -> None:
        while not stopped.is_set():
            for name, target in links.items():
                (setup.root / name).rename(setup.root / f".{name}")
                (setup.root / name).symlink_to(target)
                (setup.root / name).unlink()
                (setup.root / f".{name}").rename(setup.root / name)

    swapper = asyncio.create_task(asyncio.to_thread(swap))
    before = open_descriptors()
    try:
        for number in range(300):
            await setup.upload("directory", "file", prefix=str(number))
    finally:
        stopped.set()
        await swapper
    assert before == open_descriptors()
    assert {b"directory/secret", b"file"} >= set(setup.objects().values())


class ChangingBlobs(DirectoryBlobs):
    """Changes a file while it is uploaded."""

    def __init__(self, root: Path, change: Callable[[], object]) -> None:
        super().__init__(root)
        self._change = change

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        if name.endswith("/changing"):
            await asyncio.to_thread(self._change)
        return await super().create_from(name, file, size=size)


@pytest.mark.parametrize("size", [3, 2_000_000])
async def test_file_that_changes_its_size_is_not_uploaded(setup: UploadSetup, size: int) -> None:
    """A file that shrinks or grows during its upload is reported, and no part of it is stored."""
    setup.write("changing", "ok")
    path = setup.root / "changing"
    path.write_bytes(bytes(1_000_000))
    setup.store = Store(ChangingBlobs(setup.data, lambda: os.truncate(path, size)))
    result = await setup.upload()
    assert (["ok"], ("changing: The file changed while it was read.",)) == (paths(result), result.errors)
    assert [f"sessions/{TASK}/uploads/ok"] == list(setup.objects())

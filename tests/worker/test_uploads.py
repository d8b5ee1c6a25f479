from __future__ import annotations

import asyncio
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

import pytest

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.blobs import MAX_NAME_BYTES
from ccrun.errors import StorageError
from ccrun.removal import remove_tree
from ccrun.store import Store
from ccrun.task import TaskId, UploadAction, UploadedFile
from ccrun.worker import uploads
from ccrun.worker.uploads import MAX_FILES, MAX_UPLOAD_ERRORS, PARALLEL_UPLOADS, Uploads, upload_files

TASK: Final = TaskId("a-task")
SECRET: Final = b"what the agent may not read"
needs_root: Final = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do this")
needs_limits: Final = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


class Scene:
    """A workspace, a place that keeps objects, and a folder beside the workspace with a secret in it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "repository"
        self.outside = folder / "outside"
        self.data = folder / "data"
        self.store = Store(DirectoryBlobs(self.data))
        self.root.mkdir()
        self.outside.mkdir()
        (self.outside / "secret").write_bytes(SECRET)

    def write(self, *paths: str) -> None:
        """Write files, each with its path as its content."""
        for path in paths:
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_bytes(os.fsencode(path))

    async def upload(self, *patterns: str, prefix: str = "", **options: frozenset[str]) -> Uploads:
        """Upload what these patterns mean."""
        action = UploadAction(glob_patterns=patterns or ("**",), gcs_prefix=prefix)
        return await upload_files(self.store, TASK, self.root, action, **options)

    def kept(self) -> dict[str, bytes]:
        """Return all objects, by their names."""
        return {
            str(path.relative_to(self.data)): path.read_bytes()
            for path in self.data.rglob("*")
            if path.is_file() and ".scratch" not in path.parts
        }


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Return an empty workspace."""
    return Scene(tmp_path)


def paths(found: Uploads) -> list[str]:
    """Return which files were uploaded."""
    return [file.original_path for file in found.files]


def open_descriptors() -> int:
    """Return how many this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# --- what is uploaded ------------------------------------------------------------------------------------------------


async def test_files_go_below_the_uploads_of_the_task(scene: Scene) -> None:
    """Each file is told with its path, its address and its size, and is there byte for byte."""
    scene.write(".playwright/test-results/video-1.webm", "test-output.log", "coverage/a/b.html", "src/main.py")
    found = await scene.upload(".playwright/**/*.webm", "*.log", "coverage/**", prefix="test-artifacts")
    names = [".playwright/test-results/video-1.webm", "coverage/a/b.html", "test-output.log"]
    base = f"sessions/{TASK}/uploads/test-artifacts"
    assert {f"{base}/{name}": name.encode() for name in names} == scene.kept()
    assert (
        Uploads(
            files=tuple(
                UploadedFile(original_path=name, gcs_path=(scene.data / base / name).as_uri(), size_bytes=len(name))
                for name in names
            )
        )
        == found
    )


@pytest.mark.parametrize("prefix", ["", ".", "a", "a/", "./a//b/."])
async def test_prefix_is_a_folder_among_the_uploads(scene: Scene, prefix: str) -> None:
    """A prefix may have several parts, and slashes and dots that mean nothing."""
    scene.write("x")
    await scene.upload(prefix=prefix)
    clean = {"": "", ".": "", "a": "a/", "a/": "a/", "./a//b/.": "a/b/"}[prefix]
    assert [f"sessions/{TASK}/uploads/{clean}x"] == list(scene.kept())


@pytest.mark.parametrize("prefix", ["..", "a/../../..", "a\\b", "a\nb", "x" * MAX_NAME_BYTES])
async def test_prefix_does_not_lead_elsewhere(scene: Scene, prefix: str) -> None:
    """A prefix that would, had it come so far, keeps everything from being uploaded, and is told."""
    scene.write("x")
    assert Uploads(errors=("gcsPrefix cannot be a part of an object's name.",)) == await scene.upload(prefix=prefix)
    assert {} == scene.kept()


async def test_file_that_several_patterns_mean_goes_once(scene: Scene) -> None:
    """Patterns that overlap make no file twice."""
    scene.write("a/b.log")
    found = await scene.upload("a", "a/", "**/*.log", "a/b.{log,log}")
    assert (["a/b.log"], ()) == (paths(found), found.errors)


async def test_taken_away_is_not_uploaded(scene: Scene) -> None:
    """What a pattern with an exclamation mark means stays."""
    scene.write("a.js", "node_modules/b.js", "c/node_modules/d.js", "c/e.js")
    assert ["a.js", "c/e.js"] == paths(await scene.upload("**", "!**/node_modules"))


async def test_files_come_in_the_order_of_their_paths(scene: Scene) -> None:
    """The list is sorted as plain strings are, also around the slash."""
    names = ["a-b", "a.b", "a/b", "a0", "b/a/c", "b/a-c", "ä"]
    scene.write(*names)
    assert sorted(names) == paths(await scene.upload())


async def test_no_match_is_told(scene: Scene) -> None:
    """That nothing was found is no error, but said."""
    scene.write("a.txt")
    assert Uploads(errors=("No file matches globPatterns.",)) == await scene.upload("*.log")


async def test_pattern_that_cannot_be_used_is_told(scene: Scene) -> None:
    """A bomb of braces, had it come so far, is one sentence."""
    assert ("globPatterns may stand for at most 1000 patterns.",) == (await scene.upload("{a,b}" * 20)).errors


async def test_missing_workspace_is_told(scene: Scene) -> None:
    """A workspace that the agent has removed, or put a link in the place of, is one sentence."""
    scene.root.rmdir()
    assert ("The workspace changed before it could be read.",) == (await scene.upload()).errors
    scene.root.symlink_to(scene.outside)
    assert ("The workspace changed before it could be read.",) == (await scene.upload()).errors
    assert {} == scene.kept()


async def test_what_the_worker_has_put_there_stays(scene: Scene) -> None:
    """Files of the worker's own, such as the one with the secrets, are meant by no pattern; a folder's namesakes are."""
    scene.write(".env", "a/.env")
    assert ["a/.env"] == paths(await scene.upload("**", never=frozenset({".env"})))
    found = await scene.upload(".env", never=frozenset({".env"}))
    assert Uploads(errors=(".env: is never uploaded.",)) == found


async def test_upload_that_is_there_already_stays(scene: Scene) -> None:
    """Nothing is written over; the others still go."""
    scene.write("a", "b")
    await scene.upload("a")
    scene.write("a")
    (scene.root / "a").write_bytes(b"new")
    found = await scene.upload()
    assert (["b"], ("a: there is an upload of that name already.",)) == (paths(found), found.errors)
    assert b"a" == scene.kept()[f"sessions/{TASK}/uploads/a"]


# --- what is not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("git", [".git", ".GIT", "a/.git", "a/.Git"])
@pytest.mark.parametrize("is_file", [False, True], ids=["folder", "file"])
async def test_git_is_never_uploaded(scene: Scene, git: str, is_file: bool) -> None:
    """Neither a repository nor the file that points to one goes, in whatever spelling and wherever; plain names are told so."""
    scene.write(git if is_file else f"{git}/config", "ok", ".github/x")
    assert [".github/x", "ok"] == paths(await scene.upload())
    found = await scene.upload(git)
    assert Uploads(errors=(f"{git}: is never uploaded.",)) == found


async def test_links_are_not_followed(scene: Scene) -> None:
    """A symbolic link to a file or folder, outside or inside, is no file; it is told only where a plain pattern names it."""
    scene.write("real/file")
    links = {"file": scene.outside / "secret", "folder": scene.outside, "inside": scene.root / "real"}
    for name, target in links.items():
        (scene.root / name).symlink_to(target)
    found = await scene.upload("**", "*/secret", "f*/*")
    assert (["real/file"], ()) == (paths(found), found.errors)
    found = await scene.upload("file", "folder/secret", "inside/")
    assert Uploads(errors=tuple(f"{name}: is a link: links are not followed." for name in links)) == found
    assert SECRET not in scene.kept().values()


def make_fifo(path: Path) -> None:
    """Make a pipe that nobody ever writes to."""
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    """Make a socket that nobody listens at; by a short name, for it may not be long."""
    with socket.socket(socket.AF_UNIX) as made:
        folder = os.open(path.parent, os.O_RDONLY)
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


def make_device(path: Path) -> None:
    """Make a device that gives zeros without end."""
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))


@pytest.mark.parametrize("make", [make_fifo, make_socket, pytest.param(make_device, marks=needs_root)])
async def test_what_is_no_file_is_not_opened(scene: Scene, make: Callable[[Path], None]) -> None:
    """Pipes, sockets and devices hold nobody up; only where a plain pattern names one is it told."""
    scene.write("file")
    make(scene.root / "special")
    found = await asyncio.wait_for(scene.upload(), 10)
    assert (["file"], ()) == (paths(found), found.errors)
    assert ("special: is no file.",) == (await scene.upload("special")).errors


async def test_hard_link_to_the_outside_is_left(scene: Scene) -> None:
    """A file that has a further name outside the workspace, or in `.git`, may be anybody's: it stays, and is told."""
    scene.write("ok", ".git/config")
    (scene.root / "a").hardlink_to(scene.outside / "secret")
    (scene.root / "b").hardlink_to(scene.root / ".git" / "config")
    found = await scene.upload()
    fault = "has a further name (hard link) outside the workspace, or in .git."
    assert (["ok"], (f"a: {fault}", f"b: {fault}")) == (paths(found), found.errors)


async def test_hard_links_within_the_workspace_are_files(scene: Scene) -> None:
    """A file all of whose names are in the workspace goes under each that is meant, wherever the others are."""
    scene.write("a")
    (scene.root / "deep" / "er").mkdir(parents=True)
    for name in ("b", "deep/er/c"):
        (scene.root / name).hardlink_to(scene.root / "a")
    found = await scene.upload("a", "b")
    assert (["a", "b"], ()) == (paths(found), found.errors)


@needs_limits
async def test_unreadable_file_keeps_no_other(scene: Scene) -> None:
    """A file or a folder that may not be read is told, and the others go."""
    scene.write("closed/file", "file", "ok")
    (scene.root / "file").chmod(0)
    (scene.root / "closed").chmod(0)
    try:
        found = await scene.upload()
    finally:
        (scene.root / "closed").chmod(0o700)
    assert ["ok"] == paths(found)
    assert {"closed: cannot be read: Permission denied.", "file: cannot be read: Permission denied."} == set(
        found.errors
    )


@pytest.mark.parametrize("name", [b"line\nbreak", b"back\\slash", b"\xff\xfe", b"del\x7f", b"\xe2\x80\xae\n"])
async def test_name_that_no_object_has_is_told(scene: Scene, name: bytes) -> None:
    """A file whose name cannot be an object's stays, in a sentence of one line that can be stored; the others go."""
    scene.write("ok")
    Path(os.fsdecode(os.fsencode(scene.root) + b"/" + name)).write_bytes(b"")
    found = await scene.upload()
    assert ["ok"] == paths(found)
    (fault,) = found.errors
    assert fault.endswith(
        ": cannot be an object's name: it is too long, or has a control character, a backslash or no UTF-8."
    )
    assert fault.isprintable()
    fault.encode()


async def test_path_that_is_too_long_is_told(scene: Scene) -> None:
    """A file or folder whose object's name would be too long stays; those in the same folder go."""
    inner = "/".join(["x" * 200] * 4)
    scene.write(f"{inner}/{'y' * 200}", f"{inner}/ok", f"{inner}/{'z' * 190}/file")
    found = await scene.upload(prefix="p" * 30)
    assert [f"{inner}/ok"] == paths(found)
    assert [
        "lies too deep: no object's name is longer than 1024 bytes.",
        "cannot be an object's name: it is too long, or has a control character, a backslash or no UTF-8.",
    ] == [fault.partition("…: ")[2] for fault in found.errors]


async def test_very_deep_tree_is_no_trap(scene: Scene) -> None:
    """Thousands of folders in each other are left where no name fits any more; everything else goes, with few descriptors."""
    scene.write("ok")
    folder = os.open(scene.root, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 20, limit[1]))
    try:
        found = await scene.upload()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        # It is too deep for pytest to clear away.
        await asyncio.to_thread(remove_tree, scene.root)
    assert ["ok"] == paths(found)
    assert 1 == len(found.errors)
    assert found.errors[0].endswith("lies too deep: no object's name is longer than 1024 bytes.")


async def test_files_have_a_limit(scene: Scene) -> None:
    """Of ten thousand files the first go, by their paths, and how many did not is told."""
    for number in range(10_000):
        (scene.root / f"{number:05}").touch()
    scene.store = Store(KeptInMind(scene.data))
    found = await scene.upload()
    assert [f"{number:05}" for number in range(MAX_FILES)] == paths(found)
    assert (f"{10_000 - MAX_FILES} more files match: at most {MAX_FILES} are uploaded.",) == found.errors


async def test_faults_have_a_limit(scene: Scene) -> None:
    """Of many faults some are told, and how many more there are."""
    for number in range(MAX_UPLOAD_ERRORS + 7):
        (scene.root / f"{number:02}\n").touch()
    errors = (await scene.upload()).errors
    assert (MAX_UPLOAD_ERRORS + 1, "And 7 more.") == (len(errors), errors[-1])


async def test_search_has_a_limit(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace with too much in it is told; what was found until then goes."""
    scene.write("a/1", "b/1", "c/1")
    monkeypatch.setattr(uploads, "MAX_ENTRIES", 4)
    found = await scene.upload()
    assert ["a/1"] == paths(found)
    assert ("The workspace has too many files: the search was stopped before its end.",) == found.errors


async def test_search_can_be_cancelled(scene: Scene) -> None:
    """Who goes away during the search is back soon, though the patterns make it long."""
    for number in range(300):
        (scene.root / f"d{number}" / "a" / "a").mkdir(parents=True)
    patterns = [f"**/a*/**/*{number}*/**/b" for number in range(250)]
    before = threading.active_count()
    searching = asyncio.create_task(scene.upload(*patterns))
    async with asyncio.timeout(10):
        while threading.active_count() == before and not searching.done():
            await asyncio.sleep(0)
    began = time.monotonic()
    searching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await searching
    assert 1.0 > time.monotonic() - began


# --- what changes meanwhile ------------------------------------------------------------------------------------------


class Blobs(DirectoryBlobs):
    """A place that lets something happen when the first file arrives, before any other file is opened."""

    def __init__(self, root: Path, happens: Callable[[], None]) -> None:
        super().__init__(root)
        self._happens = happens
        self._begun = False
        self._over = asyncio.Event()

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        if not self._begun:
            self._begun = True
            await asyncio.to_thread(self._happens)
            self._over.set()
        await self._over.wait()
        return await super().create_from(name, file, size=size)


class KeptInMind(DirectoryBlobs):
    """A place for so many files that a disk would take long."""

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        return 1


def is_replaced_by_link(path: Path, outside: Path) -> None:
    """Put a link to the secret in the place of the file."""
    path.unlink()
    path.symlink_to(outside / "secret")


def is_in_a_replaced_folder(path: Path, outside: Path) -> None:
    """Put a link to the outside in the place of the file's folder."""
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.symlink_to(outside)


def is_replaced_by_hard_link(path: Path, outside: Path) -> None:
    """Put another name of the secret in the place of the file."""
    path.unlink()
    path.hardlink_to(outside / "secret")


def is_replaced_by_folder(path: Path, outside: Path) -> None:
    """Put a folder in the place of the file."""
    path.unlink()
    path.mkdir()


def is_replaced_by_fifo(path: Path, outside: Path) -> None:
    """Put a pipe in the place of the file."""
    path.unlink()
    os.mkfifo(path)


def is_removed(path: Path, outside: Path) -> None:
    """Remove the file."""
    path.unlink()


CHANGED: Final = "z/secret: changed before it could be read."


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (is_replaced_by_link, CHANGED),
        (is_in_a_replaced_folder, CHANGED),
        (is_replaced_by_hard_link, "z/secret: has a further name (hard link) outside the workspace, or in .git."),
        (is_replaced_by_folder, CHANGED),
        (is_replaced_by_fifo, CHANGED),
        (is_removed, CHANGED),
    ],
)
async def test_swap_after_the_search_does_not_escape(
    scene: Scene, change: Callable[[Path, Path], None], fault: str
) -> None:
    """What takes the place of a file between search and upload is not read: the file is told, the others go."""
    # So many that the last one is opened only when one of them has arrived.
    others = [f"{number}" for number in range(PARALLEL_UPLOADS)]
    scene.write(*others, "z/secret")
    scene.store = Store(Blobs(scene.data, lambda: change(scene.root / "z" / "secret", scene.outside)))
    found = await asyncio.wait_for(scene.upload(), 10)
    assert (others, (fault,)) == (paths(found), found.errors)
    assert SECRET not in scene.kept().values()


async def test_steady_swapping_does_not_escape(scene: Scene) -> None:
    """Whenever files and folders are swapped for links, only what is in the workspace goes, and no descriptor stays open."""
    scene.write("folder/secret", "file")
    links = {"folder": scene.outside, "file": scene.outside / "secret"}
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            for name, target in links.items():
                (scene.root / name).rename(scene.root / f".{name}")
                (scene.root / name).symlink_to(target)
                (scene.root / name).unlink()
                (scene.root / f".{name}").rename(scene.root / name)

    swapping = asyncio.create_task(asyncio.to_thread(swap))
    before = open_descriptors()
    try:
        for number in range(300):
            await scene.upload("folder", "file", prefix=str(number))
    finally:
        over.set()
        await swapping
    assert before == open_descriptors()
    assert {b"folder/secret", b"file"} >= set(scene.kept().values())


class Changing(DirectoryBlobs):
    """A place where files change while they are read."""

    def __init__(self, root: Path, change: Callable[[], object]) -> None:
        super().__init__(root)
        self._change = change

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        if name.endswith("/changing"):
            await asyncio.to_thread(self._change)
        return await super().create_from(name, file, size=size)


@pytest.mark.parametrize("size", [3, 2_000_000])
async def test_file_that_changes_its_size_is_left(scene: Scene, size: int) -> None:
    """A file that shrinks or grows during its upload is told and is not there by half; the others go."""
    scene.write("changing", "ok")
    path = scene.root / "changing"
    path.write_bytes(bytes(1_000_000))
    scene.store = Store(Changing(scene.data, lambda: os.truncate(path, size)))
    found = await scene.upload()
    assert (["ok"], ("changing: The file changed while it was read.",)) == (paths(found), found.errors)
    assert [f"sessions/{TASK}/uploads/ok"] == list(scene.kept())


# --- when the storage fails ------------------------------------------------------------------------------------------


class Refusing(DirectoryBlobs):
    """A place that does not take some files."""

    def __init__(self, root: Path, refused: str) -> None:
        super().__init__(root)
        self.tries = 0
        self._refused = refused

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        self.tries += 1
        if self._refused in name.removeprefix(f"sessions/{TASK}/uploads/"):
            raise StorageError("The storage is out of order.")
        return await super().create_from(name, file, size=size)


async def test_storage_that_refuses_a_file_gets_the_others(scene: Scene) -> None:
    """A fault of the storage with some files is told for each, and the others go."""
    scene.write("a", "b", "bad-1", "c", "d", "e", "f", "g-bad")
    scene.store = Store(Refusing(scene.data, "bad"))
    found = await scene.upload()
    assert ["a", "b", "c", "d", "e", "f"] == paths(found)
    assert {"bad-1: The storage is out of order.", "g-bad: The storage is out of order."} == set(found.errors)


async def test_storage_that_takes_nothing_is_not_asked_for_ever(scene: Scene) -> None:
    """After some files in a row the others are not tried: each would wait for its patience."""
    scene.write(*map(str, range(100)))
    blobs = Refusing(scene.data, "")
    scene.store = Store(blobs)
    found = await scene.upload()
    assert 8 > blobs.tries
    assert f"The storage rejects all files: {100 - blobs.tries} more were skipped." == found.errors[-1]


# --- cost ------------------------------------------------------------------------------------------------------------

UPLOAD_LARGE: Final = """
import asyncio, resource, sys
from pathlib import Path
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.store import Store
from ccrun.task import TaskId, UploadAction
from ccrun.worker.uploads import upload_files

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

async def main():
    root, data = map(Path, sys.argv[1:])
    store, task = Store(DirectoryBlobs(data)), TaskId("a-task")
    await upload_files(store, task, root, UploadAction(glob_patterns=("small",)))
    before = peak()
    found = await upload_files(store, task, root, UploadAction(glob_patterns=("large",)))
    print(found.files[0].size_bytes, peak() - before)

asyncio.run(main())
"""


def test_large_file_takes_little_memory(scene: Scene) -> None:
    """Two gigabytes are uploaded in a few megabytes of memory."""
    size = 2 * 1024**3
    scene.write("small")
    with (scene.root / "large").open("wb") as file:
        file.truncate(size)
    done = subprocess.run(
        [sys.executable, "-P", "-c", UPLOAD_LARGE, str(scene.root), str(scene.data)], stdout=subprocess.PIPE, check=True
    )
    stored, megabytes = map(int, done.stdout.split())
    (scene.data / "sessions" / TASK / "uploads" / "large").unlink()
    assert size == stored
    assert 64 > megabytes

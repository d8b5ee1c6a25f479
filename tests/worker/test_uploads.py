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
from ccrun.results import UploadedFile
from ccrun.spec import UploadAction
from ccrun.store import Store
from ccrun.task import TaskId
from ccrun.worker import uploads
from ccrun.worker.uploads import MAX_FILES, MAX_UPLOAD_ERRORS, PARALLEL_UPLOADS, Uploads, upload_files

TASK: Final = TaskId("a-task")
SECRET: Final = b"content outside the workspace"
needs_root: Final = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do this")
needs_non_root: Final = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


class UploadSetup:
    """A workspace, a storage, and a directory outside the workspace with a secret file."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "repository"
        self.outside = directory / "outside"
        self.data = directory / "data"
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
        """Upload the files that match these patterns, by default all."""
        action = UploadAction(glob_patterns=patterns or ("**",), gcs_prefix=prefix)
        return await upload_files(self.store, TASK, self.root, action, **options)

    def objects(self) -> dict[str, bytes]:
        """Return the contents of all objects, by name."""
        return {
            str(path.relative_to(self.data)): path.read_bytes()
            for path in self.data.rglob("*")
            if path.is_file() and ".scratch" not in path.parts
        }


@pytest.fixture
def setup(tmp_path: Path) -> UploadSetup:
    """An empty workspace."""
    return UploadSetup(tmp_path)


def paths(result: Uploads) -> list[str]:
    """Return the paths of the uploaded files."""
    return [file.original_path for file in result.files]


def open_descriptors() -> int:
    """Return the number of open file descriptors of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# --- files that are uploaded -----------------------------------------------------------------------------------------


async def test_matching_files_are_uploaded(setup: UploadSetup) -> None:
    """They are stored below the uploads of the task and reported with path, URL and size."""
    setup.write(".playwright/test-results/video-1.webm", "test-output.log", "coverage/a/b.html", "src/main.py")
    result = await setup.upload(".playwright/**/*.webm", "*.log", "coverage/**", prefix="test-artifacts")
    names = [".playwright/test-results/video-1.webm", "coverage/a/b.html", "test-output.log"]
    base = f"sessions/{TASK}/uploads/test-artifacts"
    assert {f"{base}/{name}": name.encode() for name in names} == setup.objects()
    assert (
        Uploads(
            files=tuple(
                UploadedFile(original_path=name, gcs_path=(setup.data / base / name).as_uri(), size_bytes=len(name))
                for name in names
            )
        )
        == result
    )


@pytest.mark.parametrize("prefix", ["", ".", "a", "a/", "./a//b/."])
async def test_prefix_is_a_directory_of_the_uploads(setup: UploadSetup, prefix: str) -> None:
    """A prefix may have several parts; redundant slashes and dots are removed."""
    setup.write("x")
    await setup.upload(prefix=prefix)
    clean = {"": "", ".": "", "a": "a/", "a/": "a/", "./a//b/.": "a/b/"}[prefix]
    assert [f"sessions/{TASK}/uploads/{clean}x"] == list(setup.objects())


@pytest.mark.parametrize("prefix", ["..", "a/../../..", "a\\b", "a\nb", "x" * MAX_NAME_BYTES])
async def test_invalid_prefix_is_an_error(setup: UploadSetup, prefix: str) -> None:
    """Nothing is uploaded. Requests with such a prefix are rejected earlier; this is a second check."""
    setup.write("x")
    assert Uploads(errors=("gcsPrefix is not valid in an object name.",)) == await setup.upload(prefix=prefix)
    assert {} == setup.objects()


async def test_file_that_matches_several_patterns_is_uploaded_once(setup: UploadSetup) -> None:
    """Patterns may overlap."""
    setup.write("a/b.log")
    result = await setup.upload("a", "a/", "**/*.log", "a/b.{log,log}")
    assert (["a/b.log"], ()) == (paths(result), result.errors)


async def test_excluded_files_are_not_uploaded(setup: UploadSetup) -> None:
    """A pattern with an exclamation mark excludes files."""
    setup.write("a.js", "node_modules/b.js", "c/node_modules/d.js", "c/e.js")
    assert ["a.js", "c/e.js"] == paths(await setup.upload("**", "!**/node_modules"))


async def test_files_are_sorted_by_path(setup: UploadSetup) -> None:
    """The order is that of strings, also for slashes."""
    names = ["a-b", "a.b", "a/b", "a0", "b/a/c", "b/a-c", "ä"]
    setup.write(*names)
    assert sorted(names) == paths(await setup.upload())


async def test_no_match_is_reported(setup: UploadSetup) -> None:
    """The result has no files and one error."""
    setup.write("a.txt")
    assert Uploads(errors=("No file matches globPatterns.",)) == await setup.upload("*.log")


async def test_pattern_that_expands_too_far_is_reported(setup: UploadSetup) -> None:
    """Requests with such a pattern are rejected earlier; this is a second check."""
    assert ("globPatterns may expand to at most 1000 patterns.",) == (await setup.upload("{a,b}" * 20)).errors


async def test_missing_workspace_is_reported(setup: UploadSetup) -> None:
    """The agent may have removed the workspace or replaced it with a link."""
    setup.root.rmdir()
    assert ("The workspace changed before it could be read.",) == (await setup.upload()).errors
    setup.root.symlink_to(setup.outside)
    assert ("The workspace changed before it could be read.",) == (await setup.upload()).errors
    assert {} == setup.objects()


async def test_files_of_the_worker_are_never_uploaded(setup: UploadSetup) -> None:
    """The `.env` of the worker, which has secrets, matches no pattern. Files of that name in other directories do."""
    setup.write(".env", "a/.env")
    assert ["a/.env"] == paths(await setup.upload("**", excluded=frozenset({".env"})))
    result = await setup.upload(".env", excluded=frozenset({".env"}))
    assert Uploads(errors=(".env: is never uploaded.",)) == result


async def test_existing_upload_is_not_overwritten(setup: UploadSetup) -> None:
    """The error names the file, and the other files are uploaded."""
    setup.write("a", "b")
    await setup.upload("a")
    setup.write("a")
    (setup.root / "a").write_bytes(b"new")
    result = await setup.upload()
    assert (["b"], ("a: an upload with this name already exists.",)) == (paths(result), result.errors)
    assert b"a" == setup.objects()[f"sessions/{TASK}/uploads/a"]


# --- files that are not uploaded -------------------------------------------------------------------------------------


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
    monkeypatch.setattr(uploads, "MAX_ENTRIES", 4)
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


# --- concurrent changes ----------------------------------------------------------------------------------------------


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


class DiscardingBlobs(DirectoryBlobs):
    """Discards all files, since writing thousands would take long."""

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        return 1


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


# --- storage errors --------------------------------------------------------------------------------------------------


class RejectingBlobs(DirectoryBlobs):
    """Rejects some files."""

    def __init__(self, root: Path, rejected: str) -> None:
        super().__init__(root)
        self.attempts = 0
        self._rejected = rejected

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        self.attempts += 1
        if self._rejected in name.removeprefix(f"sessions/{TASK}/uploads/"):
            raise StorageError("The storage is unavailable.")
        return await super().create_from(name, file, size=size)


async def test_storage_error_of_one_file_does_not_affect_others(setup: UploadSetup) -> None:
    """Each rejected file is reported, and the others are uploaded."""
    setup.write("a", "b", "bad-1", "c", "d", "e", "f", "g-bad")
    setup.store = Store(RejectingBlobs(setup.data, "bad"))
    result = await setup.upload()
    assert ["a", "b", "c", "d", "e", "f"] == paths(result)
    assert {"bad-1: The storage is unavailable.", "g-bad: The storage is unavailable."} == set(result.errors)


async def test_uploads_stop_after_consecutive_storage_errors(setup: UploadSetup) -> None:
    """The other files are skipped, since each would be retried for a long time."""
    setup.write(*map(str, range(100)))
    blobs = RejectingBlobs(setup.data, "")
    setup.store = Store(blobs)
    result = await setup.upload()
    assert 8 > blobs.attempts
    assert f"The storage rejected 4 files in a row: {100 - blobs.attempts} more were skipped." == result.errors[-1]


# --- memory ----------------------------------------------------------------------------------------------------------

UPLOAD_LARGE: Final = """
import asyncio, resource, sys
from pathlib import Path
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.store import Store
from ccrun.spec import UploadAction
from ccrun.task import TaskId
from ccrun.worker.uploads import upload_files

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

async def main():
    root, data = map(Path, sys.argv[1:])
    store, task = Store(DirectoryBlobs(data)), TaskId("a-task")
    await upload_files(store, task, root, UploadAction(glob_patterns=("small",)))
    before = peak()
    result = await upload_files(store, task, root, UploadAction(glob_patterns=("large",)))
    print(result.files[0].size_bytes, peak() - before)

asyncio.run(main())
"""


def test_large_file_needs_little_memory(setup: UploadSetup) -> None:
    """The upload of 2 GiB needs less than 64 MiB."""
    size = 2 * 1024**3
    setup.write("small")
    with (setup.root / "large").open("wb") as file:
        file.truncate(size)
    process = subprocess.run(
        [sys.executable, "-P", "-c", UPLOAD_LARGE, str(setup.root), str(setup.data)], stdout=subprocess.PIPE, check=True
    )
    stored, megabytes = map(int, process.stdout.split())
    (setup.data / "sessions" / TASK / "uploads" / "large").unlink()
    assert size == stored
    assert 64 > megabytes

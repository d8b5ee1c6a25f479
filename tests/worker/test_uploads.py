from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import BinaryIO, Final

import pytest
from helpers.uploads import TASK, UploadSetup, paths, setup

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.blobs import MAX_NAME_BYTES
from ccrun.errors import StorageError
from ccrun.results import UploadedFile
from ccrun.store import Store
from ccrun.worker.uploads import Uploads

__all__ = ["setup"]


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
    await upload_files(store, task, root, UploadAction(glob_patterns=("small",)), max_bytes=2**40)
    before = peak()
    result = await upload_files(store, task, root, UploadAction(glob_patterns=("large",)), max_bytes=2**40)
    print(result.files[0].size_bytes, peak() - before)

asyncio.run(main())
"""


def test_large_file_needs_little_memory(setup: UploadSetup) -> None:
    """The upload of 512 MiB needs less than 64 MiB."""
    size = 512 * 1024**2
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

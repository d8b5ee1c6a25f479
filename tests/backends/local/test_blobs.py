"""Object storage in a directory. `tests/test_blobs.py` tests what every adapter must do."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.blobs import list_names

from ccrun.backends.local.blobs import COPY_BYTES, LOCK_FILES, SCRATCH_SECONDS, DirectoryBlobs
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, StorageError


async def test_listing_is_confined_to_the_root(tmp_path: Path) -> None:
    """A listing rejects a prefix outside the root or in an internal directory."""
    (tmp_path / "outside").write_bytes(b"")
    blobs = DirectoryBlobs(tmp_path / "root")
    await blobs.create("name", b"")
    for prefix in ("../", "name/../../", ".scratch/", "a//"):
        with pytest.raises(ValueError, match="not an object name"):
            await blobs.entries(prefix, limit=10)


async def test_listing_skips_internal_files(tmp_path: Path) -> None:
    """Files and directories in the root whose names start with a dot are not objects."""
    blobs = DirectoryBlobs(tmp_path)
    generation = await blobs.create("name", b"")
    await blobs.replace("name", b"", generation=generation)
    (tmp_path / ".keys").mkdir()
    (tmp_path / ".keys" / "sealing.key").write_bytes(b"")
    assert await list_names(blobs, "") == ["name"]


async def test_listing_does_not_follow_links(tmp_path: Path) -> None:
    """A listing does not follow a symbolic link to a directory outside the root."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"")
    blobs = DirectoryBlobs(tmp_path / "root")
    await blobs.create("folder/name", b"")
    (tmp_path / "root" / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    assert "folder/link/file" not in await list_names(blobs, "folder/")


async def test_other_users_cannot_read_objects(tmp_path: Path) -> None:
    """The root has mode 0700 and objects have mode 0600, independently of the umask."""
    blobs = DirectoryBlobs(tmp_path / "new" / "root")
    before = os.umask(0)
    try:
        await blobs.create("folder/name", b"")
    finally:
        os.umask(before)
    root = tmp_path / "new" / "root"
    assert tuple(stat.S_IMODE(path.stat().st_mode) for path in (root, root / "folder" / "name")) == (0o700, 0o600)


async def test_generation_increases_when_the_clock_goes_back(tmp_path: Path) -> None:
    """A write increases the generation even if the clock was ahead at the previous write."""
    blobs = DirectoryBlobs(tmp_path)
    await blobs.create("name", b"")
    ahead = (await blobs.read("name")).generation + 3600 * 10**9
    os.utime(tmp_path / "name", ns=(ahead, ahead))
    assert await blobs.replace("name", b"", generation=ahead) > ahead


async def test_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    """A `create` or `replace` that fails removes its temporary file."""
    blobs = DirectoryBlobs(tmp_path)
    generation = await blobs.create("name", b"")
    with pytest.raises(BlobExists):
        await blobs.create("name", b"")
    with pytest.raises(BlobChanged):
        await blobs.replace("name", b"", generation=generation + 1)
    assert list((tmp_path / ".scratch").iterdir()) == []


FILL_THE_DISK = """
import asyncio, io, resource, sys
from pathlib import Path
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.errors import StorageError

resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
try:
    asyncio.run(DirectoryBlobs(Path(sys.argv[1])).create_from("name", io.BytesIO(bytes(5_000_000)), size=5_000_000))
except StorageError as error:
    print(error)
"""


async def test_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    """A file that does not fit on the disk is a `StorageError` with the reason, and the temporary file is removed."""
    with run_python(FILL_THE_DISK, tmp_path) as process:
        output, _ = await asyncio.to_thread(process.communicate, None, 30)
    assert b"The storage directory cannot be written: File too large.\n" == output
    assert [] == [path for path in tmp_path.rglob("*") if path.is_file()]


async def test_sparse_file_stays_sparse(tmp_path: Path) -> None:
    """The holes of a file, also one at its end, use no disk space in the object, which has the same content."""
    (tmp_path / "file").write_bytes(b"start")
    size = 50 * COPY_BYTES + 1
    os.truncate(tmp_path / "file", size)
    with (tmp_path / "file").open("rb") as file:
        await DirectoryBlobs(tmp_path / "root").create_from("name", file, size=size)
    status = (tmp_path / "root" / "name").stat()
    assert size == status.st_size
    assert 5 * COPY_BYTES > status.st_blocks * 512
    assert b"start" + bytes(size - 5) == (tmp_path / "root" / "name").read_bytes()


async def test_unusable_directory_is_a_storage_error(tmp_path: Path) -> None:
    """If the directory cannot be used, each operation raises a `StorageError` that does not contain its path."""
    (tmp_path / "root").write_bytes(b"a file instead of a directory")
    blobs = DirectoryBlobs(tmp_path / "root")
    for call in (
        blobs.create("name", b""),
        blobs.create_from("name", io.BytesIO(), size=0),
        blobs.replace("name", b"", generation=1),
        blobs.check(),
    ):
        with pytest.raises(StorageError) as caught:
            await call
        assert str(tmp_path) not in caught.value.message
        assert not isinstance(caught.value, BlobExists | BlobChanged | BlobNotFound)


async def test_url_is_a_file_url(tmp_path: Path) -> None:
    """The URL of an object, or of a directory with a slash, is a file URL, whichever characters the root contains."""
    blobs = DirectoryBlobs(tmp_path / "a b#c")
    assert (tmp_path / "a b#c" / "folder" / "name").as_uri() == blobs.url("folder/name")
    assert (tmp_path / "a b#c" / "folder").as_uri() + "/" == blobs.url("folder/")


def run_python(code: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
    """Start a Python process that runs this code."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


INCREMENT = """
import asyncio, sys
from pathlib import Path
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.errors import BlobChanged

async def main():
    blobs = DirectoryBlobs(Path(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(50):
        while True:
            blob = await blobs.read("count")
            try:
                await blobs.replace("count", b"%d" % (int(blob.content) + 1), generation=blob.generation)
                break
            except BlobChanged:
                pass

asyncio.run(main())
"""


async def test_no_replacement_is_lost_between_processes(tmp_path: Path) -> None:
    """Three processes increment a number in one object with `replace`, and no increment is lost."""
    blobs = DirectoryBlobs(tmp_path)
    await blobs.create("count", b"0")
    processes = [run_python(INCREMENT, tmp_path) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"ready\n"
    outputs = await asyncio.gather(*(asyncio.to_thread(process.communicate, b"go\n", 30) for process in processes))
    assert [output for output, _ in outputs] == [b""] * 3
    assert (await blobs.read("count")).content == b"150"


HOLD_LOCKS = """
import fcntl, sys
from pathlib import Path

files = [(Path(sys.argv[1]) / ".locks" / str(number)).open("wb") for number in range(int(sys.argv[2]))]
for file in files:
    fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.readline()
"""


async def test_lock_is_released_when_its_holder_is_killed(tmp_path: Path) -> None:
    """A replacement waits while another process holds the lock, and continues when that process is killed."""
    blobs = DirectoryBlobs(tmp_path)
    generation = await blobs.create("name", b"")
    generation = await blobs.replace("name", b"", generation=generation)
    with run_python(HOLD_LOCKS, tmp_path, str(LOCK_FILES)) as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"locked\n"
        replacing = asyncio.create_task(blobs.replace("name", b"new", generation=generation))
        done, _ = await asyncio.wait([replacing], timeout=0.05)
        assert done == set()
        process.send_signal(signal.SIGKILL)
        await asyncio.wait_for(replacing, 5)
    assert (await blobs.read("name")).content == b"new"


CREATE_OBJECTS = """
import asyncio, sys
from pathlib import Path
from ccrun.backends.local.blobs import DirectoryBlobs

async def main():
    blobs = DirectoryBlobs(Path(sys.argv[1]))
    number = 0
    while True:
        await blobs.create(f"objects/{number:06}", b"x" * 300_000)
        print(number, flush=True)
        number += 1

asyncio.run(main())
"""


async def test_killed_writer_leaves_no_partial_object(tmp_path: Path) -> None:
    """When a process is killed while it writes, every object is complete, and no object that it reported is missing."""
    with run_python(CREATE_OBJECTS, tmp_path) as process:
        assert process.stdout is not None
        for _ in range(5):
            await asyncio.to_thread(process.stdout.readline)
        process.kill()
        reported = 5 + len(process.stdout.readlines())
    blobs = DirectoryBlobs(tmp_path)
    entries = await blobs.entries("objects/", limit=1000)
    assert len(entries) in (reported, reported + 1)
    assert {300_000} == {len((await blobs.read(entry.name)).content) for entry in entries}


async def test_interrupted_writes_are_removed(tmp_path: Path) -> None:
    """A temporary file that was not changed for a minute is removed; that of a running write and objects stay."""
    blobs = DirectoryBlobs(tmp_path)
    await blobs.remove_interrupted_writes()
    await blobs.create("name", b"content")
    old, new = tmp_path / ".scratch" / "old", tmp_path / ".scratch" / "new"
    for file, age in (
        (old, SCRATCH_SECONDS + 1),
        (new, SCRATCH_SECONDS - 30),
        (tmp_path / "name", SCRATCH_SECONDS + 1),
    ):
        file.touch()
        os.utime(file, (time.time() - age, time.time() - age))
    await blobs.remove_interrupted_writes()
    assert [False, True, True] == [file.exists() for file in (old, new, tmp_path / "name")]


async def test_full_disk_fails_the_check(tmp_path: Path) -> None:
    """With less free space than the minimum, the storage is not ready, although an empty file can be created."""
    await DirectoryBlobs(tmp_path).check()
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(StorageError, match=r"^The storage directory has less than [0-9]+ MiB of free space\.$"):
        await DirectoryBlobs(tmp_path, min_free_bytes=2 * free).check()

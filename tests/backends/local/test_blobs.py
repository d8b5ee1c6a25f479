from __future__ import annotations

import asyncio
import datetime as dt
import errno
import io
import itertools
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from standins.gcs import BUCKET, Gcs

from ccrun.backends.gcp.blobs import open_blobs
from ccrun.backends.local.blobs import COPY_BYTES, LOCK_FILES, DirectoryBlobs
from ccrun.blobs import MAX_NAME_BYTES, Blob, Blobs, check_name
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, FileUnreadable, StorageError

#: Bytes of a file that go to a bucket at once: the least that Cloud Storage takes.
PART = 256 * 1024
#: What takes several of them, and of those that are copied at once in a folder.
LARGE = 2 * COPY_BYTES + 1
#: Examples of one test must not see each other's objects.
fresh = itertools.count()


# --- what every adapter owes -----------------------------------------------------------------------------------------


@pytest.fixture(params=["directory", "bucket"])
async def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Blobs]:
    """Each adapter in turn, empty."""
    match request.param:
        case "directory":
            yield DirectoryBlobs(tmp_path / "blobs")
        case "bucket":
            # Two names a page, so that most listings take several calls; and small parts.
            async with Gcs() as gcs, open_blobs(BUCKET, emulator=gcs.url, page_names=2, part_bytes=PART) as bucket:
                yield bucket


async def names(blobs: Blobs, prefix: str, after: str = "", before: str | None = None, limit: int = 1000) -> list[str]:
    """Return the names of a listing."""
    return [entry.name for entry in await blobs.entries(prefix, after=after, before=before, limit=limit)]


async def test_object_is_read_as_it_was_created(blobs: Blobs) -> None:
    """What was created is read back, byte for byte, at the generation that `create` told."""
    content = bytes(range(256)) + "ünïcödé\n".encode()
    generation = await blobs.create("folder/name", content)
    assert Blob(content, generation) == await blobs.read("folder/name")


async def test_pieces_become_one_object(blobs: Blobs) -> None:
    """Content may come in pieces, which are put together in their order."""
    await blobs.create("pieces", [b"one", bytearray(b" and "), b"", b"two"])
    assert (await blobs.read("pieces")).content == b"one and two"


async def test_empty_object_is_an_object(blobs: Blobs) -> None:
    """An object without content is there, and listed."""
    generation = await blobs.create("empty", b"")
    assert Blob(b"", generation) == await blobs.read("empty")
    assert await names(blobs, "empty") == ["empty"]


@pytest.mark.parametrize("name", ["missing", "missing/too", "present/below", "folder"])
async def test_missing_object_cannot_be_read(blobs: Blobs, name: str) -> None:
    """Reading what is not there says so, also where a part of the name is an object or a folder."""
    await blobs.create("present", b"")
    await blobs.create("folder/name", b"")
    with pytest.raises(BlobNotFound):
        await blobs.read(name)


async def test_taken_name_is_not_created_again(blobs: Blobs) -> None:
    """Creating a name that is taken fails and changes nothing."""
    generation = await blobs.create("name", b"first")
    with pytest.raises(BlobExists):
        await blobs.create("name", b"second")
    assert Blob(b"first", generation) == await blobs.read("name")


async def test_one_of_many_creators_wins(blobs: Blobs) -> None:
    """Of twenty who create one name at once, in a folder that is not there yet, one succeeds and all others are told."""
    outcomes = await asyncio.gather(
        *(blobs.create("new/folder/name", b"%d" % number) for number in range(20)), return_exceptions=True
    )
    winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, int)]
    losers = [outcome for outcome in outcomes if isinstance(outcome, BlobExists)]
    assert (len(winners), len(losers)) == (1, 19)
    assert Blob(b"%d" % winners[0], outcomes[winners[0]]) == await blobs.read("new/folder/name")  # type: ignore[arg-type]


async def test_replacing_makes_a_new_generation(blobs: Blobs) -> None:
    """A replacement is read back at the generation that it told, which is another one each time."""
    generations = [await blobs.create("name", b"0")]
    for number in range(1, 10):
        generations.append(await blobs.replace("name", b"%d" % number, generation=generations[-1]))
    assert Blob(b"9", generations[-1]) == await blobs.read("name")
    assert sorted(set(generations)) == generations


async def test_old_generation_is_not_replaced(blobs: Blobs) -> None:
    """Who read before somebody else wrote cannot write over that."""
    first = await blobs.create("name", b"first")
    second = await blobs.replace("name", b"second", generation=first)
    with pytest.raises(BlobChanged):
        await blobs.replace("name", b"third", generation=first)
    assert Blob(b"second", second) == await blobs.read("name")


async def test_missing_object_is_not_replaced(blobs: Blobs) -> None:
    """Replacing what was never there, or is there no more, makes nothing."""
    with pytest.raises(BlobChanged):
        await blobs.replace("never/there", b"", generation=1)
    generation = await blobs.create("name", b"")
    await blobs.delete("name")
    with pytest.raises(BlobChanged):
        await blobs.replace("name", b"", generation=generation)
    assert await names(blobs, "") == []


async def test_one_of_many_replacers_wins(blobs: Blobs) -> None:
    """Of twenty who replace one generation at once, one succeeds and all others are told."""
    generation = await blobs.create("name", b"")
    outcomes = await asyncio.gather(
        *(blobs.replace("name", b"%d" % number, generation=generation) for number in range(20)),
        return_exceptions=True,
    )
    winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, int)]
    losers = [outcome for outcome in outcomes if isinstance(outcome, BlobChanged)]
    assert (len(winners), len(losers)) == (1, 19)
    assert (await blobs.read("name")).content == b"%d" % winners[0]


async def test_deleted_object_is_gone(blobs: Blobs) -> None:
    """What was deleted is neither read nor listed, and its name is free again."""
    await blobs.create("folder/name", b"old")
    await blobs.delete("folder/name")
    with pytest.raises(BlobNotFound):
        await blobs.read("folder/name")
    assert await names(blobs, "") == []
    await blobs.create("folder/name", b"new")
    assert (await blobs.read("folder/name")).content == b"new"


async def test_deleting_what_is_not_there_is_no_error(blobs: Blobs) -> None:
    """A name that is not there can be deleted, and deleted twice."""
    await blobs.create("name", b"")
    for name in ("name", "name", "other", "no/such/folder", "name/below"):
        await blobs.delete(name)


async def test_replacement_never_brings_back_what_is_deleted(blobs: Blobs) -> None:
    """Whichever of a replacement and a deletion at once comes first, the object is gone in the end."""
    for number in range(30):
        generation = await blobs.create(f"name-{number}", b"")
        await asyncio.gather(
            blobs.replace(f"name-{number}", b"new", generation=generation),
            blobs.delete(f"name-{number}"),
            return_exceptions=True,
        )
    assert await names(blobs, "") == []


async def test_reader_never_sees_a_part_of_a_write(blobs: Blobs) -> None:
    """Whoever reads while objects are written sees the whole of an old or of a new one."""
    size = 256 * 1024

    async def write() -> None:
        generation = await blobs.create("name", b"0" * size)
        for number in range(1, 10):
            generation = await blobs.replace("name", b"%d" % number * size, generation=generation)

    writing = asyncio.create_task(write())
    seen = set()
    while not writing.done():
        try:
            content = (await blobs.read("name")).content
        except BlobNotFound:
            continue
        seen.add((len(content), len(set(content))))
    await writing
    assert seen == {(size, 1)}


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 2 * PART, LARGE])
async def test_object_is_made_of_a_file(blobs: Blobs, size: int) -> None:
    """What a file holds from its present place on becomes an object, byte for byte, at the generation that is told."""
    content = random.Random(size).randbytes(size)
    file = io.BytesIO(b"before" + content)
    file.seek(len(b"before"))
    generation = await blobs.create_from("folder/name", file, size=size)
    assert Blob(content, generation) == await blobs.read("folder/name")


@pytest.mark.parametrize("size", [1, LARGE])
async def test_file_takes_no_name_that_is_taken(blobs: Blobs, size: int) -> None:
    """An object of a file is not made where there is one, and that one stays as it is."""
    generation = await blobs.create("name", b"first")
    with pytest.raises(BlobExists):
        await blobs.create_from("name", io.BytesIO(bytes(size)), size=size)
    assert Blob(b"first", generation) == await blobs.read("name")


@pytest.mark.parametrize("size", [1, LARGE])
async def test_one_of_many_files_becomes_the_object(blobs: Blobs, size: int) -> None:
    """Of five who make one object of their files at once, one succeeds and all others are told."""
    files = [b"%d" % number * size for number in range(5)]
    outcomes = await asyncio.gather(
        *(blobs.create_from("new/name", io.BytesIO(file), size=size) for file in files), return_exceptions=True
    )
    winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, int)]
    assert (1, 4) == (len(winners), sum(isinstance(outcome, BlobExists) for outcome in outcomes))
    assert files[winners[0]] == (await blobs.read("new/name")).content


@pytest.mark.parametrize("size", [1, LARGE])
@pytest.mark.parametrize("difference", [-1, 1])
async def test_file_of_another_size_becomes_nothing(blobs: Blobs, size: int, difference: int) -> None:
    """A file that holds less or more than was told makes no object: nobody takes a part of it for the whole."""
    with pytest.raises(FileUnreadable, match=r"The file changed while it was read\."):
        await blobs.create_from("name", io.BytesIO(bytes(size + difference)), size=size)
    assert await names(blobs, "") == []


class Broken(io.BytesIO):
    """A file on a disk that fails after a while."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= PART:
            raise OSError(errno.EIO, "Input/output error", "/a/secret/path")
        return super().read(size)


async def test_file_that_cannot_be_read_is_not_the_fault_of_the_storage(blobs: Blobs) -> None:
    """When reading fails nothing is made, and the sentence speaks of the file without its path."""
    with pytest.raises(FileUnreadable) as caught:
        await blobs.create_from("name", Broken(bytes(LARGE)), size=LARGE)
    assert "The file cannot be read: Input/output error." == caught.value.message
    assert await names(blobs, "") == []


class Slow(io.BytesIO):
    """A file that is read slowly; `reading` and `is_read` tell whether somebody has begun, and is at it."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reading = threading.Event()
        self.is_read = False

    def read(self, size: int | None = -1, /) -> bytes:
        self.is_read = True
        self.reading.set()
        time.sleep(0.05)
        content = super().read(size)
        self.is_read = False
        return content


async def test_cancelled_upload_lets_go_of_the_file(blobs: Blobs) -> None:
    """Who is cancelled gets the file back unused, soon, and there is no object."""
    file = Slow(bytes(100 * PART))
    creating = asyncio.create_task(blobs.create_from("name", file, size=100 * PART))
    assert await asyncio.to_thread(file.reading.wait, 10)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert not file.is_read
    assert 20 * PART > file.tell()
    assert await names(blobs, "") == []


#: Few letters, so that names often begin alike, and some that sort around the slash and beyond ASCII.
segments = st.text("ab-.0é\U0001f600\uffee", min_size=1, max_size=3).filter(lambda text: not text.startswith("."))
object_names = st.lists(segments, min_size=1, max_size=3).map("/".join)


def keep_leaves(found: set[str]) -> list[str]:
    """Drop names that are also a folder of another one: a file system cannot hold both."""
    return sorted(name for name in found if not any(other.startswith(name + "/") for other in found))


@given(
    found=st.sets(object_names, max_size=12).map(keep_leaves),
    cut=st.tuples(st.integers(0, 20), st.integers(0, 6)),
    after=st.one_of(st.just(""), object_names),
    before=st.one_of(st.none(), object_names),
    limit=st.integers(1, 14),
)
@example(found=["a-b", "a.b", "a/b", "a0b"], cut=(0, 0), after="a-b", before="a0b", limit=9)
@example(found=["\uffee", "\U0001f600"], cut=(0, 0), after="", before=None, limit=9)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_listing_is_a_range_of_all_names(
    blobs: Blobs, found: list[str], cut: tuple[int, int], after: str, before: str | None, limit: int
) -> None:
    """A listing is the first names with the prefix, above `after` and below `before`, in the order of their UTF-8 bytes."""
    place = f"example-{next(fresh)}/"
    for name in found:
        await blobs.create(place + name, b"")
    prefix = found[cut[0] % len(found)][: cut[1]] if found else "a"
    expected = [
        place + name
        for name in sorted(found, key=str.encode)
        if name.startswith(prefix)
        and name.encode() > after.encode()
        and (before is None or name.encode() < before.encode())
    ]
    listed = await names(
        blobs, place + prefix, after=place + after, before=None if before is None else place + before, limit=limit
    )
    assert expected[:limit] == listed


async def test_listing_tells_generation_and_time(blobs: Blobs) -> None:
    """An entry has the generation that a read would give, and the time of the last write."""
    began = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    generation = await blobs.create("name", b"")
    generation = await blobs.replace("name", b"", generation=generation)
    (entry,) = await blobs.entries("name", limit=1)
    assert ("name", generation) == (entry.name, entry.generation)
    assert began <= entry.updated <= dt.datetime.now(dt.UTC)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/absolute",
        "folder/",
        "double//slash",
        ".",
        "..",
        "../outside",
        "folder/../../outside",
        "folder/./name",
        ".scratch/name",
        ".locks/0",
        "back\\slash",
        "line\nbreak",
        "nul\x00",
        "del\x7f",
        "lone \ud800",
        "x" * (MAX_NAME_BYTES + 1),
        "é" * (MAX_NAME_BYTES // 2 + 1),
    ],
)
async def test_name_that_could_lead_elsewhere_is_refused(blobs: Blobs, name: str) -> None:
    """No call takes a name that leads out of the root, into what an adapter keeps there, or that a bucket would not take."""
    for call in (
        blobs.read(name),
        blobs.create(name, b""),
        blobs.create_from(name, io.BytesIO(), size=0),
        blobs.replace(name, b"", generation=1),
        blobs.delete(name),
    ):
        with pytest.raises(ValueError, match=r"not an object name|surrogates not allowed"):
            await call


@given(st.text(max_size=40))
@example("a/..")
@example("a/.../b")
def test_checked_name_stays_below_the_root(name: str) -> None:
    """Whatever name is let through is a path below any folder that it is put under."""
    try:
        check_name(name)
    except ValueError:
        return
    path = os.path.normpath(f"/base/{name}")
    assert f"/base/{name}" == path


async def test_working_storage_passes_its_check(blobs: Blobs) -> None:
    """A check of a storage that works returns, and leaves nothing that a listing shows."""
    await blobs.check()
    assert await names(blobs, "") == []


# --- the folder ------------------------------------------------------------------------------------------------------


async def test_listing_never_leaves_the_root(tmp_path: Path) -> None:
    """A listing under a prefix that leads out of the root, or into what ccrun keeps there, is refused."""
    (tmp_path / "outside").write_bytes(b"")
    blobs = DirectoryBlobs(tmp_path / "root")
    await blobs.create("name", b"")
    for prefix in ("../", "name/../../", ".scratch/", "a//"):
        with pytest.raises(ValueError, match="not an object name"):
            await blobs.entries(prefix, limit=10)


async def test_listing_passes_by_what_ccrun_keeps_beside(tmp_path: Path) -> None:
    """Files and folders whose names begin with a dot in the root are nobody's objects."""
    blobs = DirectoryBlobs(tmp_path)
    generation = await blobs.create("name", b"")
    await blobs.replace("name", b"", generation=generation)
    (tmp_path / ".keys").mkdir()
    (tmp_path / ".keys" / "sealing.key").write_bytes(b"")
    assert await names(blobs, "") == ["name"]


async def test_listing_does_not_follow_links(tmp_path: Path) -> None:
    """A link to a folder elsewhere is not entered."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"")
    blobs = DirectoryBlobs(tmp_path / "root")
    await blobs.create("folder/name", b"")
    (tmp_path / "root" / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    assert "folder/link/file" not in await names(blobs, "folder/")


async def test_other_users_cannot_look_in(tmp_path: Path) -> None:
    """Whatever the umask, the root and what is in it are open to their owner alone."""
    blobs = DirectoryBlobs(tmp_path / "new" / "root")
    before = os.umask(0)
    try:
        await blobs.create("folder/name", b"")
    finally:
        os.umask(before)
    root = tmp_path / "new" / "root"
    assert tuple(stat.S_IMODE(path.stat().st_mode) for path in (root, root / "folder" / "name")) == (0o700, 0o600)


async def test_generation_grows_though_the_clock_goes_back(tmp_path: Path) -> None:
    """An object written by a clock that was ahead still gets a new generation with each write."""
    blobs = DirectoryBlobs(tmp_path)
    await blobs.create("name", b"")
    ahead = (await blobs.read("name")).generation + 3600 * 10**9
    os.utime(tmp_path / "name", ns=(ahead, ahead))
    assert await blobs.replace("name", b"", generation=ahead) > ahead


async def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    """What a write that lost made on its way is removed."""
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


async def test_full_disk_is_told_and_left_clean(tmp_path: Path) -> None:
    """A file for which there is no room is a `StorageError` that says why, and what was written of it is removed."""
    with run_python(FILL_THE_DISK, tmp_path) as process:
        output, _ = await asyncio.to_thread(process.communicate, None, 30)
    assert b"The storage directory cannot be written: File too large.\n" == output
    assert [] == [path for path in tmp_path.rglob("*") if path.is_file()]


async def test_hole_stays_a_hole(tmp_path: Path) -> None:
    """A file that is large only by its size takes no room as an object, and reads the same; also where a hole is its end."""
    (tmp_path / "file").write_bytes(b"begin")
    size = 50 * COPY_BYTES + 1
    os.truncate(tmp_path / "file", size)
    with (tmp_path / "file").open("rb") as file:
        await DirectoryBlobs(tmp_path / "root").create_from("name", file, size=size)
    status = (tmp_path / "root" / "name").stat()
    assert size == status.st_size
    assert 5 * COPY_BYTES > status.st_blocks * 512
    assert b"begin" + bytes(size - 5) == (tmp_path / "root" / "name").read_bytes()


async def test_broken_folder_is_a_storage_error_without_its_path(tmp_path: Path) -> None:
    """Where the file system refuses, each call raises a `StorageError` that names no local path."""
    (tmp_path / "root").write_bytes(b"a file where the folder should be")
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


async def test_address_leads_to_the_object(tmp_path: Path) -> None:
    """The URL of an object, or of a folder with its slash, is a file URL whatever letters the root has."""
    blobs = DirectoryBlobs(tmp_path / "a b#c")
    assert (tmp_path / "a b#c" / "folder" / "name").as_uri() == blobs.url("folder/name")
    assert (tmp_path / "a b#c" / "folder").as_uri() + "/" == blobs.url("folder/")


def run_python(code: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
    """Start another process that uses the same folder."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


COUNT_UP = """
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


async def test_no_swap_is_lost_between_processes(tmp_path: Path) -> None:
    """Three processes that count up one object by compare-and-swap lose no step."""
    blobs = DirectoryBlobs(tmp_path)
    await blobs.create("count", b"0")
    processes = [run_python(COUNT_UP, tmp_path) for _ in range(3)]
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
print("held", flush=True)
sys.stdin.readline()
"""


async def test_lock_dies_with_its_holder(tmp_path: Path) -> None:
    """A process that is killed in the middle of a swap holds up nobody; until then, others wait."""
    blobs = DirectoryBlobs(tmp_path)
    generation = await blobs.create("name", b"")
    generation = await blobs.replace("name", b"", generation=generation)
    with run_python(HOLD_LOCKS, tmp_path, str(LOCK_FILES)) as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"held\n"
        replacing = asyncio.create_task(blobs.replace("name", b"new", generation=generation))
        done, _ = await asyncio.wait([replacing], timeout=0.05)
        assert done == set()
        process.send_signal(signal.SIGKILL)
        await asyncio.wait_for(replacing, 5)
    assert (await blobs.read("name")).content == b"new"


WRITE_FOR_EVER = """
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


async def test_killed_writer_leaves_no_part_of_an_object(tmp_path: Path) -> None:
    """Of a process that is killed while it writes, every object that is there is whole, and none that it told of is missing."""
    with run_python(WRITE_FOR_EVER, tmp_path) as process:
        assert process.stdout is not None
        for _ in range(5):
            await asyncio.to_thread(process.stdout.readline)
        process.kill()
        told = 5 + len(process.stdout.readlines())
    blobs = DirectoryBlobs(tmp_path)
    entries = await blobs.entries("objects/", limit=1000)
    assert len(entries) in (told, told + 1)
    assert {300_000} == {len((await blobs.read(entry.name)).content) for entry in entries}

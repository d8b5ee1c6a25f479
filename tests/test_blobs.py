"""What every adapter for object storage must do."""

from __future__ import annotations

import asyncio
import datetime as dt
import errno
import io
import itertools
import os
import random
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from helpers.blobs import list_names
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from standins.gcs import BUCKET, Gcs

from ccrun.backends.gcp.blobs import open_blobs
from ccrun.backends.local.blobs import COPY_BYTES, DirectoryBlobs
from ccrun.blobs import MAX_NAME_BYTES, Blob, Blobs, check_name
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, FileUnreadable

#: The size of the parts of an upload to Cloud Storage: the smallest that it accepts.
PART_BYTES = 256 * 1024
#: A size that needs several parts on both backends.
LARGE_BYTES = 2 * COPY_BYTES + 1
#: Numbers the examples of a property test, which share one storage.
example_numbers = itertools.count()


@pytest.fixture(params=["directory", "bucket"])
async def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Blobs]:
    """Return an empty storage of each adapter."""
    match request.param:
        case "directory":
            yield DirectoryBlobs(tmp_path / "blobs")
        case "bucket":
            # With two names in a page, most listings need several calls.
            async with (
                Gcs() as gcs,
                open_blobs(BUCKET, emulator=gcs.url, page_names=2, part_bytes=PART_BYTES) as bucket,
            ):
                yield bucket


async def test_created_object_is_read_back(blobs: Blobs) -> None:
    """`read` returns the created content and the generation that `create` returned."""
    content = bytes(range(256)) + "ünïcödé\n".encode()
    generation = await blobs.create("folder/name", content)
    assert Blob(content, generation) == await blobs.read("folder/name")


async def test_content_in_parts_is_joined(blobs: Blobs) -> None:
    """`create` joins content that is given in several parts."""
    await blobs.create("parts", [b"one", bytearray(b" and "), b"", b"two"])
    assert (await blobs.read("parts")).content == b"one and two"


async def test_empty_object_exists(blobs: Blobs) -> None:
    """An object without content can be read and is listed."""
    generation = await blobs.create("empty", b"")
    assert Blob(b"", generation) == await blobs.read("empty")
    assert await list_names(blobs, "empty") == ["empty"]


@pytest.mark.parametrize("name", ["missing", "missing/too", "present/below", "folder"])
async def test_missing_object_cannot_be_read(blobs: Blobs, name: str) -> None:
    """Reading a missing object raises `BlobNotFound`, also if a part of its name is an object or a directory."""
    await blobs.create("present", b"")
    await blobs.create("folder/name", b"")
    with pytest.raises(BlobNotFound):
        await blobs.read(name)


async def test_existing_object_cannot_be_created(blobs: Blobs) -> None:
    """Creating an object under an existing name fails and changes nothing."""
    generation = await blobs.create("name", b"first")
    with pytest.raises(BlobExists):
        await blobs.create("name", b"second")
    assert Blob(b"first", generation) == await blobs.read("name")


async def test_one_of_many_concurrent_creates_succeeds(blobs: Blobs) -> None:
    """Of twenty concurrent creates in a new directory, one succeeds and all others raise `BlobExists`."""
    outcomes = await asyncio.gather(
        *(blobs.create("new/folder/name", b"%d" % number) for number in range(20)), return_exceptions=True
    )
    winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, int)]
    losers = [outcome for outcome in outcomes if isinstance(outcome, BlobExists)]
    assert (len(winners), len(losers)) == (1, 19)
    assert Blob(b"%d" % winners[0], outcomes[winners[0]]) == await blobs.read("new/folder/name")  # type: ignore[arg-type]


async def test_replacement_has_a_new_generation(blobs: Blobs) -> None:
    """Each replacement has a higher generation, which `read` returns too."""
    generations = [await blobs.create("name", b"0")]
    for number in range(1, 10):
        generations.append(await blobs.replace("name", b"%d" % number, generation=generations[-1]))
    assert Blob(b"9", generations[-1]) == await blobs.read("name")
    assert sorted(set(generations)) == generations


async def test_old_generation_cannot_be_replaced(blobs: Blobs) -> None:
    """A replacement that is based on an old generation fails and changes nothing."""
    first = await blobs.create("name", b"first")
    second = await blobs.replace("name", b"second", generation=first)
    with pytest.raises(BlobChanged):
        await blobs.replace("name", b"third", generation=first)
    assert Blob(b"second", second) == await blobs.read("name")


async def test_missing_object_cannot_be_replaced(blobs: Blobs) -> None:
    """Replacing an object that never existed, or that was deleted, fails and creates nothing."""
    with pytest.raises(BlobChanged):
        await blobs.replace("never/there", b"", generation=1)
    generation = await blobs.create("name", b"")
    await blobs.delete("name")
    with pytest.raises(BlobChanged):
        await blobs.replace("name", b"", generation=generation)
    assert await list_names(blobs, "") == []


async def test_one_of_many_concurrent_replacements_succeeds(blobs: Blobs) -> None:
    """Of twenty concurrent replacements of one generation, one succeeds and all others raise `BlobChanged`."""
    generation = await blobs.create("name", b"")
    outcomes = await asyncio.gather(
        *(blobs.replace("name", b"%d" % number, generation=generation) for number in range(20)),
        return_exceptions=True,
    )
    winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, int)]
    losers = [outcome for outcome in outcomes if isinstance(outcome, BlobChanged)]
    assert (len(winners), len(losers)) == (1, 19)
    assert (await blobs.read("name")).content == b"%d" % winners[0]


async def test_deleted_object_does_not_exist(blobs: Blobs) -> None:
    """A deleted object is neither readable nor listed, and its name can be used again."""
    await blobs.create("folder/name", b"old")
    await blobs.delete("folder/name")
    with pytest.raises(BlobNotFound):
        await blobs.read("folder/name")
    assert await list_names(blobs, "") == []
    await blobs.create("folder/name", b"new")
    assert (await blobs.read("folder/name")).content == b"new"


async def test_deleting_a_missing_object_is_not_an_error(blobs: Blobs) -> None:
    """Deleting an object that does not exist, or deleting one twice, does nothing."""
    await blobs.create("name", b"")
    for name in ("name", "name", "other", "no/such/folder", "name/below"):
        await blobs.delete(name)


async def test_only_the_given_generation_is_deleted(blobs: Blobs) -> None:
    """With a generation, an object that has another one remains. A missing object is no error."""
    first = await blobs.create("name", b"first")
    second = await blobs.replace("name", b"second", generation=first)
    await blobs.delete("name", generation=first)
    assert Blob(b"second", second) == await blobs.read("name")
    for _ in range(2):
        await blobs.delete("name", generation=second)
    assert [] == await list_names(blobs, "")


async def test_replacement_never_restores_a_deleted_object(blobs: Blobs) -> None:
    """After a concurrent replacement and deletion the object does not exist, whichever came first."""
    for number in range(30):
        generation = await blobs.create(f"name-{number}", b"")
        await asyncio.gather(
            blobs.replace(f"name-{number}", b"new", generation=generation),
            blobs.delete(f"name-{number}"),
            return_exceptions=True,
        )
    assert await list_names(blobs, "") == []


async def test_reader_never_sees_a_partial_write(blobs: Blobs) -> None:
    """A read during writes returns the complete old or the complete new content."""
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


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, LARGE_BYTES])
async def test_object_is_created_from_a_file(blobs: Blobs, size: int) -> None:
    """`create_from` stores the content of a file from its current position to its end."""
    content = random.Random(size).randbytes(size)
    file = io.BytesIO(b"before" + content)
    file.seek(len(b"before"))
    generation = await blobs.create_from("folder/name", file, size=size)
    assert Blob(content, generation) == await blobs.read("folder/name")


@pytest.mark.parametrize("size", [1, LARGE_BYTES])
async def test_existing_object_cannot_be_created_from_a_file(blobs: Blobs, size: int) -> None:
    """`create_from` with an existing name fails and changes nothing."""
    generation = await blobs.create("name", b"first")
    with pytest.raises(BlobExists):
        await blobs.create_from("name", io.BytesIO(bytes(size)), size=size)
    assert Blob(b"first", generation) == await blobs.read("name")


@pytest.mark.parametrize("size", [1, LARGE_BYTES])
async def test_one_of_many_concurrent_creates_from_files_succeeds(blobs: Blobs, size: int) -> None:
    """Of five concurrent creates of one object from files, one succeeds and all others raise `BlobExists`."""
    files = [b"%d" % number * size for number in range(5)]
    outcomes = await asyncio.gather(
        *(blobs.create_from("new/name", io.BytesIO(file), size=size) for file in files), return_exceptions=True
    )
    winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, int)]
    assert (1, 4) == (len(winners), sum(isinstance(outcome, BlobExists) for outcome in outcomes))
    assert files[winners[0]] == (await blobs.read("new/name")).content


@pytest.mark.parametrize("size", [1, LARGE_BYTES])
@pytest.mark.parametrize("difference", [-1, 1])
async def test_file_of_another_size_creates_no_object(blobs: Blobs, size: int, difference: int) -> None:
    """If the file is shorter or longer than the given size, no object is created."""
    with pytest.raises(FileUnreadable, match=r"The file changed while it was read\."):
        await blobs.create_from("name", io.BytesIO(bytes(size + difference)), size=size)
    assert await list_names(blobs, "") == []


class BrokenFile(io.BytesIO):
    """A file that cannot be read after the first part."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= PART_BYTES:
            raise OSError(errno.EIO, "Input/output error", "/a/secret/path")
        return super().read(size)


async def test_unreadable_file_is_not_a_storage_error(blobs: Blobs) -> None:
    """If the file cannot be read, no object is created, and the error is about the file but does not contain its path."""
    with pytest.raises(FileUnreadable) as caught:
        await blobs.create_from("name", BrokenFile(bytes(LARGE_BYTES)), size=LARGE_BYTES)
    assert "The file cannot be read: Input/output error." == caught.value.message
    assert await list_names(blobs, "") == []


class SlowFile(io.BytesIO):
    """A file that is slow to read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        #: Set by the first read.
        self.read_started = threading.Event()
        #: Whether a read is in progress.
        self.is_being_read = False

    def read(self, size: int | None = -1, /) -> bytes:
        self.is_being_read = True
        self.read_started.set()
        time.sleep(0.05)
        content = super().read(size)
        self.is_being_read = False
        return content


async def test_cancelled_create_stops_using_the_file(blobs: Blobs) -> None:
    """After a cancelled `create_from` the file is no longer read, and no object exists."""
    file = SlowFile(bytes(100 * PART_BYTES))
    creating = asyncio.create_task(blobs.create_from("name", file, size=100 * PART_BYTES))
    assert await asyncio.to_thread(file.read_started.wait, 10)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert not file.is_being_read
    assert 20 * PART_BYTES > file.tell()
    assert await list_names(blobs, "") == []


#: Few characters, so that names often share a prefix; some sort next to the slash, some are not ASCII.
segments = st.text("ab-.0é\U0001f600\uffee", min_size=1, max_size=3).filter(lambda text: not text.startswith("."))
object_names = st.lists(segments, min_size=1, max_size=3).map("/".join)


def without_directories(names: set[str]) -> list[str]:
    """Drop names that are directories of other names, because a file system cannot contain both."""
    return sorted(name for name in names if not any(other.startswith(name + "/") for other in names))


@given(
    names=st.sets(object_names, max_size=12).map(without_directories),
    cut=st.tuples(st.integers(0, 20), st.integers(0, 6)),
    after=st.one_of(st.just(""), object_names),
    before=st.one_of(st.none(), object_names),
    limit=st.integers(1, 14),
)
@example(names=["a-b", "a.b", "a/b", "a0b"], cut=(0, 0), after="a-b", before="a0b", limit=9)
@example(names=["\uffee", "\U0001f600"], cut=(0, 0), after="", before=None, limit=9)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_listing_is_a_range_of_the_sorted_names(
    blobs: Blobs, names: list[str], cut: tuple[int, int], after: str, before: str | None, limit: int
) -> None:
    """A listing contains the first names with the prefix between `after` and `before`, in the order of their UTF-8 bytes."""
    root = f"example-{next(example_numbers)}/"
    for name in names:
        await blobs.create(root + name, b"")
    prefix = names[cut[0] % len(names)][: cut[1]] if names else "a"
    expected = [
        root + name
        for name in sorted(names, key=str.encode)
        if name.startswith(prefix)
        and name.encode() > after.encode()
        and (before is None or name.encode() < before.encode())
    ]
    listed = await list_names(
        blobs, root + prefix, after=root + after, before=None if before is None else root + before, limit=limit
    )
    assert expected[:limit] == listed


async def test_listing_has_generation_and_time(blobs: Blobs) -> None:
    """An entry of a listing has the object's generation and the time of the last write."""
    started = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    generation = await blobs.create("name", b"")
    generation = await blobs.replace("name", b"", generation=generation)
    (entry,) = await blobs.entries("name", limit=1)
    assert ("name", generation) == (entry.name, entry.generation)
    assert started <= entry.updated <= dt.datetime.now(dt.UTC)


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
async def test_unsafe_name_is_rejected(blobs: Blobs, name: str) -> None:
    """No operation accepts a name outside the root, of an adapter's internal file, or that Cloud Storage does not allow."""
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
def test_checked_name_is_a_path_below_the_root(name: str) -> None:
    """Every name that `check_name` accepts is a normalized path below the directory that it is joined to."""
    try:
        check_name(name)
    except ValueError:
        return
    path = os.path.normpath(f"/base/{name}")
    assert f"/base/{name}" == path


async def test_check_of_working_storage_passes(blobs: Blobs) -> None:
    """`check` of a working storage returns and creates no object."""
    await blobs.check()
    assert await list_names(blobs, "") == []

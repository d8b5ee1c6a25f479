from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
from helpers.store import TASK, WatchedBlobs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.errors import (
    BlobExists,
    StorageError,
)
from ccrun.store import Store
from ccrun.task import TaskId
from ccrun.worker.log_writer import MAX_CHUNK_BYTES, MAX_QUEUED_BYTES, FlushPolicy, LogWriter

#: Examples of one test must not see each other's tasks.
fresh = itertools.count()


@pytest.fixture
def blobs(tmp_path: Path) -> WatchedBlobs:
    """Where the store of a test keeps its objects."""
    return WatchedBlobs(tmp_path / "blobs")


@pytest.fixture
def store(blobs: WatchedBlobs) -> Store:
    """The store of a test."""
    return Store(blobs)


class SlowBlobs(DirectoryBlobs):
    """A storage that takes a chunk when a test lets it, or not at all."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened = asyncio.Event()
        self.errors: list[type[StorageError]] = []
        self.refusals = 0.0

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        await self.opened.wait()
        if self.refusals:
            self.refusals -= 1
            raise StorageError
        written = await super().create(name, content)
        if self.errors:
            raise self.errors.pop()
        return written


#: Only the number of lines makes a chunk.
PATIENT = FlushPolicy(flush_lines=100, flush_seconds=3600, first_flush_seconds=3600)


async def chunks(store: Store, task_id: TaskId = TASK) -> list[bytes]:
    """Return the contents of the chunks of a log; check that they are numbered without a gap."""
    listing = await store.listing(task_id, first=1)
    assert list(range(1, len(listing.chunks) + 1)) == [chunk.number for chunk in listing.chunks]
    return [await store.read_chunk(chunk) for chunk in listing.chunks]


async def until_chunks(store: Store, count: int) -> None:
    """Wait until the log has so many chunks, within a bound."""
    async with asyncio.timeout(10):
        while len((await store.listing(TASK, first=1)).chunks) < count:
            await asyncio.sleep(0.002)


async def test_hundred_lines_make_a_chunk(store: Store) -> None:
    """A chunk is written when it has a hundred lines, and the rest when the log is closed."""
    lines = [b"line %d" % number for number in range(250)]
    async with LogWriter(store, TASK, PATIENT) as writer:
        for line in lines:
            await writer.write(line)
        await until_chunks(store, 2)
    assert [100, 100, 50] == [content.count(b"\n") for content in await chunks(store)]
    assert b"".join(line + b"\n" for line in lines) == b"".join(await chunks(store))


async def test_mebibyte_makes_a_chunk(store: Store) -> None:
    """A chunk is written when it has a MiB, however few lines that is."""
    async with LogWriter(store, TASK, PATIENT) as writer:
        for _ in range(24):
            await writer.write(b"x" * (MAX_CHUNK_BYTES // 4))
        await until_chunks(store, 6)
        await writer.write(b"more")
    assert [4, 4, 4, 4, 4, 4, 1] == [content.count(b"\n") for content in await chunks(store)]


async def test_age_makes_a_chunk_under_steady_output(store: Store) -> None:
    """Lines that keep coming do not put off the chunk of those that are waiting."""
    pace = attrs.evolve(PATIENT, flush_lines=10**9, flush_seconds=0.05, first_flush_seconds=0.05)
    async with LogWriter(store, TASK, pace) as writer:
        waiting = asyncio.create_task(until_chunks(store, 3))
        while not waiting.done():
            await writer.write(b"line")
            await asyncio.sleep(0.001)
        await waiting


async def test_first_chunk_comes_sooner(store: Store) -> None:
    """The first line is stored after the first chunk's own time, which is a tenth of a second unless told otherwise."""
    pace = attrs.evolve(PATIENT, first_flush_seconds=FlushPolicy().first_flush_seconds)
    began = asyncio.get_running_loop().time()
    async with LogWriter(store, TASK, pace) as writer:
        await writer.write(b"first")
        await until_chunks(store, 1)
        assert asyncio.get_running_loop().time() - began >= 0.1
        await writer.write(b"second")
    assert [b"first\n", b"second\n"] == await chunks(store)


async def test_line_after_a_pause_is_stored_in_time(store: Store) -> None:
    """The age counts from the first unwritten line, not from the last chunk: a line after a pause waits its time."""
    pace = attrs.evolve(PATIENT, flush_seconds=0.03, first_flush_seconds=0.03)
    async with LogWriter(store, TASK, pace) as writer:
        for number in range(1, 4):
            await writer.write(b"line")
            await until_chunks(store, number)


async def test_slow_storage_slows_the_writer_of_lines(tmp_path: Path) -> None:
    """While the storage takes nothing, so much waits in memory and no more; then nothing is missing."""
    blobs = SlowBlobs(tmp_path)
    store = Store(blobs)
    line = b"x" * (256 * 1024)
    written = 0

    async def write_all() -> None:
        nonlocal written
        for _ in range(40):
            await writer.write(line)
            written += len(line)

    async with LogWriter(store, TASK, PATIENT) as writer:
        writing = asyncio.create_task(write_all())
        async with asyncio.timeout(10):
            while written < MAX_QUEUED_BYTES:
                await asyncio.sleep(0)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert MAX_QUEUED_BYTES <= written <= MAX_QUEUED_BYTES + MAX_CHUNK_BYTES
        blobs.opened.set()
        await writing
    assert (line + b"\n") * 40 == b"".join(await chunks(store))


async def test_storage_that_comes_back_gets_everything(tmp_path: Path) -> None:
    """A chunk that the storage did not take is offered again, under the same number, and nothing is missing."""
    blobs = SlowBlobs(tmp_path)
    blobs.opened.set()
    blobs.refusals = 1
    store = Store(blobs)
    async with LogWriter(store, TASK, attrs.evolve(PATIENT, flush_lines=1)) as writer:
        await writer.write(b"one")
        await writer.write(b"two")
    assert [b"one\n", b"two\n"] == await chunks(store)


@pytest.mark.parametrize("fault", [StorageError, BlobExists])
async def test_chunk_whose_answer_was_lost_is_not_written_twice(tmp_path: Path, fault: type[StorageError]) -> None:
    """When the storage took a chunk and says that it did not, or that it is there already, the log goes on behind it."""
    blobs = SlowBlobs(tmp_path)
    blobs.opened.set()
    blobs.errors = [fault]
    store = Store(blobs)
    async with LogWriter(store, TASK, attrs.evolve(PATIENT, flush_lines=1)) as writer:
        await writer.write(b"one")
        await writer.write(b"two")
    assert [b"one\n", b"two\n"] == await chunks(store)


async def test_log_is_given_up_when_the_storage_stays_away(tmp_path: Path) -> None:
    """After the patience, a waiting writer of lines, each later one and the close are told."""
    blobs = SlowBlobs(tmp_path)
    blobs.refusals = math.inf
    writer = LogWriter(Store(blobs), TASK, attrs.evolve(PATIENT, flush_lines=1, retry_seconds=0.01))
    line = b"x" * MAX_QUEUED_BYTES

    async def write_for_ever() -> None:
        async with writer:
            while True:
                await writer.write(line)

    async with asyncio.timeout(10):
        writing = asyncio.create_task(write_for_ever())
        await asyncio.sleep(0)
        blobs.opened.set()
        with pytest.raises(StorageError):
            await writing
        with pytest.raises(StorageError):
            await writer.write(b"more")
        with pytest.raises(StorageError):
            await writer.close()


async def test_line_of_64_mebibytes_is_stored(store: Store) -> None:
    """One line may be larger than the whole queue; it waits alone and is stored whole."""
    line = bytearray(b"x") * (64 * 1024 * 1024)
    async with LogWriter(store, TASK, PATIENT) as writer:
        await writer.write(b"before")
        await writer.write(line)
        await writer.write(b"after")
    stored = b"".join(await chunks(store))
    # Compared outside of the assertion, which would spell out what differs.
    is_whole = stored == b"before\n" + line + b"\nafter\n"
    assert is_whole


async def test_closing_twice_is_harmless(store: Store) -> None:
    """A log that is closed can be closed again, and takes no more lines."""
    async with LogWriter(store, TASK, PATIENT) as writer:
        await writer.write(b"line")
        await writer.close()
        await writer.close()
        with pytest.raises(RuntimeError, match=r"The log is closed\."):
            await writer.write(b"late")
    assert [b"line\n"] == await chunks(store)


async def test_log_without_lines_has_no_chunk(store: Store) -> None:
    """A task that prints nothing leaves no chunk."""
    async with LogWriter(store, TASK, PATIENT):
        pass
    assert await chunks(store) == []


@given(
    sizes=st.lists(
        st.sampled_from([0, 1, 70, 5000, MAX_CHUNK_BYTES // 2, MAX_CHUNK_BYTES, MAX_CHUNK_BYTES + 1]), max_size=30
    ),
    flush_lines=st.sampled_from([1, 2, 7, 100]),
    flush_seconds=st.sampled_from([0.0, 0.0005, 3600]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_log_has_every_line_once_and_in_order(
    store: Store, sizes: list[int], flush_lines: int, flush_seconds: float
) -> None:
    """Whatever is written at whatever pace, the chunks, gapless, hold the lines and nothing else."""
    task_id = TaskId(f"example-{next(fresh)}")
    pace = FlushPolicy(flush_lines=flush_lines, flush_seconds=flush_seconds, first_flush_seconds=flush_seconds)
    lines = [b"%d" % number * (size // len(b"%d" % number)) for number, size in enumerate(sizes)]
    async with LogWriter(store, task_id, pace) as writer:
        for line in lines:
            await writer.write(line)
    stored = await chunks(store, task_id)
    assert b"".join(line + b"\n" for line in lines) == b"".join(stored)
    assert all(1 <= content.count(b"\n") <= flush_lines for content in stored)

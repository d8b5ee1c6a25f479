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
from ccrun.worker.log_writer import (
    MAX_CHUNK_BYTES,
    MAX_CHUNK_LINES,
    MAX_QUEUED_CHUNKS,
    FlushPolicy,
    LogIncomplete,
    LogWriter,
)

MAX_QUEUED_BYTES = MAX_QUEUED_CHUNKS * MAX_CHUNK_BYTES


#: Numbers the examples of a property test, which share one store.
example_numbers = itertools.count()


@pytest.fixture
def blobs(tmp_path: Path) -> WatchedBlobs:
    """Return an empty storage."""
    return WatchedBlobs(tmp_path / "blobs")


@pytest.fixture
def store(blobs: WatchedBlobs) -> Store:
    """Return a store in the storage."""
    return Store(blobs)


class SlowBlobs(DirectoryBlobs):
    """A storage in which creating an object blocks or fails as the test requires."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.called = asyncio.Event()
        self.unblocked = asyncio.Event()
        #: Calls that were not blocked.
        self.calls = 0
        self.errors: list[type[StorageError]] = []
        self.failures = 0.0

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        self.called.set()
        await self.unblocked.wait()
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise StorageError
        written = await super().create(name, content)
        if self.errors:
            raise self.errors.pop()
        return written


#: Chunks are written by their number of lines only, not by their age.
BY_LINES = FlushPolicy(flush_lines=100, flush_seconds=3600, first_flush_seconds=3600)


async def chunks(store: Store, task_id: TaskId = TASK) -> list[bytes]:
    """Return the contents of the chunks of a log, whose numbers must have no gaps."""
    listing = await store.logs.listing(task_id, first=1)
    assert list(range(1, len(listing.chunks) + 1)) == [chunk.number for chunk in listing.chunks]
    return [await store.logs.read_chunk(chunk) for chunk in listing.chunks]


async def until_chunks(store: Store, count: int) -> None:
    """Wait until the log has this number of chunks."""
    async with asyncio.timeout(10):
        while len((await store.logs.listing(TASK, first=1)).chunks) < count:
            await asyncio.sleep(0.002)


async def test_chunk_is_written_after_a_number_of_lines(store: Store) -> None:
    """A chunk is written when it has a hundred lines, and the remaining lines when the log is closed."""
    lines = [b"line %d" % number for number in range(250)]
    async with LogWriter(store, TASK, BY_LINES) as writer:
        for count in (100, 200, 250):
            for line in lines[count - 100 if count < 250 else 200 : count]:
                await writer.write(line)
            await until_chunks(store, count // 100)
    assert [100, 100, 50] == [content.count(b"\n") for content in await chunks(store)]
    assert b"".join(line + b"\n" for line in lines) == b"".join(await chunks(store))


async def test_chunk_is_written_at_its_maximum_size(store: Store) -> None:
    """A chunk is written when it has `MAX_CHUNK_BYTES`, even with few lines."""
    async with LogWriter(store, TASK, BY_LINES) as writer:
        for _ in range(24):
            await writer.write(b"x" * (MAX_CHUNK_BYTES // 4))
        await until_chunks(store, 6)
        await writer.write(b"more")
    assert [4, 4, 4, 4, 4, 4, 1] == [content.count(b"\n") for content in await chunks(store)]


async def test_steady_output_does_not_delay_a_chunk(store: Store) -> None:
    """A chunk is written after its maximum age, also while new lines arrive."""
    policy = attrs.evolve(BY_LINES, flush_lines=10**9, flush_seconds=0.05, first_flush_seconds=0.05)
    async with LogWriter(store, TASK, policy) as writer:
        waiting = asyncio.create_task(until_chunks(store, 3))
        while not waiting.done():
            await writer.write(b"line")
            await asyncio.sleep(0.001)
        await waiting


async def test_first_chunk_has_its_own_maximum_age(store: Store) -> None:
    """The first chunk is written after `first_flush_seconds`, by default 0.1 s."""
    policy = attrs.evolve(BY_LINES, first_flush_seconds=FlushPolicy().first_flush_seconds)
    started = asyncio.get_running_loop().time()
    async with LogWriter(store, TASK, policy) as writer:
        await writer.write(b"first")
        await until_chunks(store, 1)
        assert asyncio.get_running_loop().time() - started >= 0.1
        await writer.write(b"second")
    assert [b"first\n", b"second\n"] == await chunks(store)


async def test_age_counts_from_the_first_unwritten_line(store: Store) -> None:
    """A line after a pause is stored after the maximum age of a chunk."""
    policy = attrs.evolve(BY_LINES, flush_seconds=0.03, first_flush_seconds=0.03)
    async with LogWriter(store, TASK, policy) as writer:
        for number in range(1, 4):
            await writer.write(b"line")
            await until_chunks(store, number)


async def test_write_blocks_while_the_queue_is_full(tmp_path: Path) -> None:
    """While the storage blocks, `write` waits instead of exceeding `MAX_QUEUED_BYTES`; no line is lost."""
    blobs = SlowBlobs(tmp_path)
    store = Store(blobs)
    line = b"x" * (256 * 1024)
    written = 0

    async def write_all() -> None:
        nonlocal written
        for _ in range(40):
            await writer.write(line)
            written += len(line)

    async with LogWriter(store, TASK, BY_LINES) as writer:
        writing = asyncio.create_task(write_all())
        async with asyncio.timeout(10):
            while written < MAX_QUEUED_BYTES:
                await asyncio.sleep(0)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert MAX_QUEUED_BYTES <= written <= MAX_QUEUED_BYTES + MAX_CHUNK_BYTES
        blobs.unblocked.set()
        await writing
    assert (line + b"\n") * 40 == b"".join(await chunks(store))


async def until_writing(blobs: SlowBlobs) -> None:
    """Wait until a chunk is being written."""
    async with asyncio.timeout(10):
        await blobs.called.wait()


async def test_backlog_is_written_in_large_chunks(tmp_path: Path) -> None:
    """Lines that arrive while a chunk is being written are in the next chunk together, however many they are."""
    blobs = SlowBlobs(tmp_path)
    store = Store(blobs)
    lines = [b"line %d" % number for number in range(5000)]
    async with LogWriter(store, TASK, BY_LINES) as writer:
        for number, line in enumerate(lines):
            await writer.write(line)
            if number == BY_LINES.flush_lines:
                await until_writing(blobs)
        blobs.unblocked.set()
    assert [101, 4899] == [content.count(b"\n") for content in await chunks(store)]


@pytest.mark.parametrize(
    ("drain_seconds", "queued_chunks"), [(3600, MAX_QUEUED_CHUNKS), (0.0, 1)], ids=["fast storage", "slow storage"]
)
async def test_queue_of_short_lines_is_bounded(tmp_path: Path, drain_seconds: float, queued_chunks: int) -> None:
    """The queue holds as many lines as can be written in `drain_seconds`, and four chunks of 10,000 at most."""
    blobs = SlowBlobs(tmp_path)
    written = 0

    async def write_all() -> None:
        nonlocal written
        for _ in range(100 + (MAX_QUEUED_CHUNKS + 1) * MAX_CHUNK_LINES):
            await writer.write(b"{}")
            written += 1
            if written == BY_LINES.flush_lines:
                await until_writing(blobs)

    async with LogWriter(Store(blobs), TASK, attrs.evolve(BY_LINES, drain_seconds=drain_seconds)) as writer:
        writing = asyncio.create_task(write_all())
        expected = BY_LINES.flush_lines + queued_chunks * MAX_CHUNK_LINES
        async with asyncio.timeout(10):
            while written < expected:
                await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert expected == written
        blobs.unblocked.set()
        await writing
    assert sum(content.count(b"\n") for content in await chunks(Store(blobs))) == written


async def closing(writer: LogWriter, blobs: SlowBlobs) -> asyncio.Task[None]:
    """Write a line, wait until it is being written, write two more, and return the task that closes the log."""

    async def write() -> None:
        async with writer:
            await writer.write(b"one")
            await until_writing(blobs)
            await writer.write(b"two")
            await writer.write(b"three")
            written.set()

    written = asyncio.Event()
    task = asyncio.create_task(write())
    async with asyncio.timeout(10):
        await written.wait()
    return task


async def test_abandoned_log_says_how_many_lines_were_dropped(tmp_path: Path) -> None:
    """When a log is abandoned, its last line and the error say how many lines are missing."""
    blobs = SlowBlobs(tmp_path)
    policy = attrs.evolve(BY_LINES, flush_lines=1, abandon_seconds=0.01, drop_note_seconds=10)
    task = await closing(LogWriter(Store(blobs), TASK, policy), blobs)
    asyncio.get_running_loop().call_later(0.1, blobs.unblocked.set)
    task.cancel()
    with pytest.raises(LogIncomplete, match=r"^2 lines of the log could not be stored\."):
        await task
    note = b'{"type":"worker","step":"log","error":"2 lines of the log could not be stored in time."}\n'
    assert [b"one\n", note] == await chunks(Store(blobs))


async def test_nothing_is_written_after_a_log_is_abandoned(tmp_path: Path) -> None:
    """When the storage hangs, the error counts all lines, and no chunk appears later."""
    blobs = SlowBlobs(tmp_path)
    policy = attrs.evolve(BY_LINES, flush_lines=1, abandon_seconds=0.01, drop_note_seconds=0.01)
    task = await closing(LogWriter(Store(blobs), TASK, policy), blobs)
    task.cancel()
    with pytest.raises(LogIncomplete, match=r"^3 lines of the log could not be stored\."):
        await task
    assert blobs.calls == 0


async def test_abandoned_log_is_complete_if_the_storage_is_fast(tmp_path: Path) -> None:
    """When a log is abandoned and its lines can be written in time, none is missing."""
    blobs = SlowBlobs(tmp_path)
    task = await closing(
        LogWriter(Store(blobs), TASK, attrs.evolve(BY_LINES, flush_lines=1, abandon_seconds=10)), blobs
    )
    blobs.unblocked.set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [b"one\n", b"two\nthree\n"] == await chunks(Store(blobs))


async def test_failed_chunk_is_retried(tmp_path: Path) -> None:
    """A chunk that could not be stored is stored later with the same number, and no line is lost."""
    blobs = SlowBlobs(tmp_path)
    blobs.unblocked.set()
    blobs.failures = 1
    store = Store(blobs)
    async with LogWriter(store, TASK, attrs.evolve(BY_LINES, flush_lines=1)) as writer:
        await writer.write(b"one")
        await until_chunks(store, 1)
        await writer.write(b"two")
    assert [b"one\n", b"two\n"] == await chunks(store)


@pytest.mark.parametrize("fault", [StorageError, BlobExists])
async def test_chunk_is_not_repeated_after_a_lost_response(tmp_path: Path, fault: type[StorageError]) -> None:
    """When a chunk was stored although `create` raised, the next chunk follows and no line is repeated."""
    blobs = SlowBlobs(tmp_path)
    blobs.unblocked.set()
    blobs.errors = [fault]
    store = Store(blobs)
    async with LogWriter(store, TASK, attrs.evolve(BY_LINES, flush_lines=1)) as writer:
        await writer.write(b"one")
        await until_chunks(store, 1)
        await writer.write(b"two")
    assert [b"one\n", b"two\n"] == await chunks(store)


async def test_write_and_close_fail_when_retries_end(tmp_path: Path) -> None:
    """When the storage fails for longer than `retry_seconds`, waiting and later writes and `close` raise."""
    blobs = SlowBlobs(tmp_path)
    blobs.failures = math.inf
    writer = LogWriter(Store(blobs), TASK, attrs.evolve(BY_LINES, flush_lines=1, retry_seconds=0.01))
    line = b"x" * MAX_QUEUED_BYTES

    async def write_until_error() -> None:
        async with writer:
            while True:
                await writer.write(line)

    async with asyncio.timeout(10):
        writing = asyncio.create_task(write_until_error())
        await asyncio.sleep(0)
        blobs.unblocked.set()
        with pytest.raises(StorageError):
            await writing
        with pytest.raises(StorageError):
            await writer.write(b"more")
        with pytest.raises(StorageError):
            await writer.close()


async def test_line_longer_than_the_queue_is_stored(store: Store) -> None:
    """A line of 64 MiB, which is longer than the queue, is stored completely."""
    line = bytearray(b"x") * (64 * 1024 * 1024)
    async with LogWriter(store, TASK, BY_LINES) as writer:
        await writer.write(b"before")
        await writer.write(line)
        await writer.write(b"after")
    stored = b"".join(await chunks(store))
    # Compared outside the assertion, which would print the difference.
    is_complete = stored == b"before\n" + line + b"\nafter\n"
    assert is_complete


async def test_log_can_be_closed_twice(store: Store) -> None:
    """Closing a closed log does nothing, and writing to it raises `RuntimeError`."""
    async with LogWriter(store, TASK, BY_LINES) as writer:
        await writer.write(b"line")
        await writer.close()
        await writer.close()
        with pytest.raises(RuntimeError, match=r"The log is closed\."):
            await writer.write(b"late")
    assert [b"line\n"] == await chunks(store)


async def test_log_without_lines_has_no_chunk(store: Store) -> None:
    """A log without lines has no chunks."""
    async with LogWriter(store, TASK, BY_LINES):
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
    """The chunks contain exactly the lines in order, whatever their sizes and the flush policy are."""
    task_id = TaskId(f"example-{next(example_numbers)}")
    policy = FlushPolicy(flush_lines=flush_lines, flush_seconds=flush_seconds, first_flush_seconds=flush_seconds)
    lines = [b"%d" % number * (size // len(b"%d" % number)) for number, size in enumerate(sizes)]
    async with LogWriter(store, task_id, policy) as writer:
        for line in lines:
            await writer.write(line)
    stored = await chunks(store, task_id)
    assert b"".join(line + b"\n" for line in lines) == b"".join(stored)
    assert all(1 <= content.count(b"\n") <= MAX_CHUNK_LINES for content in stored)

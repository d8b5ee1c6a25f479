from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ccrun.api.feed import CaughtUp, Feed, FeedReader, Finished, Idle, Lines, PollPolicy
from ccrun.api.sse import Cursor, parse_cursor
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.blobs import Blob, BlobInfo
from ccrun.errors import StorageError, TaskNotFound
from ccrun.lifecycle import finish, start
from ccrun.names import chunk_name, record_name
from ccrun.store import LISTING_NAMES, Store
from ccrun.task import Outcome, Reason, Status, TaskId, TaskRecord, TaskType

TASK = TaskId("t-1")
NOW = dt.datetime(2025, 3, 4, 5, 6, 7, tzinfo=dt.UTC)
SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0)
QUICK = PollPolicy(min_seconds=0.001, max_seconds=0.01)
START = Cursor()
#: Numbers for task IDs, since the examples of one test share a store.
task_numbers = itertools.count()


class WatchedBlobs(DirectoryBlobs):
    """A directory that counts reads and can fail. `between` runs before and after each read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.between: Callable[[], Awaitable[None]] | None = None

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        await self._called("listing")
        entries = await super().entries(prefix, after=after, before=before, limit=limit)
        await self._run_between()
        return entries

    async def read(self, name: str) -> Blob:
        await self._called(name.rpartition("/")[2])
        blob = await super().read(name)
        await self._run_between()
        return blob

    async def _called(self, what: str) -> None:
        self.calls[what] += 1
        if self.errors[what] > 0:
            self.errors[what] -= 1
            raise StorageError
        await self._run_between()

    async def _run_between(self) -> None:
        if self.between is not None:
            await self.between()


@pytest.fixture
def blobs(tmp_path: Path) -> WatchedBlobs:
    """What the feed reads."""
    return WatchedBlobs(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The store that the worker writes to. Its operations are not counted."""
    return Store(DirectoryBlobs(tmp_path))


@pytest.fixture
async def feed(blobs: WatchedBlobs) -> AsyncIterator[Feed]:
    """The feed. After a test, it must have no pollers and no asyncio tasks."""
    before = asyncio.all_tasks()
    feed = Feed(Store(blobs), QUICK)
    yield feed
    assert {} == feed._pollers
    assert set() == asyncio.all_tasks() - before - {asyncio.current_task()}


def line_at(chunk: int, line: int) -> bytes:
    """Return the content of a line, which is its position."""
    return b'"%d:%d"' % (chunk, line)


async def start_task(store: Store, task_id: TaskId = TASK) -> None:
    """Store a running task."""
    record = TaskRecord(
        task_id=task_id, type=TaskType.ASYNC, status=Status.PENDING, created_at=NOW, logs_path=store.logs_path(task_id)
    )
    await store.add(start(record, at=NOW))


async def add_chunk(store: Store, chunk: int, lines: int = 2, task_id: TaskId = TASK) -> None:
    """Store a chunk whose lines contain their positions."""
    await store.add_chunk(task_id, chunk, [line_at(chunk, line) for line in range(1, lines + 1)], NOW)


async def finish_task(store: Store, task_id: TaskId = TASK) -> None:
    """Store the final record."""
    await store.update(task_id, lambda record: finish(record, SUCCESS, at=NOW))


def event_ids(events: bytes) -> list[str]:
    """Return the IDs of events. Check that each event has the line of its ID."""
    found = []
    for event in events.decode().split("\n\n")[:-1]:
        event_id, data = event.split("\n")
        assert f'data: "{event_id.removeprefix("id: ")}"' == data
        found.append(event_id.removeprefix("id: "))
    return found


def line_ids(*chunks: int, lines: int = 2) -> list[str]:
    """Return the IDs of all lines of these chunks."""
    return [f"{chunk}:{line}" for chunk in chunks for line in range(1, lines + 1)]


Seen = list[str | type[CaughtUp] | type[Idle] | Status]


async def read_items(reader: FeedReader, seen: Seen) -> None:
    """Append the items of a reader to a list, until the last one."""
    async for item in reader.items(idle_seconds=60):
        match item:
            case Lines():
                seen += event_ids(item.events)
            case Finished():
                seen.append(item.record.status)
            case CaughtUp() | Idle():
                seen.append(type(item))


async def follow(feed: Feed, after: Cursor | None = START, task_id: TaskId = TASK) -> Seen:
    """Read a task to its end. Return the IDs of its lines, and the other items."""
    seen: Seen = []
    async with asyncio.timeout(20), feed.follow(task_id, after=after) as reader:
        await read_items(reader, seen)
    return seen


@contextlib.asynccontextmanager
async def following(feed: Feed, after: Cursor | None = START) -> AsyncIterator[Seen]:
    """Read a task in the background. On exit, wait for its end."""
    seen: Seen = []
    async with asyncio.timeout(20), asyncio.TaskGroup() as group, feed.follow(TASK, after=after) as reader:
        reading = group.create_task(read_items(reader, seen))
        yield seen
        await reading


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def ids_in(seen: Seen) -> list[str]:
    """Return only the IDs."""
    return [item for item in seen if isinstance(item, str) and not isinstance(item, Status)]


# --- what a reader receives ------------------------------------------------------------------------------------------


async def test_finished_task_is_replayed(store: Store, feed: Feed) -> None:
    """A reader of a finished task gets all lines, `CaughtUp` and the end."""
    await start_task(store)
    for chunk in (1, 2, 3):
        await add_chunk(store, chunk)
    await finish_task(store)
    assert [*line_ids(1, 2, 3), CaughtUp, Status.COMPLETED] == await follow(feed)


async def test_finished_task_without_lines_is_replayed(store: Store, feed: Feed) -> None:
    """A reader of a task without a log gets `CaughtUp` and the end."""
    await start_task(store)
    await finish_task(store)
    assert [CaughtUp, Status.COMPLETED] == await follow(feed)


async def test_unknown_task_raises_an_error(feed: Feed) -> None:
    """Following a task that does not exist fails, for each of several concurrent readers."""
    outcomes = await asyncio.gather(*(follow(feed) for _ in range(5)), return_exceptions=True)
    assert [TaskNotFound] * 5 == [type(outcome) for outcome in outcomes]


async def test_running_task_is_followed(store: Store, feed: Feed) -> None:
    """A reader gets each chunk when it is stored, `CaughtUp` once, and the end last."""
    await start_task(store)
    await add_chunk(store, 1)
    async with following(feed) as seen:
        await until(lambda: CaughtUp in seen)
        for chunk in (2, 3):
            await add_chunk(store, chunk)
            await until(lambda chunk=chunk: line_ids(chunk)[-1] in seen)  # type: ignore[misc]
        await finish_task(store)
    assert [*line_ids(1), CaughtUp, *line_ids(2, 3), Status.COMPLETED] == seen


async def test_second_reader_gets_the_whole_log(store: Store, feed: Feed) -> None:
    """A reader that joins while another one reads gets the log from its start, and then the same new lines."""
    await start_task(store)
    await add_chunk(store, 1)
    async with following(feed) as early:
        await add_chunk(store, 2)
        await until(lambda: "2:2" in early)
        async with following(feed) as late:
            await add_chunk(store, 3)
            await finish_task(store)
    assert [*line_ids(1), CaughtUp, *line_ids(2, 3), Status.COMPLETED] == early
    assert [*line_ids(1, 2), CaughtUp, *line_ids(3), Status.COMPLETED] == late


async def test_reader_without_a_cursor_gets_only_new_lines(store: Store, feed: Feed) -> None:
    """With `after=None`, a reader gets no line that was stored before, and all later ones."""
    await start_task(store)
    await add_chunk(store, 1)
    async with following(feed, after=None) as seen:
        await add_chunk(store, 2)
        await finish_task(store)
    assert [CaughtUp, *line_ids(2), Status.COMPLETED] == seen


async def test_reader_resumes_after_any_line(store: Store, feed: Feed) -> None:
    """A reader that resumes after a line gets exactly the lines after it."""
    await start_task(store)
    for chunk in (1, 2, 3):
        await add_chunk(store, chunk, lines=3)
    await finish_task(store)
    everything = line_ids(1, 2, 3, lines=3)
    for position, line_id in enumerate(everything, 1):
        seen = await follow(feed, after=parse_cursor(line_id))
        assert [*everything[position:], CaughtUp, Status.COMPLETED] == seen


async def test_cursor_beyond_the_log_gets_the_end(store: Store, feed: Feed) -> None:
    """With a cursor behind the last line of a finished task, a reader gets only the end."""
    await start_task(store)
    await add_chunk(store, 1)
    await finish_task(store)
    assert [CaughtUp, Status.COMPLETED] == await follow(feed, after=Cursor(10**15 - 1, 10**15 - 1))
    assert [CaughtUp, Status.COMPLETED] == await follow(feed, after=Cursor(1, 10**15 - 1))


async def test_idle_reader_gets_idle_items(store: Store, feed: Feed) -> None:
    """While nothing is stored, a reader gets `Idle` repeatedly, so that it can send heartbeats."""
    await start_task(store)
    async with asyncio.timeout(10), feed.follow(TASK, after=START) as reader:
        items = reader.items(idle_seconds=0.005)
        kinds = [type(await anext(items)) for _ in range(3)]
        await finish_task(store)
        async for item in items:
            last = item
    assert ([CaughtUp, Idle, Idle], Finished) == (kinds, type(last))


async def test_record_is_updated_by_polls(store: Store, feed: Feed) -> None:
    """The record of a reader changes with the task."""
    await start_task(store)
    async with feed.follow(TASK, after=START) as reader:
        assert reader.record.status is Status.RUNNING
        await finish_task(store)
        await until(lambda: reader.record.status is Status.COMPLETED)


async def test_log_of_several_listings_is_replayed(store: Store, feed: Feed, tmp_path: Path) -> None:
    """A log with more chunks than one listing returns is replayed completely."""
    await start_task(store)
    count = 2 * LISTING_NAMES + 5
    for chunk in range(1, count + 1):
        (tmp_path / chunk_name(TASK, chunk, NOW)).write_bytes(line_at(chunk, 1) + b"\n")
    await finish_task(store)
    seen = await follow(feed)
    assert [*line_ids(*range(1, count + 1), lines=1), CaughtUp, Status.COMPLETED] == seen


# --- order -----------------------------------------------------------------------------------------------------------


async def test_chunk_waits_for_the_chunk_before_it(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """A chunk that is listed before the previous one is delivered after it."""
    await start_task(store)
    await add_chunk(store, 1)
    async with following(feed) as seen:
        await add_chunk(store, 3)
        polled = blobs.calls["listing"]
        await until(lambda: blobs.calls["listing"] > polled + 3)
        assert [*line_ids(1), CaughtUp] == seen
        await add_chunk(store, 2)
        await finish_task(store)
    assert [*line_ids(1), CaughtUp, *line_ids(2, 3), Status.COMPLETED] == seen


async def test_deleted_chunks_of_a_finished_task_are_skipped(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """When chunks of a finished task were deleted, readers get the others."""
    await start_task(store)
    for chunk in (1, 2, 3, 4):
        await add_chunk(store, chunk)
    await finish_task(store)
    await blobs.delete(chunk_name(TASK, 1, NOW))
    await blobs.delete(chunk_name(TASK, 3, NOW))
    assert [*line_ids(2, 4), CaughtUp, Status.COMPLETED] == await follow(feed)


@given(
    schedule=st.lists(st.integers(0, 3), max_size=14),
    chunks=st.integers(0, 4),
    readers=st.integers(1, 3),
    after=st.sampled_from([START, Cursor(1, 1), Cursor(2, 2)]),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_line_is_lost_in_any_order_of_polls_and_writes(
    store: Store, blobs: WatchedBlobs, schedule: list[int], chunks: int, readers: int, after: Cursor
) -> None:
    """In any order of the feed's reads and the worker's writes, each reader gets each line once."""
    task_id = TaskId(f"example-{next(task_numbers)}")
    await start_task(store, task_id)
    waits = iter(schedule)

    async def work() -> AsyncIterator[None]:
        for chunk in range(1, chunks + 1):
            await add_chunk(store, chunk, task_id=task_id)
            yield
        await finish_task(store, task_id)
        yield

    worker, gate = work(), asyncio.Lock()

    async def between() -> None:
        async with gate:
            # As many steps as the schedule has next; one when it is exhausted.
            for _ in range(next(waits, 1)):
                with contextlib.suppress(StopAsyncIteration):
                    await anext(worker)

    blobs.between = between
    feed = Feed(Store(blobs), PollPolicy(min_seconds=0, max_seconds=0))
    expected = [each for each in line_ids(*range(1, chunks + 1)) if (parse_cursor(each) or START) > after]
    for seen in await asyncio.gather(*(follow(feed, after, task_id) for _ in range(readers))):
        assert expected == ids_in(seen)
        assert (Status.COMPLETED, 1) == (seen[-1], seen.count(CaughtUp))
    blobs.between = None


# --- several readers -------------------------------------------------------------------------------------------------


async def test_readers_share_polls_and_reads(store: Store, blobs: WatchedBlobs) -> None:
    """A hundred readers need no more listings than one, and each chunk is read once."""
    await start_task(store)
    # A constant delay, which limits the polls of one poller on any machine. A hundred pollers would exceed the limit.
    delay = 0.01
    feed = Feed(Store(blobs), PollPolicy(min_seconds=delay, max_seconds=delay))
    seen: list[Seen] = [[] for _ in range(100)]
    async with asyncio.timeout(20), contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        followers = [await stack.enter_async_context(feed.follow(TASK, after=None)) for _ in seen]
        reading = [group.create_task(read_items(reader, mine)) for reader, mine in zip(followers, seen, strict=True)]
        for chunk in range(1, 11):
            await add_chunk(store, chunk)
            await until(lambda: all(line_ids(chunk)[-1] in mine for mine in seen))  # noqa: B023
        seconds = loop.time() - started_at
        listings = blobs.calls["listing"]
        for task in reading:
            task.cancel()
    assert [[CaughtUp, *line_ids(*range(1, 11))]] * 100 == seen
    assert {1} == {count for name, count in blobs.calls.items() if name.endswith(".jsonl")}
    # The first reader causes one more.
    assert listings <= seconds / delay + 1


async def test_slow_reader_delays_no_other(store: Store, blobs: WatchedBlobs, tmp_path: Path) -> None:
    """While one reader stalls, others read to the end and the cache stays within its limit; then the slow one gets everything."""
    await start_task(store)
    window = 2000
    feed = Feed(Store(blobs), QUICK, window_bytes=window)
    async with asyncio.timeout(20), feed.follow(TASK, after=START) as slow:
        await add_chunk(store, 1)
        items = slow.items(idle_seconds=60)
        assert type(await anext(items)) is CaughtUp
        for chunk in range(2, 101):
            (tmp_path / chunk_name(TASK, chunk, NOW)).write_bytes(line_at(chunk, 1) + b"\n" + line_at(chunk, 2) + b"\n")
        await finish_task(store)
        assert line_ids(*range(1, 101)) == ids_in(await follow(feed))
        cached = feed._pollers[TASK]._window
        assert 0 < sum(map(len, cached.values())) <= window
        rest = [item async for item in items]
    assert line_ids(*range(1, 101)) == [
        each for item in rest if isinstance(item, Lines) for each in event_ids(item.events)
    ]
    assert type(rest[-1]) is Finished


async def test_cancelled_readers_do_not_disturb_others(store: Store, feed: Feed) -> None:
    """When all but one of the readers that wait for a chunk are cancelled, the last one still gets it."""
    await start_task(store)
    async with following(feed) as seen:
        others = [asyncio.create_task(follow(feed)) for _ in range(5)]
        await until(lambda: feed.readers(TASK) == 6)
        await add_chunk(store, 1)
        for other in others:
            other.cancel()
        await asyncio.wait(others)
        assert feed.readers(TASK) == 1
        await add_chunk(store, 2)
        await finish_task(store)
    assert line_ids(1, 2) == ids_in(seen)


async def test_reader_cancelled_at_any_step_leaves_nothing_behind(store: Store, feed: Feed) -> None:
    """A reader can be cancelled at any step, even during the first poll; the fixture checks that nothing remains."""
    await start_task(store)
    await add_chunk(store, 1)
    for steps in range(30):
        reading = asyncio.create_task(follow(feed))
        for _ in range(steps):
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert feed.readers(TASK) == 0


async def test_first_poll_survives_a_cancelled_reader(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """Concurrent readers share the first poll; when one is cancelled, the poll continues for the others."""
    await start_task(store)
    await finish_task(store)
    polling, proceed = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        polling.set()
        await proceed.wait()

    blobs.between = wait
    leaving, staying = asyncio.create_task(follow(feed)), asyncio.create_task(follow(feed))
    await polling.wait()
    leaving.cancel()
    await asyncio.wait([leaving])
    proceed.set()
    assert [CaughtUp, Status.COMPLETED] == await staying


async def test_readers_are_counted(store: Store, feed: Feed) -> None:
    """The feed counts the readers of a task."""
    await start_task(store)
    assert feed.readers(TASK) == 0
    async with feed.follow(TASK, after=START):
        async with feed.follow(TASK, after=START):
            assert feed.readers(TASK) == 2
        assert feed.readers(TASK) == 1
    assert feed.readers(TASK) == 0


async def test_idle_task_is_polled_less_often(store: Store, blobs: WatchedBlobs) -> None:
    """The delay between polls grows with the time without changes, up to its maximum."""
    await start_task(store)
    feed = Feed(Store(blobs), PollPolicy(min_seconds=0.001, max_seconds=60))
    async with feed.follow(TASK, after=START):
        started_at = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > started_at + 0.5)
    # Each delay is a quarter of the time before it: about 25 polls in half a second. With a constant delay there would be 500.
    assert blobs.calls["listing"] < 60


# --- storage that fails ----------------------------------------------------------------------------------------------


async def test_error_of_the_first_poll_is_raised(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """A reader gets the error of the first poll; the next reader polls again."""
    await start_task(store)
    await finish_task(store)
    blobs.errors["listing"] = 1
    with pytest.raises(StorageError):
        await follow(feed)
    assert [CaughtUp, Status.COMPLETED] == await follow(feed)


@pytest.mark.parametrize("operation", ["listing", "metadata.json"])
async def test_failed_polls_are_retried(store: Store, feed: Feed, blobs: WatchedBlobs, operation: str) -> None:
    """Some failed polls delay a reader and lose nothing."""
    await start_task(store)
    async with following(feed) as seen:
        await until(lambda: CaughtUp in seen)
        blobs.errors[operation] = 3
        await add_chunk(store, 1)
        await finish_task(store)
    assert [CaughtUp, *line_ids(1), Status.COMPLETED] == seen
    assert blobs.errors[operation] == 0


async def test_end_waits_for_the_last_chunks(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """When the listing after the final record fails, the end is delivered only after another listing."""
    await start_task(store)

    async def fail_after_the_record() -> None:
        if blobs.calls["metadata.json"]:
            blobs.between = None
            blobs.errors["listing"] = 1

    async with following(feed) as seen:
        await until(lambda: CaughtUp in seen)
        blobs.calls.clear()
        blobs.between = fail_after_the_record
        await add_chunk(store, 1)
        await finish_task(store)
    assert [CaughtUp, *line_ids(1), Status.COMPLETED] == seen
    assert blobs.errors["listing"] == 0


async def test_failed_read_of_a_chunk_is_retried(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """A chunk whose read fails at first is delivered to all readers that wait for it."""
    await start_task(store)
    await add_chunk(store, 1)
    await finish_task(store)
    blobs.errors[chunk_name(TASK, 1, NOW).rpartition("/")[2]] = 1
    first, second = await asyncio.gather(follow(feed), follow(feed))
    assert [*line_ids(1), CaughtUp, Status.COMPLETED] == first == second


async def test_readers_of_a_deleted_task_get_an_error(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """When a task is deleted while it is read, its readers get an error and no end."""
    await start_task(store)
    await add_chunk(store, 1)
    with pytest.raises(ExceptionGroup) as raised:
        async with following(feed) as seen:
            await until(lambda: CaughtUp in seen)
            await blobs.delete(record_name(TASK))
    assert raised.group_contains(TaskNotFound)
    assert [*line_ids(1), CaughtUp] == seen

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

#: Examples of one test must not see each other's tasks.
fresh = itertools.count()


class WatchedBlobs(DirectoryBlobs):
    """A folder that counts what is read of it, and fails or waits as a test wants."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.between: Callable[[], Awaitable[None]] | None = None

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        await self._called("listing")
        entries = await super().entries(prefix, after=after, before=before, limit=limit)
        await self._meanwhile()
        return entries

    async def read(self, name: str) -> Blob:
        await self._called(name.rpartition("/")[2])
        blob = await super().read(name)
        await self._meanwhile()
        return blob

    async def _called(self, what: str) -> None:
        self.calls[what] += 1
        if self.errors[what] > 0:
            self.errors[what] -= 1
            raise StorageError
        await self._meanwhile()

    async def _meanwhile(self) -> None:
        if self.between is not None:
            await self.between()


@pytest.fixture
def blobs(tmp_path: Path) -> WatchedBlobs:
    """What the feed reads."""
    return WatchedBlobs(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The store that the worker of a test writes to; nothing that it does is counted."""
    return Store(DirectoryBlobs(tmp_path))


@pytest.fixture
async def feed(blobs: WatchedBlobs) -> AsyncIterator[Feed]:
    """The feed of a test; nothing of it may be left at the end."""
    before = asyncio.all_tasks()
    feed = Feed(Store(blobs), QUICK)
    yield feed
    assert {} == feed._tails
    assert set() == asyncio.all_tasks() - before - {asyncio.current_task()}


def text(chunk: int, line: int) -> bytes:
    """Return the line that stands at that place in the log of a test."""
    return b'"%d:%d"' % (chunk, line)


async def begin(store: Store, task_id: TaskId = TASK) -> None:
    """Add a task that runs."""
    record = TaskRecord(
        task_id=task_id, type=TaskType.ASYNC, status=Status.PENDING, created_at=NOW, logs_path=store.logs_path(task_id)
    )
    await store.add(start(record, at=NOW))


async def add_chunk(store: Store, chunk: int, lines: int = 2, task_id: TaskId = TASK) -> None:
    """Add a chunk whose lines tell their own places."""
    await store.add_chunk(task_id, chunk, [text(chunk, line) for line in range(1, lines + 1)], NOW)


async def end(store: Store, task_id: TaskId = TASK) -> None:
    """Write the final record."""
    await store.update(task_id, lambda record: finish(record, SUCCESS, at=NOW))


def places(frames: bytes) -> list[str]:
    """Return the IDs of events; check that each event has the line that stands there."""
    found = []
    for frame in frames.decode().split("\n\n")[:-1]:
        event_id, data = frame.split("\n")
        assert f'data: "{event_id.removeprefix("id: ")}"' == data
        found.append(event_id.removeprefix("id: "))
    return found


def log(*chunks: int, lines: int = 2) -> list[str]:
    """Return the places of all lines of those chunks."""
    return [f"{chunk}:{line}" for chunk in chunks for line in range(1, lines + 1)]


Seen = list[str | type[CaughtUp] | type[Idle] | Status]


async def look(reader: FeedReader, seen: Seen) -> None:
    """Note what a reader gets, until its end."""
    async for item in reader.items(idle_seconds=60):
        match item:
            case Lines():
                seen += places(item.frames)
            case Finished():
                seen.append(item.record.status)
            case CaughtUp() | Idle():
                seen.append(type(item))


async def follow(feed: Feed, after: Cursor | None = START, task_id: TaskId = TASK) -> Seen:
    """Read a task to its end; return the places of its lines, and what else came."""
    seen: Seen = []
    async with asyncio.timeout(20), feed.follow(task_id, after=after) as reader:
        await look(reader, seen)
    return seen


@contextlib.asynccontextmanager
async def following(feed: Feed, after: Cursor | None = START) -> AsyncIterator[Seen]:
    """Read a task on the side; leaving waits for its end."""
    seen: Seen = []
    async with asyncio.timeout(20), asyncio.TaskGroup() as group, feed.follow(TASK, after=after) as reader:
        reading = group.create_task(look(reader, seen))
        yield seen
        await reading


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so, within a bound."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def lines_of(seen: Seen) -> list[str]:
    """Return the places alone."""
    return [item for item in seen if isinstance(item, str) and not isinstance(item, Status)]


# --- what a reader gets ----------------------------------------------------------------------------------------------


async def test_finished_task_is_replayed(store: Store, feed: Feed) -> None:
    """Of a task that is long over a reader gets every line, that it has caught up, and the end."""
    await begin(store)
    for chunk in (1, 2, 3):
        await add_chunk(store, chunk)
    await end(store)
    assert [*log(1, 2, 3), CaughtUp, Status.COMPLETED] == await follow(feed)


async def test_finished_task_without_a_line_is_replayed(store: Store, feed: Feed) -> None:
    """A task that printed nothing has an end too."""
    await begin(store)
    await end(store)
    assert [CaughtUp, Status.COMPLETED] == await follow(feed)


async def test_unknown_task_is_told(feed: Feed) -> None:
    """Following a task that is not there says so, to each of many at once."""
    outcomes = await asyncio.gather(*(follow(feed) for _ in range(5)), return_exceptions=True)
    assert [TaskNotFound] * 5 == [type(outcome) for outcome in outcomes]


async def test_running_task_is_read_as_it_grows(store: Store, feed: Feed) -> None:
    """A reader gets each chunk when it is there, the mark between replay and life once, and the end last."""
    await begin(store)
    await add_chunk(store, 1)
    async with following(feed) as seen:
        await until(lambda: CaughtUp in seen)
        for chunk in (2, 3):
            await add_chunk(store, chunk)
            await until(lambda chunk=chunk: log(chunk)[-1] in seen)  # type: ignore[misc]
        await end(store)
    assert [*log(1), CaughtUp, *log(2, 3), Status.COMPLETED] == seen


async def test_late_reader_misses_nothing(store: Store, feed: Feed) -> None:
    """A reader that comes while others read gets the log from its start, and then what they get."""
    await begin(store)
    await add_chunk(store, 1)
    async with following(feed) as early:
        await add_chunk(store, 2)
        await until(lambda: "2:2" in early)
        async with following(feed) as late:
            await add_chunk(store, 3)
            await end(store)
    assert [*log(1), CaughtUp, *log(2, 3), Status.COMPLETED] == early
    assert [*log(1, 2), CaughtUp, *log(3), Status.COMPLETED] == late


async def test_reader_of_the_tail_gets_what_comes(store: Store, feed: Feed) -> None:
    """Who wants the present end alone gets no line that was there before, and every one after."""
    await begin(store)
    await add_chunk(store, 1)
    async with following(feed, after=None) as seen:
        await add_chunk(store, 2)
        await end(store)
    assert [CaughtUp, *log(2), Status.COMPLETED] == seen


async def test_every_place_in_a_log_can_be_resumed(store: Store, feed: Feed) -> None:
    """After whichever line a connection broke, the next one goes on with the very next line."""
    await begin(store)
    for chunk in (1, 2, 3):
        await add_chunk(store, chunk, lines=3)
    await end(store)
    everything = log(1, 2, 3, lines=3)
    for position, place in enumerate(everything, 1):
        seen = await follow(feed, after=parse_cursor(place))
        assert [*everything[position:], CaughtUp, Status.COMPLETED] == seen


async def test_place_beyond_the_end_gives_the_end(store: Store, feed: Feed) -> None:
    """A made-up place behind a log that is over gives no line, and the end."""
    await begin(store)
    await add_chunk(store, 1)
    await end(store)
    assert [CaughtUp, Status.COMPLETED] == await follow(feed, after=Cursor(10**15 - 1, 10**15 - 1))
    assert [CaughtUp, Status.COMPLETED] == await follow(feed, after=Cursor(1, 10**15 - 1))


async def test_reader_that_hears_nothing_is_told(store: Store, feed: Feed) -> None:
    """While nothing comes, a reader is told so again and again, so that it can keep its connection awake."""
    await begin(store)
    async with asyncio.timeout(10), feed.follow(TASK, after=START) as reader:
        items = reader.items(idle_seconds=0.005)
        kinds = [type(await anext(items)) for _ in range(3)]
        await end(store)
        async for item in items:
            last = item
    assert ([CaughtUp, Idle, Idle], Finished) == (kinds, type(last))


async def test_record_is_as_fresh_as_the_last_poll(store: Store, feed: Feed) -> None:
    """A reader sees the state of the task change."""
    await begin(store)
    async with feed.follow(TASK, after=START) as reader:
        assert reader.record.status is Status.RUNNING
        await end(store)
        await until(lambda: reader.record.status is Status.COMPLETED)


async def test_log_of_more_chunks_than_one_listing(store: Store, feed: Feed, tmp_path: Path) -> None:
    """A log of any length is replayed whole."""
    await begin(store)
    count = 2 * LISTING_NAMES + 5
    for chunk in range(1, count + 1):
        (tmp_path / chunk_name(TASK, chunk, NOW)).write_bytes(text(chunk, 1) + b"\n")
    await end(store)
    seen = await follow(feed)
    assert [*log(*range(1, count + 1), lines=1), CaughtUp, Status.COMPLETED] == seen


# --- order -----------------------------------------------------------------------------------------------------------


async def test_chunk_behind_a_gap_waits(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """A chunk that is seen before the one in front of it is not passed on, and not forgotten."""
    await begin(store)
    await add_chunk(store, 1)
    async with following(feed) as seen:
        await add_chunk(store, 3)
        polled = blobs.calls["listing"]
        await until(lambda: blobs.calls["listing"] > polled + 3)
        assert [*log(1), CaughtUp] == seen
        await add_chunk(store, 2)
        await end(store)
    assert [*log(1), CaughtUp, *log(2, 3), Status.COMPLETED] == seen


async def test_gap_in_a_finished_log_is_passed_over(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """When chunks of a task that is over were removed, the others are still shown."""
    await begin(store)
    for chunk in (1, 2, 3, 4):
        await add_chunk(store, chunk)
    await end(store)
    await blobs.delete(chunk_name(TASK, 1, NOW))
    await blobs.delete(chunk_name(TASK, 3, NOW))
    assert [*log(2, 4), CaughtUp, Status.COMPLETED] == await follow(feed)


@given(
    schedule=st.lists(st.integers(0, 3), max_size=14),
    chunks=st.integers(0, 4),
    readers=st.integers(1, 3),
    after=st.sampled_from([START, Cursor(1, 1), Cursor(2, 2)]),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_nothing_is_lost_whenever_the_end_comes(
    store: Store, blobs: WatchedBlobs, schedule: list[int], chunks: int, readers: int, after: Cursor
) -> None:
    """Wherever between two calls of the feed the worker writes chunks and the end, each reader gets every line once."""
    task_id = TaskId(f"example-{next(fresh)}")
    await begin(store, task_id)
    waits = iter(schedule)

    async def work() -> AsyncIterator[None]:
        for chunk in range(1, chunks + 1):
            await add_chunk(store, chunk, task_id=task_id)
            yield
        await end(store, task_id)
        yield

    worker, gate = work(), asyncio.Lock()

    async def between() -> None:
        async with gate:
            # As many steps as the schedule says, and one at a time when it is used up.
            for _ in range(next(waits, 1)):
                with contextlib.suppress(StopAsyncIteration):
                    await anext(worker)

    blobs.between = between
    feed = Feed(Store(blobs), PollPolicy(min_seconds=0, max_seconds=0))
    expected = [place for place in log(*range(1, chunks + 1)) if (parse_cursor(place) or START) > after]
    for seen in await asyncio.gather(*(follow(feed, after, task_id) for _ in range(readers))):
        assert expected == lines_of(seen)
        assert (Status.COMPLETED, 1) == (seen[-1], seen.count(CaughtUp))
    blobs.between = None


# --- many readers ----------------------------------------------------------------------------------------------------


async def test_hundred_readers_cost_one_poll(store: Store, blobs: WatchedBlobs) -> None:
    """However many read a task, the storage is asked no more often than for one, and each chunk is read once."""
    await begin(store)
    # Steady, so that one poll has a most that it can ask, however fast or slow the machine is; a hundred would go far beyond.
    pause = 0.01
    feed = Feed(Store(blobs), PollPolicy(min_seconds=pause, max_seconds=pause))
    seen: list[Seen] = [[] for _ in range(100)]
    async with asyncio.timeout(20), contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        loop = asyncio.get_running_loop()
        began = loop.time()
        places = [await stack.enter_async_context(feed.follow(TASK, after=None)) for _ in seen]
        reading = [group.create_task(look(reader, mine)) for reader, mine in zip(places, seen, strict=True)]
        for chunk in range(1, 11):
            await add_chunk(store, chunk)
            await until(lambda: all(log(chunk)[-1] in mine for mine in seen))  # noqa: B023
        took = loop.time() - began
        listings = blobs.calls["listing"]
        for task in reading:
            task.cancel()
    assert [[CaughtUp, *log(*range(1, 11))]] * 100 == seen
    assert {1} == {count for name, count in blobs.calls.items() if name.endswith(".jsonl")}
    # And one look when the first reader comes.
    assert listings <= took / pause + 1


async def test_slow_reader_holds_up_nobody(store: Store, blobs: WatchedBlobs, tmp_path: Path) -> None:
    """While one reader takes nothing, others read to the end, memory stays in its window, and then it gets everything."""
    await begin(store)
    window = 2000
    feed = Feed(Store(blobs), QUICK, window_bytes=window)
    async with asyncio.timeout(20), feed.follow(TASK, after=START) as slow:
        await add_chunk(store, 1)
        items = slow.items(idle_seconds=60)
        assert type(await anext(items)) is CaughtUp
        for chunk in range(2, 101):
            (tmp_path / chunk_name(TASK, chunk, NOW)).write_bytes(text(chunk, 1) + b"\n" + text(chunk, 2) + b"\n")
        await end(store)
        assert log(*range(1, 101)) == lines_of(await follow(feed))
        kept = feed._tails[TASK]._window
        assert 0 < sum(map(len, kept.values())) <= window
        rest = [item async for item in items]
    assert log(*range(1, 101)) == [place for item in rest if isinstance(item, Lines) for place in places(item.frames)]
    assert type(rest[-1]) is Finished


async def test_reader_that_leaves_takes_nobody_with_it(store: Store, feed: Feed) -> None:
    """When readers are cancelled, even all who wait for one chunk but one, the last goes on undisturbed."""
    await begin(store)
    async with following(feed) as seen:
        others = [asyncio.create_task(follow(feed)) for _ in range(5)]
        await until(lambda: feed.readers(TASK) == 6)
        await add_chunk(store, 1)
        for other in others:
            other.cancel()
        await asyncio.wait(others)
        assert feed.readers(TASK) == 1
        await add_chunk(store, 2)
        await end(store)
    assert log(1, 2) == lines_of(seen)


async def test_reader_that_leaves_at_once_leaves_nothing(store: Store, feed: Feed) -> None:
    """A reader may be cancelled at any moment, also before its first look is over; the fixture sees what would stay."""
    await begin(store)
    await add_chunk(store, 1)
    for steps in range(30):
        reading = asyncio.create_task(follow(feed))
        for _ in range(steps):
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert feed.readers(TASK) == 0


async def test_reader_that_leaves_during_the_first_look_leaves_it_to_others(
    store: Store, feed: Feed, blobs: WatchedBlobs
) -> None:
    """Readers that come at once share the first look at a task; when one of them leaves, it goes on for the others."""
    await begin(store)
    await end(store)
    looking, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        looking.set()
        await go_on.wait()

    blobs.between = wait
    leaving, staying = asyncio.create_task(follow(feed)), asyncio.create_task(follow(feed))
    await looking.wait()
    leaving.cancel()
    await asyncio.wait([leaving])
    go_on.set()
    assert [CaughtUp, Status.COMPLETED] == await staying


async def test_readers_are_counted(store: Store, feed: Feed) -> None:
    """The feed knows how many read a task here and now."""
    await begin(store)
    assert feed.readers(TASK) == 0
    async with feed.follow(TASK, after=START):
        async with feed.follow(TASK, after=START):
            assert feed.readers(TASK) == 2
        assert feed.readers(TASK) == 1
    assert feed.readers(TASK) == 0


async def test_quiet_task_is_asked_for_less_often(store: Store, blobs: WatchedBlobs) -> None:
    """The longer nothing comes, the longer the pause between two polls, up to its bound."""
    await begin(store)
    feed = Feed(Store(blobs), PollPolicy(min_seconds=0.001, max_seconds=60))
    async with feed.follow(TASK, after=START):
        began = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > began + 0.5)
    # Each pause is a quarter of the time before it: about 25 polls in half a second, where steady ones would be 500.
    assert blobs.calls["listing"] < 60


# --- storage that fails ----------------------------------------------------------------------------------------------


async def test_storage_that_fails_at_first_is_told(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """A reader that comes while the storage does not answer is told; the next one tries again."""
    await begin(store)
    await end(store)
    blobs.errors["listing"] = 1
    with pytest.raises(StorageError):
        await follow(feed)
    assert [CaughtUp, Status.COMPLETED] == await follow(feed)


@pytest.mark.parametrize("what", ["listing", "metadata.json"])
async def test_polls_that_fail_are_made_again(store: Store, feed: Feed, blobs: WatchedBlobs, what: str) -> None:
    """A storage that fails for some polls delays a reader, and loses nothing."""
    await begin(store)
    async with following(feed) as seen:
        await until(lambda: CaughtUp in seen)
        blobs.errors[what] = 3
        await add_chunk(store, 1)
        await end(store)
    assert [CaughtUp, *log(1), Status.COMPLETED] == seen
    assert blobs.errors[what] == 0


async def test_end_waits_for_the_last_chunks(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """When the listing that follows the final state fails, the end is not told before another one has come."""
    await begin(store)

    async def fail_after_the_record() -> None:
        if blobs.calls["metadata.json"]:
            blobs.between = None
            blobs.errors["listing"] = 1

    async with following(feed) as seen:
        await until(lambda: CaughtUp in seen)
        blobs.calls.clear()
        blobs.between = fail_after_the_record
        await add_chunk(store, 1)
        await end(store)
    assert [CaughtUp, *log(1), Status.COMPLETED] == seen
    assert blobs.errors["listing"] == 0


async def test_chunk_that_cannot_be_read_is_read_again(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """A chunk that the storage does not give at first is given to all who wait for it."""
    await begin(store)
    await add_chunk(store, 1)
    await end(store)
    blobs.errors[chunk_name(TASK, 1, NOW).rpartition("/")[2]] = 1
    first, second = await asyncio.gather(follow(feed), follow(feed))
    assert [*log(1), CaughtUp, Status.COMPLETED] == first == second


async def test_removed_task_breaks_its_readers_off(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """When somebody removes a task that is read, its readers are not told of an end that it never had."""
    await begin(store)
    await add_chunk(store, 1)
    with pytest.raises(ExceptionGroup) as raised:
        async with following(feed) as seen:
            await until(lambda: CaughtUp in seen)
            await blobs.delete(record_name(TASK))
    assert raised.group_contains(TaskNotFound)
    assert [*log(1), CaughtUp] == seen

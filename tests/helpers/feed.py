"""Tasks whose logs are written while readers follow their streams."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from ccrun.api.feed import CaughtUp, Feed, FeedReader, Finished, Idle, Lines
from ccrun.api.poller import PollPolicy
from ccrun.api.sse import Cursor
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.blobs import Blob, BlobInfo
from ccrun.errors import StorageError
from ccrun.lifecycle import finish, start
from ccrun.store import Store
from ccrun.task import Outcome, Reason, Status, TaskId, TaskRecord, TaskType

TASK = TaskId("t-1")


NOW = dt.datetime(2025, 3, 4, 5, 6, 7, tzinfo=dt.UTC)


SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0)


QUICK = PollPolicy(min_seconds=0.001, max_seconds=0.01)


START = Cursor()


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
    await store.logs.add_chunk(task_id, chunk, [line_at(chunk, line) for line in range(1, lines + 1)], NOW)


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

"""The feed: one tail for each task that is followed in this process, for any number of readers.

A tail polls the storage for new chunks. Readers have cursors and get chunks from the tail, which reads each chunk once for all
readers that need it at about the same time. A slow reader slows only itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

import attrs
import stamina
import structlog

from ccrun.api import sse
from ccrun.api.sse import Cursor
from ccrun.errors import BlobNotFound, StorageError
from ccrun.store import ChunkRef, Store
from ccrun.task import TaskId, TaskRecord

log = structlog.get_logger()

#: Bytes of events that a tail caches for its readers. A chunk has at most about 1 MiB, unless it has a longer line.
WINDOW_BYTES: Final = 8 * 1024 * 1024
#: Names of chunks that a tail remembers. A reader further back lists them again.
MAX_NAMES: Final = 5000
#: The interval of polls as a share of the time without a change, so that it delays an event by at most this share.
IDLE_SHARE: Final = 0.25
#: Seconds for which reading a chunk is retried before the stream is aborted.
READ_RETRY_SECONDS: Final = 30.0


@attrs.frozen(kw_only=True)
class PollPolicy:
    """The minimum and maximum interval of polls, and the time without a change after which a task is settled, in seconds."""

    min_seconds: float
    max_seconds: float
    settle_seconds: float = 30.0


@attrs.frozen(kw_only=True)
class Lines:
    """Some lines of the log as events."""

    frames: bytes = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class CaughtUp:
    """All lines that were stored when the reader connected have been read. What follows is live."""


@attrs.frozen(kw_only=True)
class Idle:
    """There was nothing new for some time."""


@attrs.frozen(kw_only=True)
class Finished:
    """The task is final, and its complete log has been read."""

    record: TaskRecord


Settle = Callable[[TaskRecord], Awaitable[object]]
Item = Lines | CaughtUp | Idle | Finished


class Feed:
    """The tails of this process."""

    def __init__(
        self, store: Store, policy: PollPolicy, *, settle: Settle | None = None, window_bytes: int = WINDOW_BYTES
    ) -> None:
        """Create the feed of a store.

        Args:
            policy: How often a tail polls.
            settle: Called for a task without a change for `PollPolicy.settle_seconds`, since its worker may be lost.
            window_bytes: See `WINDOW_BYTES`.
        """
        self._store = store
        self._policy = policy
        self._settle = settle
        self._window_bytes = window_bytes
        self._tails: dict[TaskId, _Tail] = {}

    def readers(self, task_id: TaskId) -> int:
        """Return the number of readers of a task in this process."""
        tail = self._tails.get(task_id)
        return tail.readers if tail else 0

    @contextlib.asynccontextmanager
    async def follow(self, task_id: TaskId, *, after: Cursor | None) -> AsyncIterator[FeedReader]:
        """Follow a task while the context is open, after a cursor, or with None from the end of what is stored.

        Raises:
            TaskNotFound: There is no such task.
            StorageError: The storage failed.
        """
        tail = self._tails.get(task_id)
        if tail is None:
            tail = self._tails[task_id] = _Tail(self._store, task_id, self._policy, self._settle, self._window_bytes)
        tail.readers += 1
        try:
            await tail.ready()
            yield FeedReader(tail, after)
        finally:
            tail.readers -= 1
            if not tail.readers:
                del self._tails[task_id]
                await tail.close()


class FeedReader:
    """One reader of a task."""

    def __init__(self, tail: _Tail, after: Cursor | None) -> None:
        self._tail = tail
        self._boundary = tail.head
        self._cursor = Cursor(tail.head + 1, 0) if after is None else max(after, Cursor(1, 0))

    @property
    def record(self) -> TaskRecord:
        """The task record as of the last poll."""
        return self._tail.record

    async def items(self, *, idle_seconds: float) -> AsyncIterator[Item]:
        """Yield what is new, `Finished` last, and `Idle` whenever there was nothing for this time."""
        chunk, caught_up = self._cursor.chunk, False
        after_line = self._cursor.line
        while True:
            if not caught_up and chunk > self._boundary:
                caught_up = True
                yield CaughtUp()
            pulse = self._tail.pulse
            if chunk <= self._tail.head:
                frames = await self._tail.frames(chunk, after_line=after_line)
                chunk, after_line = chunk + 1, 0
                if frames:
                    yield Lines(frames=frames)
            elif self._tail.is_over:
                yield Finished(record=self.record)
                return
            else:
                self._tail.check()
                try:
                    async with asyncio.timeout(idle_seconds):
                        await pulse.wait()
                except TimeoutError:
                    yield Idle()


class _Tail:
    """The end of the log of one task, and its chunks near the positions of its readers."""

    record: TaskRecord

    def __init__(
        self, store: Store, task_id: TaskId, policy: PollPolicy, settle: Settle | None, window_bytes: int
    ) -> None:
        self._store = store
        self._settle = settle
        self._task_id = task_id
        self._policy = policy
        self._window_bytes = window_bytes
        self.readers = 0
        #: The last chunk without a gap before it.
        self.head = 0
        self.is_over = False
        #: Set, and replaced by a new event, at each change.
        self.pulse = asyncio.Event()
        self._generation: int | None = None
        self._names: OrderedDict[int, ChunkRef] = OrderedDict()
        self._window: OrderedDict[int, bytes] = OrderedDict()
        self._reads: dict[int, asyncio.Task[bytes]] = {}
        self._first_look = asyncio.create_task(self._poll_once())
        self._polling: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Wait for the first poll of the task, whose result all readers share."""
        await asyncio.shield(self._first_look)
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll())
            self._polling.add_done_callback(lambda _: self._tell())

    def check(self) -> None:
        """Raise the exception that has stopped the polling, so that readers do not wait for it."""
        if self._polling is not None and self._polling.done():
            self._polling.result()

    async def close(self) -> None:
        """Cancel all tasks of the tail."""
        tasks = [task for task in (self._first_look, self._polling, *self._reads.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def frames(self, number: int, *, after_line: int = 0) -> bytes:
        """Return the events of a chunk, none for a chunk that was deleted."""
        if after_line:
            # At most once for each connection, so it is not cached.
            return sse.lines(number, await self._read(number), after_line=after_line)
        if number in self._window:
            self._window.move_to_end(number)
            return self._window[number]
        if number not in self._reads:
            read = self._reads[number] = asyncio.create_task(self._spell(number))
            read.add_done_callback(lambda _: self._reads.pop(number, None))
        return await asyncio.shield(self._reads[number])

    async def _spell(self, number: int) -> bytes:
        content = await self._read(number)
        # In a thread, since a line may have many megabytes.
        frames = await asyncio.to_thread(sse.lines, number, content)
        self._window[number] = frames
        while len(self._window) > 1 and sum(map(len, self._window.values())) > self._window_bytes:
            self._window.popitem(last=False)
        return frames

    async def _read(self, number: int) -> bytes:
        async for attempt in stamina.retry_context(on=_is_transient, attempts=None, timeout=READ_RETRY_SECONDS):
            with attempt:
                if number not in self._names:
                    self._remember((await self._store.listing(self._task_id, first=number)).chunks)
                if number in self._names:
                    with contextlib.suppress(BlobNotFound):
                        return await self._store.read_chunk(self._names[number])
        return b""

    def _remember(self, chunks: Sequence[ChunkRef]) -> None:
        for chunk in chunks:
            self._names[chunk.number] = chunk
        while len(self._names) > MAX_NAMES:
            self._names.popitem(last=False)

    async def _poll(self) -> None:
        """Poll until the task is final. When its objects are deleted, polling and readers stop."""
        loop = asyncio.get_running_loop()
        news_at = settled_at = loop.time()
        try:
            while not self.is_over:
                quiet = loop.time() - news_at
                await asyncio.sleep(max(self._policy.min_seconds, min(self._policy.max_seconds, quiet * IDLE_SHARE)))
                try:
                    if await self._poll_once():
                        news_at = settled_at = loop.time()
                    elif self._settle is not None and loop.time() - settled_at > self._policy.settle_seconds:
                        settled_at = loop.time()
                        await self._settle(self.record)
                except StorageError as error:
                    log.warning("poll_failed", message="Poll failed", taskId=self._task_id, error=error.message)
        finally:
            self._tell()

    async def _poll_once(self) -> bool:
        """Poll the task once. Return whether something has changed.

        The record is read before the chunks: a final record is written after the last chunk, so chunks that are listed after
        it are complete.
        """
        head, generation = self.head, self._generation
        # The first poll always reads the record.
        seen = None if generation is None else await self._advance()
        if seen is None or seen != generation:
            read_versioned = await self._store.read_versioned(self._task_id)
            self.record = read_versioned.record
            is_over = read_versioned.record.status.is_final
            if is_over or generation is None:
                await self._advance(skip_gaps=is_over)
            self.is_over = is_over
            self._generation = read_versioned.generation
        news = (head, generation) != (self.head, self._generation)
        if news:
            self._tell()
        return news

    async def _advance(self, *, skip_gaps: bool = False) -> int | None:
        """List new chunks, and return the generation of the record. A chunk after a gap waits for the missing one."""
        while True:
            listing = await self._store.listing(self._task_id, first=self.head + 1)
            before = self.head
            for chunk in listing.chunks:
                if chunk.number == self.head + 1 or skip_gaps:
                    self.head = chunk.number
            self._remember(listing.chunks)
            if listing.record_generation is not None or self.head == before:
                return listing.record_generation

    def _tell(self) -> None:
        self.pulse.set()
        self.pulse = asyncio.Event()


def _is_transient(error: Exception) -> bool:
    return isinstance(error, StorageError) and not isinstance(error, BlobNotFound)

"""Fan-out: one tail a task in this process, however many read it.

The tail polls the storage and knows how far the log goes; readers hold cursors and take chunks through the tail, which reads each
once for all who want it at about the same time. A slow reader slows only itself.
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

#: Bytes of spelled chunks that a tail keeps for its readers; a chunk has about one MiB at the most, but for longer lines.
WINDOW_BYTES: Final = 8 * 1024 * 1024
#: Names of chunks that a tail remembers; a reader further back looks its names up again.
MAX_NAMES: Final = 5000
#: A poll comes after this share of the time for which nothing was new, so that a wait is made longer by no more than that.
IDLE_SHARE: Final = 0.25
#: Seconds for which a chunk that the storage does not give is asked for again, before the stream breaks off.
READ_RETRY_SECONDS: Final = 30.0


@attrs.frozen(kw_only=True)
class PollPolicy:
    """Bounds of the pause between two polls, and after how long without news a task is settled, in seconds."""

    min_seconds: float
    max_seconds: float
    settle_seconds: float = 30.0


@attrs.frozen(kw_only=True)
class Lines:
    """Some lines of the log, spelled as events."""

    frames: bytes = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class CaughtUp:
    """All that was there when the reader came has been read; what follows is live."""


@attrs.frozen(kw_only=True)
class Idle:
    """Nothing came for a while."""


@attrs.frozen(kw_only=True)
class Finished:
    """The task is over and its log has been read to the end."""

    record: TaskRecord


Settle = Callable[[TaskRecord], Awaitable[object]]
Item = Lines | CaughtUp | Idle | Finished


class Feed:
    """The tails of this process."""

    def __init__(
        self, store: Store, pace: PollPolicy, *, settle: Settle | None = None, window_bytes: int = WINDOW_BYTES
    ) -> None:
        """Follow tasks of this store.

        Args:
            pace: When a tail polls.
            settle: Asked about a task of which nothing was heard for `Pace.settle_seconds`: its worker may be gone.
            window_bytes: See `WINDOW_BYTES`.
        """
        self._store = store
        self._pace = pace
        self._settle = settle
        self._window_bytes = window_bytes
        self._tails: dict[TaskId, _Tail] = {}

    def readers(self, task_id: TaskId) -> int:
        """Return how many read that task here and now."""
        tail = self._tails.get(task_id)
        return tail.readers if tail else 0

    @contextlib.asynccontextmanager
    async def follow(self, task_id: TaskId, *, after: Cursor | None) -> AsyncIterator[FeedReader]:
        """Follow a task while the context lasts, from a cursor on, or from the present end with None.

        Raises:
            TaskNotFound: There is none.
            StorageError: The storage does not answer.
        """
        tail = self._tails.get(task_id)
        if tail is None:
            tail = self._tails[task_id] = _Tail(self._store, task_id, self._pace, self._settle, self._window_bytes)
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
    """One reader's place in a log."""

    def __init__(self, tail: _Tail, after: Cursor | None) -> None:
        self._tail = tail
        self._boundary = tail.head
        self._cursor = Cursor(tail.head + 1, 0) if after is None else max(after, Cursor(1, 0))

    @property
    def record(self) -> TaskRecord:
        """The task record, as fresh as the last poll."""
        return self._tail.record

    async def items(self, *, idle_seconds: float) -> AsyncIterator[Item]:
        """Yield what comes, `Finished` last; `Idle` whenever nothing came for so long."""
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
    """How far the log of one task goes, and its chunks near the places where readers are."""

    record: TaskRecord

    def __init__(
        self, store: Store, task_id: TaskId, pace: PollPolicy, settle: Settle | None, window_bytes: int
    ) -> None:
        self._store = store
        self._settle = settle
        self._task_id = task_id
        self._pace = pace
        self._window_bytes = window_bytes
        self.readers = 0
        #: The last chunk before which none is missing.
        self.head = 0
        self.is_over = False
        #: Set, and replaced by a new one, whenever there is news.
        self.pulse = asyncio.Event()
        self._generation: int | None = None
        self._names: OrderedDict[int, ChunkRef] = OrderedDict()
        self._window: OrderedDict[int, bytes] = OrderedDict()
        self._reads: dict[int, asyncio.Task[bytes]] = {}
        self._first_look = asyncio.create_task(self._look())
        self._polling: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Wait for the first look at the task; all readers share its outcome."""
        await asyncio.shield(self._first_look)
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll())
            self._polling.add_done_callback(lambda _: self._tell())

    def check(self) -> None:
        """Raise what ended the polling before the task was over: readers must not wait for news that nobody looks for."""
        if self._polling is not None and self._polling.done():
            self._polling.result()

    async def close(self) -> None:
        """End all that is under way."""
        tasks = [task for task in (self._first_look, self._polling, *self._reads.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def frames(self, number: int, *, after_line: int = 0) -> bytes:
        """Return the events of a chunk; nothing for one that is not there, since somebody removed it."""
        if after_line:
            # Once in a connection at most, so it is not worth keeping.
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
        # In a thread, since a line can have many megabytes.
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
        """Look until the task is over. That its objects were removed under us ends the polling, and so the readers."""
        loop = asyncio.get_running_loop()
        news_at = settled_at = loop.time()
        try:
            while not self.is_over:
                quiet = loop.time() - news_at
                await asyncio.sleep(max(self._pace.min_seconds, min(self._pace.max_seconds, quiet * IDLE_SHARE)))
                try:
                    if await self._look():
                        news_at = settled_at = loop.time()
                    elif self._settle is not None and loop.time() - settled_at > self._pace.settle_seconds:
                        settled_at = loop.time()
                        await self._settle(self.record)
                except StorageError as error:
                    log.warning("poll_failed", message="Poll failed", taskId=self._task_id, error=error.message)
        finally:
            self._tell()

    async def _look(self) -> bool:
        """Look at the task once; return whether something was new.

        The state first, the chunks second: a final state is written after the last chunk, so the chunks listed after it was
        seen are all there are.
        """
        head, generation = self.head, self._generation
        # The first look reads the record in any case, so no listing need tell that it is new.
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
        """Move the head to the end of the log; return the generation of the record.

        A chunk behind a gap is not passed on: it waits for the one that is missing.
        """
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

"""The polling of one task: its record, and its log in chunks near the positions of its readers."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import attrs
import stamina
import structlog

from ccrun.api import sse
from ccrun.errors import BlobNotFound, StorageError
from ccrun.store import Store
from ccrun.task import TaskId, TaskRecord, TaskType
from ccrun.task_logs import ChunkRef

log = structlog.get_logger()

#: Bytes of formatted chunks that a poller caches. A chunk has at most about 1 MiB, unless one line is longer.
WINDOW_BYTES: Final = 8 * 1024 * 1024
#: Chunks whose names a poller caches. For a reader that is further back, the name is listed again.
MAX_CACHED_NAMES: Final = 5000
#: The delay of a poll, as a share of the time since the last change. So an event is late by at most this share of that time.
POLL_DELAY_RATIO: Final = 0.25
#: Seconds after which a poller renews the lease on its task, if a client of the task has left (`ccrun.api.abandoned`): a third
#: of the time that clients have to return. A task of `POST /run` is polled at least that often.
RENEW_LEASE_SECONDS: Final = 10.0
#: Seconds for which reading a chunk is retried before the stream is aborted.
READ_RETRY_SECONDS: Final = 30.0

Settle = Callable[[TaskRecord], Awaitable[object]]


@attrs.frozen(kw_only=True)
class PollPolicy:
    """How often a task is polled.

    Args:
        min_seconds: The minimum delay between two polls.
        max_seconds: The maximum delay between two polls.
        settle_seconds: The time without changes after which the poller checks whether the execution is lost.
    """

    min_seconds: float
    max_seconds: float
    settle_seconds: float = 30.0


class TaskPoller:
    """Polls one task while it has readers, and caches its chunks near the positions of the readers."""

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
        #: The number of the last chunk that readers may read: all chunks before it are stored.
        self.head = 0
        #: Whether the task is final and `head` is its last chunk.
        self.is_finished = False
        #: The generation of the lease on the task, None while there is none.
        self.lease_generation: int | None = None
        #: Set, and replaced by a new event, when the task has changed.
        self.changed = asyncio.Event()
        self._generation: int | None = None
        self._renewed_at = -math.inf
        self._names: OrderedDict[int, ChunkRef] = OrderedDict()
        self._window: OrderedDict[int, bytes] = OrderedDict()
        self._reads: dict[int, asyncio.Task[bytes]] = {}
        self._first_poll = asyncio.create_task(self.poll())
        self._polling: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Wait for the first poll, whose result all readers share, then poll periodically.

        Raises:
            TaskNotFound: There is no such task.
            StorageError: The storage failed.
        """
        await asyncio.shield(self._first_poll)
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll_until_finished())
            self._polling.add_done_callback(lambda _: self._notify())

    def check(self) -> None:
        """Raise the exception that stopped the polling, if any, since its readers would otherwise wait indefinitely."""
        if self._polling is not None and self._polling.done():
            self._polling.result()

    async def close(self) -> None:
        """Cancel the polling and all reads."""
        tasks = [task for task in (self._first_poll, self._polling, *self._reads.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def events(self, number: int, *, after_line: int = 0) -> bytes:
        """Return a chunk as events. A chunk that does not exist, because it was deleted, has none.

        Args:
            number: The number of the chunk.
            after_line: The number of lines to skip.

        Raises:
            StorageError: The chunk could not be read for `READ_RETRY_SECONDS`.
        """
        if after_line:
            # Not cached, since this happens at most once for each connection.
            return sse.line_events(number, await self._read(number), after_line=after_line)
        if number in self._window:
            self._window.move_to_end(number)
            return self._window[number]
        if number not in self._reads:
            read = self._reads[number] = asyncio.create_task(self._read_into_window(number))
            read.add_done_callback(lambda _: self._reads.pop(number, None))
        return await asyncio.shield(self._reads[number])

    async def _read_into_window(self, number: int) -> bytes:
        content = await self._read(number)
        # In a thread, since a line can have many megabytes.
        events = await asyncio.to_thread(sse.line_events, number, content)
        self._window[number] = events
        while len(self._window) > 1 and sum(map(len, self._window.values())) > self._window_bytes:
            self._window.popitem(last=False)
        return events

    async def _read(self, number: int) -> bytes:
        async for attempt in stamina.retry_context(on=_is_transient, attempts=None, timeout=READ_RETRY_SECONDS):
            with attempt:
                if number not in self._names:
                    self._remember((await self._store.logs.listing(self._task_id, first=number)).chunks)
                if number in self._names:
                    with contextlib.suppress(BlobNotFound):
                        return await self._store.logs.read_chunk(self._names[number])
        return b""

    def _remember(self, chunks: Sequence[ChunkRef]) -> None:
        for chunk in chunks:
            self._names[chunk.number] = chunk
        while len(self._names) > MAX_CACHED_NAMES:
            self._names.popitem(last=False)

    async def _poll_until_finished(self) -> None:
        """Poll until the task is final. Fails when the task was deleted, which stops its readers."""
        loop = asyncio.get_running_loop()
        changed_at = settled_at = loop.time()
        try:
            while not self.is_finished:
                delay = (loop.time() - changed_at) * POLL_DELAY_RATIO
                most = self._policy.max_seconds
                if self.record.type is TaskType.SYNC:
                    most = min(most, RENEW_LEASE_SECONDS)
                await asyncio.sleep(max(self._policy.min_seconds, min(most, delay)))
                try:
                    if await self.poll():
                        changed_at = settled_at = loop.time()
                    elif self._settle is not None and loop.time() - settled_at > self._policy.settle_seconds:
                        settled_at = loop.time()
                        await self._settle(self.record)
                    await self._renew_lease()
                except StorageError as error:
                    log.warning("poll_failed", message="Poll failed", taskId=self._task_id, error=error.message)
        finally:
            self._notify()

    async def _renew_lease(self) -> None:
        """Show other instances that this one has readers, if they ask."""
        now = asyncio.get_running_loop().time()
        if self.lease_generation is not None and not self.is_finished and now - self._renewed_at >= RENEW_LEASE_SECONDS:
            self._renewed_at = now
            await self._store.leases.renew(self._task_id, generation=self.lease_generation, at=dt.datetime.now(dt.UTC))

    async def poll(self) -> bool:
        """Read the state of the task once; return whether it has changed.

        The record is read first and the chunks second. A final record is written after the last chunk, so the listing that
        follows it has all chunks.

        Raises:
            TaskNotFound: There is no such task.
            StorageError: The storage failed.
        """
        head, generation = self.head, self._generation
        # The first poll reads the record in any case, so it needs no listing before.
        listed = None if generation is None else await self._advance()
        if listed is None or listed != generation:
            versioned = await self._store.read_versioned(self._task_id)
            self.record = versioned.record
            is_final = versioned.record.status.is_final
            if is_final or generation is None:
                await self._advance(skip_gaps=is_final)
            self.is_finished = is_final
            self._generation = versioned.generation
        has_changed = (head, generation) != (self.head, self._generation)
        if has_changed:
            self._notify()
        return has_changed

    async def _advance(self, *, skip_gaps: bool = False) -> int | None:
        """Move `head` to the end of the log; return the generation of the record, None if it was not listed.

        Args:
            skip_gaps: Whether to pass missing chunks. Otherwise a chunk waits for those before it.
        """
        while True:
            listing = await self._store.logs.listing(self._task_id, first=self.head + 1)
            before = self.head
            for chunk in listing.chunks:
                if chunk.number == self.head + 1 or skip_gaps:
                    self.head = chunk.number
            self._remember(listing.chunks)
            if listing.record_generation is not None:
                self.lease_generation = listing.lease_generation
            if listing.record_generation is not None or self.head == before:
                return listing.record_generation

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


def _is_transient(error: Exception) -> bool:
    return isinstance(error, StorageError) and not isinstance(error, BlobNotFound)

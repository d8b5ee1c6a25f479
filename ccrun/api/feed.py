"""The events of a task for any number of readers, with one poller for each task and process.

The poller finds new chunks in the storage, and readers read chunks through it, so that each chunk is read once for all readers
that need it at about the same time. A slow reader delays no other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Final

import attrs

from ccrun.api.poller import WINDOW_BYTES, PollPolicy, Settle, TaskPoller
from ccrun.api.sse import Cursor
from ccrun.store import Store
from ccrun.task import Status, TaskId, TaskRecord

#: Seconds between two looks at the place of a pending task in the queue.
QUEUE_SECONDS: Final = 1.0


@attrs.frozen(kw_only=True)
class Lines:
    """Some lines of the log, formatted as events."""

    events: bytes = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class CaughtUp:
    """The reader has all lines that were stored when it started; later lines are new.

    Args:
        cursor: The position of the reader.
    """

    cursor: Cursor


@attrs.frozen(kw_only=True)
class StatusChanged:
    """A task that was pending when the reader started is still pending, at a place in the queue that has changed, or runs.

    Args:
        queue_position: The place in the queue, from 1; None if it is not known.
        cursor: The position of the reader.
    """

    status: Status
    queue_position: int | None
    cursor: Cursor


@attrs.frozen(kw_only=True)
class Idle:
    """There was no other item for some time."""


@attrs.frozen(kw_only=True)
class Finished:
    """The task is final and its log has been read to the end."""

    record: TaskRecord


Item = Lines | CaughtUp | StatusChanged | Idle | Finished


class Feed:
    """The pollers of this process.

    Args:
        policy: How often a task is polled.
        settle: Called when a task has not changed for `PollPolicy.settle_seconds`: its execution may be lost.
        queue_position: Returns the place of a pending task in the queue, None if it is not known.
        window_bytes: See `WINDOW_BYTES`.
    """

    def __init__(
        self,
        store: Store,
        policy: PollPolicy,
        *,
        settle: Settle | None = None,
        queue_position: Callable[[TaskId], int | None] = lambda _: None,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self._store = store
        self._policy = policy
        self._settle = settle
        self._queue_position = queue_position
        self._window_bytes = window_bytes
        self._pollers: dict[TaskId, TaskPoller] = {}

    def readers(self, task_id: TaskId) -> int:
        """Return the number of readers of a task in this process."""
        poller = self._pollers.get(task_id)
        return poller.readers if poller else 0

    @contextlib.asynccontextmanager
    async def follow(self, task_id: TaskId, *, after: Cursor | None) -> AsyncIterator[FeedReader]:
        """Return a reader of a task.

        Args:
            task_id: The task.
            after: Where to start; None for the end of what is stored.

        Raises:
            TaskNotFound: There is no such task.
            StorageError: The storage failed.
        """
        poller = self._pollers.get(task_id)
        if poller is None:
            poller = TaskPoller(self._store, task_id, self._policy, self._settle, self._window_bytes)
            self._pollers[task_id] = poller
        poller.readers += 1
        try:
            await poller.ready()
            yield FeedReader(poller, after, self._queue_position)
        finally:
            poller.readers -= 1
            if not poller.readers:
                del self._pollers[task_id]
                await poller.close()


class FeedReader:
    """A position in the log of a task."""

    def __init__(
        self, poller: TaskPoller, after: Cursor | None, queue_position: Callable[[TaskId], int | None]
    ) -> None:
        self._poller = poller
        self._queue_position = queue_position
        #: The last chunk that was stored when the reader started.
        self._last_stored = poller.head
        #: The position at which the reader starts.
        self.cursor = Cursor(poller.head + 1, 0) if after is None else max(after, Cursor(1, 0))

    @property
    def record(self) -> TaskRecord:
        """The task record, as of the last poll."""
        return self._poller.record

    @property
    def is_finished(self) -> bool:
        """Whether the task is final, as of the last poll."""
        return self._poller.is_finished

    @property
    def has_lease(self) -> bool:
        """Whether a client of the task has left some instance, as of the last poll."""
        return self._poller.lease_generation is not None

    async def items(self, *, idle_seconds: float) -> AsyncIterator[Item]:
        """Yield the items of the task in order, `Finished` last.

        Args:
            idle_seconds: The time without an item after which `Idle` is yielded.

        Raises:
            StorageError: A chunk could not be read.
            TaskNotFound: The task was deleted.
        """
        chunk, caught_up = self.cursor.chunk, False
        after_line = self.cursor.line
        clock = asyncio.get_running_loop().time
        # When `Idle` is due; None while there is something to do.
        idle_at: float | None = None
        # What the client knows from the record with which the stream starts.
        shown: tuple[Status, int | None] = (self.record.status, None)
        while True:
            status = self._status(has_lines=chunk <= self._poller.head)
            if not status.is_final:
                position = self._queue_position(self.record.task_id) if status is Status.PENDING else None
                if shown != (shown := (status, position)):
                    yield StatusChanged(status=status, queue_position=position, cursor=Cursor(chunk, after_line))
                    idle_at = None
            if not caught_up and chunk > self._last_stored:
                caught_up = True
                yield CaughtUp(cursor=Cursor(chunk, after_line))
            changed = self._poller.changed
            if chunk <= self._poller.head:
                events = await self._poller.events(chunk, after_line=after_line)
                chunk, after_line = chunk + 1, 0
                if events:
                    yield Lines(events=events)
            elif self._poller.is_finished:
                yield Finished(record=self.record)
                return
            else:
                self._poller.check()
                idle_at = idle_at or clock() + idle_seconds
                wake_at = min(idle_at, clock() + QUEUE_SECONDS) if status is Status.PENDING else idle_at
                try:
                    async with asyncio.timeout_at(wake_at):
                        await changed.wait()
                    idle_at = None
                except TimeoutError:
                    if wake_at == idle_at:
                        idle_at = None
                        yield Idle()

    def _status(self, *, has_lines: bool) -> Status:
        """Return the status of the task. A pending one with lines has started since the record was read."""
        status = self.record.status
        return Status.RUNNING if status is Status.PENDING and has_lines else status

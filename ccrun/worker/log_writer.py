"""Writing the log of one task: lines in, chunks without gaps in storage."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Self

import attrs
import stamina

from ccrun.errors import BlobExists, StorageError
from ccrun.store import Store
from ccrun.task import TaskId
from ccrun.worker.lines import worker_line

#: Bytes at which a chunk is full, so that reading one stays cheap. A longer line is alone in its chunk.
MAX_CHUNK_BYTES: Final = 1024 * 1024
#: Lines at which a chunk is full, so that a reader gets its events in moderate batches.
MAX_CHUNK_LINES: Final = 10_000
#: Full chunks in the queue. When there are as many, `write` waits. A longer line is alone in the queue.
MAX_QUEUED_CHUNKS: Final = 4
#: Seconds in which the whole queue can be written: the queue is shorter while writing a chunk takes long. A shutdown leaves two
#: seconds between the exit of the agent and the final record (`WorkerTimeouts`).
DRAIN_SECONDS: Final = 1.5
#: Seconds for which an abandoned log is still written; then lines are dropped.
ABANDON_SECONDS: Final = 0.6
#: Seconds for writing how many lines were dropped.
DROP_NOTE_SECONDS: Final = 0.2
#: Seconds until the first chunk, so that readers see the start of a task.
FIRST_FLUSH_SECONDS: Final = 0.1
#: Seconds for which writing a chunk is retried before the log is given up.
STORAGE_RETRY_SECONDS: Final = 60.0
#: The maximum delay of these retries, in seconds.
MAX_RETRY_DELAY_SECONDS: Final = 5.0


@attrs.frozen(kw_only=True)
class FlushPolicy:
    """When a chunk is due, and how long writing may take.

    Args:
        flush_lines: Lines with which a chunk is due. It contains more if more have arrived by then.
        flush_seconds: Seconds after its first line at which a chunk is due.
        first_flush_seconds: The same for the first chunk.
        retry_seconds: See `STORAGE_RETRY_SECONDS`.
        drain_seconds: See `DRAIN_SECONDS`.
        abandon_seconds: See `ABANDON_SECONDS`.
        drop_note_seconds: See `DROP_NOTE_SECONDS`.
    """

    flush_lines: int = 100
    flush_seconds: float = 1.0
    first_flush_seconds: float = FIRST_FLUSH_SECONDS
    retry_seconds: float = STORAGE_RETRY_SECONDS
    drain_seconds: float = DRAIN_SECONDS
    abandon_seconds: float = ABANDON_SECONDS
    drop_note_seconds: float = DROP_NOTE_SECONDS


#: Masks the secrets in the lines of a chunk. Blocks.
Redact = Callable[[Sequence[bytes | bytearray]], Sequence[bytes | bytearray]]


class LogIncomplete(StorageError):
    """Some lines of a log were not stored."""

    def __init__(self, lines: int, reason: str) -> None:
        super().__init__(f"{_count(lines)} could not be stored. {reason}")


class LogWriter:
    """Writes lines through a bounded queue into chunks without gaps.

    Leaving its context writes what is left; a cancellation limits the time for that. A chunk is due by the age of its
    first line, not by the time since its last, so that steady output does not delay it. While lines arrive faster than they are
    written, chunks become larger. When the storage is slow, `write` waits; no line is dropped. The queue counts bytes, which an
    `asyncio.Queue` cannot: lines differ in size by a factor of a million.
    """

    def __init__(
        self, store: Store, task_id: TaskId, policy: FlushPolicy, redact: Redact = lambda lines: lines
    ) -> None:
        self._store = store
        self._task_id = task_id
        self._policy = policy
        self._redact = redact
        self._lines: deque[tuple[bytes | bytearray, float]] = deque()
        self._bytes = 0
        self._chunks = 0
        #: Lines that were passed to `write`, lines in chunks, and lines that were removed from the queue for lack of time.
        self._received = self._stored = self._dropped = 0
        #: How long the last write of a chunk took, and when the current one started, on the clock of the event loop.
        self._write_seconds = 0.0
        self._write_started: float | None = None
        self._closing = False
        #: Whether a line waits for space in the queue, which may have less than a chunk.
        self._is_crowded = False
        self._failure: Exception | None = None
        self._given_up = asyncio.Event()
        #: Set when the writer of chunks must check the queue: there is a first line, a chunk is full, or the log is closed.
        self._check_queue = asyncio.Event()
        #: Set when a waiting `write` must check the queue: there is space, or the log was given up.
        self._space = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._writing = asyncio.create_task(self._write_chunks())
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        if exc_type is not None and issubclass(exc_type, asyncio.CancelledError):
            await self._abandon()
            return
        try:
            await self.close()
        except asyncio.CancelledError:
            await self._abandon()
            raise

    async def write(self, line: bytes | bytearray) -> None:
        """Add a line, without its newline. Wait while the queue is full. A line is added even if the wait is cancelled.

        Raises:
            StorageError: The log was given up, because no chunk could be written for `FlushPolicy.retry_seconds`.
        """
        if self._closing and self._failure is None:
            raise RuntimeError("The log is closed.")
        self._received += 1
        while self._lines and self._exceeds_queue(line) and self._failure is None:
            self._is_crowded = True
            self._check_queue.set()
            self._space.clear()
            try:
                await self._space.wait()
            except asyncio.CancelledError:
                self._append(line)
                raise
        if self._failure is not None:
            raise self._failure
        self._append(line)

    def _append(self, line: bytes | bytearray) -> None:
        self._lines.append((line, asyncio.get_running_loop().time()))
        self._bytes += len(line)
        if len(self._lines) == 1 or self._is_full:
            self._check_queue.set()

    def _exceeds_queue(self, line: bytes | bytearray) -> bool:
        """Return whether the queue with that line could not be written within `FlushPolicy.drain_seconds`."""
        seconds = self._write_seconds
        if self._write_started is not None:
            seconds = max(seconds, asyncio.get_running_loop().time() - self._write_started)
        chunks = MAX_QUEUED_CHUNKS
        while chunks > 1 and chunks * seconds > self._policy.drain_seconds:
            chunks -= 1
        return self._bytes + len(line) > chunks * MAX_CHUNK_BYTES or len(self._lines) >= chunks * MAX_CHUNK_LINES

    async def close(self) -> None:
        """Write what is left. Idempotent.

        Raises:
            StorageError: The log could not be written completely.
        """
        self._closing = True
        self._check_queue.set()
        if self._writing is not None:
            await asyncio.wait([self._writing])
        self._raise_if_incomplete()

    async def _abandon(self) -> None:
        """Write what is possible in `FlushPolicy.abandon_seconds`, and a note about the rest. Then nothing is being written.

        A chunk that is being written is completed before the note about dropped lines, since its object may already exist.

        Raises:
            LogIncomplete: Lines were dropped. The last line of the log says how many, unless it could not be written either.
        """
        self._closing = True
        self._check_queue.set()
        if self._writing is None:
            return
        await asyncio.wait([self._writing], timeout=self._policy.abandon_seconds)
        if self._lines and not self._writing.done():
            self._dropped, self._bytes = len(self._lines), 0
            self._lines.clear()
            self._append(worker_line("log", error=f"{_count(self._dropped)} could not be stored in time."))
            await asyncio.wait([self._writing], timeout=self._policy.drop_note_seconds)
        self._writing.cancel()
        await asyncio.wait([self._writing])
        self._raise_if_incomplete()

    def _raise_if_incomplete(self) -> None:
        # The note about dropped lines is stored, but was not received.
        lost = self._received - min(self._stored, self._received - self._dropped)
        if isinstance(self._failure, StorageError) and lost:
            raise LogIncomplete(lost, self._failure.message) from self._failure
        if self._failure is not None:
            raise self._failure
        if lost:
            raise LogIncomplete(lost, "There was no time left to write them.")

    async def until_given_up(self) -> None:
        """Wait until the log is given up, for a caller that may not call `write` for long."""
        await self._given_up.wait()

    @property
    def _is_full(self) -> bool:
        return len(self._lines) >= self._policy.flush_lines or self._bytes >= MAX_CHUNK_BYTES or self._is_crowded

    async def _write_chunks(self) -> None:
        try:
            while await self._chunk_is_due():
                await self._write_chunk(self._take())
        except Exception as error:  # Any exception must reach `write`, which would wait forever.
            self._failure = error
            self._given_up.set()
        finally:
            self._space.set()

    async def _chunk_is_due(self) -> bool:
        """Wait until a chunk is due. Return False when the log is closed and all lines are written."""
        while not self._lines and not self._closing:
            self._check_queue.clear()
            await self._check_queue.wait()
        if not self._lines:
            return False
        age = self._policy.flush_seconds if self._chunks else self._policy.first_flush_seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._lines[0][1] + age):
                while not self._is_full and not self._closing:
                    self._check_queue.clear()
                    await self._check_queue.wait()
        return True

    def _take(self) -> list[bytes | bytearray]:
        chunk: list[bytes | bytearray] = []
        size = 0
        while self._lines and len(chunk) < MAX_CHUNK_LINES and size < MAX_CHUNK_BYTES:
            line, _ = self._lines.popleft()
            chunk.append(line)
            size += len(line)
        self._bytes -= size
        self._is_crowded = False
        self._space.set()
        return chunk

    async def _write_chunk(self, lines: Sequence[bytes | bytearray]) -> None:
        loop = asyncio.get_running_loop()
        self._write_started = loop.time()
        lines = await asyncio.to_thread(self._redact, lines)
        number, at = self._chunks + 1, dt.datetime.now(dt.UTC)
        retries = stamina.retry_context(
            on=_is_transient, attempts=None, timeout=self._policy.retry_seconds, wait_max=MAX_RETRY_DELAY_SECONDS
        )
        async for attempt in retries:
            with attempt:
                await self._store.logs.add_chunk(self._task_id, number, lines, at)
        self._chunks = number
        self._stored += len(lines)
        self._write_seconds, self._write_started = loop.time() - self._write_started, None


def _count(lines: int) -> str:
    return f"{lines} {'line' if lines == 1 else 'lines'} of the log"


def _is_transient(error: Exception) -> bool:
    return isinstance(error, StorageError) and not isinstance(error, BlobExists)

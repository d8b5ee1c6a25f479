"""Writing the log of one task: lines in, chunks without gaps in storage."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections import deque
from collections.abc import Sequence
from typing import Final, Self

import attrs
import stamina

from ccrun.errors import BlobExists, StorageError
from ccrun.store import Store
from ccrun.task import TaskId

#: Bytes at which a chunk is written, so that reading one stays cheap.
MAX_CHUNK_BYTES: Final = 1024 * 1024
#: Bytes in the queue. When it is full, `write` waits. A longer line is alone in the queue.
MAX_QUEUED_BYTES: Final = 4 * MAX_CHUNK_BYTES
#: Seconds until the first chunk, so that readers see the start of a task.
FIRST_FLUSH_SECONDS: Final = 0.1
#: Seconds for which writing a chunk is retried before the log is given up.
STORAGE_RETRY_SECONDS: Final = 60.0
#: The maximum delay of these retries, in seconds.
MAX_RETRY_DELAY_SECONDS: Final = 5.0


@attrs.frozen(kw_only=True)
class FlushPolicy:
    """When a chunk is written: with this many lines, or this many seconds after its first line."""

    flush_lines: int = 100
    flush_seconds: float = 1.0
    first_flush_seconds: float = FIRST_FLUSH_SECONDS
    retry_seconds: float = STORAGE_RETRY_SECONDS


class LogWriter:
    """Writes lines through a bounded queue into chunks without gaps.

    Leaving its context writes what is left. A chunk is due by the age of its first line, not by the time since its last, so that
    steady output does not delay it. When the storage is slow, `write` waits; no line is dropped. The queue counts bytes, which an
    `asyncio.Queue` cannot: lines differ in size by a factor of a million.
    """

    def __init__(self, store: Store, task_id: TaskId, policy: FlushPolicy) -> None:
        self._store = store
        self._task_id = task_id
        self._policy = policy
        self._lines: deque[tuple[bytes | bytearray, float]] = deque()
        self._bytes = 0
        self._chunks = 0
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

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def write(self, line: bytes | bytearray) -> None:
        """Add a line, without its newline. Wait while the queue is full.

        Raises:
            StorageError: The log was given up, because no chunk could be written for `FlushPolicy.retry_seconds`.
        """
        while self._lines and self._bytes + len(line) > MAX_QUEUED_BYTES and self._failure is None:
            self._is_crowded = True
            self._check_queue.set()
            self._space.clear()
            await self._space.wait()
        if self._failure is not None:
            raise self._failure
        if self._closing:
            raise RuntimeError("The log is closed.")
        self._lines.append((line, asyncio.get_running_loop().time()))
        self._bytes += len(line)
        if len(self._lines) == 1 or self._is_full:
            self._check_queue.set()

    async def close(self) -> None:
        """Write what is left. Idempotent.

        Raises:
            StorageError: The log could not be written completely.
        """
        self._closing = True
        self._check_queue.set()
        if self._writing is not None:
            await asyncio.wait([self._writing])
        if self._failure is not None:
            raise self._failure

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
        while self._lines and len(chunk) < self._policy.flush_lines and size < MAX_CHUNK_BYTES:
            line, _ = self._lines.popleft()
            chunk.append(line)
            size += len(line)
        self._bytes -= size
        self._is_crowded = False
        self._space.set()
        return chunk

    async def _write_chunk(self, lines: Sequence[bytes | bytearray]) -> None:
        number, at = self._chunks + 1, dt.datetime.now(dt.UTC)
        retries = stamina.retry_context(
            on=_is_transient, attempts=None, timeout=self._policy.retry_seconds, wait_max=MAX_RETRY_DELAY_SECONDS
        )
        async for attempt in retries:
            with attempt:
                await self._store.add_chunk(self._task_id, number, lines, at)
        self._chunks = number


def _is_transient(error: Exception) -> bool:
    return isinstance(error, StorageError) and not isinstance(error, BlobExists)

"""The log of one task: lines in, gapless chunks in storage out."""

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

# --- writing a log ---------------------------------------------------------------------------------------------------

#: Bytes. A chunk is written when it has this many, so that one read of it stays cheap.
MAX_CHUNK_BYTES: Final = 1024 * 1024
#: Bytes that may wait for the storage; after that, the writer of lines waits. A longer line waits alone.
MAX_QUEUED_BYTES: Final = 4 * MAX_CHUNK_BYTES
#: Seconds until the first chunk of a task, so that readers see life at once.
FIRST_FLUSH_SECONDS: Final = 0.1
#: Seconds for which a chunk is offered to a storage that does not take it, before the log is given up.
STORAGE_RETRY_SECONDS: Final = 60.0
#: Seconds between two offers at the most.
MAX_RETRY_DELAY_SECONDS: Final = 5.0


@attrs.frozen(kw_only=True)
class FlushPolicy:
    """When a chunk is written: at so many lines, or so long (seconds) after its first line came."""

    flush_lines: int = 100
    flush_seconds: float = 1.0
    first_flush_seconds: float = FIRST_FLUSH_SECONDS
    retry_seconds: float = STORAGE_RETRY_SECONDS


class LogWriter:
    """The log of one task, written line by line through a bounded queue into gapless chunks.

    `async with` it: leaving writes what is left. The age of the first unwritten line counts, not the pause after the last,
    so that steady output does not put a chunk off. When the storage is slow, `write` waits; nothing is dropped. (An
    `asyncio.Queue` counts items; lines differ in size by a factor of a million, so this queue counts bytes too.)
    """

    def __init__(self, store: Store, task_id: TaskId, pace: FlushPolicy) -> None:
        self._store = store
        self._task_id = task_id
        self._pace = pace
        self._lines: deque[tuple[bytes | bytearray, float]] = deque()
        self._bytes = 0
        self._chunks = 0
        self._closing = False
        #: Whether a line waits for room, which also a queue of less than a chunk may not have for it.
        self._crowded = False
        self._failure: Exception | None = None
        self._given_up = asyncio.Event()
        #: Set when the writer of chunks has to look: the first line came, a chunk is full, or nothing more comes.
        self._news = asyncio.Event()
        #: Set when a waiting writer of lines has to look: there is room, or there never will be.
        self._room = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._writing = asyncio.create_task(self._write_chunks())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def write(self, line: bytes | bytearray) -> None:
        """Take one line, without its newline; wait while the queue is full.

        Raises:
            StorageError: The log was given up, because the storage took no chunk for `Pace.patience_seconds`.
        """
        while self._lines and self._bytes + len(line) > MAX_QUEUED_BYTES and self._failure is None:
            self._crowded = True
            self._news.set()
            self._room.clear()
            await self._room.wait()
        if self._failure is not None:
            raise self._failure
        if self._closing:
            raise RuntimeError("The log is closed.")
        self._lines.append((line, asyncio.get_running_loop().time()))
        self._bytes += len(line)
        if len(self._lines) == 1 or self._is_full:
            self._news.set()

    async def close(self) -> None:
        """Write what is left; closing twice is harmless.

        Raises:
            StorageError: Not all of the log could be written.
        """
        self._closing = True
        self._news.set()
        if self._writing is not None:
            await asyncio.wait([self._writing])
        if self._failure is not None:
            raise self._failure

    async def until_given_up(self) -> None:
        """Wait until the log is given up; for a writer whose next line may be long in coming."""
        await self._given_up.wait()

    @property
    def _is_full(self) -> bool:
        return len(self._lines) >= self._pace.flush_lines or self._bytes >= MAX_CHUNK_BYTES or self._crowded

    async def _write_chunks(self) -> None:
        try:
            while await self._chunk_is_due():
                await self._write_chunk(self._take())
        except Exception as error:  # Whatever it is, the writer of lines has to know, or it waits for ever.
            self._failure = error
            self._given_up.set()
        finally:
            self._room.set()

    async def _chunk_is_due(self) -> bool:
        """Wait until a chunk must be written; False when the log is closed and all of it is written."""
        while not self._lines and not self._closing:
            self._news.clear()
            await self._news.wait()
        if not self._lines:
            return False
        age = self._pace.flush_seconds if self._chunks else self._pace.first_flush_seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._lines[0][1] + age):
                while not self._is_full and not self._closing:
                    self._news.clear()
                    await self._news.wait()
        return True

    def _take(self) -> list[bytes | bytearray]:
        chunk: list[bytes | bytearray] = []
        size = 0
        while self._lines and len(chunk) < self._pace.flush_lines and size < MAX_CHUNK_BYTES:
            line, _ = self._lines.popleft()
            chunk.append(line)
            size += len(line)
        self._bytes -= size
        self._crowded = False
        self._room.set()
        return chunk

    async def _write_chunk(self, lines: Sequence[bytes | bytearray]) -> None:
        number, at = self._chunks + 1, dt.datetime.now(dt.UTC)
        retries = stamina.retry_context(
            on=_is_transient, attempts=None, timeout=self._pace.retry_seconds, wait_max=MAX_RETRY_DELAY_SECONDS
        )
        async for attempt in retries:
            with attempt:
                await self._store.add_chunk(self._task_id, number, lines, at)
        self._chunks = number


def _is_transient(error: Exception) -> bool:
    return isinstance(error, StorageError) and not isinstance(error, BlobExists)

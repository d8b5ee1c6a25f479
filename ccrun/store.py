"""The bucket's map: every object name, the task records, the payloads, the log, the uploads.

Records change only by compare-and-swap, in `Store.update`. Log chunks are gapless and their names sort in time order. Nothing
here opens a payload.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import re
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from typing import BinaryIO, Final, Self

import attrs
import stamina

from ccrun import wire
from ccrun.blobs import Blobs
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, StorageError, TaskExists, TaskNotFound
from ccrun.seal import Sealed
from ccrun.task import TASK_ID_PATTERN, Status, TaskId, TaskRecord

# --- object names: pure ----------------------------------------------------------------------------------------------

#: The digits of the first 999 chunks. See `chunk_code` for what follows.
CHUNK_DIGITS: Final = 3
#: Milliseconds since 1970 have 13 digits until the year 2286; taken from this, a later time gives a smaller number.
LAST_MILLISECOND: Final = 10**13 - 1

_CHUNK_NAME: Final = re.compile(r"([0-9]{3,})-[0-9]{8}-[0-9]{6}\.jsonl")


def folder(task_id: TaskId) -> str:
    """Return the prefix of all objects of a task."""
    return f"sessions/{task_id}/"


def record_name(task_id: TaskId) -> str:
    """Return the name of the task record."""
    return f"{folder(task_id)}metadata.json"


def payload_name(task_id: TaskId) -> str:
    """Return the name of the sealed request."""
    return f"{folder(task_id)}encrypted-payload.bin"


def upload_name(task_id: TaskId, path: str) -> str:
    """Return the name of a file that a task left, under its path in the place for uploads."""
    return f"{folder(task_id)}uploads/{path}"


def active_name(task_id: TaskId) -> str:
    """Return the name of the mark that a task is not over, or owes its callback."""
    return f"active/{task_id}"


def index_name(task_id: TaskId, created_at: dt.datetime) -> str:
    """Return the name under which a listing shows tasks newest first.

    The digits of the time are cut into folders, so that on a disk no folder grows with the number of tasks ever run: a
    listing looks into those of the days, hours and seconds that it shows, and no others.
    """
    newest_first = f"{LAST_MILLISECOND - round(created_at.timestamp() * 1000):013d}"
    return f"index/{newest_first[:5]}/{newest_first[5:8]}/{newest_first[8:]}-{task_id}"


def chunk_code(number: int) -> str:
    """Return the digits of a chunk: 001 to 999, then longer, so that plain string order stays the order of the numbers.

    A name goes on with a hyphen, which sorts before any digit: `999-` comes before `999000001-`. So when the codes of one
    width are used up, the last of them becomes the prefix of twice as many digits more, for as long as it takes.
    """
    prefix, width = "", CHUNK_DIGITS
    while number > (most := 10**width - 1):
        prefix, number, width = prefix + str(most), number - most, width * 2
    return f"{prefix}{number:0{width}d}"


def chunk_number(code: str) -> int:
    """Return the number of a chunk from its digits: the inverse of `chunk_code`."""
    number, width = 0, CHUNK_DIGITS
    while code:
        number, code, width = number + int(code[:width]), code[width:], width * 2
    return number


def chunk_name(task_id: TaskId, number: int, at: dt.datetime) -> str:
    """Return the name of a log chunk."""
    return f"{folder(task_id)}{chunk_code(number)}-{at.astimezone(dt.UTC):%Y%m%d-%H%M%S}.jsonl"


def _below_chunk(task_id: TaskId, number: int) -> str:
    """Return a name that sorts after every chunk before `number` and before that chunk."""
    return f"{folder(task_id)}{chunk_code(number - 1)}-~" if number > 1 else folder(task_id)


# --- facts -----------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class ChunkRef:
    """A log chunk as a listing shows it."""

    number: int
    name: str


@attrs.frozen(kw_only=True)
class Listing:
    """What one look at a task shows: its chunks from some number on, and the generation of its record.

    `record_generation` is None when more chunks follow than one listing shows.
    """

    chunks: Sequence[ChunkRef]
    record_generation: int | None


@attrs.frozen(kw_only=True)
class Page:
    """Some of the tasks, newest first. `next_cursor` asks for those that follow."""

    tasks: Sequence[TaskRecord]
    next_cursor: str | None


@attrs.frozen(kw_only=True)
class Mark:
    """That a task is not over or owes its callback, and when that began."""

    task_id: TaskId
    since: dt.datetime


@attrs.frozen(kw_only=True)
class Versioned:
    """A record and the generation that it was read at."""

    record: TaskRecord
    generation: int


# --- the store -------------------------------------------------------------------------------------------------------

#: Names in one listing: what Cloud Storage gives at once.
LISTING_NAMES: Final = 1000
#: Records that one page of `GET /tasks` may read while it looks for those of one status.
MAX_PAGE_READS: Final = 500
#: Records read side by side for a page.
PARALLEL_READS: Final = 20
#: Tries at a swap. Few parties ever write one record (API, worker, sweep), so losing this often means that something is wrong.
SWAP_ATTEMPTS: Final = 20
#: The name of a write. Two parties may write the same words in the same millisecond; only one of them may believe that it won.
SWAP_BYTES: Final = 8
#: Active tasks that one listing shows; see `Store.active`.
MAX_ACTIVE: Final = 20_000


class Store:
    """Tasks in a place that keeps blobs."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    async def check(self) -> None:
        """Raise `StorageError` when the storage does not work now."""
        await self._blobs.check()

    def logs_path(self, task_id: TaskId) -> str:
        """Return where the objects of a task are found from outside."""
        return self._blobs.url(folder(task_id))

    # Birth. `add_payload` and `mark_active` come first, `add` makes it a task.

    async def add_payload(self, task_id: TaskId, sealed: Sealed) -> None:
        """Keep the sealed request. Raises `TaskExists` when there is one under this ID."""
        try:
            await self._blobs.create(payload_name(task_id), sealed)
        except BlobExists:
            raise TaskExists(f"The task ID {task_id} is in use.") from None

    async def mark_active(self, task_id: TaskId) -> None:
        """Make sure that sweeps look at this task."""
        with contextlib.suppress(BlobExists):
            await self._blobs.create(active_name(task_id), b"")

    async def unmark_active(self, task_id: TaskId) -> None:
        """Tell sweeps that there is nothing left to do for this task, unless there is again meanwhile."""
        await self._blobs.delete(active_name(task_id))
        with contextlib.suppress(TaskNotFound):
            record = await self.record(task_id)
            if record.owes_callback or not record.status.is_final:
                await self.mark_active(task_id)

    async def add(self, record: TaskRecord) -> None:
        """Keep a new record, and its place in the list of tasks. Raises `TaskExists`, and then leaves no trace."""
        listed = index_name(record.task_id, record.created_at)
        record_added, index_added = await asyncio.gather(
            self._blobs.create(record_name(record.task_id), wire.record_to_bytes(record)),
            self._blobs.create(listed, b""),
            return_exceptions=True,
        )
        if isinstance(record_added, BaseException) and not isinstance(index_added, BaseException):
            await self._blobs.delete(listed)
        if isinstance(record_added, BlobExists):
            raise TaskExists(f"The task ID {record.task_id} is in use.")
        for failure in (record_added, index_added):
            if isinstance(failure, BaseException):
                raise failure

    # The payload.

    async def payload(self, task_id: TaskId) -> bytes:
        """Return the sealed request. Raises `BlobNotFound` when it was opened before."""
        return (await self._blobs.read(payload_name(task_id))).content

    async def delete_payload(self, task_id: TaskId) -> None:
        """Remove the sealed request; that there is none is no error."""
        await self._blobs.delete(payload_name(task_id))

    # The record.

    async def record(self, task_id: TaskId) -> TaskRecord:
        """Return the record. Raises `TaskNotFound`."""
        return (await self.versioned(task_id)).record

    async def versioned(self, task_id: TaskId) -> Versioned:
        """Return the record with its generation. Raises `TaskNotFound`."""
        try:
            blob = await self._blobs.read(record_name(task_id))
        except BlobNotFound:
            raise TaskNotFound(f"There is no task {task_id}.") from None
        return Versioned(record=wire.record_from_bytes(blob.content), generation=blob.generation)

    async def update(self, task_id: TaskId, change: Callable[[TaskRecord], TaskRecord]) -> TaskRecord:
        """Write what `change` makes of the record, on the very state that it saw; the one gate for every change of a task.

        `change` is called again when somebody else was faster, and may raise to leave the record as it is. A change that
        gives back the same record writes nothing.

        Raises:
            TaskNotFound: There is no such task.
            StorageError: The storage does not answer, or the swap was lost too often.
        """
        swap = secrets.token_hex(SWAP_BYTES)
        for _ in range(SWAP_ATTEMPTS):
            present = await self.versioned(task_id)
            if present.record.swap == swap:
                # The answer to our own write was lost, not the write.
                return await self._settled(present.record)
            changed = change(present.record)
            if changed == present.record:
                return present.record
            content = wire.record_to_bytes(attrs.evolve(changed, swap=swap))
            try:
                await self._blobs.replace(record_name(task_id), content, generation=present.generation)
            except BlobChanged:
                continue
            # As it is read by all others: times, for one, are kept in milliseconds.
            return await self._settled(wire.record_from_bytes(content))
        raise StorageError("The task record is being changed too often.")

    async def _settled(self, record: TaskRecord) -> TaskRecord:
        if record.status.is_final and not record.owes_callback:
            # The change is made, whatever becomes of this. The mark goes last: while it is there, a sweep tries again.
            with contextlib.suppress(StorageError):
                await self.clear_away(record.task_id)
        return record

    async def clear_away(self, task_id: TaskId) -> None:
        """Remove what only a task with something left to do needs: its payload, then its mark."""
        await self.delete_payload(task_id)
        await self.unmark_active(task_id)

    # Lists.

    async def active(self) -> list[Mark]:
        """Return the marks of the tasks that are not over or owe a callback, at most `MAX_ACTIVE` of them."""
        entries = await self._blobs.entries("active/", limit=MAX_ACTIVE)
        return [Mark(task_id=TaskId(entry.name.removeprefix("active/")), since=entry.updated) for entry in entries]

    async def records(self, task_ids: Sequence[TaskId]) -> list[TaskRecord | None]:
        """Return the records of these tasks in this order, None for one that is not there."""
        gate = asyncio.Semaphore(PARALLEL_READS)

        async def read(task_id: TaskId) -> TaskRecord | None:
            async with gate:
                try:
                    return await self.record(task_id)
                except TaskNotFound:
                    return None

        return await asyncio.gather(*(read(task_id) for task_id in task_ids))

    async def page(self, *, limit: int, cursor: str | None = None, status: Status | None = None) -> Page:
        """Return the newest tasks after the cursor.

        With `status` a page may hold fewer than `limit` and still have a `next_cursor`: it reads at most `MAX_PAGE_READS`
        records, so that no call grows with the number of tasks.

        Raises:
            ValueError: That is no cursor of ours.
        """
        after = f"index/{_checked_cursor(cursor)}" if cursor else ""
        tasks: list[TaskRecord] = []
        reads = 0
        while reads < MAX_PAGE_READS:
            entries = await self._blobs.entries("index/", after=after, limit=limit + 1)
            more, names = len(entries) > limit, [entry.name for entry in entries[:limit]]
            reads += len(names)
            found = await self.records([TaskId(name.partition("-")[2]) for name in names])
            for name, record in zip(names, found, strict=True):
                after = name
                if record is not None and status in (None, record.status):
                    tasks.append(record)
                    if len(tasks) == limit:
                        more = more or name != names[-1]
                        return Page(tasks=tasks, next_cursor=after.removeprefix("index/") if more else None)
            if not more:
                return Page(tasks=tasks, next_cursor=None)
        return Page(tasks=tasks, next_cursor=after.removeprefix("index/"))

    # Uploads.

    async def add_upload(self, task_id: TaskId, path: str, file: BinaryIO, *, size: int) -> str:
        """Keep what a file holds under a path among the uploads, and return where it is found from outside.

        Args:
            task_id: The task that left the file.
            path: In the place for uploads of the task.
            file: Opened for reading bytes, with a buffer; it is free again when this returns.
            size: Its bytes.

        Raises:
            BlobExists: There is one of that path.
            FileUnreadable: The file cannot be read, or has another size than that.
            StorageError: The storage does not take it.
            ValueError: The path leads out of that place, or is no name of an object.
        """
        name = upload_name(task_id, path)
        await self._blobs.create_from(name, file, size=size)
        return self._blobs.url(name)

    # The log, for readers.

    async def listing(self, task_id: TaskId, *, first: int) -> Listing:
        """Look at a task once: its chunks from number `first` on, and whether its record changed."""
        last = record_name(task_id)
        entries = await self._blobs.entries(
            folder(task_id), after=_below_chunk(task_id, first), before=last + "\x00", limit=LISTING_NAMES
        )
        chunks = [
            ChunkRef(number=chunk_number(match[1]), name=entry.name)
            for entry in entries
            if (match := _CHUNK_NAME.fullmatch(entry.name.removeprefix(folder(task_id))))
        ]
        generation = entries[-1].generation if entries and entries[-1].name == last else None
        return Listing(chunks=chunks, record_generation=generation)

    async def read_chunk(self, chunk: ChunkRef) -> bytes:
        """Return the lines of a chunk, each with its newline. Raises `BlobNotFound`."""
        return (await self._blobs.read(chunk.name)).content

    # The log, for its one writer.

    async def add_chunk(
        self, task_id: TaskId, number: int, lines: Sequence[bytes | bytearray], at: dt.datetime
    ) -> None:
        """Write a chunk; that this very chunk is there already is no error. Raises `BlobExists` for another one."""
        name = chunk_name(task_id, number, at)
        content: list[bytes | bytearray] = []
        for line in lines:
            content += (line, b"\n")
        try:
            await self._blobs.create(name, content)
        except BlobExists:
            # The answer to an earlier try was lost, not the chunk.
            if (await self._blobs.read(name)).content != b"".join(content):
                raise


def _checked_cursor(cursor: str) -> str:
    time, _, task_id = cursor.partition("-")
    if not re.fullmatch(r"[0-9]{5}/[0-9]{3}/[0-9]{5}", time) or not TASK_ID_PATTERN.fullmatch(task_id):
        raise ValueError("cursor must be the nextCursor of an earlier answer")
    return cursor


# --- writing a log ---------------------------------------------------------------------------------------------------

#: Bytes. A chunk is written when it has this many, so that one read of it stays cheap.
CHUNK_BYTES: Final = 1024 * 1024
#: Bytes that may wait for the storage; after that, the writer of lines waits. A longer line waits alone.
QUEUE_BYTES: Final = 4 * CHUNK_BYTES
#: Seconds until the first chunk of a task, so that readers see life at once.
FIRST_FLUSH_SECONDS: Final = 0.1
#: Seconds for which a chunk is offered to a storage that does not take it, before the log is given up.
STORAGE_PATIENCE_SECONDS: Final = 60.0
#: Seconds between two offers at the most.
MAX_RETRY_PAUSE_SECONDS: Final = 5.0


@attrs.frozen(kw_only=True)
class Pace:
    """When a chunk is written: at so many lines, or so long (seconds) after its first line came."""

    flush_lines: int = 100
    flush_seconds: float = 1.0
    first_flush_seconds: float = FIRST_FLUSH_SECONDS
    patience_seconds: float = STORAGE_PATIENCE_SECONDS


class LogWriter:
    """The log of one task, written line by line through a bounded queue into gapless chunks.

    `async with` it: leaving writes what is left. The age of the first unwritten line counts, not the pause after the last,
    so that steady output does not put a chunk off. When the storage is slow, `write` waits; nothing is dropped. (An
    `asyncio.Queue` counts items; lines differ in size by a factor of a million, so this queue counts bytes too.)
    """

    def __init__(self, store: Store, task_id: TaskId, pace: Pace) -> None:
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
        while self._lines and self._bytes + len(line) > QUEUE_BYTES and self._failure is None:
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
        return len(self._lines) >= self._pace.flush_lines or self._bytes >= CHUNK_BYTES or self._crowded

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
        while self._lines and len(chunk) < self._pace.flush_lines and size < CHUNK_BYTES:
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
            on=_may_pass, attempts=None, timeout=self._pace.patience_seconds, wait_max=MAX_RETRY_PAUSE_SECONDS
        )
        async for attempt in retries:
            with attempt:
                await self._store.add_chunk(self._task_id, number, lines, at)
        self._chunks = number


def _may_pass(error: Exception) -> bool:
    return isinstance(error, StorageError) and not isinstance(error, BlobExists)

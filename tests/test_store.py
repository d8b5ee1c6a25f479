from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import json
import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ccrun import codec, names
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.blobs import Blob, BlobInfo
from ccrun.errors import (
    BlobChanged,
    BlobExists,
    BlobNotFound,
    IllegalTransition,
    StorageError,
    TaskExists,
    TaskNotFound,
)
from ccrun.lifecycle import finish, owe_callback, record_delivery, request_cancel, start
from ccrun.seal import Sealed
from ccrun.store import LISTING_NAMES, MAX_PAGE_READS, UPDATE_ATTEMPTS, Store
from ccrun.task import CallbackInfo, CallbackState, Outcome, Reason, Status, TaskId, TaskRecord, TaskType
from ccrun.worker.log_writer import MAX_CHUNK_BYTES, MAX_QUEUED_BYTES, FlushPolicy, LogWriter

TASK = TaskId("t-1")
NOW = dt.datetime(2025, 3, 4, 5, 6, 7, tzinfo=dt.UTC)
SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0)

#: Examples of one test must not see each other's tasks.
fresh = itertools.count()


class WatchedBlobs(DirectoryBlobs):
    """A folder that counts its calls, and lets a test act right before or after one."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.listings = 0
        self.reads: list[str] = []
        self.replacements = 0
        self.before_replace: Callable[[], object] | None = None
        self.after_delete: Callable[[], object] | None = None
        self.replies_to_lose = 0
        self.deleted: list[str] = []

    async def read(self, name: str) -> Blob:
        self.reads.append(name)
        return await super().read(name)

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        self.listings += 1
        return await super().entries(prefix, after=after, before=before, limit=limit)

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        self.replacements += 1
        if self.before_replace is not None:
            act, self.before_replace = self.before_replace, None
            await asyncio.to_thread(act)
        written = await super().replace(name, content, generation=generation)
        if self.replies_to_lose:
            self.replies_to_lose -= 1
            raise BlobChanged
        return written

    async def delete(self, name: str) -> None:
        self.deleted.append(name)
        await super().delete(name)
        if self.after_delete is not None:
            act, self.after_delete = self.after_delete, None
            await asyncio.to_thread(act)


@pytest.fixture
def blobs(tmp_path: Path) -> WatchedBlobs:
    """Where the store of a test keeps its objects."""
    return WatchedBlobs(tmp_path / "blobs")


@pytest.fixture
def store(blobs: WatchedBlobs) -> Store:
    """The store of a test."""
    return Store(blobs)


@pytest.fixture
def other(tmp_path: Path) -> Store:
    """The same tasks as another process sees them."""
    return Store(DirectoryBlobs(tmp_path / "blobs"))


def pending(task_id: str = "t-1", created_at: dt.datetime = NOW, webhook: CallbackInfo | None = None) -> TaskRecord:
    """Return the record of a task that has just been asked for."""
    return TaskRecord(
        task_id=TaskId(task_id),
        type=TaskType.ASYNC,
        status=Status.PENDING,
        created_at=created_at,
        logs_path=f"file:///sessions/{task_id}/",
        webhook=webhook,
    )


def begin(record: TaskRecord) -> TaskRecord:
    """Change a record as a worker does that takes up its task."""
    return start(record, at=NOW)


async def everything(blobs: DirectoryBlobs) -> list[str]:
    """Return the names of all objects."""
    return [entry.name for entry in await blobs.entries("", limit=10_000)]


# --- names -----------------------------------------------------------------------------------------------------------


def test_every_object_has_its_name() -> None:
    """The objects of a task stand where users of the bucket look for them."""
    at = dt.datetime(2025, 3, 4, 5, 6, 7, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    assert [
        "sessions/t-1/",
        "sessions/t-1/encrypted-payload.bin",
        "sessions/t-1/007-20250304-030607.jsonl",
        "sessions/t-1/metadata.json",
        "active/t-1",
        "index/82589/352/32999-t-1",
    ] == [
        names.task_prefix(TASK),
        names.payload_name(TASK),
        names.chunk_name(TASK, 7, at),
        names.record_name(TASK),
        names.active_name(TASK),
        names.index_name(TASK, at + dt.timedelta(hours=2)),
    ]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (1, "001"),
        (999, "999"),
        (1000, "999000001"),
        (1000 + 999_998, "999999999"),
        (1000 + 999_999, "999999999000000000001"),
    ],
)
def test_codes_grow_where_a_width_is_used_up(number: int, code: str) -> None:
    """Chunks have three digits up to 999, and then as many more as it takes."""
    assert code == names.chunk_code(number)


numbers = st.one_of(
    st.integers(1, 2000), st.integers(1_000_900, 1_001_100), st.integers(1, 10**13), st.integers(1, 10**40)
)
moments = st.integers(0, names.LAST_MILLISECOND * 1000).map(
    lambda microseconds: dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=microseconds)
)


@given(numbers)
@example(999)
@example(1000)
@example(1_000_998)
@example(1_000_999)
@example(1_000_998 + 10**12 - 1)
@example(1_000_998 + 10**12)
def test_number_is_read_back_from_its_code(number: int) -> None:
    """The digits in a chunk's name tell its number, whatever that is."""
    assert number == names.chunk_number(names.chunk_code(number))


@given(numbers, numbers, moments, moments)
@example(999, 1000, NOW, NOW)
@example(1000, 9999, NOW, NOW)
@example(1_000_998, 1_000_999, NOW, NOW)
def test_string_order_of_chunks_is_their_order(one: int, two: int, at: dt.datetime, later: dt.datetime) -> None:
    """Whichever chunk has the higher number has the name that sorts later, whenever both were written."""
    first, second = names.chunk_name(TASK, one, at), names.chunk_name(TASK, two, later)
    if one != two:
        assert (one < two) == (first < second)


def test_chunks_sort_the_same_in_javascript(tmp_path: Path) -> None:
    """A page in a browser that sorts the names with `localeCompare` gets the order of the numbers."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    edges = [*range(1, 1200), *range(1_000_900, 1_001_100), 10**12, 1_000_998 + 10**12, 10**12 + 10**7]
    in_order = [names.chunk_name(TASK, number, NOW) for number in sorted(edges)]
    program = tmp_path / "sort.js"
    program.write_text(
        "const names = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        "console.log(JSON.stringify(names.reverse().sort((a, b) => a.localeCompare(b))));"
    )
    done = subprocess.run([node, program], input=json.dumps(in_order).encode(), stdout=subprocess.PIPE, check=True)
    assert in_order == json.loads(done.stdout)


@given(moments, moments)
@example(NOW, NOW + dt.timedelta(milliseconds=1))
def test_index_shows_the_newest_first(one: dt.datetime, two: dt.datetime) -> None:
    """Of two tasks, the one made later, to the millisecond, has the place in the list that sorts first."""
    first, second = names.index_name(TASK, one), names.index_name(TASK, two)
    if abs(one - two) >= dt.timedelta(milliseconds=1):
        assert (one < two) == (second < first)


# --- birth -----------------------------------------------------------------------------------------------------------


async def test_task_is_kept(store: Store) -> None:
    """What was added is read back, and listed."""
    await store.add(pending())
    assert pending() == await store.record(TASK)
    assert [pending()] == (await store.page(limit=10)).tasks


async def test_second_task_of_an_id_leaves_no_trace(store: Store, blobs: WatchedBlobs) -> None:
    """An ID that is in use is refused, and nothing was written when it is."""
    await store.add(pending())
    before = await everything(blobs)
    with pytest.raises(TaskExists):
        await store.add(pending(created_at=NOW + dt.timedelta(hours=1)))
    assert before == await everything(blobs)


async def test_unknown_task_is_told(store: Store) -> None:
    """Reading or changing a task that is not there says so."""
    with pytest.raises(TaskNotFound):
        await store.record(TASK)
    with pytest.raises(TaskNotFound):
        await store.update(TASK, begin)


async def test_payload_is_kept_until_it_is_deleted(store: Store) -> None:
    """The sealed request is read back, cannot be overwritten, and is gone once deleted."""
    await store.add_payload(TASK, Sealed(b"sealed"))
    with pytest.raises(TaskExists):
        await store.add_payload(TASK, Sealed(b"another"))
    assert await store.payload(TASK) == b"sealed"
    await store.delete_payload(TASK)
    await store.delete_payload(TASK)
    with pytest.raises(BlobNotFound):
        await store.payload(TASK)


# --- changes of the record -------------------------------------------------------------------------------------------


async def test_change_is_written_and_returned(store: Store) -> None:
    """`update` returns the record as all others read it, where times are in milliseconds."""
    await store.add(pending())
    updated = await store.update(TASK, lambda record: start(record, at=NOW + dt.timedelta(microseconds=1234)))
    assert attrs.evolve(begin(pending()), started_at=NOW + dt.timedelta(milliseconds=1)) == updated
    assert updated == await store.record(TASK)


@pytest.mark.parametrize(
    ("webhook", "delete_payload", "expected"),
    [
        (None, True, [names.payload_name(TASK), names.active_name(TASK)]),
        (None, False, [names.active_name(TASK)]),
        (CallbackInfo(), True, [names.payload_name(TASK)]),
        (CallbackInfo(), False, []),
    ],
)
async def test_payload_is_deleted_once_when_a_task_becomes_final(
    store: Store, blobs: WatchedBlobs, webhook: CallbackInfo | None, *, delete_payload: bool, expected: list[str]
) -> None:
    """The final write deletes the payload, unless the caller has; the mark stays while the callback is owed."""
    await store.add(begin(pending(webhook=webhook)))
    final = await store.update(TASK, lambda record: finish(record, SUCCESS, at=NOW), delete_payload=delete_payload)
    assert expected == blobs.deleted
    if webhook is None:
        return
    blobs.deleted.clear()
    assert final.webhook is not None
    delivered = attrs.evolve(final.webhook, state=CallbackState.DELIVERED, next_attempt_at=None)
    await store.update(TASK, lambda record: attrs.evolve(record, webhook=delivered))
    assert [names.active_name(TASK)] == blobs.deleted


async def test_change_that_changes_nothing_writes_nothing(store: Store, blobs: WatchedBlobs) -> None:
    """A change that gives the same record back costs no write."""
    await store.add(pending())
    assert pending() == await store.update(TASK, lambda record: record)
    assert blobs.replacements == 0


async def test_change_that_raises_leaves_the_record(store: Store, blobs: WatchedBlobs) -> None:
    """What a change raises comes out, and nothing is written."""
    await store.add(begin(pending()))
    with pytest.raises(IllegalTransition):
        await store.update(TASK, begin)
    assert blobs.replacements == 0


async def test_change_is_made_again_on_what_somebody_else_wrote(
    store: Store, blobs: WatchedBlobs, other: Store
) -> None:
    """A write that came in between is not lost: the change is made on top of it."""
    await store.add(pending())
    blobs.before_replace = lambda: asyncio.run(other.update(TASK, begin))
    later = NOW + dt.timedelta(seconds=1)
    updated = await store.update(TASK, lambda record: request_cancel(record, at=later))
    assert attrs.evolve(begin(pending()), cancelled_at=later) == updated


async def test_no_change_of_many_at_once_is_lost(store: Store) -> None:
    """Ten who change a record at the same time all have their change in it."""
    await store.add(pending(webhook=CallbackInfo()))

    def count(record: TaskRecord) -> TaskRecord:
        assert record.webhook is not None
        return attrs.evolve(record, webhook=attrs.evolve(record.webhook, attempts=record.webhook.attempts + 1))

    await asyncio.gather(*(store.update(TASK, count) for _ in range(10)))
    assert pending(webhook=CallbackInfo(attempts=10)) == await store.record(TASK)


async def test_own_write_is_known_though_its_answer_was_lost(store: Store, blobs: WatchedBlobs) -> None:
    """A change that was written is not made a second time when the storage says that it was not."""
    await store.add(pending())
    blobs.replies_to_lose = 1
    assert begin(pending()) == await store.update(TASK, begin)
    assert blobs.replacements == 1


async def test_same_write_of_another_is_not_taken_for_the_own(store: Store, blobs: WatchedBlobs, other: Store) -> None:
    """Of two who claim a task in the same millisecond and so write the same words, one loses."""
    await store.add(pending())
    blobs.before_replace = lambda: asyncio.run(other.update(TASK, begin))
    with pytest.raises(IllegalTransition):
        await store.update(TASK, begin)


async def test_swap_that_is_always_lost_is_given_up(store: Store, blobs: WatchedBlobs, other: Store) -> None:
    """A record that somebody else changes before each try ends in an error, not in a loop."""
    await store.add(pending(webhook=CallbackInfo()))

    def meddle() -> None:
        asyncio.run(other.update(TASK, lambda record: owe_callback(record, at=dt.datetime.now(dt.UTC))))
        blobs.before_replace = meddle

    blobs.before_replace = meddle
    with pytest.raises(StorageError, match="changed by other processes too often"):
        await store.update(TASK, begin)
    assert blobs.replacements == UPDATE_ATTEMPTS


async def test_who_wrote_a_record_is_nobody_elses_business(store: Store) -> None:
    """The name of a write is not shown to callers."""
    await store.add(pending())
    shown = codec.record_to_public(await store.update(TASK, begin))
    assert "writeId" not in shown


# --- marks -----------------------------------------------------------------------------------------------------------


async def marked(store: Store) -> list[TaskId]:
    """Return the tasks that a sweep would look at."""
    return [mark.task_id for mark in await store.active()]


async def test_mark_tells_since_when(store: Store) -> None:
    """A mark has the time at which it was first made; marking again changes nothing."""
    await store.mark_active(TASK)
    (first,) = await store.active()
    await store.mark_active(TASK)
    assert [first] == await store.active()
    assert abs(first.since - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)


async def test_end_of_a_task_without_callback_takes_its_mark(store: Store) -> None:
    """Nobody looks at a task any more that is over and owes nothing."""
    await store.mark_active(TASK)
    await store.add(pending())
    await store.update(TASK, begin)
    assert [TASK] == await marked(store)
    await store.update(TASK, lambda record: finish(record, SUCCESS, at=NOW))
    assert await marked(store) == []


async def test_mark_stays_until_the_callback_is_delivered(store: Store) -> None:
    """A task that is over is looked at for as long as it owes its callback."""
    await store.mark_active(TASK)
    await store.add(begin(pending(webhook=CallbackInfo())))
    await store.update(TASK, lambda record: finish(record, SUCCESS, at=NOW))
    assert [TASK] == await marked(store)
    await store.update(TASK, lambda record: record_delivery(record, delivered=True, attempts=1, error=None, at=NOW))
    assert await marked(store) == []


async def test_debt_made_while_the_mark_is_removed_is_not_forgotten(
    store: Store, blobs: WatchedBlobs, other: Store
) -> None:
    """When a callback is wished again just as the task's mark goes, the mark comes back."""
    await store.add(finish(begin(pending(webhook=CallbackInfo(state=CallbackState.DELIVERED))), SUCCESS, at=NOW))
    await store.mark_active(TASK)
    blobs.after_delete = lambda: asyncio.run(
        other.update(TASK, lambda record: owe_callback(record, at=NOW + dt.timedelta(seconds=1)))
    )
    await store.unmark_active(TASK)
    assert [TASK] == await marked(store)


# --- lists -----------------------------------------------------------------------------------------------------------


async def add_tasks(store: Store, count: int) -> list[TaskRecord]:
    """Add so many tasks, a millisecond apart; return them, newest first. Every tenth is failed."""
    tasks = [
        pending(f"t-{number}", NOW + dt.timedelta(milliseconds=number))
        if number % 10
        else attrs.evolve(pending(f"t-{number}", NOW + dt.timedelta(milliseconds=number)), status=Status.FAILED)
        for number in range(count)
    ]
    await asyncio.gather(*(store.add(task) for task in tasks))
    return tasks[::-1]


@pytest.mark.parametrize("limit", [1, 7, 10, 12, 100])
async def test_pages_show_every_task_once(store: Store, limit: int) -> None:
    """Page after page shows all tasks, newest first, and each page but the last is full."""
    tasks = await add_tasks(store, 23)
    cursor, pages = None, []
    while True:
        page = await store.page(limit=limit, cursor=cursor)
        pages.append(list(page.tasks))
        if (cursor := page.next_cursor) is None:
            break
    assert [tasks[start : start + limit] for start in range(0, 23, limit)] == pages


async def test_page_goes_on_where_the_last_one_ended(store: Store) -> None:
    """A task that comes between two pages is not on the second, and nothing is there twice."""
    tasks = await add_tasks(store, 4)
    first = await store.page(limit=2)
    await store.add(pending("newer", NOW + dt.timedelta(hours=1)))
    second = await store.page(limit=2, cursor=first.next_cursor)
    assert tasks == [*first.tasks, *second.tasks]


async def test_page_costs_one_listing(store: Store, blobs: WatchedBlobs) -> None:
    """However many tasks there are, a page is one listing and as many reads as it has tasks."""
    await add_tasks(store, 60)
    cursor = (await store.page(limit=5)).next_cursor
    blobs.listings, blobs.reads = 0, []
    await store.page(limit=5, cursor=cursor)
    assert (blobs.listings, len(blobs.reads)) == (1, 5)


async def test_pages_of_one_status_show_each_of_its_tasks_once(store: Store) -> None:
    """Asked for one status, pages hold the tasks of that status alone, and the last one says that it is."""
    tasks = await add_tasks(store, 45)
    first = await store.page(limit=3, status=Status.FAILED)
    second = await store.page(limit=3, status=Status.FAILED, cursor=first.next_cursor)
    assert [task for task in tasks if task.status is Status.FAILED] == [*first.tasks, *second.tasks]
    assert second.next_cursor is None


async def test_page_that_is_full_early_says_that_more_follows(store: Store) -> None:
    """A page of one status that is full before the end of the list has a cursor, and what follows is not lost."""
    for number, status in enumerate([Status.FAILED, Status.FAILED, Status.PENDING, Status.FAILED]):
        await store.add(attrs.evolve(pending(f"t-{number}", NOW + dt.timedelta(milliseconds=number)), status=status))
    first = await store.page(limit=2, status=Status.FAILED)
    second = await store.page(limit=2, status=Status.FAILED, cursor=first.next_cursor)
    assert ["t-3", "t-1", "t-0"] == [task.task_id for task in (*first.tasks, *second.tasks)]


async def test_search_for_a_status_is_bounded(store: Store, blobs: WatchedBlobs) -> None:
    """A page of a status that no task has reads so many records and no more; its cursor goes on from there."""
    await add_tasks(store, MAX_PAGE_READS + 20)
    blobs.reads = []
    page = await store.page(limit=100, status=Status.COMPLETED)
    assert ([], MAX_PAGE_READS) == (page.tasks, len(blobs.reads))
    last = await store.page(limit=100, status=Status.COMPLETED, cursor=page.next_cursor)
    assert ([], None, MAX_PAGE_READS + 20) == (last.tasks, last.next_cursor, len(blobs.reads))


async def test_task_that_was_removed_is_passed_over(store: Store, blobs: WatchedBlobs) -> None:
    """A place in the list whose record is gone does not break the page."""
    tasks = await add_tasks(store, 5)
    await blobs.delete(names.record_name(tasks[1].task_id))
    page = await store.page(limit=2)
    assert [tasks[0], tasks[2]] == page.tasks
    assert [tasks[3], tasks[4]] == (await store.page(limit=2, cursor=page.next_cursor)).tasks


@pytest.mark.parametrize(
    "cursor",
    [
        "x",
        "../../x",
        "00000/000/00000-",
        "00000/000/00000-../x",
        "00000/000/00000-a/b",
        "0/0/0-t",
        "\u0660" * 5 + "/000/00000-t",
    ],
)
async def test_made_up_cursor_is_refused(store: Store, cursor: str) -> None:
    """A cursor that no page gave is an error of the caller, and no listing is made."""
    with pytest.raises(ValueError, match="cursor must be the nextCursor of an earlier response"):
        await store.page(limit=1, cursor=cursor)


async def test_records_come_in_the_order_asked_for(store: Store) -> None:
    """Many records are read at once; one that is not there is None."""
    await add_tasks(store, 3)
    found = await store.records([TaskId("t-2"), TaskId("gone"), TaskId("t-0")])
    assert ["t-2", None, "t-0"] == [record and record.task_id for record in found]


# --- the log, read ---------------------------------------------------------------------------------------------------


async def test_listing_shows_chunks_and_the_record(store: Store) -> None:
    """One look shows the chunks from a number on and the generation of the record, and no other object."""
    await store.add_payload(TASK, Sealed(b""))
    await store.add(pending())
    for number in range(1, 4):
        await store.add_chunk(TASK, number, [b"line"], NOW)
    listing = await store.listing(TASK, first=2)
    assert [2, 3] == [chunk.number for chunk in listing.chunks]
    assert (await store.read_versioned(TASK)).generation == listing.record_generation
    assert [] == (await store.listing(TASK, first=4)).chunks


@pytest.mark.parametrize("first", [1, 2, 999, 1000, 1001])
async def test_listing_begins_at_any_number(store: Store, blobs: WatchedBlobs, first: int) -> None:
    """Chunks before the first one asked for are not listed, whenever they were written, also where the digits change."""
    for number, hour in ((1, 3), (2, 2), (998, 9), (999, 8), (1000, 7), (1001, 6)):
        await store.add_chunk(TASK, number, [b""], NOW.replace(hour=hour))
    listing = await store.listing(TASK, first=first)
    assert [number for number in (1, 2, 998, 999, 1000, 1001) if number >= first] == [
        chunk.number for chunk in listing.chunks
    ]


async def test_long_log_is_listed_in_parts(store: Store, tmp_path: Path) -> None:
    """A log of more chunks than one listing shows says that there are more, by not telling of the record."""
    await store.add(pending())
    for number in range(1, LISTING_NAMES + 3):
        (tmp_path / "blobs" / names.chunk_name(TASK, number, NOW)).touch()
    listing = await store.listing(TASK, first=1)
    assert (LISTING_NAMES, None) == (len(listing.chunks), listing.record_generation)
    rest = await store.listing(TASK, first=LISTING_NAMES + 1)
    assert [LISTING_NAMES + 1, LISTING_NAMES + 2] == [chunk.number for chunk in rest.chunks]
    assert rest.record_generation is not None


# --- the log, written ------------------------------------------------------------------------------------------------


class SlowBlobs(DirectoryBlobs):
    """A storage that takes a chunk when a test lets it, or not at all."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened = asyncio.Event()
        self.errors: list[type[StorageError]] = []
        self.refusals = 0.0

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        await self.opened.wait()
        if self.refusals:
            self.refusals -= 1
            raise StorageError
        written = await super().create(name, content)
        if self.errors:
            raise self.errors.pop()
        return written


#: Only the number of lines makes a chunk.
PATIENT = FlushPolicy(flush_lines=100, flush_seconds=3600, first_flush_seconds=3600)


async def chunks(store: Store, task_id: TaskId = TASK) -> list[bytes]:
    """Return the contents of the chunks of a log; check that they are numbered without a gap."""
    listing = await store.listing(task_id, first=1)
    assert list(range(1, len(listing.chunks) + 1)) == [chunk.number for chunk in listing.chunks]
    return [await store.read_chunk(chunk) for chunk in listing.chunks]


async def until_chunks(store: Store, count: int) -> None:
    """Wait until the log has so many chunks, within a bound."""
    async with asyncio.timeout(10):
        while len((await store.listing(TASK, first=1)).chunks) < count:
            await asyncio.sleep(0.002)


async def test_hundred_lines_make_a_chunk(store: Store) -> None:
    """A chunk is written when it has a hundred lines, and the rest when the log is closed."""
    lines = [b"line %d" % number for number in range(250)]
    async with LogWriter(store, TASK, PATIENT) as writer:
        for line in lines:
            await writer.write(line)
        await until_chunks(store, 2)
    assert [100, 100, 50] == [content.count(b"\n") for content in await chunks(store)]
    assert b"".join(line + b"\n" for line in lines) == b"".join(await chunks(store))


async def test_mebibyte_makes_a_chunk(store: Store) -> None:
    """A chunk is written when it has a MiB, however few lines that is."""
    async with LogWriter(store, TASK, PATIENT) as writer:
        for _ in range(24):
            await writer.write(b"x" * (MAX_CHUNK_BYTES // 4))
        await until_chunks(store, 6)
        await writer.write(b"more")
    assert [4, 4, 4, 4, 4, 4, 1] == [content.count(b"\n") for content in await chunks(store)]


async def test_age_makes_a_chunk_under_steady_output(store: Store) -> None:
    """Lines that keep coming do not put off the chunk of those that are waiting."""
    pace = attrs.evolve(PATIENT, flush_lines=10**9, flush_seconds=0.05, first_flush_seconds=0.05)
    async with LogWriter(store, TASK, pace) as writer:
        waiting = asyncio.create_task(until_chunks(store, 3))
        while not waiting.done():
            await writer.write(b"line")
            await asyncio.sleep(0.001)
        await waiting


async def test_first_chunk_comes_sooner(store: Store) -> None:
    """The first line is stored after the first chunk's own time, which is a tenth of a second unless told otherwise."""
    pace = attrs.evolve(PATIENT, first_flush_seconds=FlushPolicy().first_flush_seconds)
    began = asyncio.get_running_loop().time()
    async with LogWriter(store, TASK, pace) as writer:
        await writer.write(b"first")
        await until_chunks(store, 1)
        assert asyncio.get_running_loop().time() - began >= 0.1
        await writer.write(b"second")
    assert [b"first\n", b"second\n"] == await chunks(store)


async def test_line_after_a_pause_is_stored_in_time(store: Store) -> None:
    """The age counts from the first unwritten line, not from the last chunk: a line after a pause waits its time."""
    pace = attrs.evolve(PATIENT, flush_seconds=0.03, first_flush_seconds=0.03)
    async with LogWriter(store, TASK, pace) as writer:
        for number in range(1, 4):
            await writer.write(b"line")
            await until_chunks(store, number)


async def test_slow_storage_slows_the_writer_of_lines(tmp_path: Path) -> None:
    """While the storage takes nothing, so much waits in memory and no more; then nothing is missing."""
    blobs = SlowBlobs(tmp_path)
    store = Store(blobs)
    line = b"x" * (256 * 1024)
    written = 0

    async def write_all() -> None:
        nonlocal written
        for _ in range(40):
            await writer.write(line)
            written += len(line)

    async with LogWriter(store, TASK, PATIENT) as writer:
        writing = asyncio.create_task(write_all())
        async with asyncio.timeout(10):
            while written < MAX_QUEUED_BYTES:
                await asyncio.sleep(0)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert MAX_QUEUED_BYTES <= written <= MAX_QUEUED_BYTES + MAX_CHUNK_BYTES
        blobs.opened.set()
        await writing
    assert (line + b"\n") * 40 == b"".join(await chunks(store))


async def test_storage_that_comes_back_gets_everything(tmp_path: Path) -> None:
    """A chunk that the storage did not take is offered again, under the same number, and nothing is missing."""
    blobs = SlowBlobs(tmp_path)
    blobs.opened.set()
    blobs.refusals = 1
    store = Store(blobs)
    async with LogWriter(store, TASK, attrs.evolve(PATIENT, flush_lines=1)) as writer:
        await writer.write(b"one")
        await writer.write(b"two")
    assert [b"one\n", b"two\n"] == await chunks(store)


@pytest.mark.parametrize("fault", [StorageError, BlobExists])
async def test_chunk_whose_answer_was_lost_is_not_written_twice(tmp_path: Path, fault: type[StorageError]) -> None:
    """When the storage took a chunk and says that it did not, or that it is there already, the log goes on behind it."""
    blobs = SlowBlobs(tmp_path)
    blobs.opened.set()
    blobs.errors = [fault]
    store = Store(blobs)
    async with LogWriter(store, TASK, attrs.evolve(PATIENT, flush_lines=1)) as writer:
        await writer.write(b"one")
        await writer.write(b"two")
    assert [b"one\n", b"two\n"] == await chunks(store)


async def test_chunk_of_another_writer_is_not_taken_for_the_own(store: Store) -> None:
    """A name that holds something else is an error at once: lines are never dropped in silence."""
    await store.add_chunk(TASK, 1, [b"of another"], NOW)
    await store.add_chunk(TASK, 1, [b"of another"], NOW)
    with pytest.raises(BlobExists):
        await store.add_chunk(TASK, 1, [b"our own"], NOW)


async def test_log_is_given_up_when_the_storage_stays_away(tmp_path: Path) -> None:
    """After the patience, a waiting writer of lines, each later one and the close are told."""
    blobs = SlowBlobs(tmp_path)
    blobs.refusals = math.inf
    writer = LogWriter(Store(blobs), TASK, attrs.evolve(PATIENT, flush_lines=1, retry_seconds=0.01))
    line = b"x" * MAX_QUEUED_BYTES

    async def write_for_ever() -> None:
        async with writer:
            while True:
                await writer.write(line)

    async with asyncio.timeout(10):
        writing = asyncio.create_task(write_for_ever())
        await asyncio.sleep(0)
        blobs.opened.set()
        with pytest.raises(StorageError):
            await writing
        with pytest.raises(StorageError):
            await writer.write(b"more")
        with pytest.raises(StorageError):
            await writer.close()


async def test_line_of_64_mebibytes_is_stored(store: Store) -> None:
    """One line may be larger than the whole queue; it waits alone and is stored whole."""
    line = bytearray(b"x") * (64 * 1024 * 1024)
    async with LogWriter(store, TASK, PATIENT) as writer:
        await writer.write(b"before")
        await writer.write(line)
        await writer.write(b"after")
    stored = b"".join(await chunks(store))
    # Compared outside of the assertion, which would spell out what differs.
    is_whole = stored == b"before\n" + line + b"\nafter\n"
    assert is_whole


async def test_closing_twice_is_harmless(store: Store) -> None:
    """A log that is closed can be closed again, and takes no more lines."""
    async with LogWriter(store, TASK, PATIENT) as writer:
        await writer.write(b"line")
        await writer.close()
        await writer.close()
        with pytest.raises(RuntimeError, match=r"The log is closed\."):
            await writer.write(b"late")
    assert [b"line\n"] == await chunks(store)


async def test_log_without_lines_has_no_chunk(store: Store) -> None:
    """A task that prints nothing leaves no chunk."""
    async with LogWriter(store, TASK, PATIENT):
        pass
    assert await chunks(store) == []


@given(
    sizes=st.lists(
        st.sampled_from([0, 1, 70, 5000, MAX_CHUNK_BYTES // 2, MAX_CHUNK_BYTES, MAX_CHUNK_BYTES + 1]), max_size=30
    ),
    flush_lines=st.sampled_from([1, 2, 7, 100]),
    flush_seconds=st.sampled_from([0.0, 0.0005, 3600]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_log_has_every_line_once_and_in_order(
    store: Store, sizes: list[int], flush_lines: int, flush_seconds: float
) -> None:
    """Whatever is written at whatever pace, the chunks, gapless, hold the lines and nothing else."""
    task_id = TaskId(f"example-{next(fresh)}")
    pace = FlushPolicy(flush_lines=flush_lines, flush_seconds=flush_seconds, first_flush_seconds=flush_seconds)
    lines = [b"%d" % number * (size // len(b"%d" % number)) for number, size in enumerate(sizes)]
    async with LogWriter(store, task_id, pace) as writer:
        for line in lines:
            await writer.write(line)
    stored = await chunks(store, task_id)
    assert b"".join(line + b"\n" for line in lines) == b"".join(stored)
    assert all(1 <= content.count(b"\n") <= flush_lines for content in stored)

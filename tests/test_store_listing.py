from __future__ import annotations

import asyncio
import datetime as dt
from pathlib import Path

import attrs
import pytest
from helpers.store import NOW, WatchedBlobs, pending

from ccrun import names
from ccrun.store import MAX_PAGE_READS, Store
from ccrun.task import Status, TaskId, TaskRecord


@pytest.fixture
def blobs(tmp_path: Path) -> WatchedBlobs:
    """Return an empty storage."""
    return WatchedBlobs(tmp_path / "blobs")


@pytest.fixture
def store(blobs: WatchedBlobs) -> Store:
    """Return a store that uses this storage."""
    return Store(blobs)


async def add_tasks(store: Store, count: int) -> list[TaskRecord]:
    """Add tasks with creation times a millisecond apart; return them, newest first. Every tenth has failed."""
    tasks = [
        pending(f"t-{number}", NOW + dt.timedelta(milliseconds=number))
        if number % 10
        else attrs.evolve(pending(f"t-{number}", NOW + dt.timedelta(milliseconds=number)), status=Status.FAILED)
        for number in range(count)
    ]
    await asyncio.gather(*(store.add(task) for task in tasks))
    return tasks[::-1]


@pytest.mark.parametrize("limit", [1, 7, 10, 12, 100])
async def test_pages_have_every_task_once(store: Store, limit: int) -> None:
    """The pages have all tasks, newest first, and only the last page may have fewer tasks than the limit."""
    tasks = await add_tasks(store, 23)
    cursor, pages = None, []
    while True:
        page = await store.page(limit=limit, cursor=cursor)
        pages.append(list(page.tasks))
        if (cursor := page.next_cursor) is None:
            break
    assert [tasks[start : start + limit] for start in range(0, 23, limit)] == pages


async def test_new_task_does_not_shift_pages(store: Store) -> None:
    """A task that is added between two pages is not on the second page, and shifts no task onto it."""
    tasks = await add_tasks(store, 4)
    first = await store.page(limit=2)
    await store.add(pending("newer", NOW + dt.timedelta(hours=1)))
    second = await store.page(limit=2, cursor=first.next_cursor)
    assert tasks == [*first.tasks, *second.tasks]


async def test_page_needs_one_listing(store: Store, blobs: WatchedBlobs) -> None:
    """A page needs one listing and one read for each of its tasks, independent of the number of tasks."""
    await add_tasks(store, 60)
    cursor = (await store.page(limit=5)).next_cursor
    blobs.listings, blobs.reads = 0, []
    await store.page(limit=5, cursor=cursor)
    assert (blobs.listings, len(blobs.reads)) == (1, 5)


async def test_pages_can_be_filtered_by_status(store: Store) -> None:
    """With a status, the pages have each task with that status once, and the last page has no cursor."""
    tasks = await add_tasks(store, 45)
    first = await store.page(limit=3, wanted=has_failed)
    second = await store.page(limit=3, wanted=has_failed, cursor=first.next_cursor)
    assert [task for task in tasks if task.status is Status.FAILED] == [*first.tasks, *second.tasks]
    assert second.next_cursor is None


def has_failed(record: TaskRecord) -> bool:
    """Select failed tasks."""
    return record.status is Status.FAILED


def is_completed(record: TaskRecord) -> bool:
    """Select completed tasks."""
    return record.status is Status.COMPLETED


async def test_full_page_of_a_status_has_a_cursor(store: Store) -> None:
    """A filtered page that is full before the end of the list has a cursor, which leads to the remaining tasks."""
    for number, status in enumerate([Status.FAILED, Status.FAILED, Status.PENDING, Status.FAILED]):
        await store.add(attrs.evolve(pending(f"t-{number}", NOW + dt.timedelta(milliseconds=number)), status=status))
    first = await store.page(limit=2, wanted=has_failed)
    second = await store.page(limit=2, wanted=has_failed, cursor=first.next_cursor)
    assert ["t-3", "t-1", "t-0"] == [task.task_id for task in (*first.tasks, *second.tasks)]


async def test_reads_of_a_filtered_page_are_bounded(store: Store, blobs: WatchedBlobs) -> None:
    """A page of a status that no task has reads at most `MAX_PAGE_READS` records; its cursor continues after them."""
    await add_tasks(store, MAX_PAGE_READS + 20)
    blobs.reads = []
    page = await store.page(limit=100, wanted=is_completed)
    assert ([], MAX_PAGE_READS) == (page.tasks, len(blobs.reads))
    last = await store.page(limit=100, wanted=is_completed, cursor=page.next_cursor)
    assert ([], None, MAX_PAGE_READS + 20) == (last.tasks, last.next_cursor, len(blobs.reads))


async def test_task_without_a_record_is_skipped(store: Store, blobs: WatchedBlobs) -> None:
    """An index entry whose record was deleted is not on the page, and does not shorten it."""
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
async def test_invalid_cursor_is_rejected(store: Store, cursor: str) -> None:
    """A cursor that is not the `next_cursor` of a page raises `ValueError`."""
    with pytest.raises(ValueError, match="cursor must be the nextCursor of an earlier response"):
        await store.page(limit=1, cursor=cursor)


async def test_records_are_in_the_given_order(store: Store) -> None:
    """The records have the order of the IDs, with None for a task that does not exist."""
    await add_tasks(store, 3)
    found = await store.records([TaskId("t-2"), TaskId("missing"), TaskId("t-0")])
    assert ["t-2", None, "t-0"] == [record and record.task_id for record in found]

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
    """Where the store of a test keeps its objects."""
    return WatchedBlobs(tmp_path / "blobs")


@pytest.fixture
def store(blobs: WatchedBlobs) -> Store:
    """The store of a test."""
    return Store(blobs)


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

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

from helpers.feed import (
    NOW,
    START,
    TASK,
    WatchedBlobs,
    add_chunk,
    blobs,
    feed,
    finish_task,
    follow,
    following,
    ids_in,
    line_at,
    line_ids,
    start_task,
    store,
    until,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ccrun.api.feed import CaughtUp, Feed, Finished, Idle
from ccrun.api.poller import PollPolicy
from ccrun.api.sse import Cursor, parse_cursor
from ccrun.errors import TaskNotFound
from ccrun.names import chunk_name
from ccrun.store import Store
from ccrun.task import Status, TaskId
from ccrun.task_logs import LISTING_NAMES

__all__ = ["blobs", "feed", "store"]


#: Numbers for task IDs, since the examples of one test share a store.
task_numbers = itertools.count()


# --- what a reader receives ------------------------------------------------------------------------------------------


async def test_finished_task_is_replayed(store: Store, feed: Feed) -> None:
    """A reader of a finished task gets all lines, `CaughtUp` and the end."""
    await start_task(store)
    for chunk in (1, 2, 3):
        await add_chunk(store, chunk)
    await finish_task(store)
    assert [*line_ids(1, 2, 3), CaughtUp, Status.COMPLETED] == await follow(feed)


async def test_finished_task_without_lines_is_replayed(store: Store, feed: Feed) -> None:
    """A reader of a task without a log gets `CaughtUp` and the end."""
    await start_task(store)
    await finish_task(store)
    assert [CaughtUp, Status.COMPLETED] == await follow(feed)


async def test_unknown_task_raises_an_error(feed: Feed) -> None:
    """Following a task that does not exist fails, for each of several concurrent readers."""
    outcomes = await asyncio.gather(*(follow(feed) for _ in range(5)), return_exceptions=True)
    assert [TaskNotFound] * 5 == [type(outcome) for outcome in outcomes]


async def test_running_task_is_followed(store: Store, feed: Feed) -> None:
    """A reader gets each chunk when it is stored, `CaughtUp` once, and the end last."""
    await start_task(store)
    await add_chunk(store, 1)
    async with following(feed) as seen:
        await until(lambda: CaughtUp in seen)
        for chunk in (2, 3):
            await add_chunk(store, chunk)
            await until(lambda chunk=chunk: line_ids(chunk)[-1] in seen)  # type: ignore[misc]
        await finish_task(store)
    assert [*line_ids(1), CaughtUp, *line_ids(2, 3), Status.COMPLETED] == seen


async def test_second_reader_gets_the_whole_log(store: Store, feed: Feed) -> None:
    """A reader that joins while another one reads gets the log from its start, and then the same new lines."""
    await start_task(store)
    await add_chunk(store, 1)
    async with following(feed) as early:
        await add_chunk(store, 2)
        await until(lambda: "2:2" in early)
        async with following(feed) as late:
            await add_chunk(store, 3)
            await finish_task(store)
    assert [*line_ids(1), CaughtUp, *line_ids(2, 3), Status.COMPLETED] == early
    assert [*line_ids(1, 2), CaughtUp, *line_ids(3), Status.COMPLETED] == late


async def test_reader_without_a_cursor_gets_only_new_lines(store: Store, feed: Feed) -> None:
    """With `after=None`, a reader gets no line that was stored before, and all later ones."""
    await start_task(store)
    await add_chunk(store, 1)
    async with following(feed, after=None) as seen:
        await add_chunk(store, 2)
        await finish_task(store)
    assert [CaughtUp, *line_ids(2), Status.COMPLETED] == seen


async def test_reader_resumes_after_any_line(store: Store, feed: Feed) -> None:
    """A reader that resumes after a line gets exactly the lines after it."""
    await start_task(store)
    for chunk in (1, 2, 3):
        await add_chunk(store, chunk, lines=3)
    await finish_task(store)
    everything = line_ids(1, 2, 3, lines=3)
    for position, line_id in enumerate(everything, 1):
        seen = await follow(feed, after=parse_cursor(line_id))
        assert [*everything[position:], CaughtUp, Status.COMPLETED] == seen


async def test_cursor_beyond_the_log_gets_the_end(store: Store, feed: Feed) -> None:
    """With a cursor behind the last line of a finished task, a reader gets only the end."""
    await start_task(store)
    await add_chunk(store, 1)
    await finish_task(store)
    assert [CaughtUp, Status.COMPLETED] == await follow(feed, after=Cursor(10**15 - 1, 10**15 - 1))
    assert [CaughtUp, Status.COMPLETED] == await follow(feed, after=Cursor(1, 10**15 - 1))


async def test_idle_reader_gets_idle_items(store: Store, feed: Feed) -> None:
    """While nothing is stored, a reader gets `Idle` repeatedly, so that it can send heartbeats."""
    await start_task(store)
    async with asyncio.timeout(10), feed.follow(TASK, after=START) as reader:
        items = reader.items(idle_seconds=0.005)
        kinds = [type(await anext(items)) for _ in range(3)]
        await finish_task(store)
        async for item in items:
            last = item
    assert ([CaughtUp, Idle, Idle], Finished) == (kinds, type(last))


async def test_record_is_updated_by_polls(store: Store, feed: Feed) -> None:
    """The record of a reader changes with the task."""
    await start_task(store)
    async with feed.follow(TASK, after=START) as reader:
        assert reader.record.status is Status.RUNNING
        await finish_task(store)
        await until(lambda: reader.record.status is Status.COMPLETED)


async def test_log_of_several_listings_is_replayed(store: Store, feed: Feed, tmp_path: Path) -> None:
    """A log with more chunks than one listing returns is replayed completely."""
    await start_task(store)
    count = 2 * LISTING_NAMES + 5
    for chunk in range(1, count + 1):
        (tmp_path / chunk_name(TASK, chunk, NOW)).write_bytes(line_at(chunk, 1) + b"\n")
    await finish_task(store)
    seen = await follow(feed)
    assert [*line_ids(*range(1, count + 1), lines=1), CaughtUp, Status.COMPLETED] == seen


# --- order -----------------------------------------------------------------------------------------------------------


async def test_chunk_waits_for_the_chunk_before_it(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """A chunk that is listed before the previous one is delivered after it."""
    await start_task(store)
    await add_chunk(store, 1)
    async with following(feed) as seen:
        await add_chunk(store, 3)
        polled = blobs.calls["listing"]
        await until(lambda: blobs.calls["listing"] > polled + 3)
        assert [*line_ids(1), CaughtUp] == seen
        await add_chunk(store, 2)
        await finish_task(store)
    assert [*line_ids(1), CaughtUp, *line_ids(2, 3), Status.COMPLETED] == seen


async def test_deleted_chunks_of_a_finished_task_are_skipped(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """When chunks of a finished task were deleted, readers get the others."""
    await start_task(store)
    for chunk in (1, 2, 3, 4):
        await add_chunk(store, chunk)
    await finish_task(store)
    await blobs.delete(chunk_name(TASK, 1, NOW))
    await blobs.delete(chunk_name(TASK, 3, NOW))
    assert [*line_ids(2, 4), CaughtUp, Status.COMPLETED] == await follow(feed)


@given(
    schedule=st.lists(st.integers(0, 3), max_size=14),
    chunks=st.integers(0, 4),
    readers=st.integers(1, 3),
    after=st.sampled_from([START, Cursor(1, 1), Cursor(2, 2)]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_line_is_lost_in_any_order_of_polls_and_writes(
    store: Store, blobs: WatchedBlobs, schedule: list[int], chunks: int, readers: int, after: Cursor
) -> None:
    """In any order of the feed's reads and the worker's writes, each reader gets each line once."""
    task_id = TaskId(f"example-{next(task_numbers)}")
    await start_task(store, task_id)
    waits = iter(schedule)

    async def work() -> AsyncIterator[None]:
        for chunk in range(1, chunks + 1):
            await add_chunk(store, chunk, task_id=task_id)
            yield
        await finish_task(store, task_id)
        yield

    worker, gate = work(), asyncio.Lock()

    async def between() -> None:
        async with gate:
            # As many steps as the schedule has next; one when it is exhausted.
            for _ in range(next(waits, 1)):
                with contextlib.suppress(StopAsyncIteration):
                    await anext(worker)

    blobs.between = between
    feed = Feed(Store(blobs), PollPolicy(min_seconds=0, max_seconds=0))
    expected = [each for each in line_ids(*range(1, chunks + 1)) if (parse_cursor(each) or START) > after]
    for seen in await asyncio.gather(*(follow(feed, after, task_id) for _ in range(readers))):
        assert expected == ids_in(seen)
        assert (Status.COMPLETED, 1) == (seen[-1], seen.count(CaughtUp))
    blobs.between = None

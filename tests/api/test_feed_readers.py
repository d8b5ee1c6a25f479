from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from helpers.feed import (
    NOW,
    QUICK,
    START,
    TASK,
    Seen,
    WatchedBlobs,
    add_chunk,
    blobs,
    event_ids,
    feed,
    finish_task,
    follow,
    following,
    ids_in,
    line_at,
    line_ids,
    read_items,
    start_task,
    store,
    until,
)

from ccrun.api.feed import CaughtUp, Feed, Finished, Lines
from ccrun.api.poller import PollPolicy
from ccrun.errors import StorageError, TaskNotFound
from ccrun.names import chunk_name, record_name
from ccrun.store import Store
from ccrun.task import Status

__all__ = ["blobs", "feed", "store"]


# --- several readers -------------------------------------------------------------------------------------------------


async def test_readers_share_polls_and_reads(store: Store, blobs: WatchedBlobs) -> None:
    """A hundred readers need no more listings than one, and each chunk is read once."""
    await start_task(store)
    # A constant delay, which limits the polls of one poller on any machine. A hundred pollers would exceed the limit.
    delay = 0.01
    feed = Feed(Store(blobs), PollPolicy(min_seconds=delay, max_seconds=delay))
    seen: list[Seen] = [[] for _ in range(100)]
    async with asyncio.timeout(20), contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        followers = [await stack.enter_async_context(feed.follow(TASK, after=None)) for _ in seen]
        reading = [group.create_task(read_items(reader, mine)) for reader, mine in zip(followers, seen, strict=True)]
        for chunk in range(1, 11):
            await add_chunk(store, chunk)
            await until(lambda: all(line_ids(chunk)[-1] in mine for mine in seen))  # noqa: B023
        seconds = loop.time() - started_at
        listings = blobs.calls["listing"]
        for task in reading:
            task.cancel()
    assert [[CaughtUp, *line_ids(*range(1, 11))]] * 100 == seen
    assert {1} == {count for name, count in blobs.calls.items() if name.endswith(".jsonl")}
    # The first reader causes one more.
    assert listings <= seconds / delay + 1


async def test_slow_reader_delays_no_other(store: Store, blobs: WatchedBlobs, tmp_path: Path) -> None:
    """While one reader stalls, others read to the end and the cache stays within its limit; then the slow one gets everything."""
    await start_task(store)
    window = 2000
    feed = Feed(Store(blobs), QUICK, window_bytes=window)
    async with asyncio.timeout(20), feed.follow(TASK, after=START) as slow:
        await add_chunk(store, 1)
        items = slow.items(idle_seconds=60)
        assert type(await anext(items)) is CaughtUp
        for chunk in range(2, 101):
            (tmp_path / chunk_name(TASK, chunk, NOW)).write_bytes(line_at(chunk, 1) + b"\n" + line_at(chunk, 2) + b"\n")
        await finish_task(store)
        assert line_ids(*range(1, 101)) == ids_in(await follow(feed))
        cached = feed._pollers[TASK]._window
        assert 0 < sum(map(len, cached.values())) <= window
        rest = [item async for item in items]
    assert line_ids(*range(1, 101)) == [
        each for item in rest if isinstance(item, Lines) for each in event_ids(item.events)
    ]
    assert type(rest[-1]) is Finished


async def test_cancelled_readers_do_not_disturb_others(store: Store, feed: Feed) -> None:
    """When all but one of the readers that wait for a chunk are cancelled, the last one still gets it."""
    await start_task(store)
    async with following(feed) as seen:
        others = [asyncio.create_task(follow(feed)) for _ in range(5)]
        await until(lambda: feed.readers(TASK) == 6)
        await add_chunk(store, 1)
        for other in others:
            other.cancel()
        await asyncio.wait(others)
        assert feed.readers(TASK) == 1
        await add_chunk(store, 2)
        await finish_task(store)
    assert line_ids(1, 2) == ids_in(seen)


async def test_reader_cancelled_at_any_step_leaves_nothing_behind(store: Store, feed: Feed) -> None:
    """A reader can be cancelled at any step, even during the first poll; the fixture checks that nothing remains."""
    await start_task(store)
    await add_chunk(store, 1)
    for steps in range(30):
        reading = asyncio.create_task(follow(feed))
        for _ in range(steps):
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert feed.readers(TASK) == 0


async def test_first_poll_survives_a_cancelled_reader(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """Concurrent readers share the first poll; when one is cancelled, the poll continues for the others."""
    await start_task(store)
    await finish_task(store)
    polling, proceed = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        polling.set()
        await proceed.wait()

    blobs.between = wait
    leaving, staying = asyncio.create_task(follow(feed)), asyncio.create_task(follow(feed))
    await polling.wait()
    leaving.cancel()
    await asyncio.wait([leaving])
    proceed.set()
    assert [CaughtUp, Status.COMPLETED] == await staying


async def test_readers_are_counted(store: Store, feed: Feed) -> None:
    """The feed counts the readers of a task."""
    await start_task(store)
    assert feed.readers(TASK) == 0
    async with feed.follow(TASK, after=START):
        async with feed.follow(TASK, after=START):
            assert feed.readers(TASK) == 2
        assert feed.readers(TASK) == 1
    assert feed.readers(TASK) == 0


async def test_idle_task_is_polled_less_often(store: Store, blobs: WatchedBlobs) -> None:
    """The delay between polls grows with the time without changes, up to its maximum."""
    await start_task(store)
    feed = Feed(Store(blobs), PollPolicy(min_seconds=0.001, max_seconds=60))
    async with feed.follow(TASK, after=START):
        started_at = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > started_at + 0.5)
    # Each delay is a quarter of the time before it: about 25 polls in half a second. With a constant delay there would be 500.
    assert blobs.calls["listing"] < 60


# --- storage that fails ----------------------------------------------------------------------------------------------


async def test_error_of_the_first_poll_is_raised(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """A reader gets the error of the first poll; the next reader polls again."""
    await start_task(store)
    await finish_task(store)
    blobs.errors["listing"] = 1
    with pytest.raises(StorageError):
        await follow(feed)
    assert [CaughtUp, Status.COMPLETED] == await follow(feed)


@pytest.mark.parametrize("operation", ["listing", "metadata.json"])
async def test_failed_polls_are_retried(store: Store, feed: Feed, blobs: WatchedBlobs, operation: str) -> None:
    """Some failed polls delay a reader and lose nothing."""
    await start_task(store)
    async with following(feed) as seen:
        await until(lambda: CaughtUp in seen)
        blobs.errors[operation] = 3
        await add_chunk(store, 1)
        await finish_task(store)
    assert [CaughtUp, *line_ids(1), Status.COMPLETED] == seen
    assert blobs.errors[operation] == 0


async def test_end_waits_for_the_last_chunks(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """When the listing after the final record fails, the end is delivered only after another listing."""
    await start_task(store)

    async def fail_after_the_record() -> None:
        if blobs.calls["metadata.json"]:
            blobs.between = None
            blobs.errors["listing"] = 1

    async with following(feed) as seen:
        await until(lambda: CaughtUp in seen)
        blobs.calls.clear()
        blobs.between = fail_after_the_record
        await add_chunk(store, 1)
        await finish_task(store)
    assert [CaughtUp, *line_ids(1), Status.COMPLETED] == seen
    assert blobs.errors["listing"] == 0


async def test_failed_read_of_a_chunk_is_retried(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """A chunk whose read fails at first is delivered to all readers that wait for it."""
    await start_task(store)
    await add_chunk(store, 1)
    await finish_task(store)
    blobs.errors[chunk_name(TASK, 1, NOW).rpartition("/")[2]] = 1
    first, second = await asyncio.gather(follow(feed), follow(feed))
    assert [*line_ids(1), CaughtUp, Status.COMPLETED] == first == second


async def test_readers_of_a_deleted_task_get_an_error(store: Store, feed: Feed, blobs: WatchedBlobs) -> None:
    """When a task is deleted while it is read, its readers get an error and no end."""
    await start_task(store)
    await add_chunk(store, 1)
    with pytest.raises(ExceptionGroup) as raised:
        async with following(feed) as seen:
            await until(lambda: CaughtUp in seen)
            await blobs.delete(record_name(TASK))
    assert raised.group_contains(TaskNotFound)
    assert [*line_ids(1), CaughtUp] == seen

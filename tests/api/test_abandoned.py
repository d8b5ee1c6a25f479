"""Two instances of the API on one storage."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from helpers.api import Api, api_on, until
from helpers.service import WAIT_SECONDS

from ccrun.api.dependencies import ApiTimeouts
from ccrun.task import TaskId

#: Seconds that a client has to return.
GRACE_SECONDS = 1.0
TASK = TaskId("one")


@pytest.fixture
async def instances(tmp_path: Path) -> AsyncIterator[list[Api]]:
    """Two APIs on one directory."""
    async with contextlib.AsyncExitStack() as stack:
        timeouts = ApiTimeouts(abandon=GRACE_SECONDS)
        yield [await stack.enter_async_context(api_on(tmp_path / "data", timeouts=timeouts)) for _ in range(2)]


@contextlib.asynccontextmanager
async def reader_at(api: Api, *, runs: bool = False) -> AsyncIterator[None]:
    """Read the events of the task; with `runs`, send the request that submits it."""
    async with aiohttp.ClientSession() as http:
        request = (
            http.post(f"{api.url}/run", json=api.body(taskId=TASK), headers={"Idempotency-Key": "made-up-key"})
            if runs
            else http.get(f"{api.url}/tasks/{TASK}/events")
        )
        async with request as response:
            assert response.status == 200
            await response.content.readline()
            yield


async def until_lease(api: Api, *, exists: bool) -> None:
    """Wait until there is a lease on the task, or none."""
    async with asyncio.timeout(WAIT_SECONDS):
        while exists is (await api.store.leases.get(TASK) is None):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("runs", [False, True])
async def test_reader_on_another_instance_keeps_the_task(instances: list[Api], runs: bool) -> None:
    """It reads the events, or repeats the request with its key. The task is cancelled when it leaves too."""
    one, two = instances
    async with reader_at(one, runs=True):
        await one.start(TASK)
    async with reader_at(two, runs=runs):
        await asyncio.sleep(3 * GRACE_SECONDS)  # That nothing happens is visible only after waiting.
        assert [] == one.jobs.cancelled + two.jobs.cancelled
    await until(lambda: two.jobs.cancelled == [TASK])
    assert [] == one.jobs.cancelled
    await until_lease(one, exists=False)


async def test_nothing_is_stored_while_the_instance_has_readers(instances: list[Api]) -> None:
    """Neither when the submitter leaves others, nor when a reader of another instance leaves. The last one to leave matters."""
    one, two = instances
    async with contextlib.AsyncExitStack() as submitter:
        await submitter.enter_async_context(reader_at(one, runs=True))
        await one.start(TASK)
        async with reader_at(two):
            pass
        async with reader_at(one):
            await submitter.aclose()
            await asyncio.sleep(2 * GRACE_SECONDS)
            assert await one.store.leases.get(TASK) is None
    await until(lambda: one.jobs.cancelled == [TASK])
    assert [] == two.jobs.cancelled


async def test_finished_task_has_no_lease(instances: list[Api]) -> None:
    """A client that comes back to another instance and stays to the end leaves nothing behind."""
    one, two = instances
    async with reader_at(one, runs=True):
        await one.start(TASK)
    await until_lease(one, exists=True)
    reading = asyncio.create_task(two.events(f"/tasks/{TASK}/events"))
    await until(lambda: two.feed.readers(TASK) == 1)
    await one.finish(TASK)
    assert "done" == (await reading)[-1].name
    await until_lease(one, exists=False)
    assert [] == one.jobs.cancelled + two.jobs.cancelled

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import pytest
from helpers.api import Api, until
from helpers.service import Event, read_events
from helpers.submit import api

from ccrun.errors import StorageError
from ccrun.task import Status, TaskId

__all__ = ["api"]


# --- POST /run -------------------------------------------------------------------------------------------------------


async def test_run_streams_the_whole_task(api: Api) -> None:
    """A header has the task ID before the first event; then all events of the task follow."""
    async with api.http.post(f"{api.url}/run", json=api.body(taskId="one")) as response:
        assert (200, "one") == (response.status, response.headers["X-Task-Id"])
        events = read_events(response)
        assert Event(
            name="task",
            data={"taskId": "one", "status": "pending", "logsPath": api.store.logs_path(TaskId("one"))},
            id="1:0",
        ) == await anext(events)
        await api.start(TaskId("one"))
        await api.add_chunk(TaskId("one"), 1, b'{"n":1}', b'{"n":2}')
        await api.finish(TaskId("one"))
        rest = [event async for event in events]
    # A poll may find the task running, or only when it has finished.
    assert ["caught_up", *["message"] * 2, "done"] == [event.name for event in rest if event.name != "status"]
    assert ["1:1", "1:2"] == [event.id for event in rest if event.name == "message"]
    assert "sync" == (await api.call("GET", "/tasks/one")).body["type"]


async def test_repeated_run_resumes_after_the_last_event(api: Api) -> None:
    """A client that repeats its request with the same key gets no line twice, and nothing after the end."""
    headers = {"Idempotency-Key": "key"}
    async with api.http.post(f"{api.url}/run", json=api.body(), headers=headers) as response:
        task_id = TaskId(response.headers["X-Task-Id"])
    await api.start(task_id)
    await api.add_chunk(task_id, 1, b'{"n":1}', b'{"n":2}')
    await api.finish(task_id)
    resumed = {**headers, "Last-Event-ID": "1:1"}
    async with api.http.post(f"{api.url}/run", json=api.body(), headers=resumed) as response:
        assert ["1:2"] == [event.id async for event in read_events(response) if event.name == "message"]
    async with api.http.post(
        f"{api.url}/run", json=api.body(), headers={**headers, "Last-Event-ID": "end"}
    ) as response:
        assert (204, task_id) == (response.status, response.headers["X-Task-Id"])


async def test_run_responds_after_the_task_is_stored(api: Api) -> None:
    """There is no response before the task is stored; a storage error is a regular error response."""
    api.blobs.gate = asyncio.Event()
    request = asyncio.create_task(api.call("POST", "/run", json=api.body()))
    await until(lambda: api.blobs.waiting > 0)
    assert not request.done()
    api.blobs.error = StorageError()
    api.blobs.gate.set()
    assert (503, {"error": "The storage does not answer."}) == ((await request).status, (await request).body)


# --- clients of /run that disconnect ---------------------------------------------------------------------------------


async def disconnect_from_run(api: Api) -> TaskId:
    """Submit a task over `/run`, read its first bytes and disconnect. Return its ID."""
    async with aiohttp.ClientSession() as http, http.post(f"{api.url}/run", json=api.body()) as response:
        task_id = TaskId(response.headers["X-Task-Id"])
        await api.start(task_id)
        await response.content.readline()
    return task_id


async def test_abandoned_task_is_cancelled(api: Api) -> None:
    """After the grace period, the task is cancelled."""
    task_id = await disconnect_from_run(api)
    await until(lambda: api.jobs.cancelled == [task_id])
    assert (await api.store.record(task_id)).is_cancelling


async def test_abandoned_task_with_another_reader_continues(api: Api) -> None:
    """A client that reads the events at the end of the grace period keeps the task running."""
    async with contextlib.AsyncExitStack() as reading:
        async with aiohttp.ClientSession() as http, http.post(f"{api.url}/run", json=api.body()) as response:
            task_id = TaskId(response.headers["X-Task-Id"])
            await api.start(task_id)
            reader = await reading.enter_async_context(api.http.get(f"{api.url}/tasks/{task_id}/events"))
        await asyncio.sleep(0.3)  # Three times the grace period. That nothing happens is visible only after waiting.
        assert [] == api.jobs.cancelled
        await api.finish(task_id)
        assert (await reader.read()).endswith(await api.done_event(task_id))


async def test_task_abandoned_during_submission_is_cancelled(api: Api) -> None:
    """A client that disconnects before the response does not know the ID; its task is cancelled too."""
    api.key.gate = asyncio.Event()
    request = asyncio.create_task(api.call("POST", "/run", json=api.body(taskId="one")))
    await until(lambda: api.key.waiting == 1)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    # The server notices the disconnection before the key service responds.
    await asyncio.sleep(0.05)
    api.key.gate.set()
    await until(lambda: api.jobs.cancelled == ["one"])
    assert Status.CANCELLED is (await api.store.record(TaskId("one"))).status


async def test_abandoned_request_does_not_cancel_a_task_with_the_same_id(api: Api) -> None:
    """A request for an ID in use, whose client disconnects, does not cancel the existing task."""
    await api.submit(taskId="one")
    api.key.gate = asyncio.Event()
    request = asyncio.create_task(api.call("POST", "/run", json=api.body(taskId="one")))
    await until(lambda: api.key.waiting == 1)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    await asyncio.sleep(0.05)
    api.key.gate.set()
    await asyncio.sleep(0.3)  # Three times the grace period.
    assert ([], Status.PENDING) == (api.jobs.cancelled, (await api.store.record(TaskId("one"))).status)


@pytest.mark.parametrize("path", ["/run-async", "/run"])
async def test_disconnected_reader_of_events_cancels_nothing(api: Api, path: str) -> None:
    """Neither a reader of `/events` that disconnects nor a client of `/run` that stays to the end cancels the task."""
    async with contextlib.AsyncExitStack() as running:
        body = api.body(taskId="one", callbackUrl="http://127.0.0.1:9/")
        owner = await running.enter_async_context(api.http.post(api.url + path, json=body))
        await api.start(TaskId("one"))
        async with aiohttp.ClientSession() as http, http.get(f"{api.url}/tasks/one/events") as response:
            await response.content.readline()
        await asyncio.sleep(0.3)  # Three times the grace period.
        assert [] == api.jobs.cancelled
        await api.finish(TaskId("one"))
        await owner.read()
    await asyncio.sleep(0.2)
    assert [] == api.jobs.cancelled

"""Tasks, workers and receivers for sweeps."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.backends.local.key import LocalKey
from ccrun.callbacks import deliver, guard
from ccrun.callbacks.owed import OwedCallbacks
from ccrun.jobs import ExecutionState
from ccrun.lifecycle import finish, start
from ccrun.seal import Purpose, Sealed, new_data_key
from ccrun.store import Store
from ccrun.sweep import Sweeper
from ccrun.task import CallbackInfo, Outcome, Reason, Secret, Status, TaskId, TaskRecord, TaskType

NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)


SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0)


class FakeJobs:
    """An adapter that runs no workers, and reports the states that the test sets."""

    max_running: int | None = None
    start_timeout: dt.timedelta | None = None
    launch_time: dt.timedelta = dt.timedelta(0)

    def __init__(self) -> None:
        self.states: dict[TaskId, ExecutionState | Exception] = {}
        self.launched: list[TaskId] = []
        self.launch_error: Exception | None = None
        self.with_leftovers: list[TaskId] = []
        self.cleared: list[TaskId] = []

    def check_capacity(self) -> None: ...

    def queue_position(self, task_id: TaskId) -> int | None:
        return None

    async def launch(self, task_id: TaskId) -> str | None:
        if self.launch_error is not None:
            raise self.launch_error
        self.launched.append(task_id)
        self.states[task_id] = ExecutionState.QUEUED
        return None

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        raise AssertionError

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        state = self.states.get(task_id, ExecutionState.UNKNOWN)
        if isinstance(state, Exception):
            raise state
        return state

    async def launched_states(self, task_ids: Collection[TaskId]) -> Mapping[TaskId, ExecutionState]:
        return {task_id: await self.state(task_id, None) for task_id in task_ids}

    async def clear(self, task_id: TaskId) -> None:
        self.cleared.append(task_id)

    async def leftovers(self) -> list[TaskId]:
        return self.with_leftovers


class Receiver:
    """Records callbacks, and responds with a status that the test sets; for tasks in `hanging`, not before `released` is set."""

    def __init__(self) -> None:
        self.task_ids: list[str] = []
        self.status = 200
        self.hanging: set[str] = set()
        self.released = asyncio.Event()
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        """Record the ID of the task, and respond."""
        task_id = (await request.json())["taskId"]
        self.task_ids.append(task_id)
        if task_id in self.hanging:
            await self.released.wait()
        return web.Response(status=self.status)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """Start a receiver on loopback."""
    async with serve_receiver() as receiver:
        yield receiver


@contextlib.asynccontextmanager
async def serve_receiver() -> AsyncIterator[Receiver]:
    """Serve a receiver on a port of its own."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.handle)
    async with TestServer(app) as server:
        receiver.url = str(server.make_url("/hook"))
        yield receiver
        receiver.released.set()


@pytest.fixture
def jobs() -> FakeJobs:
    """Return the adapter that reports the states of workers."""
    return FakeJobs()


@pytest.fixture
def make_sweeper(tmp_path: Path, jobs: FakeJobs) -> Callable[[], Sweeper]:
    """Return a function that creates a sweeper, as a separate process would."""

    def make() -> Sweeper:
        store = Store(DirectoryBlobs(tmp_path / "blobs"))
        callbacks = OwedCallbacks(
            store=store,
            wrapper=LocalKey(tmp_path / "sealing.key"),
            secret=Secret("made-up secret"),
            guard=guard.CallbackGuard(everywhere=True),
            policy=deliver.RetryPolicy(attempt_seconds=10, attempts=1, total_seconds=10),
        )
        return Sweeper(store=store, jobs=jobs, callbacks=callbacks, launches_pending=True)

    return make


@pytest.fixture
def sweeper(make_sweeper: Callable[[], Sweeper]) -> Sweeper:
    """Return a sweeper."""
    return make_sweeper()


async def pending(sweeper: Sweeper, task_id: str = "t-1", url: str = "", created_at: dt.datetime = NOW) -> TaskRecord:
    """Return the record of a new task, with a callback if there is a URL."""
    sealed_url = None
    if url:
        key = await new_data_key(sweeper.callbacks.wrapper)
        sealed_url = await key.seal(url.encode(), task_id=TaskId(task_id), purpose=Purpose.CALLBACK_URL)
    return TaskRecord(
        task_id=TaskId(task_id),
        type=TaskType.ASYNC,
        status=Status.PENDING,
        created_at=created_at,
        logs_path=f"file:///sessions/{task_id}/",
        webhook=CallbackInfo() if url else None,
        callback_url=url or None,
        sealed_callback_url=sealed_url,
    )


async def add_task(sweeper: Sweeper, record: TaskRecord) -> TaskRecord:
    """Store a task; write its mark last, because a sweep may be running. Only a pending task has a payload."""
    if record.status is Status.PENDING:
        await sweeper.store.add_payload(record.task_id, Sealed(b""))
    await sweeper.store.add(record)
    await sweeper.store.mark_active(record.task_id)
    return record


async def add_finished(
    sweeper: Sweeper, task_id: str = "t-1", url: str = "", *, lease_until: dt.datetime | None = None
) -> TaskRecord:
    """Store a finished task whose callback, if it has one, is owed or under a lease."""
    running = start(await pending(sweeper, task_id, url), at=NOW)
    return await add_task(sweeper, finish(running, SUCCESS, at=NOW, lease_until=lease_until))


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def sweeping(sweeper: Sweeper, every_seconds: float = 3600) -> AsyncIterator[asyncio.Event]:
    """Run sweeps in the background; yield the event that requests the next sweep."""
    sooner = asyncio.Event()
    task = asyncio.create_task(sweeper.run_forever(every_seconds=every_seconds, sooner=sooner))
    try:
        yield sooner
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()

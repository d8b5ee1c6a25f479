"""The operations of the API on a store in a directory, with an adapter that records launches."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import pytest

from ccrun.api.dispatch import Dispatcher
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.backends.local.key import LocalKey
from ccrun.errors import (
    CcrunError,
)
from ccrun.jobs import ExecutionState
from ccrun.lifecycle import finish, start
from ccrun.spec import TaskSpec
from ccrun.store import Store
from ccrun.task import Outcome, Reason, Secret, Status, TaskId, TaskRecord, TaskType

TASK = TaskId("t-1")
NOW = dt.datetime(2025, 3, 4, 5, 6, 7, tzinfo=dt.UTC)
SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0)
URL = "https://user:made-up-password@example.com:8443/hook?token=made-up-token"


class WatchedBlobs(DirectoryBlobs):
    """A directory that can call a function before a record is replaced, or delay the creation of records."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.before_replace: Callable[[], object] | None = None
        self.may_store_records = asyncio.Event()
        self.may_store_records.set()

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        if name.endswith("metadata.json"):
            await self.may_store_records.wait()
        return await super().create(name, content)

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        if self.before_replace is not None:
            run, self.before_replace = self.before_replace, None
            await asyncio.to_thread(run)
        return await super().replace(name, content, generation=generation)


class RecordingJobs:
    """A backend that records launches and cancellations, and starts no workers."""

    max_running: int | None = None
    start_timeout: dt.timedelta | None = None
    launch_time: dt.timedelta = dt.timedelta(0)

    def __init__(self) -> None:
        self.launched: list[TaskId] = []
        self.cancelled: list[TaskId] = []
        self.error: CcrunError | None = None
        self.before_launch: Callable[[], object] | None = None

    def check_capacity(self) -> None: ...

    def queue_position(self, task_id: TaskId) -> int | None:
        return None

    async def launch(self, task_id: TaskId) -> str | None:
        if self.before_launch is not None:
            await asyncio.to_thread(self.before_launch)
        if self.error is not None:
            raise self.error
        self.launched.append(task_id)
        return f"executions/{task_id}"

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        self.cancelled.append(task_id)

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        return ExecutionState.UNKNOWN

    async def launched_states(self, task_ids: Collection[TaskId]) -> Mapping[TaskId, ExecutionState]:
        return {task_id: await self.state(task_id, None) for task_id in task_ids}

    async def clear(self, task_id: TaskId) -> None:
        pass

    async def leftovers(self) -> list[TaskId]:
        return []


@pytest.fixture
def blobs(tmp_path: Path) -> WatchedBlobs:
    """The objects."""
    return WatchedBlobs(tmp_path / "blobs")


@pytest.fixture
def store(blobs: WatchedBlobs) -> Store:
    """The store."""
    return Store(blobs)


@pytest.fixture
def other_store(tmp_path: Path) -> Store:
    """The same store, used by another process."""
    return Store(DirectoryBlobs(tmp_path / "blobs"))


@pytest.fixture
def wrapper(tmp_path: Path) -> LocalKey:
    """The key service."""
    return LocalKey(tmp_path / "sealing.key")


@pytest.fixture
def jobs() -> RecordingJobs:
    """The recorded launches and cancellations."""
    return RecordingJobs()


@pytest.fixture
def owed() -> list[str]:
    """One entry for each time that a callback became due."""
    return []


@pytest.fixture
def dispatcher(store: Store, jobs: RecordingJobs, wrapper: LocalKey, owed: list[str]) -> Dispatcher:
    """The operations under test."""
    return Dispatcher(
        store=store, jobs=jobs, wrapper=wrapper, callback_owed=lambda: owed.append("owed"), creation_wait_seconds=0.2
    )


def spec(task_id: str = "t-1", *, prompt: str = "made-up prompt", callback_url: str | None = None) -> TaskSpec:
    """Return a request."""
    return TaskSpec(
        task_id=TaskId(task_id),
        type=TaskType.ASYNC,
        prompt=prompt,
        timeout_minutes=5,
        anthropic_api_key=Secret("made-up-key"),
        callback_url=Secret(callback_url) if callback_url else None,
        environment_secrets={"TOKEN": Secret("made-up-secret")},
        metadata={"order": 7},
    )


async def all_objects(blobs: DirectoryBlobs) -> dict[str, bytes]:
    """Return the content of all objects by name."""
    return {entry.name: (await blobs.read(entry.name)).content for entry in await blobs.entries("", limit=1000)}


async def finish_task(store: Store, outcome: Outcome = SUCCESS) -> TaskRecord:
    """Change the store as a worker does that starts and finishes the task."""
    await store.update(TASK, lambda record: start(record, at=NOW))
    await store.delete_payload(TASK)
    return await store.update(TASK, lambda record: finish(record, outcome, at=NOW))

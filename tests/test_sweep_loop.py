from __future__ import annotations

from pathlib import Path

import attrs
from helpers.sweep import (
    NOW,
    SUCCESS,
    FakeJobs,
    Receiver,
    add_finished,
    add_task,
    jobs,
    make_sweeper,
    pending,
    receiver,
    sweeper,
    sweeping,
    until,
)

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.blobs import BlobInfo
from ccrun.errors import StorageError
from ccrun.jobs import ExecutionState
from ccrun.lifecycle import finish, start
from ccrun.store import Store
from ccrun.sweep import Sweeper
from ccrun.task import TaskId

__all__ = ["jobs", "make_sweeper", "receiver", "sweeper"]


async def test_sweeps_are_repeated(sweeper: Sweeper, receiver: Receiver) -> None:
    """A callback that becomes owed after one sweep is delivered by a later one."""
    async with sweeping(sweeper, every_seconds=0.01):
        for number in range(3):
            await add_finished(sweeper, f"t-{number}", receiver.url)
            await until(lambda number=number: f"t-{number}" in receiver.task_ids)  # type: ignore[misc]


async def test_sweep_runs_when_it_is_requested(sweeper: Sweeper, receiver: Receiver) -> None:
    """A request starts a sweep immediately, independent of the interval."""
    async with sweeping(sweeper) as sooner:
        for number in range(3):
            await add_finished(sweeper, f"t-{number}", receiver.url)
            sooner.set()
            await until(lambda number=number: f"t-{number}" in receiver.task_ids)  # type: ignore[misc]


async def test_one_request_starts_one_sweep(sweeper: Sweeper, receiver: Receiver) -> None:
    """The event is cleared when the requested sweep starts, so that no further sweep follows."""
    await add_finished(sweeper, "t-0", receiver.url)
    receiver.status = 500
    async with sweeping(sweeper) as sooner:
        await until(lambda: "t-0" in receiver.task_ids)
        sooner.set()
        await until(lambda: not sooner.is_set())


async def test_hanging_receiver_does_not_delay_others(sweeper: Sweeper, receiver: Receiver) -> None:
    """While one delivery hangs, later sweeps deliver other callbacks and do not repeat that one."""
    receiver.hanging = {"t-0"}
    async with sweeping(sweeper) as sooner:
        for number in range(4):
            await add_finished(sweeper, f"t-{number}", receiver.url)
            sooner.set()
            await until(lambda number=number: f"t-{number}" in receiver.task_ids)  # type: ignore[misc]
    assert ["t-0", "t-1", "t-2", "t-3"] == receiver.task_ids


class BrokenBlobs(DirectoryBlobs):
    """A storage whose first listings fail."""

    def __init__(self, root: Path, errors: list[Exception]) -> None:
        super().__init__(root)
        self.errors = errors

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        if self.errors:
            raise self.errors.pop()
        return await super().entries(prefix, after=after, before=before, limit=limit)


async def test_sweep_runs_after_one_that_failed(sweeper: Sweeper, receiver: Receiver, tmp_path: Path) -> None:
    """When a whole sweep fails with any error, the next one runs."""
    await add_finished(sweeper, url=receiver.url)
    blobs = BrokenBlobs(tmp_path / "blobs", [StorageError("It does not respond."), OSError("unexpected")])
    async with sweeping(attrs.evolve(sweeper, store=Store(blobs)), every_seconds=0.01):
        await until(lambda: receiver.task_ids == ["t-1"])


async def test_leftovers_of_final_and_unknown_tasks_are_cleared(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """What a lost worker has left is removed although its task is final; what a task still needs is not."""
    final, waiting = TaskId("t-final"), TaskId("t-pending")
    record = await pending(sweeper, final)
    await sweeper.store.add(finish(start(record, at=NOW), SUCCESS, at=NOW))
    await add_task(sweeper, await pending(sweeper, waiting))
    jobs.states[waiting] = ExecutionState.QUEUED
    jobs.with_leftovers = [final, waiting, TaskId("t-unknown")]
    await sweeper.sweep()
    assert [final, TaskId("t-unknown")] == jobs.cleared

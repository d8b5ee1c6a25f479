from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable

import attrs
import pytest
from helpers.sweep import (
    NOW,
    FakeJobs,
    Receiver,
    add_finished,
    add_task,
    jobs,
    make_sweeper,
    pending,
    receiver,
    serve_receiver,
    sweeper,
    until,
)

from ccrun.errors import Busy, StorageError
from ccrun.jobs import ExecutionState
from ccrun.lifecycle import CALLBACK_RETRY_PERIOD, claim_callback, start
from ccrun.seal import Sealed
from ccrun.sweep import PARALLEL_DELIVERIES, Sweeper, SweepReport
from ccrun.task import CallbackInfo, CallbackState, Reason, Status, TaskId, TaskRecord, TaskType

__all__ = ["jobs", "make_sweeper", "receiver", "sweeper"]


TASK = TaskId("t-1")


HOUR = dt.timedelta(hours=1)


async def add_pending(sweeper: Sweeper, task_id: str = "t-1", created_at: dt.datetime = NOW) -> TaskRecord:
    """Store a pending task."""
    return await add_task(sweeper, await pending(sweeper, task_id, created_at=created_at))


async def add_running(sweeper: Sweeper, task_id: str = "t-1", url: str = "") -> TaskRecord:
    """Store a running task."""
    return await add_task(sweeper, start(await pending(sweeper, task_id, url), at=NOW))


async def other_objects(sweeper: Sweeper) -> set[str]:
    """Return the names of all objects except records and index entries."""
    names = {entry.name for entry in await sweeper.store._blobs.entries("", limit=1000)}
    return {name for name in names if not name.startswith("index/") and not name.endswith("metadata.json")}


def state_of(record: TaskRecord) -> CallbackState:
    """Return the state of the callback."""
    assert record.webhook is not None
    return record.webhook.state


# --- settling --------------------------------------------------------------------------------------------------------


async def test_sweep_without_tasks_reports_nothing(sweeper: Sweeper) -> None:
    """The report of a sweep without tasks is empty."""
    assert SweepReport() == await sweeper.sweep()


async def test_lost_task_is_settled_and_its_callback_delivered(
    sweeper: Sweeper, jobs: FakeJobs, receiver: Receiver
) -> None:
    """One sweep settles a lost task and delivers its callback."""
    await add_running(sweeper, url=receiver.url)
    jobs.states[TASK] = ExecutionState.FINISHED
    assert SweepReport(settled=1, delivered=1) == await sweeper.sweep()
    record = await sweeper.store.record(TASK)
    assert (Reason.WORKER_LOST, CallbackState.DELIVERED, ["t-1"]) == (
        record.reason,
        state_of(record),
        receiver.task_ids,
    )
    assert await other_objects(sweeper) == set()
    assert SweepReport() == await sweeper.sweep()


@pytest.mark.parametrize("state", [ExecutionState.QUEUED, ExecutionState.RUNNING])
async def test_task_that_is_not_lost_is_not_changed(sweeper: Sweeper, jobs: FakeJobs, state: ExecutionState) -> None:
    """A sweep does not change a task whose execution is queued or running."""
    record = await add_running(sweeper)
    jobs.states[TASK] = state
    assert SweepReport() == await sweeper.sweep()
    assert record == await sweeper.store.record(TASK)


async def test_leftovers_of_a_finished_task_are_deleted(sweeper: Sweeper) -> None:
    """A sweep deletes the mark and the payload of a finished task whose worker was killed before it deleted them."""
    record = await add_finished(sweeper)
    await sweeper.store.mark_active(record.task_id)
    await sweeper.store.add_payload(record.task_id, Sealed(b""))
    assert SweepReport() == await sweeper.sweep()
    assert await other_objects(sweeper) == set()
    assert record == await sweeper.store.record(TASK)


async def test_incomplete_task_is_deleted_when_it_is_old(sweeper: Sweeper) -> None:
    """The mark and the payload of a task without a record are deleted after `incomplete_age`, and not before."""
    await sweeper.store.mark_active(TASK)
    await sweeper.store.add_payload(TASK, Sealed(b""))
    before = await other_objects(sweeper)
    assert SweepReport() == await sweeper.sweep()
    assert before == await other_objects(sweeper)
    assert SweepReport() == await attrs.evolve(sweeper, incomplete_age=dt.timedelta(0)).sweep()
    assert await other_objects(sweeper) == set()


# --- abandoned tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task_type", "minutes", "is_cancelled"),
    [(TaskType.SYNC, 5, True), (TaskType.SYNC, 0, False), (TaskType.SYNC, None, False), (TaskType.ASYNC, 5, False)],
)
async def test_task_whose_clients_have_left_is_cancelled(
    sweeper: Sweeper, jobs: FakeJobs, task_type: TaskType, minutes: int | None, is_cancelled: bool
) -> None:
    """A sweep does it if nobody has renewed the lease: the instance that has written it was killed."""
    jobs.states[TASK] = ExecutionState.RUNNING
    record = attrs.evolve(await pending(sweeper, created_at=dt.datetime.now(dt.UTC)), type=task_type)
    await add_task(sweeper, start(record, at=NOW))
    if minutes is not None:
        await sweeper.store.leases.write(TASK, at=dt.datetime.now(dt.UTC) - dt.timedelta(minutes=minutes))
    assert SweepReport() == await sweeper.sweep()
    assert is_cancelled is (await sweeper.store.record(TASK)).is_cancelling
    assert (minutes is None or is_cancelled) is (await sweeper.store.leases.get(TASK) is None)


async def test_pending_task_whose_clients_have_left_is_not_launched(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """It is cancelled at once, and nothing of it is left to do."""
    await add_task(sweeper, attrs.evolve(await pending(sweeper), type=TaskType.SYNC))
    await sweeper.store.leases.write(TASK, at=NOW - HOUR)
    await sweeper.sweep()
    assert Status.CANCELLED is (await sweeper.store.record(TASK)).status
    assert ([], set()) == (jobs.launched, await other_objects(sweeper))


# --- restarting --------------------------------------------------------------------------------------------------


async def test_pending_tasks_are_launched_oldest_first(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """The queued tasks of a service that was killed are launched in the order of their creation."""
    for task_id, hours in (("b", 2), ("c", 3), ("a", 1), ("d", 4)):
        await add_pending(sweeper, task_id, created_at=NOW + hours * HOUR)
    assert SweepReport(started=4) == await sweeper.sweep()
    assert ["a", "b", "c", "d"] == jobs.launched
    assert SweepReport() == await sweeper.sweep()


async def test_pending_tasks_are_not_launched_without_restarts(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """A sweep without `launches_pending` does not launch or change pending tasks."""
    record = await add_pending(sweeper)
    assert SweepReport() == await attrs.evolve(sweeper, launches_pending=False).sweep()
    assert ([], record) == (jobs.launched, await sweeper.store.record(TASK))


async def test_new_pending_task_is_left_to_its_service(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """A task within its launch time is not launched, although the backend has no execution of it: its service may do it."""
    jobs.launch_time = HOUR
    record = await add_pending(sweeper)
    assert SweepReport(new=1) == await sweeper.sweep()
    assert ([], record) == (jobs.launched, await sweeper.store.record(TASK))


async def test_complete_sweep_waits_for_new_tasks(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """`sweep_completely` launches a task that was too new for its first sweep."""
    jobs.launch_time = dt.timedelta(seconds=1)
    await add_pending(sweeper, created_at=dt.datetime.now(dt.UTC))
    assert SweepReport(started=1) == await sweeper.sweep_completely()
    assert [TASK] == jobs.launched


async def test_pending_task_whose_execution_has_finished_is_settled(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """A task whose worker exited before it started the task fails in the next sweep, and is not launched again."""
    await add_pending(sweeper)
    jobs.states[TASK] = ExecutionState.FINISHED
    assert SweepReport(settled=1) == await sweeper.sweep()
    assert ([], Reason.LAUNCH_FAILED) == (jobs.launched, (await sweeper.store.record(TASK)).reason)


@pytest.mark.parametrize("state", [ExecutionState.RUNNING, ExecutionState.UNREACHABLE])
async def test_pending_task_with_an_execution_is_not_launched(
    sweeper: Sweeper, jobs: FakeJobs, state: ExecutionState
) -> None:
    """A task whose execution has not finished, or whose execution the backend cannot report now, is left as it is."""
    record = await add_pending(sweeper)
    jobs.states[TASK] = state
    assert SweepReport() == await sweeper.sweep()
    assert ([], record) == (jobs.launched, await sweeper.store.record(TASK))


async def test_failed_launch_is_retried(sweeper: Sweeper, jobs: FakeJobs) -> None:
    """A task that cannot be launched stays pending, and the next sweep launches it."""
    await add_pending(sweeper)
    jobs.launch_error = Busy("It is full.")
    assert SweepReport(failed=1) == await sweeper.sweep()
    jobs.launch_error = None
    assert SweepReport(started=1) == await sweeper.sweep()


# --- delivering ------------------------------------------------------------------------------------------------------


async def test_concurrent_sweeps_deliver_each_callback_once(
    make_sweeper: Callable[[], Sweeper], jobs: FakeJobs, receiver: Receiver
) -> None:
    """Concurrent sweeps settle each lost task once and deliver each callback once."""
    sweepers = [make_sweeper() for _ in range(4)]
    task_ids = [f"t-{number}" for number in range(12)]
    for number, task_id in enumerate(task_ids):
        make_task = add_finished if number % 2 else add_running
        await make_task(sweepers[0], task_id, receiver.url)
    reports = await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers))
    assert sorted(task_ids) == sorted(receiver.task_ids)
    total = sum(reports, SweepReport())
    assert (12, 0, 0) == (total.delivered, total.undelivered, total.failed)
    assert await other_objects(sweepers[0]) == set()


async def test_cancelled_sweep_releases_its_callbacks(
    make_sweeper: Callable[[], Sweeper], jobs: FakeJobs, receiver: Receiver
) -> None:
    """A callback whose delivery a shutdown interrupts is delivered by the next sweep, which does not wait for the lease."""
    receiver.hanging.add(TASK)
    await add_finished(make_sweeper(), url=receiver.url)
    sweeping = asyncio.create_task(make_sweeper().sweep())
    async with asyncio.timeout(30):
        while not receiver.task_ids:
            await asyncio.sleep(0.01)
    sweeping.cancel()
    await asyncio.wait([sweeping])
    assert sweeping.cancelled()
    receiver.hanging.clear()
    assert SweepReport(delivered=1) == await make_sweeper().sweep()


async def test_receiver_that_hangs_delays_no_other(sweeper: Sweeper, receiver: Receiver) -> None:
    """Sixty older callbacks to a host that does not respond keep none from another host; few are sent to it at a time."""
    sweeping = []
    async with serve_receiver() as hanging:
        hanging.hanging = {f"t-{number:02}" for number in range(60)}
        for task_id in sorted(hanging.hanging):
            await add_finished(sweeper, task_id, hanging.url)
        await add_finished(sweeper, "healthy", receiver.url)
        sweeping += [asyncio.create_task(sweeper.sweep())]
        await until(lambda: receiver.task_ids == ["healthy"] and len(hanging.task_ids) == PARALLEL_DELIVERIES)
        await add_finished(sweeper, "healthy-too", receiver.url)
        sweeping += [asyncio.create_task(sweeper.sweep())]
        await until(lambda: receiver.task_ids == ["healthy", "healthy-too"])
        assert PARALLEL_DELIVERIES == len(hanging.task_ids)
        hanging.released.set()
        reports = await asyncio.gather(*sweeping)
    assert 62 == sum(report.delivered for report in reports)


async def test_callbacks_that_have_failed_least_go_first(sweeper: Sweeper, receiver: Receiver) -> None:
    """Among those to one host, new callbacks do not wait for those that have failed before."""
    for number in range(8):
        await add_finished(sweeper, f"t-{number}", receiver.url)

        def with_attempts(record: TaskRecord, attempts: int = 8 - number) -> TaskRecord:
            return attrs.evolve(record, webhook=attrs.evolve(record.webhook or CallbackInfo(), attempts=attempts))

        await sweeper.store.update(TaskId(f"t-{number}"), with_attempts)
    await sweeper.sweep()
    assert {f"t-{number}" for number in range(4, 8)} == set(receiver.task_ids[:4])


async def test_callback_under_a_lease_is_not_delivered(sweeper: Sweeper, receiver: Receiver) -> None:
    """A sweep delivers a callback that a worker has claimed only after the lease has expired."""
    await add_finished(sweeper, url=receiver.url, lease_until=dt.datetime.now(dt.UTC) + sweeper.callbacks.lease)
    assert SweepReport() == await sweeper.sweep()
    await sweeper.store.update(TASK, lambda record: claim_callback(record, lease_until=NOW))
    assert SweepReport(delivered=1) == await sweeper.sweep()
    assert ["t-1"] == receiver.task_ids


async def test_failed_callback_is_not_retried_immediately(sweeper: Sweeper, receiver: Receiver) -> None:
    """The sweep after a failed delivery does not retry it yet, and the task stays active."""
    await add_finished(sweeper, url=receiver.url)
    receiver.status = 500
    assert SweepReport(undelivered=1) == await sweeper.sweep()
    assert SweepReport() == await sweeper.sweep()
    assert (["t-1"], {"active/t-1"}) == (receiver.task_ids, await other_objects(sweeper))


async def test_abandoned_callback_is_reported_as_undelivered(sweeper: Sweeper, receiver: Receiver) -> None:
    """After the last failed delivery within the retry period, the callback is abandoned and the task is not active."""
    record = await add_finished(sweeper, url=receiver.url)
    long_ago = NOW - CALLBACK_RETRY_PERIOD - HOUR
    await sweeper.store.update(record.task_id, lambda present: attrs.evolve(present, completed_at=long_ago))
    receiver.status = 500
    assert SweepReport(undelivered=1) == await sweeper.sweep()
    assert (CallbackState.ABANDONED, set()) == (
        state_of(await sweeper.store.record(TASK)),
        await other_objects(sweeper),
    )


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [StorageError("It does not respond."), OSError("unexpected")])
async def test_error_of_one_task_does_not_stop_the_sweep(
    sweeper: Sweeper, jobs: FakeJobs, receiver: Receiver, fault: Exception
) -> None:
    """A task that raises any error is counted as failed, and all other tasks are processed."""
    for task_id in ("t-0", "t-1", "t-2"):
        await add_running(sweeper, task_id, receiver.url)
        jobs.states[TaskId(task_id)] = ExecutionState.FINISHED
    jobs.states[TASK] = fault
    assert SweepReport(settled=2, delivered=2, failed=1) == await sweeper.sweep()
    assert ["t-0", "t-2"] == sorted(receiver.task_ids)


async def test_callbacks_of_a_cancelled_sweep_are_delivered_later(
    make_sweeper: Callable[[], Sweeper], receiver: Receiver
) -> None:
    """When a sweep is cancelled during deliveries, another sweep delivers its callbacks, at the latest after their leases."""
    first = make_sweeper()
    task_ids = [f"t-{number:02}" for number in range(30)]
    for task_id in task_ids:
        await add_finished(first, task_id, receiver.url)
    receiver.hanging = set(task_ids)
    sweeping = asyncio.create_task(first.sweep())
    await until(lambda: len(receiver.task_ids) == PARALLEL_DELIVERIES)
    sweeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sweeping
    receiver.released.set()
    records = [await first.store.record(TaskId(task_id)) for task_id in task_ids]
    assert {state_of(record) for record in records} <= {CallbackState.DELIVERING, CallbackState.OWED}
    for record in records:
        await first.store.update(record.task_id, lambda present: claim_callback(present, lease_until=NOW))
    assert SweepReport(delivered=30) == await make_sweeper().sweep()

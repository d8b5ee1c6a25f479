"""The sweep: settles lost tasks and delivers owed callbacks.

Any number of sweeps may run at any time: each step is a compare-and-swap on the record, which one of them wins.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import Iterable, Mapping
from typing import Final

import attrs
import structlog

from ccrun import lifecycle
from ccrun.callbacks.owed import OwedCallbacks
from ccrun.errors import CcrunError, TaskNotFound
from ccrun.jobs import ExecutionState, Jobs
from ccrun.settle import settle
from ccrun.store import ActiveTask, Store
from ccrun.task import CallbackState, Status, TaskId, TaskRecord, TaskType

log = structlog.get_logger()

#: A task is stored within 15 seconds, or its request fails (`ccrun.api.dispatch.CREATION_SECONDS`). A mark that has no record
#: after this time was left by a process that was killed.
INCOMPLETE_TASK_AGE: Final = dt.timedelta(seconds=30)
#: The age of a lease on a task whose clients have left, after which the sweep cancels the task. The instance that has written
#: the lease does so after `ccrun.api.dependencies.ApiTimeouts.abandon` seconds, half of this, unless it was killed.
ABANDONED_AGE: Final = dt.timedelta(seconds=60)
#: Tasks that are processed concurrently, so that a receiver that does not answer delays few others.
PARALLEL_TASKS: Final = 20
#: Concurrent sweeps, most of which wait for receivers.
MAX_PARALLEL_SWEEPS: Final = 10


@attrs.frozen(kw_only=True)
class SweepReport:
    """How many tasks one sweep has settled and started, and how many callbacks it has delivered and failed to deliver."""

    settled: int = 0
    started: int = 0
    #: Pending tasks that are too new to say whether they were launched.
    new: int = 0
    delivered: int = 0
    undelivered: int = 0
    failed: int = 0

    def __add__(self, other: SweepReport) -> SweepReport:
        return SweepReport(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in attrs.fields(SweepReport)
            }
        )


@attrs.frozen(kw_only=True)
class Sweeper:
    """Processes all active tasks."""

    store: Store
    jobs: Jobs
    callbacks: OwedCallbacks
    #: Whether a pending task without an execution is launched.
    launches_pending: bool
    incomplete_age: dt.timedelta = INCOMPLETE_TASK_AGE
    abandoned_age: dt.timedelta = ABANDONED_AGE

    async def sweep(self) -> SweepReport:
        """Process all active tasks once."""
        marks = await self.store.active()
        records = await self.store.records([mark.task_id for mark in marks])
        states = await self._launched_states(record for record in records if record is not None)
        gate = asyncio.Semaphore(PARALLEL_TASKS)
        found = zip(marks, records, strict=True)
        # The oldest first: pending tasks are launched in the order of their submission.
        oldest_first = sorted(found, key=lambda pair: pair[1].created_at if pair[1] else pair[0].since)
        reports = (self._guarded(gate, mark, record, states.get(mark.task_id)) for mark, record in oldest_first)
        report = sum(await asyncio.gather(*reports), SweepReport())
        await self._clear_leftovers()
        return report

    async def sweep_completely(self) -> SweepReport:
        """Sweep, and sweep again if pending tasks were too new, since the next scheduled sweep may be minutes away."""
        report = await self.sweep()
        if report.new and self.launches_pending:
            await asyncio.sleep(self.jobs.launch_time.total_seconds())
            report = attrs.evolve(report, new=0) + await self.sweep()
        return report

    async def _launched_states(self, records: Iterable[TaskRecord]) -> Mapping[TaskId, ExecutionState]:
        """Return the states of pending tasks whose workers have not reported the names of their executions."""
        now = dt.datetime.now(dt.UTC)
        task_ids = [
            record.task_id
            for record in records
            # Also if the clock was set back and the task seems to be of the future.
            if record.status is Status.PENDING and abs(now - record.created_at) >= self.jobs.launch_time
        ]
        return await self.jobs.launched_states(task_ids) if task_ids else {}

    async def _clear_leftovers(self) -> None:
        """Remove the processes and files of lost workers whose tasks are final, and files of writes that were interrupted."""
        task_ids = await self.jobs.leftovers()
        for task_id, record in zip(task_ids, await self.store.records(task_ids), strict=True):
            if record is None or record.status.is_final:
                await self.jobs.clear(task_id)
                log.info("leftovers_removed", message="Processes and files of a lost worker removed", taskId=task_id)
        await self.store.remove_interrupted_writes()

    async def _guarded(
        self, gate: asyncio.Semaphore, mark: ActiveTask, record: TaskRecord | None, state: ExecutionState | None
    ) -> SweepReport:
        """Process one task. Its failure must not affect the others."""
        async with gate:
            try:
                return await (self._remove_incomplete(mark) if record is None else self._look(record, state))
            except TaskNotFound:
                return SweepReport()
            except CcrunError as error:
                log.warning(
                    "task_sweep_failed", message="Task could not be swept", taskId=mark.task_id, error=error.message
                )
            except Exception:
                log.exception(
                    "task_sweep_crashed", message="Unexpected error while sweeping a task", taskId=mark.task_id
                )
        return SweepReport(failed=1)

    async def _look(self, record: TaskRecord, state: ExecutionState | None) -> SweepReport:
        report = SweepReport()
        if not record.status.is_final:
            record = await self._cancel_abandoned(record)
            # The payload of a task with a callback is deleted below, before the callback is claimed.
            present = await settle(self.store, self.jobs, record, state=state, delete_payload=record.webhook is None)
            if present.status is Status.PENDING and state is None:
                report += SweepReport(new=1)
            elif present.status is Status.PENDING and state is ExecutionState.UNKNOWN and self.launches_pending:
                # The service was killed while the task was in its queue, or before it launched the task.
                await self.jobs.launch(present.task_id)
                report += SweepReport(started=1)
            if present.status.is_final:
                log.warning(
                    "task_settled", message="Task settled by the sweep", taskId=present.task_id, reason=present.reason
                )
                report += SweepReport(settled=1)
            record = present
        if not record.status.is_final:
            return report
        if not record.owes_callback:
            # The process that wrote the final record was killed before it deleted the mark.
            await self.store.delete_leftovers(record.task_id)
            return report
        if lifecycle.is_callback_due(record, at=dt.datetime.now(dt.UTC)):
            # Deleting it may have failed, and the callback may be retried for a month.
            await self.store.delete_payload(record.task_id)
            claimed = await self.callbacks.claim(record.task_id)
            if claimed is not None:
                carried = await self._deliver(claimed)
                delivered = carried.webhook is not None and carried.webhook.state is CallbackState.DELIVERED
                report += SweepReport(delivered=1) if delivered else SweepReport(undelivered=1)
        return report

    async def _cancel_abandoned(self, record: TaskRecord) -> TaskRecord:
        """Cancel a `POST /run` task whose clients have left, if the instance that was to cancel it has not: it was killed."""
        if record.type is not TaskType.SYNC or record.is_cancelling:
            return record
        lease = await self.store.lease(record.task_id)
        now = dt.datetime.now(dt.UTC)
        if lease is None or now - lease.renewed_at < self.abandoned_age:
            return record

        def request(present: TaskRecord) -> TaskRecord:
            return present if present.status.is_final else lifecycle.request_cancel(present, at=now)

        # The worker polls its record, so the sweep needs no permission to cancel executions.
        record = await self.store.update(record.task_id, request, delete_payload=record.webhook is None)
        await self.store.delete_lease(record.task_id)
        log.info("task_abandoned", message="Task cancelled because its client left", taskId=record.task_id)
        return record

    async def _deliver(self, claimed: TaskRecord) -> TaskRecord:
        """Deliver a claimed callback. If cancelled, release the claim, so that the next sweep need not wait until it expires."""
        try:
            return await self.callbacks.deliver(claimed)
        except asyncio.CancelledError:
            await self.callbacks.release(claimed.task_id)
            raise

    async def _remove_incomplete(self, mark: ActiveTask) -> SweepReport:
        """Delete what a submission has left whose process was killed before it wrote the record. No client knows that task."""
        if dt.datetime.now(dt.UTC) - mark.since > self.incomplete_age:
            await self.store.delete_leftovers(mark.task_id)
        return SweepReport()

    async def run_forever(self, *, every_seconds: float, sooner: asyncio.Event) -> None:
        """Sweep until cancelled: at an interval, and immediately when `sooner` is set.

        A sweep does not wait for the one before it, which may wait for a receiver.
        """
        places = asyncio.Semaphore(MAX_PARALLEL_SWEEPS)

        async def sweep() -> None:
            try:
                await self.sweep()
            except CcrunError as error:
                log.warning("sweep_failed", message="Sweep failed", error=error.message)
            except Exception:
                # The loop must go on: without sweeps, no lost task would be settled.
                log.exception("sweep_crashed", message="Unexpected error in a sweep")
            finally:
                places.release()

        async with asyncio.TaskGroup() as sweeps:
            while True:
                await places.acquire()
                sooner.clear()
                sweeps.create_task(sweep())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(every_seconds):
                        await sooner.wait()

"""Settles the tasks that died and delivers the callbacks that are owed.

Safe to run at any time and any number at once: every step is a swap on the record, and what another sweep did first is left
alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from typing import Final

import attrs
import structlog

from ccrun import lifecycle
from ccrun.callbacks.owed import OwedCallbacks
from ccrun.errors import CcrunError, TaskNotFound
from ccrun.jobs import ExecutionState, Jobs
from ccrun.settle import settle
from ccrun.store import ActiveTask, Store
from ccrun.task import CallbackState, Status, TaskRecord

log = structlog.get_logger()

#: A birth takes well under a second, and two minutes when each of its writes is tried to the end of its patience; what has
#: no record after this long was left by a process that died.
INCOMPLETE_TASK_AGE: Final = dt.timedelta(minutes=5)
#: Tasks looked at side by side, so that one receiver that does not answer holds up few others.
PARALLEL_TASKS: Final = 20
#: Sweeps at once, most of which only wait for receivers.
MAX_PARALLEL_SWEEPS: Final = 10


@attrs.frozen(kw_only=True)
class SweepReport:
    """What one sweep did: how many tasks it settled, started, and how many callbacks it delivered, failed to deliver."""

    settled: int = 0
    started: int = 0
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
    """Looks at every task that is not over or owes its callback."""

    store: Store
    jobs: Jobs
    callbacks: OwedCallbacks
    #: Whether a pending task of which the place that runs workers knows nothing is launched once more.
    restarts_pending: bool
    incomplete_age: dt.timedelta = INCOMPLETE_TASK_AGE

    async def sweep(self) -> SweepReport:
        """Look at all of them once."""
        marks = await self.store.active()
        records = await self.store.records([mark.task_id for mark in marks])
        gate = asyncio.Semaphore(PARALLEL_TASKS)
        found = zip(marks, records, strict=True)
        # The oldest first: queued tasks that nobody started are started in the order in which they came.
        oldest_first = sorted(found, key=lambda pair: pair[1].created_at if pair[1] else pair[0].since)
        return sum(await asyncio.gather(*(self._guarded(gate, *pair) for pair in oldest_first)), SweepReport())

    async def _guarded(self, gate: asyncio.Semaphore, mark: ActiveTask, record: TaskRecord | None) -> SweepReport:
        """One task that cannot be swept now, for whatever reason, must not keep the others from it."""
        async with gate:
            try:
                return await (self._remove_incomplete(mark) if record is None else self._look(record))
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

    async def _look(self, record: TaskRecord) -> SweepReport:
        report = SweepReport()
        if not record.status.is_final:
            # The payload of a task with a callback is deleted below, before the callback is claimed.
            present = await settle(self.store, self.jobs, record, delete_payload=record.webhook is None)
            if await self._is_forgotten(present):
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
            # Whoever wrote the final record died before the mark was gone.
            await self.store.delete_leftovers(record.task_id)
            return report
        if lifecycle.is_callback_due(record, at=dt.datetime.now(dt.UTC)):
            # Its removal may have failed, and a receiver may be out of reach for a month.
            await self.store.delete_payload(record.task_id)
            claimed = await self.callbacks.claim(record.task_id)
            if claimed is not None:
                carried = await self.callbacks.deliver(claimed)
                delivered = carried.webhook is not None and carried.webhook.state is CallbackState.DELIVERED
                report += SweepReport(delivered=1) if delivered else SweepReport(undelivered=1)
        return report

    async def _is_forgotten(self, record: TaskRecord) -> bool:
        """Return whether the task waits in the queue of a service that is gone."""
        if record.status is not Status.PENDING or not self.restarts_pending:
            return False
        return await self.jobs.state(record.task_id, record.execution_name) is ExecutionState.UNKNOWN

    async def _remove_incomplete(self, mark: ActiveTask) -> SweepReport:
        """Remove what a submission left that died before its record was written; nobody was told of that task."""
        if dt.datetime.now(dt.UTC) - mark.since > self.incomplete_age:
            await self.store.delete_leftovers(mark.task_id)
        return SweepReport()

    async def run_forever(self, *, every_seconds: float, sooner: asyncio.Event) -> None:
        """Sweep until cancelled: every so many seconds, and at once when `sooner` is set.

        A receiver that does not answer holds up the sweep that called it, so the next one does not wait for that.
        """
        places = asyncio.Semaphore(MAX_PARALLEL_SWEEPS)

        async def sweep() -> None:
            try:
                await self.sweep()
            except CcrunError as error:
                log.warning("sweep_failed", message="Sweep failed", error=error.message)
            except Exception:
                # Without sweeps nothing would be settled any more, and nobody would see why.
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

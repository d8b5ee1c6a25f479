"""The sweep: settles lost tasks and delivers owed callbacks.

Any number of sweeps may run at any time: each step is a compare-and-swap on the record, which one of them wins.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections import Counter, deque
from collections.abc import Awaitable, Iterable, Mapping
from typing import Final
from urllib.parse import urlsplit

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
#: Tasks that are settled concurrently, each with a few calls to the storage.
PARALLEL_TASKS: Final = 20
#: Concurrent deliveries to one host, so that a process burdens no receiver.
PARALLEL_DELIVERIES: Final = 4
#: Seconds in which a sweep starts deliveries to one host. The others follow in later sweeps, so that a host that does not respond
#: ends a sweep as soon as one that does.
HOST_SECONDS: Final = 10.0
#: Hosts that are called concurrently, with `PARALLEL_DELIVERIES` open connections each.
PARALLEL_HOSTS: Final = 50
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
class _Swept:
    """What a sweep has done for one task, and its record if its callback is now to be delivered."""

    report: SweepReport = SweepReport()
    due: TaskRecord | None = None


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
    #: Deliveries under way by host, of all sweeps of this process.
    _deliveries: Counter[str] = attrs.field(factory=Counter, init=False, repr=False, eq=False)

    async def sweep(self) -> SweepReport:
        """Process all active tasks once."""
        marks = await self.store.active()
        records = await self.store.records([mark.task_id for mark in marks])
        states = await self._launched_states(record for record in records if record is not None)
        gate = asyncio.Semaphore(PARALLEL_TASKS)
        found = zip(marks, records, strict=True)
        # The oldest first: pending tasks are launched in the order of their submission.
        oldest_first = sorted(found, key=lambda pair: pair[1].created_at if pair[1] else pair[0].since)

        async def look(mark: ActiveTask, record: TaskRecord | None) -> _Swept:
            async with gate:
                work = self._remove_incomplete(mark) if record is None else self._look(record, states.get(mark.task_id))
                return await self._guarded(mark.task_id, work)

        looked = await asyncio.gather(*(look(mark, record) for mark, record in oldest_first))
        due = [each.due for each in looked if each.due is not None]
        delivered = await self._deliver_all(due)
        await self._clear_leftovers()
        return sum((each.report for each in (*looked, *delivered)), SweepReport())

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

    async def _guarded(self, task_id: TaskId, work: Awaitable[_Swept]) -> _Swept:
        """Process one task. Its failure must not affect the others."""
        try:
            return await work
        except TaskNotFound:
            return _Swept()
        except CcrunError as error:
            log.warning("task_sweep_failed", message="Task could not be swept", taskId=task_id, error=error.message)
        except Exception:
            log.exception("task_sweep_crashed", message="Unexpected error while sweeping a task", taskId=task_id)
        return _Swept(report=SweepReport(failed=1))

    async def _look(self, record: TaskRecord, state: ExecutionState | None) -> _Swept:
        """Settle a task."""
        report = SweepReport()
        if not record.status.is_final:
            record = await self._cancel_abandoned(record)
            # The payload of a task with a callback is deleted before the callback is claimed.
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
        if record.status.is_final and not record.owes_callback:
            # The process that wrote the final record was killed before it deleted the mark.
            await self.store.delete_leftovers(record.task_id)
        is_due = record.status.is_final and lifecycle.is_callback_due(record, at=dt.datetime.now(dt.UTC))
        return _Swept(report=report, due=record if is_due else None)

    async def _deliver_all(self, due: Iterable[TaskRecord]) -> list[_Swept]:
        """Deliver callbacks. A host that does not respond delays only its own, and those that have failed least go first."""
        queues: dict[str, deque[TaskRecord]] = {}
        for record in sorted(due, key=lambda record: record.webhook.attempts if record.webhook else 0):
            queues.setdefault(urlsplit(record.callback_url or "").netloc, deque()).append(record)
        hosts, clock = asyncio.Semaphore(PARALLEL_HOSTS), asyncio.get_running_loop().time
        results: list[_Swept] = []

        async def deliver_some(host: str, until: float) -> None:
            while queues[host] and clock() < until and self._deliveries[host] < PARALLEL_DELIVERIES:
                record = queues[host].popleft()
                self._deliveries[host] += 1
                try:
                    results.append(await self._guarded(record.task_id, self._deliver(record)))
                finally:
                    self._deliveries[host] -= 1

        async def deliver_to(host: str) -> None:
            async with hosts:
                until = clock() + HOST_SECONDS
                await asyncio.gather(*(deliver_some(host, until) for _ in range(PARALLEL_DELIVERIES)))
            if not self._deliveries[host]:
                del self._deliveries[host]

        await asyncio.gather(*(deliver_to(host) for host in queues))
        return results

    async def _cancel_abandoned(self, record: TaskRecord) -> TaskRecord:
        """Cancel a `POST /run` task whose clients have left, if the instance that was to cancel it has not: it was killed."""
        if record.type is not TaskType.SYNC or record.is_cancelling:
            return record
        lease = await self.store.leases.get(record.task_id)
        now = dt.datetime.now(dt.UTC)
        if lease is None or now - lease.renewed_at < self.abandoned_age:
            return record

        def request(present: TaskRecord) -> TaskRecord:
            return present if present.status.is_final else lifecycle.request_cancel(present, at=now)

        # The worker polls its record, so the sweep needs no permission to cancel executions.
        record = await self.store.update(record.task_id, request, delete_payload=record.webhook is None)
        await self.store.leases.delete(record.task_id)
        log.info("task_abandoned", message="Task cancelled because its client left", taskId=record.task_id)
        return record

    async def _deliver(self, record: TaskRecord) -> _Swept:
        """Deliver a callback. If cancelled, release the claim, so that the next sweep need not wait until it expires."""
        # Deleting it may have failed, and the callback may be retried for a month.
        await self.store.delete_payload(record.task_id)
        claimed = await self.callbacks.claim(record.task_id)
        if claimed is None:
            return _Swept()
        try:
            record = await self.callbacks.deliver(claimed)
        except asyncio.CancelledError:
            await self.callbacks.release(claimed.task_id)
            raise
        is_delivered = record.webhook is not None and record.webhook.state is CallbackState.DELIVERED
        return _Swept(report=SweepReport(delivered=1) if is_delivered else SweepReport(undelivered=1))

    async def _remove_incomplete(self, mark: ActiveTask) -> _Swept:
        """Delete what a submission has left whose process was killed before it wrote the record. No client knows that task."""
        if dt.datetime.now(dt.UTC) - mark.since > self.incomplete_age:
            await self.store.delete_leftovers(mark.task_id)
        return _Swept()

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

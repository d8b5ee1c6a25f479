"""Cancels a `POST /run` task whose clients have all left, on whichever instance they read it.

Nothing is stored while clients read. The instance whose last client leaves stores a lease beside the task and waits. An instance
with a client finds the lease in the listing that it polls anyway, and renews it (`ccrun.api.poller`); then it is the one that
waits when its own last client leaves. A lease that nobody has renewed means that nobody reads: the instance that wrote it cancels
the task, or a sweep does, if that instance has died.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt

import attrs
import structlog

from ccrun.api.background import BackgroundTasks
from ccrun.api.dependencies import ApiDependencies
from ccrun.api.feed import FeedReader
from ccrun.errors import CcrunError, TaskAlreadyFinished, TaskNotFound
from ccrun.task import TaskId

log = structlog.get_logger()


@attrs.frozen(kw_only=True)
class AbandonedTasks:
    """The `POST /run` tasks of which a client has left this instance. A client has `ApiTimeouts.abandon` seconds to return."""

    deps: ApiDependencies
    background: BackgroundTasks
    #: Tasks whose submitter has left while others read them here.
    _read_by_others: set[TaskId] = attrs.field(factory=set, init=False)

    def submitter_left(self, task_id: TaskId) -> None:
        """Cancel the task unless a client reads it, or comes back in time."""
        if self.deps.feed.readers(task_id):
            self._read_by_others.add(task_id)
        else:
            self.background.spawn(self._wait(task_id))

    def reader_left(self, reader: FeedReader) -> None:
        """Wait for other clients of a task that its submitter has left, on this instance or on another one."""
        task_id = reader.record.task_id
        if self.deps.feed.readers(task_id):
            return
        left_here = task_id in self._read_by_others
        self._read_by_others.discard(task_id)
        if reader.is_finished:
            if reader.has_lease:
                self.background.spawn(self.deps.store.leases.delete(task_id))
        elif left_here or reader.has_lease:
            self.background.spawn(self._wait(task_id))

    async def _wait(self, task_id: TaskId) -> None:
        try:
            generation = await self.deps.store.leases.write(task_id, at=dt.datetime.now(dt.UTC))
            await asyncio.sleep(self.deps.timeouts.abandon)
            lease = await self.deps.store.leases.get(task_id)
            if self.deps.feed.readers(task_id) or lease is None or lease.generation != generation:
                return
            with contextlib.suppress(TaskAlreadyFinished):
                await self.deps.dispatcher.cancel(task_id)
                log.info("task_abandoned", message="Task cancelled because its client left", taskId=task_id)
            await self.deps.store.leases.delete(task_id)
        except TaskNotFound:
            pass
        except CcrunError as error:
            log.warning(
                "abandoned_task_cancel_failed",
                message="Task whose client left could not be cancelled",
                taskId=task_id,
                error=error.message,
            )

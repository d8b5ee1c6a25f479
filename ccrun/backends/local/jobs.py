"""Workers as processes of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import signal
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

import structlog

from ccrun.backends.local import pidfile
from ccrun.errors import Busy, CcrunError
from ccrun.jobs import ExecutionState
from ccrun.names import payload_name
from ccrun.process import detached, tree
from ccrun.task import TaskId
from ccrun.task_directories import remove_leftovers

log = structlog.get_logger()

#: Tasks in the queue. More are rejected with `Busy`.
MAX_QUEUED: Final = 10_000
#: Finished executions that are remembered until their tasks are settled.
MAX_REMEMBERED_EXECUTIONS: Final = 10_000
#: Seconds after which a rejected client may retry.
QUEUE_RETRY_SECONDS: Final = 30


class SubprocessJobs:
    """Workers as processes of this machine, at most `max_running` of this service, the rest in a queue.

    Workers keep running when the service exits, as executions in the cloud do. Each locks a PID file, which all services with the
    same data directory can see.
    """

    #: A task may wait in the queue for any time.
    start_timeout: dt.timedelta | None = None

    def __init__(
        self,
        *,
        command: Sequence[str],
        environment: Mapping[str, str],
        sign_of_life: Callable[[TaskId], Path],
        marker: Callable[[TaskId], str],
        max_running: int,
        worker_ended: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the adapter; it starts no worker yet.

        Args:
            command: The command of a worker.
            environment: The environment variables of each worker, without those of its task.
            sign_of_life: Returns the PID file of a task.
            marker: Returns the marker of the processes of a task.
            max_running: How many workers run concurrently.
            worker_ended: Called whenever a worker has exited.
        """
        self.max_running: int | None = max_running
        self._places = max_running
        self._command = tuple(command)
        self._environment = dict(environment)
        self._sign_of_life = sign_of_life
        self._marker = marker
        self._queue: deque[TaskId] = deque()
        self._running: dict[TaskId, detached.Detached | None] = {}
        self._ended: OrderedDict[TaskId, None] = OrderedDict()
        self._reapers: set[asyncio.Task[None]] = set()
        self._worker_ended = worker_ended

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop launching workers. Those that run keep running."""
        self._queue.clear()
        for reaper in self._reapers:
            reaper.cancel()
        await asyncio.gather(*self._reapers, return_exceptions=True)
        for child in self._running.values():
            if child is not None:
                child.let_go()
        if self._running:
            log.info("workers_left_running", message="Workers keep running", taskIds=sorted(self._running))

    def check_capacity(self) -> None:
        if len(self._queue) >= MAX_QUEUED:
            raise Busy(f"{MAX_QUEUED} tasks are waiting already.", retry_after=QUEUE_RETRY_SECONDS)

    async def launch(self, task_id: TaskId) -> str | None:
        self.check_capacity()
        if task_id not in self._running and task_id not in self._queue:
            self._queue.append(task_id)
            self._fill_places()
        return None

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        with contextlib.suppress(ValueError):
            self._queue.remove(task_id)
        child = self._running.get(task_id)
        pid = child.pid if child else await asyncio.to_thread(pidfile.holder_pid, self._sign_of_life(task_id))
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        if task_id in self._running:
            return ExecutionState.RUNNING
        if task_id in self._queue:
            return ExecutionState.QUEUED
        if await asyncio.to_thread(pidfile.holder_pid, self._sign_of_life(task_id)):
            return ExecutionState.RUNNING
        return ExecutionState.FINISHED if task_id in self._ended else ExecutionState.UNKNOWN

    async def clear(self, task_id: TaskId) -> None:
        self._ended.pop(task_id, None)
        await tree.kill_marked(self._marker(task_id))
        await asyncio.to_thread(remove_leftovers, task_id)
        await asyncio.to_thread(self._sign_of_life(task_id).unlink, missing_ok=True)

    def _fill_places(self) -> None:
        while self._queue and len(self._running) < self._places:
            task_id = self._queue.popleft()
            self._running[task_id] = None
            reaper = asyncio.create_task(self._run(task_id))
            self._reapers.add(reaper)
            reaper.add_done_callback(self._reapers.discard)

    async def _run(self, task_id: TaskId) -> None:
        try:
            child = await detached.start_detached(
                self._command,
                env={**self._environment, "TASK_ID": task_id, "ENCRYPTED_PAYLOAD_PATH": payload_name(task_id)},
            )
            self._running[task_id] = child
            ended = await child.wait()
            if not ended.ok:
                log.warning("worker_failed", message="Worker failed", taskId=task_id, exitCode=ended.code)
        except CcrunError as error:
            log.warning(
                "worker_start_failed", message="Worker could not be started", taskId=task_id, error=error.message
            )
        del self._running[task_id]
        self._ended[task_id] = None
        while len(self._ended) > MAX_REMEMBERED_EXECUTIONS:
            self._ended.popitem(last=False)
        self._worker_ended()
        self._fill_places()

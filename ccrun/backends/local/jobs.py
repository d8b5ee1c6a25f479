"""Runs workers as processes of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import signal
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

import structlog

from ccrun.backends.local import pidfile
from ccrun.backends.local.launched import LaunchedTasks
from ccrun.errors import Busy, CcrunError
from ccrun.jobs import ExecutionState
from ccrun.names import payload_name
from ccrun.process import cgroup, detached, tree
from ccrun.task import TaskId
from ccrun.task_directories import remove_leftovers

log = structlog.get_logger()

#: More tasks than this cannot be queued.
MAX_QUEUED: Final = 10_000
#: How many finished executions are remembered until their tasks are settled.
MAX_REMEMBERED_EXECUTIONS: Final = 10_000
#: Seconds after which a client should retry when the queue is full.
QUEUE_RETRY_SECONDS: Final = 30


class SubprocessJobs:
    """Runs workers as processes of this machine.

    At most `max_running` workers of this service run at the same time; further tasks are queued in memory. Workers keep
    running when the service stops. Each holds a PID file, so every service on the same data directory can see it, as it can see
    what the others have queued.
    """

    #: None: a task stays queued until a worker slot is free.
    start_timeout: dt.timedelta | None = None
    launch_time: dt.timedelta = dt.timedelta(0)

    def __init__(
        self,
        *,
        command: Sequence[str],
        environment: Mapping[str, str],
        pid_files: Path,
        services: Path,
        marker: Callable[[TaskId], str],
        max_running: int,
        max_queued: int = MAX_QUEUED,
        on_worker_exit: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the adapter.

        Args:
            command: The command that starts a worker.
            environment: The environment of each worker. The task ID and the payload's name are added to it.
            pid_files: The directory of the PID files, each of which the worker of a task keeps locked.
            services: The directory in which services record what they have queued, see `LaunchedTasks`.
            marker: Returns the string that marks the processes of a task.
            max_running: How many workers can run at the same time.
            max_queued: How many tasks can wait for a free worker slot.
            on_worker_exit: Called after each exit of a worker.
        """
        self.max_running: int | None = max_running
        self._slots = max_running
        self._max_queued = max_queued
        self._command = tuple(command)
        self._environment = dict(environment)
        self._pid_files = pid_files
        self._marker = marker
        self._launched = LaunchedTasks(services)
        self._queue: deque[TaskId] = deque()
        #: The places in the queue, None after it has changed: thousands of readers may ask every second.
        self._places: dict[TaskId, int] | None = None
        #: None: the worker's process is being started.
        self._running: dict[TaskId, detached.Detached | None] = {}
        self._finished: OrderedDict[TaskId, None] = OrderedDict()
        self._waiters: set[asyncio.Task[None]] = set()
        #: Held while a worker's process is being started.
        self._starting = asyncio.Lock()
        self._on_worker_exit = on_worker_exit

    async def __aenter__(self) -> Self:
        await self._launched.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Start no more workers. Those that run keep running."""
        self._queue.clear()
        self._places = None
        for waiter in self._waiters:
            waiter.cancel()
        await asyncio.gather(*self._waiters, return_exceptions=True)
        for child in self._running.values():
            if child is not None:
                child.let_go()
        if self._running:
            log.info("workers_left_running", message="Workers keep running", taskIds=sorted(self._running))
        await self._launched.__aexit__(*exc_info)

    def check_capacity(self) -> None:
        if len(self._queue) >= self._max_queued:
            raise Busy(f"{self._max_queued} tasks are already queued.", retry_after=QUEUE_RETRY_SECONDS)

    def queue_position(self, task_id: TaskId) -> int | None:
        if self._places is None:
            self._places = {queued: place for place, queued in enumerate(self._queue, start=1)}
        return self._places.get(task_id)

    async def launch(self, task_id: TaskId) -> str | None:
        self.check_capacity()
        if task_id not in self._running and task_id not in self._queue:
            self._queue.append(task_id)
            self._places = None
            await self._launched.add(task_id)
            self._start_queued()
        return None

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        with contextlib.suppress(ValueError):
            self._queue.remove(task_id)
            self._places = None
            await self._launched.remove(task_id)
        child = self._running.get(task_id)
        pid = child.pid if child else await asyncio.to_thread(pidfile.holder_pid, self._pid_files / task_id)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        of_others = () if self._is_known(task_id) else await self._launched.of_others()
        return await self._state(task_id, of_others)

    async def _state(self, task_id: TaskId, of_others: Collection[TaskId]) -> ExecutionState:
        if task_id in self._running:
            return ExecutionState.RUNNING
        if task_id in self._queue:
            return ExecutionState.QUEUED
        if await asyncio.to_thread(pidfile.holder_pid, self._pid_files / task_id):
            return ExecutionState.RUNNING
        if task_id in of_others:
            return ExecutionState.QUEUED
        return ExecutionState.FINISHED if task_id in self._finished else ExecutionState.UNKNOWN

    async def launched_states(self, task_ids: Collection[TaskId]) -> Mapping[TaskId, ExecutionState]:
        of_others = await self._launched.of_others()
        return {task_id: await self._state(task_id, of_others) for task_id in task_ids}

    async def clear(self, task_id: TaskId) -> None:
        self._finished.pop(task_id, None)
        await asyncio.to_thread(cgroup.kill_group, self._marker(task_id))
        await tree.kill_marked(self._marker(task_id))
        await asyncio.to_thread(remove_leftovers, task_id)
        # Last: until then, `leftovers` finds the task again.
        await asyncio.to_thread((self._pid_files / task_id).unlink, missing_ok=True)

    async def _kill_orphans(self) -> None:
        """Kill the processes of workers that were killed."""
        # A worker that is just being started would not be known.
        async with self._starting:
            workers = {child.pid for child in self._running.values() if child is not None}
            await asyncio.to_thread(tree.kill_orphans, workers)

    async def leftovers(self) -> list[TaskId]:
        return [task_id for task_id in await asyncio.to_thread(self._unheld) if not self._is_known(task_id)]

    def _unheld(self) -> list[TaskId]:
        """Return the tasks whose PID files no worker holds. Blocks."""
        with contextlib.suppress(FileNotFoundError):
            return [TaskId(path.name) for path in self._pid_files.iterdir() if pidfile.holder_pid(path) is None]
        return []

    def _is_known(self, task_id: TaskId) -> bool:
        return task_id in self._running or task_id in self._queue

    def _start_queued(self) -> None:
        while self._queue and len(self._running) < self._slots:
            task_id = self._queue.popleft()
            self._places = None
            self._running[task_id] = None
            waiter = asyncio.create_task(self._run(task_id))
            self._waiters.add(waiter)
            waiter.add_done_callback(self._waiters.discard)

    async def _run(self, task_id: TaskId) -> None:
        try:
            async with self._starting:
                child = await detached.start_detached(
                    self._command,
                    env={**self._environment, "TASK_ID": task_id, "ENCRYPTED_PAYLOAD_PATH": payload_name(task_id)},
                )
                self._running[task_id] = child
            exited = await child.wait()
            if not exited.ok:
                log.warning("worker_failed", message="Worker failed", taskId=task_id, exitCode=exited.code)
                await self._kill_orphans()
        except CcrunError as error:
            log.warning(
                "worker_start_failed", message="Worker could not be started", taskId=task_id, error=error.message
            )
        del self._running[task_id]
        self._finished[task_id] = None
        await self._launched.remove(task_id)
        while len(self._finished) > MAX_REMEMBERED_EXECUTIONS:
            self._finished.popitem(last=False)
        self._on_worker_exit()
        self._start_queued()

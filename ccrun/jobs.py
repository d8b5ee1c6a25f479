"""The port to what runs workers: start the worker of a task, cancel it, return its state.

A task is only an ID here. The worker reads the rest from the store.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Collection, Mapping
from typing import Protocol

from ccrun.task import TaskId


class ExecutionState(enum.StrEnum):
    """The state of the execution that runs a task's worker."""

    QUEUED = "queued"
    RUNNING = "running"
    #: It stopped, for an unknown reason or for none that the three states below describe.
    FINISHED = "finished"
    OUT_OF_MEMORY = "out_of_memory"
    #: It reached the backend's own maximum duration.
    TIMED_OUT = "timed_out"
    #: It was cancelled by ccrun, or by an operator in the backend.
    CANCELLED = "cancelled"
    #: The backend has no such execution: it never started, or finished so long ago that the backend has forgotten it.
    UNKNOWN = "unknown"
    #: The backend does not respond.
    UNREACHABLE = "unreachable"


class Jobs(Protocol):
    """What runs workers.

    An adapter must:

    - Give the worker the environment variables `TASK_ID` and `ENCRYPTED_PAYLOAD_PATH` (`ccrun.names.payload_name`).
    - Return from `launch` when the execution has started or is certain to start. A second worker for the same task is
      harmless: it finds that the task was taken, and exits.
    - Send SIGTERM on `cancel`, and let the worker run for 10 s more. `cancel` must not raise when there is no such
      execution or the backend is unreachable: the worker also polls its task's record for a cancel request.
    - Return `UNREACHABLE` from `state` when the state cannot be determined now, instead of raising.
    """

    @property
    def max_running(self) -> int | None:
        """How many workers can run at the same time; None if the backend sets that limit."""
        ...

    @property
    def start_timeout(self) -> dt.timedelta | None:
        """The maximum time from the launch until the worker takes its task; None if it can stay queued indefinitely."""
        ...

    @property
    def launch_time(self) -> dt.timedelta:
        """The time after which `launch` has usually returned, so that `launched_states` finds the execution."""
        ...

    def check_capacity(self) -> None:
        """Check whether a launch is already known to fail, before the caller creates the task.

        Raises:
            Busy: There is no capacity now.
        """
        ...

    def queue_position(self, task_id: TaskId) -> int | None:
        """Return the place of a task among those that wait for a worker, from 1; None if it is not known or does not wait."""
        ...

    async def launch(self, task_id: TaskId) -> str | None:
        """Start a worker for a task, and return the execution's name, or None if the backend does not name executions.

        Raises:
            Busy: There is no capacity now.
            LaunchFailed: The worker cannot be started.
        """
        ...

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        """Request that a task's worker stops.

        Args:
            task_id: The task.
            execution_name: What `launch` returned for it.
        """
        ...

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        """Return the state of a task's execution.

        Args:
            task_id: The task.
            execution_name: What `launch` returned for it.
        """
        ...

    async def launched_states(self, task_ids: Collection[TaskId]) -> Mapping[TaskId, ExecutionState]:
        """Return the states of the executions of these pending tasks, which are found without their names.

        `UNKNOWN` means that the task was never launched, or so long ago that the backend has forgotten it.
        """
        ...

    async def clear(self, task_id: TaskId) -> None:
        """Remove what a lost worker left behind: processes and files."""
        ...

    async def leftovers(self) -> list[TaskId]:
        """Return the tasks for which `clear` has something to remove: no worker runs, but one has left processes or files.

        It is found without the record of the task, since whoever writes the final record may be killed before `clear`.
        """
        ...

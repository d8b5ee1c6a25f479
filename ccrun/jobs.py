"""The port to the platform that runs workers: launch one for a task, cancel it, report its state.

Knows the ID of a task and nothing else; the worker reads the rest from the store.
"""

from __future__ import annotations

import datetime as dt
import enum
from typing import Protocol

from ccrun.task import TaskId


class ExecutionState(enum.StrEnum):
    """The state of the execution of a task."""

    QUEUED = "queued"
    RUNNING = "running"
    #: It has finished, for an unknown reason. The three states below have a reason.
    FINISHED = "finished"
    OUT_OF_MEMORY = "out_of_memory"
    #: It was stopped at the time limit of the platform.
    TIMED_OUT = "timed_out"
    #: By ccrun, or by a person at the platform.
    CANCELLED = "cancelled"
    #: The platform does not know it: it never started, or finished long ago.
    UNKNOWN = "unknown"
    #: The platform does not answer.
    UNREACHABLE = "unreachable"


class Jobs(Protocol):
    """A platform that runs workers.

    An adapter must guarantee:

    - `launch` returns when the execution has started or will start. A second worker for a task is harmless: it finds the task
      claimed.
    - `cancel` gives the worker 10 s to stop. It does not fail when there is no worker or it cannot be reached, since the worker
      also polls its record.
    - `state` returns `UNREACHABLE` when the platform does not answer.
    """

    @property
    def max_running(self) -> int | None:
        """How many workers may run concurrently, None when the platform has the limit."""
        ...

    @property
    def start_timeout(self) -> dt.timedelta | None:
        """How long a worker may take from its launch to its start, None for no limit."""
        ...

    def check_capacity(self) -> None:
        """Check that a launch has a chance, before a task is stored.

        Raises:
            Busy: There is no capacity.
        """
        ...

    async def launch(self, task_id: TaskId) -> str | None:
        """Start a worker for a task. Return the name of the execution, if it has one yet.

        Raises:
            Busy: There is no capacity.
            LaunchFailed: The worker cannot be started.
        """
        ...

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        """Ask the worker of a task to stop."""
        ...

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        """Return the state of the execution of a task."""
        ...

    async def clear(self, task_id: TaskId) -> None:
        """Remove the processes and files that a lost worker has left."""
        ...

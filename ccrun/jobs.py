"""The port to what runs workers: start one for a task, cancel it, report its state.

Knows task IDs and nothing else about a task; the worker finds the rest in the store.
"""

from __future__ import annotations

import datetime as dt
import enum
from typing import Protocol

from ccrun.task import TaskId


class ExecutionState(enum.StrEnum):
    """What a place that runs workers knows of the worker of a task."""

    QUEUED = "queued"
    RUNNING = "running"
    #: It was started and is over; so it is in the three states that follow, which tell why.
    ENDED = "ended"
    OUT_OF_MEMORY = "out_of_memory"
    #: The place allows no worker to run for so long.
    TIMED_OUT = "timed_out"
    #: By ccrun, or by a person at the place itself.
    CANCELLED = "cancelled"
    #: Nobody here has heard of it: never started, or over for long.
    UNKNOWN = "unknown"
    #: The place does not answer now.
    UNREACHABLE = "unreachable"


class Jobs(Protocol):
    """What dispatch and sweep need of a place that runs workers.

    An adapter owes: `launch` returns when the execution will start or has; a worker started twice for one task does no harm,
    since the second finds the task taken. `cancel` lets the worker end by itself within 10 s; that there is none is no error,
    nor that it cannot be reached, since it also sees the cancel in its task's record. `state` says so when it cannot tell.
    """

    @property
    def max_running(self) -> int | None:
        """How many workers may run at once, None when the place sets the bound."""
        ...

    @property
    def start_timeout(self) -> dt.timedelta | None:
        """How long a worker may take from its launch until it begins; None when it may wait for as long as it takes."""
        ...

    def check_capacity(self) -> None:
        """Raise `Busy` when it is clear already that a launch would find no room; so that no task is made in vain."""
        ...

    async def launch(self, task_id: TaskId) -> str | None:
        """Start a worker for the task; return the execution's name, when it has one yet.

        Raises:
            Busy: There is no room now.
            LaunchFailed: It cannot be started.
        """
        ...

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        """Ask the worker of that task to end."""
        ...

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        """Return what is known of the worker of that task."""
        ...

    async def clear(self, task_id: TaskId) -> None:
        """Remove what a worker that died left behind: processes, files."""
        ...

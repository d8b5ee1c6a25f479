"""Workers for tests of what runs workers: small Python programs that hold a PID file, as a real worker does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

from ccrun.backends.local.jobs import MAX_QUEUED, SubprocessJobs
from ccrun.jobs import ExecutionState, Jobs
from ccrun.task import TaskId
from helpers.service import WAIT_SECONDS

A, B, C = TaskId("task-a"), TaskId("task-b"), TaskId("task-c")

#: Writes the payload's name into a file, and exits when the file is removed, `stop` exists, or it gets SIGTERM.
WORKER: Final = """
import os, pathlib, sys, time
from ccrun.backends.local import pidfile
directory = pathlib.Path(sys.argv[1])
task = os.environ["TASK_ID"]
with pidfile.hold(directory / "pids" / task):
    (directory / task).write_text(os.environ["ENCRYPTED_PAYLOAD_PATH"])
    while (directory / task).exists() and not (directory / "stop").exists():
        time.sleep(0.01)
"""

MakeJobs = Callable[..., SubprocessJobs]


def worker_command(directory: Path) -> tuple[str, ...]:
    """Return the command of a worker that writes its file into a directory."""
    return (sys.executable, "-c", WORKER, str(directory))


@contextlib.asynccontextmanager
async def stopped_workers(directory: Path) -> AsyncIterator[MakeJobs]:
    """Yield a function that creates a `SubprocessJobs`, and stop its workers on exit."""

    def make(
        max_running: int = 2, max_queued: int = MAX_QUEUED, command: tuple[str, ...] | None = None
    ) -> SubprocessJobs:
        return SubprocessJobs(
            command=command or worker_command(directory),
            environment=dict(os.environ),
            pid_files=directory / "pids",
            services=directory / "services",
            marker=lambda task_id: f"{directory}/{task_id}",
            max_running=max_running,
            max_queued=max_queued,
        )

    yield make
    # A file, because a worker may not have started yet.
    (directory / "stop").touch()


async def until_state(jobs: Jobs, task_id: TaskId, *states: ExecutionState, name: str | None = None) -> ExecutionState:
    """Wait until the execution of a task has one of these states, and return it."""
    async with asyncio.timeout(WAIT_SECONDS):
        while (state := await jobs.state(task_id, name)) not in states:
            await asyncio.sleep(0.01)
    return state


async def until_written(path: Path) -> str:
    """Wait until a worker has written its file, and return the content."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not path.exists() or not path.read_text():
            await asyncio.sleep(0.01)
    return path.read_text()

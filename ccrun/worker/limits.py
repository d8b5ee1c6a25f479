"""What a task may use of the machine. A task that uses more is stopped, so that the others and the service go on.

Measured, not enforced by the kernel: control groups with the controllers for memory and processes are seldom given to services,
and limits of a process (setrlimit(2)) do not add up the processes of a task. Between two measurements, a task can use more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import attrs

from ccrun import lifecycle
from ccrun.process.usage import disk_bytes, usage_of_descendants
from ccrun.task import EXIT_KILLED, Outcome, Reason
from ccrun.worker.stop import StopCause, StopRequest, alongside

#: The share of the time that is spent on measuring the disk.
DISK_SHARE: Final = 0.1
#: Seconds for one measurement of the disk.
DISK_SECONDS: Final = 10.0


@attrs.frozen(kw_only=True)
class TaskLimits:
    """What a task may use.

    Args:
        memory_bytes: Resident memory of all processes of the task.
        processes: Their number.
        disk_bytes: Space that the files of the workspace take.
        seconds: Between two measurements.
    """

    memory_bytes: int = 2**63
    processes: int = 2**31
    disk_bytes: int = 2**63
    seconds: float = 1.0

    def exceeded(self, *, memory: int = 0, processes: int = 0, disk: int = 0) -> Outcome | None:
        """Return the outcome of a task that uses this, None if it may."""
        reason = Reason.LIMIT_EXCEEDED
        if memory > self.memory_bytes:
            used, reason = f"{_size(memory)} of memory, and may use {_size(self.memory_bytes)}", Reason.OUT_OF_MEMORY
        elif processes > self.processes:
            used = f"{processes} processes, and may have {self.processes}"
        elif disk > self.disk_bytes:
            used = f"{_size(disk)} of the disk, and may use {_size(self.disk_bytes)}"
        else:
            return None
        return lifecycle.failed_outcome(reason, f"The task was stopped: it used {used}.", exit_code=EXIT_KILLED)


@contextlib.asynccontextmanager
async def watch(limits: TaskLimits, workspace: Path, stop: StopRequest) -> AsyncIterator[None]:
    """Request a stop when the task uses more than it may, while the context is open. The task is all children of this process."""

    async def watch_processes() -> None:
        while True:
            await asyncio.sleep(limits.seconds)
            usage = await asyncio.to_thread(usage_of_descendants, os.getpid())
            check(limits.exceeded(memory=usage.memory_bytes, processes=usage.processes))

    async def watch_disk() -> None:
        loop = asyncio.get_running_loop()
        pause = limits.seconds
        while True:
            await asyncio.sleep(pause)
            started = loop.time()
            check(limits.exceeded(disk=await asyncio.to_thread(disk_bytes, workspace, seconds=DISK_SECONDS)))
            pause = max(limits.seconds, (loop.time() - started) / DISK_SHARE)

    def check(outcome: Outcome | None) -> None:
        if outcome is not None:
            stop.request(StopCause.LIMIT, outcome)

    async with alongside(watch_processes(), watch_disk()):
        yield


def _size(number: int) -> str:
    return f"{number / 1024**2:.0f} MiB"

"""The request to stop a task before it has finished: a timeout, a cancel, or the shutdown of the worker."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Coroutine
from typing import Any, TypeVar

from ccrun import lifecycle
from ccrun.task import (
    EXIT_TERMINATED,
    EXIT_TIMEOUT,
    Outcome,
    Reason,
)

T = TypeVar("T")


class StopCause(enum.Enum):
    """Why a task is ended from outside."""

    TIMEOUT = enum.auto()
    CANCEL = enum.auto()
    SHUTDOWN = enum.auto()


class StopRequested(Exception):
    """The task is to be ended before this is done."""


class StopRequest:
    """The first wish to end the task. Later ones change nothing, but for the one to hurry."""

    def __init__(self) -> None:
        self.cause: StopCause | None = None
        #: When this process was told to end, on the loop's clock.
        self.shutdown_at: float | None = None
        self._requested = asyncio.Event()
        self._shutdown = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None

    def request(self, cause: StopCause) -> None:
        """Ask for the end of the task."""
        if cause is StopCause.SHUTDOWN and self.shutdown_at is None:
            self.shutdown_at = asyncio.get_running_loop().time()
            self._shutdown.set()
        if self.cause is None:
            self.cause = cause
            self._requested.set()

    def limit(self, at: float) -> None:
        """End the task at this time."""
        self._deadline = asyncio.get_running_loop().call_at(at, self.request, StopCause.TIMEOUT)

    def cancel_deadline(self) -> None:
        """Let what follows take its time: the agent has done its work, and what keeps it has bounds of its own."""
        if self._deadline is not None:
            self._deadline.cancel()
        if self.cause is StopCause.TIMEOUT:
            self.cause = None
            self._requested.clear()

    async def wait(self) -> None:
        """Wait for the first wish."""
        await self._requested.wait()

    async def wait_for_shutdown(self) -> None:
        """Wait until this process is told to end."""
        await self._shutdown.wait()

    async def before(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what the work returns; break it off when the task is to be ended first.

        Raises:
            Ended: It was broken off.
        """
        doing, wished = asyncio.create_task(work), asyncio.create_task(self.wait())
        try:
            await asyncio.wait({doing, wished}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise StopRequested
            return doing.result()
        finally:
            for waiting in (doing, wished):
                waiting.cancel()
            await asyncio.gather(doing, wished, return_exceptions=True)


def stopped_outcome(cause: StopCause | None, timeout_minutes: float) -> Outcome:
    """Return what a task ends in that was ended from outside."""
    match cause:
        case StopCause.TIMEOUT:
            error = f"The task was not done within {timeout_minutes:g} minutes."
            return lifecycle.failed_outcome(Reason.TIMEOUT, error, exit_code=EXIT_TIMEOUT)
        case StopCause.CANCEL:
            return lifecycle.cancelled_outcome()
        case StopCause.SHUTDOWN | None:
            error = "The worker was told to end before the task was done."
            return lifecycle.failed_outcome(Reason.KILLED, error, exit_code=EXIT_TERMINATED)

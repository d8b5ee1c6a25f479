"""Requests to stop a task before it has finished: a timeout, a cancellation, or the shutdown of the worker."""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import attrs

from ccrun import lifecycle
from ccrun.task import EXIT_TERMINATED, EXIT_TIMEOUT, Outcome, Reason

T = TypeVar("T")


class StopCause(enum.Enum):
    """Why a task is stopped."""

    TIMEOUT = enum.auto()
    CANCEL = enum.auto()
    SHUTDOWN = enum.auto()
    #: The task has used more of the machine than it may.
    LIMIT = enum.auto()


class StopRequested(Exception):
    """The task was stopped before the work was done."""


class StopRequest:
    """The first request to stop a task. Later ones have no effect, except that a shutdown limits the time that is left."""

    def __init__(self) -> None:
        self.cause: StopCause | None = None
        #: The outcome of the task that has exceeded a limit.
        self.exceeded: Outcome | None = None
        #: When the shutdown was requested, on the clock of the event loop.
        self.shutdown_at: float | None = None
        self._requested = asyncio.Event()
        self._shutdown = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None

    def request(self, cause: StopCause, exceeded: Outcome | None = None) -> None:
        """Request that the task stops.

        Args:
            exceeded: The outcome, for `StopCause.LIMIT`.
        """
        if cause is StopCause.SHUTDOWN and self.shutdown_at is None:
            self.shutdown_at = asyncio.get_running_loop().time()
            self._shutdown.set()
        if self.cause is None:
            self.cause, self.exceeded = cause, exceeded
            self._requested.set()

    def set_deadline(self, at: float) -> None:
        """Stop the task with a timeout at this time, on the clock of the event loop."""
        self._deadline = asyncio.get_running_loop().call_at(at, self.request, StopCause.TIMEOUT)

    def cancel_deadline(self) -> None:
        """Withdraw the timeout, even if it has passed: the agent is done, and what follows has timeouts of its own."""
        if self._deadline is not None:
            self._deadline.cancel()
        if self.cause is StopCause.TIMEOUT:
            self.cause = None
            self._requested.clear()

    async def wait(self) -> None:
        """Wait for the first request."""
        await self._requested.wait()

    async def wait_for_shutdown(self) -> None:
        """Wait until a shutdown is requested."""
        await self._shutdown.wait()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what the work returns. Cancel it when a stop is requested first.

        Raises:
            StopRequested: The work was cancelled.
        """
        working, requested = asyncio.create_task(work), asyncio.create_task(self.wait())
        try:
            await asyncio.wait({working, requested}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise StopRequested
            return working.result()
        finally:
            for task in (working, requested):
                task.cancel()
            await asyncio.gather(working, requested, return_exceptions=True)


@contextlib.asynccontextmanager
async def alongside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run coroutines while the context is open."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def with_stop(outcome: Outcome, stopped: Outcome) -> Outcome:
    """Return the outcome of a run that was stopped, with the figures of the run, and with the status and reason of the stop."""
    return attrs.evolve(
        outcome, status=stopped.status, reason=stopped.reason, exit_code=stopped.exit_code, error=stopped.error
    )


def stopped_outcome(stop: StopRequest, timeout_minutes: float) -> Outcome:
    """Return the outcome of a task that was stopped."""
    if stop.exceeded is not None:
        return stop.exceeded
    match stop.cause:
        case StopCause.TIMEOUT:
            error = f"The task did not finish within {timeout_minutes:g} minutes."
            return lifecycle.failed_outcome(Reason.TIMEOUT, error, exit_code=EXIT_TIMEOUT)
        case StopCause.CANCEL:
            return lifecycle.cancelled_outcome()
        case _:
            error = "The worker was shut down before the task finished."
            return lifecycle.failed_outcome(Reason.KILLED, error, exit_code=EXIT_TERMINATED)

"""Work that continues when the request that started it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundTasks:
    """The asyncio tasks that outlive their requests, until `close` cancels them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start work that is not cancelled with the request."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what the work returns. The work is completed even if the client disconnects."""
        return await asyncio.shield(self.spawn(work))

    async def close(self) -> None:
        """Cancel what still runs, and wait for it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        # Retrieve the exception, so that asyncio does not log it again: the work has logged its own failure.
        if not task.cancelled():
            task.exception()

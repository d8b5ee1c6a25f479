"""Which tasks the services on one data directory have queued, so that none launches the tasks of another.

Each service has a directory with a locked PID file and an empty file for each task that it has queued or is running. The kernel
releases the lock when the service exits for any reason, and its tasks then count as not launched.

If the directory cannot be used, for example on a full disk, no task fails: at worst, a worker starts for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import time
from pathlib import Path
from typing import Final, Self

from ccrun.backends.local import pidfile
from ccrun.task import TaskId

#: Random bytes of a directory's name. A PID is not sufficient: it may be reused, and one process may have two adapters.
NAME_BYTES: Final = 8
#: Seconds after which the directory of a service that has exited is removed.
REMOVAL_AGE_SECONDS: Final = 60.0
_PID_FILE: Final = ".pid"


class LaunchedTasks:
    """The tasks that this service has launched, and those of the other services on the same data directory.

    Args:
        services: The directory with one directory for each service.
    """

    def __init__(self, services: Path) -> None:
        self._services = services
        self._own = services / secrets.token_hex(NAME_BYTES)
        self._held = contextlib.ExitStack()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._open)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self._close)

    def _open(self) -> None:
        with contextlib.suppress(OSError):
            self._services.mkdir(mode=0o700, parents=True, exist_ok=True)
            for each in self._services.iterdir():
                # A new directory may belong to a service that has not locked its PID file yet.
                if time.time() - each.stat().st_mtime > REMOVAL_AGE_SECONDS and not _is_running(each):
                    shutil.rmtree(each, ignore_errors=True)
            self._held.enter_context(pidfile.hold(self._own / _PID_FILE))

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._held.close()
        shutil.rmtree(self._own, ignore_errors=True)

    async def add(self, task_id: TaskId) -> None:
        """Record that this service has queued a task."""
        with contextlib.suppress(OSError):
            await asyncio.to_thread((self._own / task_id).touch)

    async def remove(self, task_id: TaskId) -> None:
        """Record that this service no longer runs a task."""
        with contextlib.suppress(OSError):
            await asyncio.to_thread((self._own / task_id).unlink)

    async def of_others(self) -> frozenset[TaskId]:
        """Return the tasks that other services have queued or are running."""
        return await asyncio.to_thread(self._of_others)

    def _of_others(self) -> frozenset[TaskId]:
        found: set[TaskId] = set()
        # A service may exit at any time, and its directory be removed.
        for each in _entries(self._services):
            with contextlib.suppress(OSError):
                if each != self._own and _is_running(each):
                    found.update(TaskId(path.name) for path in _entries(each) if path.name != _PID_FILE)
        return frozenset(found)


def _entries(directory: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(directory.iterdir())
    return []


def _is_running(service: Path) -> bool:
    return pidfile.holder_pid(service / _PID_FILE) is not None

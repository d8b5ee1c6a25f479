"""PID files with a lock: show whether a worker of this machine still runs.

A worker holds an exclusive lock on its file. The kernel releases the lock when the process exits for any reason, so a process
ID that was reused cannot be mistaken for the worker. All functions block for the time of a file access.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ccrun.errors import CcrunError

#: Seconds. `holder_pid` takes the lock for an instant. A lock that is held for longer belongs to another holder.
LOCK_WAIT_SECONDS: Final = 0.5
LOCK_WAIT_POLL_SECONDS: Final = 0.005


class AlreadyHeld(CcrunError):
    """Another process holds the PID file."""


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Create and lock a PID file for this process, and remove it on exit.

    Raises:
        AlreadyHeld: Another process holds it.
        OSError: The file cannot be created.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path) as file:
        file.truncate()
        file.write(str(os.getpid()).encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> io.FileIO:
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    file = _opened(path)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise AlreadyHeld from None
            time.sleep(LOCK_WAIT_POLL_SECONDS)
        else:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            # The previous holder removed this file between our open and our lock, so other processes cannot see our lock.
            file.close()
            file = _opened(path)


def _opened(path: Path) -> io.FileIO:
    return io.FileIO(os.open(path, os.O_CREAT | os.O_RDWR, 0o600), "r+")


def holder_pid(path: Path) -> int | None:
    """Return the ID of the process that holds the PID file, None if no process does."""
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or b"0") or None
    except FileNotFoundError:
        pass
    return None

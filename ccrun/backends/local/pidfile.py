"""A PID file that a running process keeps locked.

The kernel releases the lock when the process exits, so that a PID that is used again does not count. All functions block for the
time of a file access.
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

#: Seconds for which the lock is awaited. `holder_pid` has it for an instant; a holder has it for longer.
LOCK_WAIT_SECONDS: Final = 0.5
LOCK_WAIT_POLL_SECONDS: Final = 0.005


class AlreadyHeld(CcrunError):
    """Another process holds this PID file."""


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the PID file while the context is open.

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
    give_up_at = time.monotonic() + LOCK_WAIT_SECONDS
    file = _opened(path)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                file.close()
                raise AlreadyHeld from None
            time.sleep(LOCK_WAIT_POLL_SECONDS)
        else:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            # The previous holder has removed this file, so a lock on it would not be seen.
            file.close()
            file = _opened(path)


def _opened(path: Path) -> io.FileIO:
    return io.FileIO(os.open(path, os.O_CREAT | os.O_RDWR, 0o600), "r+")


def holder_pid(path: Path) -> int | None:
    """Return the PID of the process that holds the file, None when there is none."""
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or b"0") or None
    except FileNotFoundError:
        pass
    return None

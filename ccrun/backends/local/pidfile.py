"""A worker's sign of life on one machine: a file that it keeps locked.

The kernel lets go of the lock when the process dies, however it dies, so no process number that was given to another meanwhile
can deceive. Knows files and process numbers; knows no tasks. All of it blocks for the time of a file access.
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

#: Seconds. Whoever asks for the holder has the lock for an instant; whoever has it longer than this is a holder.
LOCK_WAIT_SECONDS: Final = 0.5
LOCK_WAIT_POLL_SECONDS: Final = 0.005


class AlreadyHeld(CcrunError):
    """Another process holds this sign of life."""


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the sign while the context lasts.

    Raises:
        AlreadyHeld: Another process holds it.
        OSError: The file cannot be made.
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
            # The holder before us has removed this file as it ended: nobody would see a lock on it.
            file.close()
            file = _opened(path)


def _opened(path: Path) -> io.FileIO:
    return io.FileIO(os.open(path, os.O_CREAT | os.O_RDWR, 0o600), "r+")


def holder_pid(path: Path) -> int | None:
    """Return the number of the process that holds the sign, None when nobody does."""
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or b"0") or None
    except FileNotFoundError:
        pass
    return None

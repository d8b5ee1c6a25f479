"""A worker's sign of life on one machine: a file that it keeps locked.

The kernel lets go of the lock when the process dies, however it dies, so no process number that was given to another meanwhile
can deceive. Knows files and process numbers; knows no tasks. All of it blocks for the time of a file access.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ccrun.errors import CcrunError

#: Seconds. Whoever asks for the holder has the lock for an instant; whoever has it longer than this is a holder.
HOLD_SECONDS: Final = 0.5
PAUSE_SECONDS: Final = 0.005


class AlreadyHeld(CcrunError):
    """Another process holds this sign of life."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the sign while the context lasts.

    Raises:
        AlreadyHeld: Another process holds it.
        OSError: The file cannot be made.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    give_up_at = time.monotonic() + HOLD_SECONDS
    with os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR, 0o600), "r+b", buffering=0) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_at:
                    raise AlreadyHeld from None
                time.sleep(PAUSE_SECONDS)
        file.truncate()
        file.write(str(os.getpid()).encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def holder(path: Path) -> int | None:
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

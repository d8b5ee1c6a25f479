"""Settings of this process that only Linux has: prctl(2)."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

# <linux/prctl.h>
_PR_SET_DUMPABLE: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37


# --- what the worker does for itself ---------------------------------------------------------------------------------


def become_subreaper() -> bool:
    """Have orphaned descendants become our children, so that `spawn` finds what has cut every tie to its parent.

    For a process that starts nothing but through `spawn`: children of other makers that lead a session of their own would
    count as such orphans. See PR_SET_CHILD_SUBREAPER in prctl(2).

    Returns:
        Whether the system can do it (Linux).
    """
    return _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))


def harden() -> bool:
    """Keep other processes of the same user, such as our children, out of our memory and `/proc/PID/environ`.

    See PR_SET_DUMPABLE in prctl(2). Nothing keeps out root.

    Returns:
        Whether the system can do it (Linux).
    """
    return _prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0))


def is_subreaper() -> bool:
    answer = ctypes.c_int(0)
    return _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(answer)) and answer.value == 1


def _prctl(option: int, argument: object) -> bool:
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).prctl(option, argument, *(ctypes.c_ulong(0),) * 3) == 0)

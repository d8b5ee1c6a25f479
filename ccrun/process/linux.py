"""Settings of this process that only Linux has, by prctl(2)."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

# <linux/prctl.h>
_PR_SET_DUMPABLE: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37


def become_subreaper() -> bool:
    """Make this process the parent of its orphaned descendants, so that `spawn` finds all of them.

    Only for a process that starts all children by `spawn`: other children that lead a session would count as orphans. See
    PR_SET_CHILD_SUBREAPER in prctl(2).

    Returns:
        Whether the system supports it (Linux).
    """
    return _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))


def harden() -> bool:
    """Deny other processes of the same user, such as children, access to this process's memory and `/proc/PID/environ`.

    See PR_SET_DUMPABLE in prctl(2). It does not affect root.

    Returns:
        Whether the system supports it (Linux).
    """
    return _prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0))


def is_subreaper() -> bool:
    """Return whether `become_subreaper` was called with success."""
    answer = ctypes.c_int(0)
    return _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(answer)) and answer.value == 1


def _prctl(option: int, argument: object) -> bool:
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).prctl(option, argument, *(ctypes.c_ulong(0),) * 3) == 0)

"""The limit of open files of this process (RLIMIT_NOFILE in getrlimit(2))."""

from __future__ import annotations

import contextlib
import resource
from typing import Final

#: The limit where the system sets none.
MAX_OPEN_FILES: Final = 1_048_576


def raise_open_files_limit() -> None:
    """Raise the limit as far as this process may. Many systems start processes with 1024, which is less than they allow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else hard
    # macOS reports no limit, and allows less. Then the limit stays as it is.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def open_files_limit() -> int:
    """Return how many files this process can open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft

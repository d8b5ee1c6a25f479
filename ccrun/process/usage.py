"""What processes and directories use: processes, memory and disk space. Blocks; use it in a thread."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import attrs


@attrs.frozen(kw_only=True)
class Usage:
    """What the descendants of a process use.

    Args:
        processes: Their number.
        memory_bytes: Their resident memory. What several processes share counts for each.
    """

    processes: int = 0
    memory_bytes: int = 0


def usage_of_descendants(pid: int) -> Usage:
    """Return what the descendants of a process use, nothing where the kernel does not list them.

    Reads their own files alone, not those of all processes, so that many workers on one machine can call it often. See
    proc_pid_task(5) and proc_pid_statm(5).
    """
    seen: set[int] = set()
    found, pages = [pid], 0
    while found:
        parent = found.pop()
        # A process that has ended meanwhile is not counted.
        with contextlib.suppress(OSError):
            if parent != pid:
                pages += int(Path(f"/proc/{parent}/statm").read_text().split()[1])
            for task in os.listdir(f"/proc/{parent}/task"):  # noqa: PTH208 - faster
                children = {int(child) for child in Path(f"/proc/{parent}/task/{task}/children").read_text().split()}
                found += children - seen
                seen |= children
    return Usage(processes=len(seen), memory_bytes=pages * os.sysconf("SC_PAGE_SIZE"))


def disk_bytes(directory: Path, *, seconds: float) -> int:
    """Return the space that the files in a directory take. Links are not followed, and sparse files count with what they take.

    What this process may not read is not counted, nor is what has a path of more than 4096 bytes.

    Args:
        seconds: After this time, the files that were found until then count.
    """
    until = time.monotonic() + seconds
    total, directories = 0, [os.fspath(directory)]
    while directories and time.monotonic() < until:
        with contextlib.suppress(OSError), os.scandir(directories.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
    return total

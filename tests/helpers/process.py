"""Child processes of tests: wait for conditions, read process IDs, run Python code."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeAlias

import psutil
import pytest

from ccrun.process.child import Child

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prctl")
#: Seconds. The longest wait of a test, with room for a busy machine.
WAIT_SECONDS = 20.0
#: The `PATH` of child processes.
PATH = "/usr/local/bin:/usr/bin:/bin"

Shell: TypeAlias = Callable[..., AbstractAsyncContextManager[Child]]


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


async def pid_in(path: Path) -> int:
    """Wait until a script has written a process ID, and return it."""
    texts: list[str] = []

    def is_written() -> bool:
        texts.append(path.read_text() if path.exists() else "")
        return texts[-1].endswith("\n")

    await until(is_written)
    return int(texts[-1])


def is_alive(pid: int) -> bool:
    """Return whether a process runs, which a zombie does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def run_python(code: str, *arguments: str) -> str:
    """Run code in a new interpreter and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout

"""Child processes of tests: how to wait for them, and whether they run."""

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

#: Far more than any condition of these tests takes on a busy machine.
WAIT_SECONDS = 20.0

Shell: TypeAlias = Callable[..., AbstractAsyncContextManager[Child]]


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition, but not for ever."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # processes set no event
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
    """Whether a process can still do something."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def run_python(code: str, *arguments: str) -> str:
    """Run code in an interpreter of its own and return what it printed."""
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

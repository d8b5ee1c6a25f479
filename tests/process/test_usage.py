"""What descendants and directories use."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from helpers.service import WAIT_SECONDS

from ccrun.process.child import spawn
from ccrun.process.tree import lists_children
from ccrun.process.usage import Usage, disk_bytes, usage_of_descendants
from ccrun.removal import remove_tree

pytestmark = pytest.mark.skipif(not lists_children(), reason="the kernel does not list the children of a process")
MIB = 1024**2


async def test_descendants_are_counted_with_their_memory(tmp_path: Path) -> None:
    """All generations count, also those of a thread or with a session of their own; the process itself does not."""
    hold = "held = bytearray(b'x' * (100 * 2**20)); print('ready', flush=True); import time; time.sleep(1000)"
    started = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], start_new_session=True)"
    script = f"import threading; threading.Thread(target=lambda: exec({started!r})).start()"
    async with spawn([sys.executable, "-c", script], env={}, cwd=tmp_path) as child:
        async for _ in child.lines():
            break
        usage = await asyncio.to_thread(usage_of_descendants, child.pid)
        above = await asyncio.to_thread(usage_of_descendants, os.getpid())
    assert 1 == usage.processes
    assert 100 * MIB < usage.memory_bytes < 200 * MIB
    assert 2 <= above.processes
    assert usage.memory_bytes < above.memory_bytes


async def test_process_that_has_ended_uses_nothing(tmp_path: Path) -> None:
    """It is no error."""
    async with spawn(["true"], env={"PATH": os.defpath}, cwd=tmp_path) as child, asyncio.timeout(WAIT_SECONDS):
        await child.wait()
    assert Usage() == await asyncio.to_thread(usage_of_descendants, child.pid)


def test_files_count_with_what_they_take(tmp_path: Path) -> None:
    """A sparse file takes little, and a link only itself; directories at any depth count."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "file").write_bytes(os.urandom(3 * MIB))
    with (tmp_path / "in" / "sparse").open("wb") as file:
        file.truncate(1000 * MIB)
    (tmp_path / "in" / "link").symlink_to("/")
    (tmp_path / "in" / "gone").symlink_to("nowhere")
    assert 3 * MIB <= disk_bytes(tmp_path, seconds=WAIT_SECONDS) < 4 * MIB
    assert 0 == disk_bytes(tmp_path, seconds=0)
    assert 0 == disk_bytes(tmp_path / "missing", seconds=WAIT_SECONDS)


def test_deep_directories_are_counted(tmp_path: Path) -> None:
    """Their depth may exceed the recursion limit of Python."""
    top = tmp_path / "top"
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    assert 0 < disk_bytes(top, seconds=WAIT_SECONDS)
    # pytest cannot.
    remove_tree(top)

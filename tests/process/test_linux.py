from __future__ import annotations

from helpers.process import ON_LINUX, run_python


@ON_LINUX
def test_child_cannot_read_the_environment_of_a_hardened_process() -> None:
    """A child of the same user can read the environment of its parent before `harden`, and cannot afterwards."""
    code = """
import asyncio, concurrent.futures.thread, ctypes, os
from pathlib import Path
from ccrun.process.child import spawn
from ccrun.process.linux import harden

async def read_environment():
    environ = f"/proc/{os.getpid()}/environ"
    async with spawn(["head", "-c", "5", environ], env={"PATH": os.environ["PATH"]}, cwd=Path("/")) as child:
        return [bytes(line) async for line in child.lines()], (await child.wait()).ok

if os.geteuid() == 0:
    # Root may read everything. The kernel hardens a process that changes its user: undo that for the first read.
    os.setgid(65534)
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
print(asyncio.run(read_environment()), harden(), asyncio.run(read_environment()))
"""
    assert run_python(code) == "([b'PATH='], True) True ([], False)\n"

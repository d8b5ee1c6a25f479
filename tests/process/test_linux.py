from __future__ import annotations

from helpers.process import ON_LINUX, run_python


@ON_LINUX
def test_a_hardened_process_hides_its_environment_from_its_children() -> None:
    """A child of the same user reads the parent's environment before, and no more after."""
    code = """
import asyncio, concurrent.futures.thread, ctypes, os
from pathlib import Path
from ccrun.process.child import spawn
from ccrun.process.linux import harden

async def read_ours():
    environ = f"/proc/{os.getpid()}/environ"
    async with spawn(["head", "-c", "5", environ], env={"PATH": os.environ["PATH"]}, cwd=Path("/")) as child:
        return [bytes(line) async for line in child.lines()], (await child.wait()).ok

if os.geteuid() == 0:
    # Root may read everything. A process that changes its user is hardened by the kernel: undo that for the first look.
    os.setgid(65534)
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
print(asyncio.run(read_ours()), harden(), asyncio.run(read_ours()))
"""
    assert run_python(code) == "([b'PATH='], True) True ([], False)\n"

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest
from helpers.process import is_alive
from helpers.service import WAIT_SECONDS

from ccrun.errors import CcrunError
from ccrun.process.detached import start_detached

ENVIRONMENT = {"PATH": os.environ["PATH"]}


async def test_exit_status_is_returned() -> None:
    """The code, or the signal that has killed it."""
    assert 7 == (await (await start_detached(["sh", "-c", "exit 7"], env=ENVIRONMENT)).wait()).code
    assert 9 == (await (await start_detached(["sh", "-c", "kill -9 $$"], env=ENVIRONMENT)).wait()).signal


async def test_process_is_independent() -> None:
    """It leads a session of its own, and goes on when nobody waits for it any more."""
    detached = await start_detached(["sleep", "600"], env=ENVIRONMENT)
    try:
        assert detached.pid == os.getsid(detached.pid)
        waiting = asyncio.create_task(detached.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        detached.let_go()
        assert is_alive(detached.pid)
    finally:
        process = psutil.Process(detached.pid)
        process.kill()
        await asyncio.to_thread(process.wait, WAIT_SECONDS)


async def test_program_that_cannot_be_started_is_an_error(tmp_path: Path) -> None:
    """The error names the program."""
    with pytest.raises(CcrunError, match=r"^The program missing was not found\.$"):
        await start_detached([str(tmp_path / "missing")], env=ENVIRONMENT)

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from helpers.process import WAIT_SECONDS

from ccrun.process.capture import OutputTooLarge, ProcessTimeout, capture
from ccrun.process.exit import Exit

PATH = "/usr/local/bin:/usr/bin:/bin"


async def test_what_a_program_prints_is_captured() -> None:
    """Its output, its complaints and how it ended."""
    ran = await capture(
        ["sh", "-c", "cat; echo oh >&2; exit 3"],
        env={"PATH": PATH},
        cwd=Path("/"),
        stdin=b"in",
        seconds=WAIT_SECONDS,
    )
    assert (Exit(code=3), b"in", b"oh\n") == (ran.exit, ran.stdout, ran.stderr)


async def test_a_program_over_its_time_is_ended() -> None:
    """With all that it has started."""
    marker = f"sleeper-{os.getpid()}"
    with pytest.raises(ProcessTimeout):
        await capture(
            ["bash", "-c", f"(exec -a {marker} sleep 600) & wait"], env={"PATH": PATH}, cwd=Path("/"), seconds=0.2
        )
    assert not [process for process in psutil.process_iter(["cmdline"]) if marker in (process.info["cmdline"] or ())]


async def test_a_program_that_prints_too_much_is_ended() -> None:
    """Memory stays bounded."""
    with pytest.raises(OutputTooLarge):
        await capture(["yes"], env={"PATH": PATH}, cwd=Path("/"), seconds=WAIT_SECONDS, max_bytes=1000)

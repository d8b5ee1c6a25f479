from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from helpers.process import PATH, WAIT_SECONDS

from ccrun.process.capture import OutputTooLarge, ProcessTimeout, capture
from ccrun.process.exit import Exit


async def test_output_and_exit_are_captured() -> None:
    """`capture` passes stdin to a program and returns its stdout, its stderr and its exit."""
    ran = await capture(
        ["sh", "-c", "cat; echo oh >&2; exit 3"],
        env={"PATH": PATH},
        cwd=Path("/"),
        stdin=b"in",
        seconds=WAIT_SECONDS,
    )
    assert (Exit(code=3), b"in", b"oh\n") == (ran.exit, ran.stdout, ran.stderr)


async def test_program_is_killed_after_its_timeout() -> None:
    """The processes that the program has started are killed too."""
    marker = f"sleeper-{os.getpid()}"
    with pytest.raises(ProcessTimeout):
        await capture(
            ["bash", "-c", f"(exec -a {marker} sleep 600) & wait"], env={"PATH": PATH}, cwd=Path("/"), seconds=0.2
        )
    assert not [process for process in psutil.process_iter(["cmdline"]) if marker in (process.info["cmdline"] or ())]


async def test_too_much_output_is_an_error() -> None:
    """Output beyond `max_bytes` raises `OutputTooLarge`."""
    with pytest.raises(OutputTooLarge):
        await capture(["yes"], env={"PATH": PATH}, cwd=Path("/"), seconds=WAIT_SECONDS, max_bytes=1000)

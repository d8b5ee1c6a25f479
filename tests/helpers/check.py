"""Checks of a service, run as a command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeAlias

import attrs

from helpers.service import PATIENCE

TOKEN: Final = "made-up-token-of-the-tests"


@attrs.frozen(kw_only=True)
class Checked:
    """Checks that are over; a row each, without the times."""

    code: int
    rows: list[str]
    complaints: str

    def with_word(self, word: str) -> list[str]:
        """Return what the rows with that word say."""
        return [row.partition(" ")[2].strip() for row in self.rows if row.startswith(f"{word} ")]


Checks: TypeAlias = Callable[..., Awaitable[Checked]]


async def run(*words: str | Path, **environment: str) -> Checked:
    """Run a command to its end."""
    process = await asyncio.create_subprocess_exec(
        *words,
        env={**os.environ, "COLUMNS": "1000", **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE):
            output, complaints = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode is not None
    rows = [line.partition("s ")[2] for line in output.decode().splitlines()]
    return Checked(code=process.returncode, rows=rows, complaints=complaints.decode())


async def checks(word: str, *files: Path, **environment: str) -> Checked:
    """Run the checks of that name."""
    return await run(sys.executable, "-P", "-m", "ccrun", "check", word, *files, **environment)

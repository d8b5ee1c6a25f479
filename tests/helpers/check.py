"""Run `ccrun check` as a command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeAlias

import attrs

from helpers.service import WAIT_SECONDS

TOKEN: Final = "made-up-token-of-the-tests"


@attrs.frozen(kw_only=True)
class CheckResult:
    """The result of `ccrun check`: one row for each check, without durations."""

    code: int
    rows: list[str]
    stderr: str

    def rows_with_status(self, status: str) -> list[str]:
        """Return the text of the rows with that status."""
        return [row.partition(" ")[2].strip() for row in self.rows if row.startswith(f"{status} ")]


RunCheck: TypeAlias = Callable[..., Awaitable[CheckResult]]


async def run_command(*words: str | Path, **environment: str) -> CheckResult:
    """Run a command and wait until it exits."""
    process = await asyncio.create_subprocess_exec(
        *words,
        env={**os.environ, "COLUMNS": "1000", **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            output, stderr = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode is not None
    rows = [line.partition("s ")[2] for line in output.decode().splitlines()]
    return CheckResult(code=process.returncode, rows=rows, stderr=stderr.decode())


async def run_check(word: str, *files: Path, **environment: str) -> CheckResult:
    """Run `ccrun check` with this subcommand."""
    return await run_command(sys.executable, "-P", "-m", "ccrun", "check", word, *files, **environment)

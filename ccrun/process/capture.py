"""A program that is run until it exits, with its output."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs

from ccrun.errors import CcrunError
from ccrun.process.child import spawn
from ccrun.process.exit import Exit
from ccrun.process.user import User

#: What `capture` keeps in memory: a list of some hundred thousand paths.
MAX_CAPTURED_BYTES: Final = 64 * 1024 * 1024
#: A program whose output nobody reads any more has nothing to finish.
CAPTURE_TERM_GRACE_SECONDS: Final = 1.0


@attrs.frozen(kw_only=True)
class ProcessResult:
    """A program that has run to its end: how it ended, and what it printed."""

    exit: Exit
    stdout: bytes = attrs.field(repr=False)
    stderr: bytes = attrs.field(repr=False)


class ProcessTimeout(CcrunError):
    """A program was not done in its time, and was ended."""


class OutputTooLarge(CcrunError):
    """A program printed more than it may, and was ended."""


async def capture(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    seconds: float | None,
    stdin: bytes = b"",
    max_bytes: int = MAX_CAPTURED_BYTES,
    user: User | None = None,
) -> ProcessResult:
    """Run a program to its end; return what it printed. See `spawn` for the rest.

    Args:
        seconds: What it has; None where the caller bounds its time.
        max_bytes: What it may print.

    Raises:
        TookTooLong: It was not done in time.
        PrintedTooMuch: It went on printing.
        CcrunError: It cannot be started.
    """
    printed = bytearray()
    async with spawn(
        argv, env=env, cwd=cwd, stdin=stdin, user=user, term_grace_seconds=CAPTURE_TERM_GRACE_SECONDS
    ) as child:
        try:
            async with asyncio.timeout(seconds):
                async for chunk in child.chunks():
                    printed += chunk
                    if len(printed) > max_bytes:
                        raise OutputTooLarge
                ended = await child.wait()
        except TimeoutError:
            raise ProcessTimeout from None
        return ProcessResult(exit=ended, stdout=bytes(printed), stderr=child.stderr_tail)

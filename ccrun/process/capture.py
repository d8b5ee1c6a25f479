"""Running a program until it exits, and capturing its output."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs

from ccrun.errors import CcrunError
from ccrun.process.child import spawn
from ccrun.process.confinement import Confinement
from ccrun.process.exit import Exit

#: Bytes of output that `capture` accepts: a list of some hundred thousand paths.
MAX_CAPTURED_BYTES: Final = 64 * 1024 * 1024
#: Seconds between SIGTERM and SIGKILL. The output of a stopped program is not used.
CAPTURE_TERM_GRACE_SECONDS: Final = 1.0


@attrs.frozen(kw_only=True)
class ProcessResult:
    """The exit status and the output of a program."""

    exit: Exit
    stdout: bytes = attrs.field(repr=False)
    stderr: bytes = attrs.field(repr=False)


class ProcessTimeout(CcrunError):
    """The program did not exit in time and was killed."""


class OutputTooLarge(CcrunError):
    """The program printed too much and was killed."""


async def capture(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    seconds: float | None,
    stdin: bytes = b"",
    max_bytes: int = MAX_CAPTURED_BYTES,
    confinement: Confinement | None = None,
) -> ProcessResult:
    """Run a program until it exits, and return its output. See `spawn` for the other arguments.

    Args:
        seconds: The timeout; None when the caller has one.
        max_bytes: The maximum size of its output.

    Raises:
        ProcessTimeout: It did not exit in time.
        OutputTooLarge: It printed more than `max_bytes`.
        CcrunError: It cannot be started.
    """
    printed = bytearray()
    async with spawn(
        argv, env=env, cwd=cwd, stdin=stdin, confinement=confinement, term_grace_seconds=CAPTURE_TERM_GRACE_SECONDS
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

"""Processes that may outlive this one."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ccrun.errors import CcrunError
from ccrun.process.child import start_error
from ccrun.process.exit import Exit, exit_from_returncode

#: Between two looks at a process that may outlive us; its end is waited for by nobody who counts milliseconds.
DETACHED_POLL_SECONDS: Final = 0.05


# --- children that live on ---------------------------------------------------------------------------------------------


class Detached:
    """A process that may outlive us, made by `start_detached` alone; asyncio's own would kill it on the way out."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process

    async def wait(self) -> Exit:
        """Wait until it has ended. A cancellation leaves it alone."""
        # The system tells a parent of a child's end by a signal alone, and that belongs to asyncio's own children.
        while (returncode := self._process.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(DETACHED_POLL_SECONDS)
        return exit_from_returncode(returncode)

    def let_go(self) -> None:
        """Forget it while it runs; whoever becomes its parent reaps it."""
        # What subprocess itself sets when there is nothing to wait for; without, it warns of a child that still runs.
        self._process.returncode = self._process.returncode or 0


async def start_detached(argv: Sequence[str], *, env: Mapping[str, str]) -> Detached:
    """Start a program in a session of its own that ends neither with us nor with our terminal; it has our stdout and stderr.

    Raises:
        CcrunError: The program cannot be started.
    """

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(argv, env=dict(env), stdin=subprocess.DEVNULL, start_new_session=True)

    starting = asyncio.create_task(asyncio.to_thread(start))
    try:
        return Detached(await asyncio.shield(starting))
    except (OSError, ValueError) as error:
        raise CcrunError(start_error(argv[0], Path(), error)) from None
    except asyncio.CancelledError:
        # It starts all the same; nobody is left to wait for it.
        with contextlib.suppress(OSError, ValueError):
            Detached(await starting).let_go()
        raise

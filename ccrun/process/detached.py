"""Child processes that may outlive this process."""

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

#: Seconds between two polls of a detached process.
DETACHED_POLL_SECONDS: Final = 0.05


class Detached:
    """A process that may outlive this one, created by `start_detached`. asyncio would kill it at exit."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process

    async def wait(self) -> Exit:
        """Wait until it has exited. A cancellation does not stop it."""
        # Polled, since SIGCHLD belongs to asyncio.
        while (returncode := self._process.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(DETACHED_POLL_SECONDS)
        return exit_from_returncode(returncode)

    def let_go(self) -> None:
        """Stop watching it while it runs. Its next parent reaps it."""
        # As subprocess sets it when there is nothing to wait for; otherwise it warns of a running child.
        self._process.returncode = self._process.returncode or 0


async def start_detached(argv: Sequence[str], *, env: Mapping[str, str]) -> Detached:
    """Start a program in its own session, so that it outlives this process and its terminal. It inherits stdout and stderr.

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
        # It starts anyway, and nothing waits for it.
        with contextlib.suppress(OSError, ValueError):
            Detached(await starting).let_go()
        raise

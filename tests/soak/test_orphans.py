"""What becomes of processes that cleared their environment and left their session when their worker is killed.

To measure without control groups, run this module as root in a mount namespace without them:
`unshare -m bash -c 'umount -R /sys/fs/cgroup && ./scripts/test.sh -n 0 -s -m soak tests/soak/test_orphans.py'`
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from pathlib import Path
from typing import Final

import psutil
import pytest
from soak.agent import Plan
from soak.conftest import SoakDirectories
from soak.deployments import SoakService, soak_service
from soak.kill_run import POLL_SECONDS, receiving

from ccrun.process import cgroup

ORPHANS: Final = 12
#: Seconds after the kill of the worker at which no process may be left.
CLEAN_SECONDS: Final = 60.0


def orphans(service: SoakService) -> int:
    """Return how many background processes of agents run."""
    found = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found += process.cmdline()[:1] == [str(service.directories.oracle / "orphan")]
    return found


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("restarted", [False, True], ids=["same service", "restarted service"])
async def test_orphans_of_a_killed_worker_are_killed(restarted: bool, soak_directories: SoakDirectories) -> None:
    """All of them are killed, with and without control groups, also if the service was restarted in between."""
    plan = Plan(
        key="orphans",
        oracle=str(soak_directories.oracle),
        lines=1_000,
        batch=1,
        interval=1.0,
        padding=0,
        ignores_sigterm=True,
        fails=False,
        background=ORPHANS,
        detaches="environment",
    )
    has_groups = await asyncio.to_thread(cgroup._own_group) is not None
    async with receiving() as receiver, soak_service("local", soak_directories) as service:
        await service.submit(key="orphans", prompt=json.dumps(plan), callbackUrl=receiver.url)
        async with asyncio.timeout(CLEAN_SECONDS):
            while orphans(service) < ORPHANS:
                await asyncio.sleep(POLL_SECONDS)
        if restarted:
            await service.stop(signal.SIGKILL)
            await service.start()
        (worker,) = service.platform.workers()
        service.platform.kill_worker(worker, signal.SIGKILL)
        killed_at = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLEAN_SECONDS):
                while orphans(service):
                    await asyncio.sleep(POLL_SECONDS)
        left = orphans(service)
        seconds = time.monotonic() - killed_at
        groups = "with" if has_groups else "without"
        print(f"\n{groups} control groups, restarted {restarted}: {left} of {ORPHANS} left after {seconds:.1f} s")
        await asyncio.to_thread(kill_all, soak_directories.oracle / "orphan")
    assert 0 == left


def kill_all(program: Path) -> None:
    """Kill all processes of a program."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] == [str(program)]:
                process.kill()

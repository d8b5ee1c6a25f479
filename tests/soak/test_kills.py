"""What kills of the service and of workers leave behind."""

from __future__ import annotations

import random
import time

import pytest
from soak.conftest import SoakDirectories, SoakOptions
from soak.deployments import soak_service
from soak.kill_run import KillRun, receiving


@pytest.mark.soak
@pytest.mark.timeout(0)  # The run has its own bounds, which depend on its options.
@pytest.mark.parametrize("backend", ["local", "gcp"])
async def test_kills_lose_nothing(backend: str, soak_options: SoakOptions, soak_directories: SoakDirectories) -> None:
    """Each accepted task has one final record, its log what its agent printed, its callback is delivered, and nothing is left."""
    print(f"\nThe seed of this run: --soak-seed {soak_options.seed}")
    started = time.monotonic()
    async with receiving() as receiver, soak_service(backend, soak_directories) as service:
        run = KillRun(service, receiver, soak_options, random.Random(soak_options.seed))
        faults = await run.run()
        print(f"{backend}: {await run.figures()}, {time.monotonic() - started:.1f} s")
    assert not faults, "\n".join([f"seed {soak_options.seed}, logs in {soak_directories.logs}", *faults])

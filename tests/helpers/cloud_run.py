"""The adapter of Cloud Run, connected to a stand-in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from standins.cloudrun import CloudRun
from standins.execution import JOB, PROJECT, REGION, Execution

from ccrun.backends.gcp.jobs import CloudRunJobs, LaunchPolicy, open_cloud_run
from ccrun.task import TaskId
from helpers.service import WAIT_SECONDS

TASK = TaskId("task-a")


#: No call of a loaded machine reaches these timeouts.
POLICY = LaunchPolicy(
    connect_seconds=20.0,
    launch_seconds=20.0,
    attempt_seconds=20.0,
    attempts=3,
    total_seconds=60.0,
    first_delay_seconds=0.001,
)


#: Writes its environment into a file. Then it sleeps, ignores SIGTERM and sleeps, or exits with a code.
WORKER = """
import json, os, pathlib, signal, sys, time
if sys.argv[2] == "ignore-sigterm":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text(json.dumps(dict(os.environ)))
if sys.argv[2].isdigit():
    sys.exit(int(sys.argv[2]))
time.sleep(600)
"""


class Containers:
    """Starts the stand-in with a container that behaves as a test needs it."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "environment"

    @contextlib.asynccontextmanager
    async def run(
        self,
        behaviour: str = "sleep",
        *,
        policy: LaunchPolicy = POLICY,
        launch_seconds: float = 0.0,
        task_timeout_seconds: float = 3600.0,
        term_grace_seconds: float = 10.0,
    ) -> AsyncIterator[tuple[CloudRun, CloudRunJobs]]:
        """Start the stand-in, and connect the adapter to it.

        Args:
            behaviour: What the container does: `sleep`, `ignore-sigterm`, or the number of an exit code.
            policy: The policy of the adapter.
            launch_seconds: See `CloudRun`, as for the other arguments.
            task_timeout_seconds: See `CloudRun`.
            term_grace_seconds: See `CloudRun`.
        """
        async with (
            CloudRun(
                command=(sys.executable, "-c", WORKER, str(self._file), behaviour),
                environment=dict(os.environ),
                launch_seconds=launch_seconds,
                task_timeout_seconds=task_timeout_seconds,
                term_grace_seconds=term_grace_seconds,
            ) as server,
            open_cloud_run(project=PROJECT, region=REGION, job=JOB, emulator=server.host, policy=policy) as jobs,
        ):
            yield server, jobs

    async def environment(self) -> dict[str, str]:
        """Wait until the container runs, and return its environment."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not self._file.exists() or not self._file.read_text():
                await asyncio.sleep(0.01)
        return dict(json.loads(self._file.read_text()))


@pytest.fixture
def containers(tmp_path: Path) -> Containers:
    """Return what starts the stand-in."""
    return Containers(tmp_path)


async def launched(server: CloudRun, jobs: CloudRunJobs) -> Execution:
    """Launch the task, and return its execution."""
    name = await jobs.launch(TASK)
    assert name is not None
    return server.executions[name]

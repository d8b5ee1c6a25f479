"""How fast a task is stopped while its agent prints fast, and how much of its log is lost."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import signal
from typing import Final, Literal, get_args

import attrs
import pytest
from helpers.service import until_record
from soak.agent import Plan
from soak.conftest import SoakDirectories
from soak.deployments import CloudPlatform, SoakService, soak_service
from soak.kill_run import POLL_SECONDS, receiving
from soak.oracle import dropped_lines, read_starts, stored_log
from standins.gcs import Fault, Method

from ccrun.task import Status, TaskId

AGENTS: Final = 8
LINES_PER_SECOND: Final = 50_000
BATCH_LINES: Final = 1_000
#: Seconds for which the agents would print.
PRINT_SECONDS: Final = 120
#: Seconds after the first lines of all agents at which their tasks are stopped.
MOMENTS: Final = (0.0, 1.0, 4.0)
#: Seconds of each call to the cloud storage.
CLOUD_CALL_SECONDS: Final = 0.05
#: Seconds from the signal to the final record. The platform sends SIGKILL after 10.
MAX_STOP_SECONDS: Final = 8.0


@attrs.frozen(kw_only=True)
class Stop:
    """One stop of a task."""

    printed: int
    stored: int
    dropped: int
    seconds: float
    status: Status

    @property
    def lost(self) -> int:
        """Lines that the agent had printed and that are not stored."""
        return max(0, self.printed - self.stored)


def plan(service: SoakService, key: str) -> Plan:
    """Return a plan that prints fast."""
    return Plan(
        key=key,
        oracle=str(service.directories.oracle),
        lines=LINES_PER_SECOND * PRINT_SECONDS,
        batch=BATCH_LINES,
        interval=BATCH_LINES / LINES_PER_SECOND,
        padding=20,
        ignores_sigterm=False,
        fails=False,
        background=0,
        detaches="no",
    )


async def until_printing(service: SoakService, key: str) -> None:
    """Wait until an agent has printed lines."""
    async with asyncio.timeout(60):
        while not any(start.least for start in read_starts(service.directories.oracle, key)):
            await asyncio.sleep(POLL_SECONDS / 10)


async def stop_all(service: SoakService, callback_url: str, cause: str, moment: float) -> list[Stop]:
    """Run agents, stop all of them at the same time, and return what was lost."""
    keys = [f"{moment}-{number}" for number in range(AGENTS)]
    task_ids: dict[str, TaskId] = {}
    for key in keys:
        task_id = await service.submit(key=key, prompt=json.dumps(plan(service, key)), callbackUrl=callback_url)
        assert task_id is not None
        task_ids[key] = task_id
    await asyncio.gather(*(until_printing(service, key) for key in keys))
    await asyncio.sleep(moment)

    async def stop(key: str) -> Stop:
        task_id = task_ids[key]
        stopped_at = dt.datetime.now(dt.UTC)
        if cause == "cancel":
            assert await service.cancel(task_id)
        else:
            service.platform.kill_worker(task_id, signal.SIGTERM)
        store = service.platform.store
        record = await until_record(store, task_id, lambda record: record.status.is_final)
        assert record.completed_at is not None
        (printed,) = read_starts(service.directories.oracle, key)
        log = await stored_log(store, task_id)
        return Stop(
            printed=printed.least,
            stored=sum(line.startswith(b'{"type":"soak"') for line in log),
            dropped=dropped_lines(record),
            seconds=(record.completed_at - stopped_at).total_seconds(),
            status=record.status,
        )

    return await asyncio.gather(*(stop(key) for key in keys))


@pytest.mark.soak
@pytest.mark.usefixtures("only_for_figures")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cause", ["sigterm", "cancel"])
@pytest.mark.parametrize("backend", ["local", "gcp"])
async def test_stops_lose_no_lines(
    backend: Literal["local", "gcp"], cause: str, soak_directories: SoakDirectories
) -> None:
    """Tasks whose agents print fast are stopped in time, and all that the agents have printed is stored."""
    settings = {"MAX_CONCURRENT_TASKS": str(AGENTS)}
    async with receiving() as receiver, soak_service(backend, soak_directories, **settings) as service:
        if isinstance(service.platform, CloudPlatform):
            for method in get_args(Method):
                service.platform.deployment.gcs.fail_always(method, Fault(delay_seconds=CLOUD_CALL_SECONDS))
        stops = []
        for moment in MOMENTS:
            stops += (found := await stop_all(service, receiver.url, cause, moment))
            figures = {
                "printed": sum(stop.printed for stop in found),
                "lost": sum(stop.lost for stop in found),
                "dropped": sum(stop.dropped for stop in found),
                "slowest": max(stop.seconds for stop in found),
                "statuses": {str(stop.status) for stop in found},
            }
            print(f"\n{backend} {cause} after {moment:g} s: {figures}")
    assert 0 == sum(stop.lost for stop in stops)
    assert max(stop.seconds for stop in stops) <= MAX_STOP_SECONDS

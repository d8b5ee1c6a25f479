"""Checks that many tasks leak no resources in the service and leave no files and processes on the machine."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Final

import attrs
import psutil
import pytest
from helpers.service import until_record
from soak.agent import Plan
from soak.conftest import SoakDirectories, SoakOptions
from soak.deployments import SoakService, soak_service
from soak.kill_run import POLL_SECONDS, Receiver, receiving

from ccrun.task import Status, TaskId

#: Tasks before the first measurement: modules are imported, caches and thread pools are filled.
WARM_UP_TASKS: Final = 10
#: Tasks that are submitted at the same time. Four workers can run.
PARALLEL_TASKS: Final = 4
#: The fraction by which resident memory may grow.
MAX_GROWTH: Final = 0.05
#: Seconds for a task. It takes less than one.
TASK_SECONDS: Final = 60.0
#: Seconds until the processes and files of the last task are deleted.
CLEAN_SECONDS: Final = 30.0


@attrs.frozen(kw_only=True)
class Usage:
    """The resources that a process uses."""

    descriptors: int
    threads: int
    resident_kib: int


async def usage(service: SoakService) -> Usage:
    """Return the resources that the service uses."""
    process = psutil.Process(service.pid)
    return Usage(
        descriptors=process.num_fds(), threads=process.num_threads(), resident_kib=process.memory_info().rss // 1024
    )


async def run_tasks(service: SoakService, receiver: Receiver, numbers: range) -> list[TaskId]:
    """Run tasks until each is completed and its callback delivered."""
    gate = asyncio.Semaphore(PARALLEL_TASKS)

    async def run(number: int) -> TaskId:
        plan = Plan(
            key=str(number),
            oracle=str(service.directories.oracle),
            lines=20,
            batch=20,
            interval=0.0,
            padding=100,
            ignores_sigterm=False,
            fails=False,
            background=1,
            detaches="environment",
        )
        async with gate, asyncio.timeout(TASK_SECONDS):
            task_id = await service.submit(key=str(number), prompt=json.dumps(plan), callbackUrl=receiver.url)
            assert task_id is not None
            record = await until_record(
                service.platform.store, task_id, lambda record: record.status.is_final and not record.owes_callback
            )
            assert Status.COMPLETED == record.status, record.error
            return task_id

    return await asyncio.gather(*(run(number) for number in numbers))


def other_files(data: Path) -> list[str]:
    """Return all files in the data directory that belong neither to a stored task nor to the service."""
    known = re.compile(
        r"sessions/[^/]+/(metadata\.json|[0-9]{3}-[0-9]{8}-[0-9]{6}\.jsonl)|index/[0-9]{5}/[0-9]{3}/[^/]+"
        r"|\.locks/[0-9]+|\.keys/[^/]+|\.services/[^/]+/\.pid"
    )
    paths = (path.relative_to(data).as_posix() for path in data.rglob("*") if not path.is_dir())
    return [path for path in paths if not known.fullmatch(path)]


@pytest.mark.soak
@pytest.mark.timeout(0)  # Each task has a timeout.
async def test_tasks_leave_nothing(soak_options: SoakOptions, soak_directories: SoakDirectories) -> None:
    """After many tasks the service uses no more resources than before, and only the stored tasks remain."""
    count = soak_options.leak_tasks
    async with receiving() as receiver, soak_service("local", soak_directories) as service:
        await run_tasks(service, receiver, range(WARM_UP_TASKS))
        before = await usage(service)
        started = time.monotonic()
        task_ids = await run_tasks(service, receiver, range(WARM_UP_TASKS, WARM_UP_TASKS + count))
        seconds = time.monotonic() - started
        leftovers = await service.leftovers(task_ids)
        async with asyncio.timeout(CLEAN_SECONDS):
            while leftovers:
                await asyncio.sleep(POLL_SECONDS)
                leftovers = await service.leftovers(task_ids)
        after = await usage(service)
        print(f"\n{count} tasks in {seconds:.1f} s: before {before}, after {after}")
        assert [] == await asyncio.to_thread(other_files, soak_directories.data)
        assert [] == psutil.Process(service.pid).children()
    assert after.descriptors <= before.descriptors
    assert after.threads <= before.threads
    assert after.resident_kib <= before.resident_kib * (1 + MAX_GROWTH)

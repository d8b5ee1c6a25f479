"""Ways to lose a worker."""

from __future__ import annotations

import datetime as dt
import math

from ccrun.task import CallbackInfo, TaskId
from helpers.cloud import Cloud, Receiver


async def submit_without_start(cloud: Cloud, receiver: Receiver) -> TaskId:
    """Submit a task whose container never starts, and whose start timeout is exceeded immediately."""
    cloud.deployment.cloud_run.launch_seconds = math.inf
    cloud.jobs.start_timeout = dt.timedelta(0)
    return await cloud.submit(taskId="task-never", callbackUrl=receiver.url)


async def leftovers(cloud: Cloud, task_id: str) -> set[str]:
    """Return the objects of a task that must not remain when it is settled and its callback is delivered."""
    return await cloud.names(task_id) & {"encrypted-payload.bin", "active"}


async def webhook_of(cloud: Cloud, task_id: TaskId) -> CallbackInfo:
    """Return the state of a task's callback."""
    webhook = (await cloud.store.record(task_id)).webhook
    assert webhook is not None
    return webhook

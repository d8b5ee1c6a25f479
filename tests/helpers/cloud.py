"""The API on stand-ins of Google Cloud, with little patience, so that what fails for good does so within a second.

Workers are real processes; the CLI is a script that does what the prompt says: see `CLI`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, Protocol

import aiohttp
import attrs
from aiohttp import web
from standins.cloudrun import JOB, REGION, Execution
from standins.gcs import BUCKET
from standins.kms import PROJECT, key_of

from ccrun.api.app import make_app
from ccrun.api.dependencies import ApiDependencies
from ccrun.api.dispatch import Dispatcher
from ccrun.api.feed import Feed, PollPolicy
from ccrun.api.request import Defaults
from ccrun.backends.gcp import calls, jobs
from ccrun.backends.gcp.blobs import open_blobs
from ccrun.backends.gcp.jobs import CloudRunJobs, open_cloud_run
from ccrun.callbacks import deliver, guard
from ccrun.callbacks.owed import OwedCallbacks
from ccrun.settle import settle
from ccrun.store import Store
from ccrun.sweep import Sweeper, SweepReport
from ccrun.task import Secret, TaskId, TaskRecord
from helpers.api import ApiResponse
from helpers.service import (
    CALLBACK_SECRET,
    MADE_UP_KEY,
    PATIENCE,
    CloudPlace,
    Event,
    cloud_place,
    read_events,
    until_record,
)

#: Does what the prompt says: `Hang.`, or `Write N.` lines and end well, one a millisecond.
CLI: Final = """
import json, sys, time
def say(**line):
    print(json.dumps(line, separators=(",", ":")), flush=True)
words = sys.stdin.read().rstrip(".").split()
say(type="system", subtype="init")
if words[0] == "Hang":
    time.sleep(600)
for number in range(int(words[1])):
    say(type="line", number=number)
    time.sleep(0.001)
say(type="result", is_error=False, num_turns=1, result="Done.")
"""
HASTY: Final = calls.CallPolicy(attempt_seconds=10.0, attempts=2, total_seconds=10.0, first_delay_seconds=0.01)
HASTY_JOBS: Final = jobs.LaunchPolicy(
    connect_seconds=0.5,
    launch_seconds=10.0,
    attempt_seconds=10.0,
    attempts=2,
    total_seconds=10.0,
    first_delay_seconds=0.01,
)
#: Of a callback: the sweeps of a test are to end soon.
ONE_TRY: Final = deliver.RetryPolicy(attempts=1, attempt_seconds=5.0, total_seconds=5.0)
#: Longer than any answer of the stand-ins takes.
SETTLE_SECONDS: Final = 0.3


class Receiver:
    """Takes callbacks, and answers with `status`."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.status = 200
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        """Note what came."""
        self.got.append(await request.json())
        return web.Response(status=self.status)


@attrs.frozen(kw_only=True)
class Cloud:
    """An instance of the API and the cloud that it stands on."""

    place: CloudPlace
    url: str
    http: aiohttp.ClientSession
    jobs: CloudRunJobs
    sweeper: Sweeper

    @property
    def store(self) -> Store:
        """The tasks, seen past what goes wrong."""
        return self.place.store

    async def call(self, method: str, path: str, **request: Any) -> ApiResponse:
        """Send one request."""
        async with self.http.request(method, self.url + path, **request) as response:
            return ApiResponse(
                status=response.status, body=await response.json(), text=await response.text(), headers=response.headers
            )

    async def ask(self, *, headers: dict[str, str] | None = None, **fields: Any) -> ApiResponse:
        """Ask for a task over `POST /run-async`."""
        body = {"prompt": "Hang.", "anthropicApiKey": MADE_UP_KEY, "callbackUrl": "http://127.0.0.1:9/", **fields}
        return await self.call("POST", "/run-async", json=body, headers=headers)

    async def submit(self, **fields: Any) -> TaskId:
        """Submit a task; return its ID."""
        answer = await self.ask(**fields)
        assert answer.status == 202, answer.text
        return TaskId(answer.body["taskId"])

    async def get(self, task_id: str) -> dict[str, Any]:
        """Return what the API tells of a task."""
        answer = await self.call("GET", f"/tasks/{task_id}")
        assert answer.status == 200, answer.text
        return dict(answer.body)

    async def events(self, task_id: str) -> list[Event]:
        """Return all events of a task."""
        async with asyncio.timeout(PATIENCE), self.http.get(f"{self.url}/tasks/{task_id}/events") as response:
            assert response.status == 200, await response.text()
            return [event async for event in read_events(response)]

    async def until(self, task_id: str, holds: Callable[[TaskRecord], bool]) -> TaskRecord:
        """Wait until something holds of a task's record."""
        return await until_record(self.store, task_id, holds)

    async def until_over(self, task_id: str) -> TaskRecord:
        """Wait until a task is over."""
        return await self.until(task_id, lambda record: record.status.is_final)

    async def until_running(self, task_id: str) -> TaskRecord:
        """Wait until a worker has taken a task up."""
        return await self.until(task_id, lambda record: record.started_at is not None)

    async def until_at_work(self, task_id: str) -> None:
        """Wait until the worker of a task has opened its payload."""
        await self.until_running(task_id)
        async with asyncio.timeout(PATIENCE):
            while "encrypted-payload.bin" in await self.names(task_id):
                await asyncio.sleep(0.02)

    def executions(self, task_id: str) -> list[Execution]:
        """Return the executions of a task."""
        every = self.place.cloud_run.executions.values()
        return [execution for execution in every if execution.overrides["TASK_ID"] == task_id]

    async def until_ended(self, task_id: str) -> None:
        """Wait until the platform sees every execution of a task as over."""
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(execution.ended.wait() for execution in self.executions(task_id)))

    async def sweep(self) -> SweepReport:
        """Sweep once, under the worker's identity."""
        return await self.sweeper.sweep()

    async def names(self, task_id: str) -> set[str]:
        """Return the names of all objects of a task, wherever they are: `sessions/{taskId}/` is left out of them."""
        found = set()
        async with self.http.get(f"{self.place.gcs.direct}/storage/v1/b/{BUCKET}/o") as response:
            for item in (await response.json()).get("items", []):
                if task_id in item["name"]:
                    name = item["name"].removeprefix(f"sessions/{task_id}/")
                    found.add(name.partition("/")[0] if name.endswith(task_id) else name)
        return found


class OpenCloud(Protocol):
    """Opens an instance of the API; on a cloud of its own, or on that of another instance."""

    def __call__(self, place: CloudPlace | None = None) -> AbstractAsyncContextManager[Cloud]:
        """Open it while the context lasts."""


@contextlib.asynccontextmanager
async def cloud_of(cli: Path, place: CloudPlace | None = None) -> AsyncIterator[Cloud]:
    """Open an instance of the API, see `OpenCloud`."""
    async with contextlib.AsyncExitStack() as stack:
        if place is None:
            environment = {
                **os.environ,
                "CLAUDE_CLI": str(cli),
                "CLOUDRUN_CALLBACK_SECRET": CALLBACK_SECRET,
                "LOG_LEVEL": "WARNING",
                "FLUSH_SECONDS": "0.05",
            }
            place = await stack.enter_async_context(cloud_place(environment))
        store = Store(await stack.enter_async_context(open_blobs(BUCKET, emulator=place.gcs.url, policy=HASTY)))
        key = await stack.enter_async_context(key_of(place.kms, policy=HASTY))
        executions = await stack.enter_async_context(
            open_cloud_run(project=PROJECT, region=REGION, job=JOB, emulator=place.cloud_run.host, policy=HASTY_JOBS)
        )
        callbacks = OwedCallbacks(
            store=store,
            wrapper=key,
            secret=Secret(CALLBACK_SECRET),
            guard=guard.CallbackGuard(allowed_hosts=frozenset({"127.0.0.1"})),
            policy=ONE_TRY,
        )
        app = make_app(
            ApiDependencies(
                store=store,
                jobs=executions,
                wrapper=key,
                dispatcher=Dispatcher(store=store, jobs=executions, wrapper=key, callback_owed=lambda: None),
                feed=Feed(
                    store,
                    PollPolicy(min_seconds=0.02, max_seconds=0.1, settle_seconds=SETTLE_SECONDS),
                    settle=functools.partial(settle, store, executions),
                ),
                defaults=Defaults(max_timeout_minutes=60, backend_is_local=False),
                max_request_bytes=1024 * 1024,
                backend="gcp",
            )
        )
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield Cloud(
            place=place,
            url=f"http://127.0.0.1:{runner.addresses[0][1]}",
            http=await stack.enter_async_context(aiohttp.ClientSession()),
            jobs=executions,
            sweeper=Sweeper(
                store=store,
                jobs=executions,
                callbacks=callbacks,
                restarts_pending=False,
                incomplete_age=dt.timedelta(0),
            ),
        )

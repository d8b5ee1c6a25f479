"""The API on stand-ins for Google Cloud, with short delays, so that permanent faults become errors within a second.

Workers are real processes. The CLI is the script `CLI`.
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
from standins.execution import JOB, REGION, Execution
from standins.gcs import BUCKET
from standins.kms import PROJECT, open_key

from ccrun.api.app import RUNNER_OPTIONS, make_app
from ccrun.api.dependencies import ApiDependencies
from ccrun.api.dispatch import Dispatcher
from ccrun.api.feed import Feed
from ccrun.api.poller import PollPolicy
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
    WAIT_SECONDS,
    CloudDeployment,
    Event,
    cloud_deployment,
    read_events,
    until_record,
)

#: With the prompt `Hang.` it hangs. With `Write N.` it prints N lines, one per millisecond, and succeeds.
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
CALL_POLICY: Final = calls.CallPolicy(attempt_seconds=10.0, attempts=2, total_seconds=10.0, first_delay_seconds=0.01)
LAUNCH_POLICY: Final = jobs.LaunchPolicy(
    connect_seconds=0.5,
    launch_seconds=10.0,
    attempt_seconds=10.0,
    attempts=2,
    total_seconds=10.0,
    first_delay_seconds=0.01,
)
#: One attempt, so that a sweep is short.
CALLBACK_POLICY: Final = deliver.RetryPolicy(attempts=1, attempt_seconds=5.0, total_seconds=5.0)
#: Longer than any response of the stand-ins takes.
SETTLE_SECONDS: Final = 0.3


class Receiver:
    """Receives callbacks, and responds with `status`."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.status = 200
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        """Record a callback."""
        self.received.append(await request.json())
        return web.Response(status=self.status)


@attrs.frozen(kw_only=True)
class Cloud:
    """An instance of the API, and the stand-ins that it uses."""

    deployment: CloudDeployment
    url: str
    http: aiohttp.ClientSession
    jobs: CloudRunJobs
    sweeper: Sweeper

    @property
    def store(self) -> Store:
        """The tasks, read without injected faults."""
        return self.deployment.store

    async def call(self, method: str, path: str, **request: Any) -> ApiResponse:
        """Send a request to the API."""
        async with self.http.request(method, self.url + path, **request) as response:
            return ApiResponse(
                status=response.status, body=await response.json(), text=await response.text(), headers=response.headers
            )

    async def post_task(self, *, headers: dict[str, str] | None = None, **fields: Any) -> ApiResponse:
        """Send `POST /run-async`."""
        body = {"prompt": "Hang.", "anthropicApiKey": MADE_UP_KEY, "callbackUrl": "http://127.0.0.1:9/", **fields}
        return await self.call("POST", "/run-async", json=body, headers=headers)

    async def submit(self, **fields: Any) -> TaskId:
        """Submit a task, and return its ID."""
        response = await self.post_task(**fields)
        assert response.status == 202, response.text
        return TaskId(response.body["taskId"])

    async def get(self, task_id: str) -> dict[str, Any]:
        """Return the response to `GET /tasks/{taskId}`."""
        response = await self.call("GET", f"/tasks/{task_id}")
        assert response.status == 200, response.text
        return dict(response.body)

    async def events(self, task_id: str) -> list[Event]:
        """Return all events of a task."""
        async with asyncio.timeout(WAIT_SECONDS), self.http.get(f"{self.url}/tasks/{task_id}/events") as response:
            assert response.status == 200, await response.text()
            return [event async for event in read_events(response)]

    async def until(self, task_id: str, condition: Callable[[TaskRecord], bool]) -> TaskRecord:
        """Wait until a task's record fulfils a condition, and return it."""
        return await until_record(self.store, task_id, condition)

    async def until_final(self, task_id: str) -> TaskRecord:
        """Wait until the status of a task is final, and return its record."""
        return await self.until(task_id, lambda record: record.status.is_final)

    async def until_running(self, task_id: str) -> TaskRecord:
        """Wait until a worker has started a task, and return its record."""
        return await self.until(task_id, lambda record: record.started_at is not None)

    async def until_payload_opened(self, task_id: str) -> None:
        """Wait until the worker of a task has opened and deleted its payload."""
        await self.until_running(task_id)
        async with asyncio.timeout(WAIT_SECONDS):
            while "encrypted-payload.bin" in await self.names(task_id):
                await asyncio.sleep(0.02)

    def executions(self, task_id: str) -> list[Execution]:
        """Return the executions of a task."""
        every = self.deployment.cloud_run.executions.values()
        return [execution for execution in every if execution.overrides["TASK_ID"] == task_id]

    async def until_executions_finished(self, task_id: str) -> None:
        """Wait until all executions of a task have finished."""
        async with asyncio.timeout(WAIT_SECONDS):
            await asyncio.gather(*(execution.finished.wait() for execution in self.executions(task_id)))

    async def sweep(self) -> SweepReport:
        """Run a sweep."""
        return await self.sweeper.sweep()

    async def names(self, task_id: str) -> set[str]:
        """Return the names of a task's objects: without `sessions/{taskId}/`, and only the first segment of any other name."""
        found = set()
        async with self.http.get(f"{self.deployment.gcs.direct}/storage/v1/b/{BUCKET}/o") as response:
            for item in (await response.json()).get("items", []):
                if task_id in item["name"]:
                    name = item["name"].removeprefix(f"sessions/{task_id}/")
                    found.add(name.partition("/")[0] if name.endswith(task_id) else name)
        return found


class StartCloud(Protocol):
    """Starts an instance of the API."""

    def __call__(self, deployment: CloudDeployment | None = None) -> AbstractAsyncContextManager[Cloud]:
        """Start an instance, and stop it on exit.

        Args:
            deployment: The stand-ins to use; new ones by default.
        """


@contextlib.asynccontextmanager
async def start_cloud(cli: Path, deployment: CloudDeployment | None = None) -> AsyncIterator[Cloud]:
    """Start an instance of the API, as `StartCloud` describes."""
    async with contextlib.AsyncExitStack() as stack:
        if deployment is None:
            environment = {
                **os.environ,
                # The scripts of these tests reach what is outside of a sandbox.
                "CLAUDE_CLI": str(cli),
                "CCRUN_SANDBOX": "off",
                "CLOUDRUN_CALLBACK_SECRET": CALLBACK_SECRET,
                "LOG_LEVEL": "WARNING",
                "FLUSH_SECONDS": "0.05",
            }
            deployment = await stack.enter_async_context(cloud_deployment(environment))
        store = Store(
            await stack.enter_async_context(open_blobs(BUCKET, emulator=deployment.gcs.url, policy=CALL_POLICY))
        )
        key = await stack.enter_async_context(open_key(deployment.kms, policy=CALL_POLICY))
        executions = await stack.enter_async_context(
            open_cloud_run(
                project=PROJECT, region=REGION, job=JOB, emulator=deployment.cloud_run.host, policy=LAUNCH_POLICY
            )
        )
        callbacks = OwedCallbacks(
            store=store,
            wrapper=key,
            secret=Secret(CALLBACK_SECRET),
            guard=guard.CallbackGuard(allowed_hosts=frozenset({"127.0.0.1"})),
            policy=CALLBACK_POLICY,
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
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, **RUNNER_OPTIONS)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield Cloud(
            deployment=deployment,
            url=f"http://127.0.0.1:{runner.addresses[0][1]}",
            http=await stack.enter_async_context(aiohttp.ClientSession()),
            jobs=executions,
            sweeper=Sweeper(
                store=store,
                jobs=executions,
                callbacks=callbacks,
                launches_pending=True,
                incomplete_age=dt.timedelta(0),
            ),
        )

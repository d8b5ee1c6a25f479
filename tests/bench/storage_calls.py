"""Counts the calls of Google's services and checks them against limits: `.venv/bin/python tests/bench/storage_calls.py [RUNS]`.

The calls are those of the API, unless another side is named. The benchmark also compares the latency of requests with that of
bare clients that make the same calls in the same order to the same servers. The two alternate, so that a machine that becomes
slower affects both. The ratio is the median of the ratios of the pairs. All servers are on loopback; real calls take longer, so
the real ratio is smaller. The exit status is 1 if a limit is exceeded.
"""

from __future__ import annotations

import asyncio
import base64
import io
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import aiohttp
import attrs
import grpc.aio
from aiohttp import web
from aiohttp.test_utils import TestServer
from gcloud.aio.auth import Token
from gcloud.aio.kms import KMS
from gcloud.aio.storage import Storage
from google.cloud import run_v2
from google.cloud.run_v2.services.jobs.transports import JobsGrpcAsyncIOTransport

sys.path.insert(0, str(Path(__file__).parent.parent))
from helpers.recording import POLL_SECONDS, RecordedService, RecordingProxy, recorded_service
from standins.gcs import BUCKET
from standins.kms import KEY_NAME, KEY_RING, LOCATION, PROJECT

from ccrun import log
from ccrun.config import LogFormat
from ccrun.task import Status, TaskId
from ccrun.testing.model import Conversation, Hang, Reply, Say

DEFAULT_RUNS: Final = 20
#: How long a task without output is followed.
SILENT_SECONDS: Final = 3.0
#: The number of submissions, and of active tasks of a sweep.
TASKS: Final = 10
COLUMNS: Final = ("writes", "reads", "lists", "deletes", "KMS", "RunJob", "other")
GROUPS: Final = {
    "objects.insert": "writes",
    "objects.insert over": "writes",
    "objects.get": "reads",
    "objects.list": "lists",
    "objects.delete": "deletes",
    "cryptoKeys.encrypt": "KMS",
    "cryptoKeys.decrypt": "KMS",
    "Jobs.RunJob": "RunJob",
}


@attrs.define
class Report:
    """Prints one line per operation, and records whether a limit was exceeded."""

    has_failed: bool = False

    def head(self) -> None:
        """Print the column titles."""
        print(f"{'operation':<44}" + "".join(f"{column:>9}" for column in COLUMNS) + "   limit")

    def line(self, operation: str, door: RecordingProxy, *, times: int = 1, **limits: float) -> None:
        """Print the calls of an operation, and reset the counts.

        Args:
            operation: Its description.
            door: Where the calls were counted.
            times: How often the operation was done.
            limits: The maximum number of calls of one operation, by column.
        """
        counts: Counter[str] = Counter()
        for call, number in door.calls.items():
            counts[GROUPS.get(call.method, "other")] += number
        door.calls.clear()
        exceeded = [column for column, limit in limits.items() if counts[column] > limit * times]
        self.has_failed |= bool(exceeded)
        limit_text = ", ".join(f"{column} ≤ {limit:g}" for column, limit in limits.items())
        verdict = f"   {limit_text}{'  EXCEEDED: ' + ', '.join(exceeded) if exceeded else ''}" if limits else ""
        print(f"{operation:<44}" + "".join(f"{counts[column] / times:>9.3g}" for column in COLUMNS) + verdict)


def script(conversation: Conversation) -> Reply:
    """Hang if the prompt says `Wait`, otherwise finish."""
    return Hang() if "Wait" in conversation.prompt else Say("Done.")


@asynccontextmanager
async def open_receiver() -> AsyncIterator[str]:
    """Start a receiver that accepts all callbacks, and yield its URL."""

    async def receive(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/hook", receive)
    async with TestServer(app) as server:
        yield str(server.make_url("/hook"))


async def count(report: Report, recorded: RecordedService, receiver: str) -> None:
    """Do each operation once, and count its calls."""
    service, api = recorded.service, recorded.api
    report.head()
    recorded.deployment.cloud_run.launch_seconds = float("inf")
    await asyncio.gather(*(service.submit() for _ in range(TASKS)))
    report.line("POST /run-async", api, times=TASKS, writes=4, reads=0, lists=0, deletes=0, KMS=1, RunJob=1)
    await service.get(f"/tasks?limit={TASKS}")
    report.line(f"GET /tasks, a page of {TASKS}", api, writes=0, reads=TASKS, lists=1)
    await service.get("/tasks/status")
    report.line(f"GET /tasks/status, {TASKS} active", api, writes=0, reads=TASKS, lists=1)
    await recorded.deployment.sweep()
    report.line(f"ccrun sweep, {TASKS} active, none due (sweep)", recorded.sweep, reads=TASKS, lists=1, writes=0)

    recorded.deployment.cloud_run.launch_seconds = 0.0
    await service.run(taskId="done", callbackUrl=receiver)
    report.line("POST /run, followed to its end", api)
    [execution] = (
        each for each in recorded.deployment.cloud_run.executions.values() if each.overrides["TASK_ID"] == "done"
    )
    await execution.finished.wait()
    chunks = len((await recorded.deployment.store.logs.listing(TaskId("done"), first=1)).chunks)
    report.line(f"a task with a callback, {chunks} chunks (worker)", recorded.worker, writes=3 + chunks, lists=0, KMS=1)
    await service.events("done")
    report.line(f"GET events of a finished task, {chunks} chunks", api, writes=0, reads=1 + chunks, lists=1)
    async with service.http.get(f"{service.url}/tasks/done/logs") as response:
        await response.read()
    report.line(f"GET logs, {chunks} chunks", api, writes=0, reads=1 + chunks, lists=1)
    await service.get("/tasks/done")
    report.line("GET /tasks/{taskId} of a finished task", api, writes=0, reads=1, lists=0)

    await service.submit(taskId="silent", prompt="Wait.")
    await service.until("silent", lambda record: record.status is Status.RUNNING)
    await asyncio.sleep(1.0)
    api.calls.clear()
    await service.get("/tasks/silent")
    report.line("GET /tasks/{taskId} of a running task", api, writes=0, reads=1, lists=0)
    async with service.http.get(f"{service.url}/tasks/silent/events") as response:
        await response.content.readuntil(b"event: caught_up")
        api.calls.clear()
        await asyncio.sleep(SILENT_SECONDS)
        polls = int(SILENT_SECONDS / POLL_SECONDS) + 1
        report.line("a poll of a silent task", api, times=polls, writes=0, reads=0, lists=1, other=0)
    async with service.http.post(f"{service.url}/cancel/silent") as response:
        await response.read()
    report.line("POST /cancel of a running task", api, writes=1, reads=1)


# --- latency ---------------------------------------------------------------------------------------------------------


class Bare:
    """Google's clients without ccrun, which make the calls of a submission."""

    def __init__(self, http: aiohttp.ClientSession, channel: grpc.aio.Channel, door: RecordingProxy) -> None:
        shared: Any = http  # The libraries annotate the session type of their synchronous variants.
        token = Token(service_file=io.StringIO("{}"), session=shared)
        self._storage = Storage(
            session=shared, token=token, api_root=door.environment["STORAGE_EMULATOR_HOST"], api_is_dev=True
        )
        self._kms = KMS(
            keyproject=PROJECT,
            keyring=KEY_RING,
            keyname=KEY_NAME,
            location=LOCATION,
            session=shared,
            token=token,
            api_root=f"http://{door.environment['KMS_EMULATOR_HOST']}/v1",
            api_is_dev=True,
        )
        self._jobs = run_v2.JobsAsyncClient(transport=JobsGrpcAsyncIOTransport(channel=channel))

    async def submit(self, task_id: str, job: str) -> None:
        """Make the calls of `/run-async`."""
        await self._kms.encrypt(base64.b64encode(bytes(32)).decode())
        await self._create(f"active/{task_id}", b"")
        await self._create(f"sessions/{task_id}/encrypted-payload.bin", bytes(600))
        await asyncio.gather(
            self._create(f"sessions/{task_id}/metadata.json", bytes(600)),
            self._create(f"index/00000/000/00000-{task_id}", b""),
        )
        await self._jobs.run_job(run_v2.RunJobRequest(name=job))

    async def open_stream(self, task_id: str) -> None:
        """Make the further calls of `/run` until its stream is open."""
        await (await self._storage.download_stream(BUCKET, f"sessions/{task_id}/metadata.json")).read()
        await self._storage.list_objects(BUCKET, params={"prefix": f"sessions/{task_id}/"})

    async def _create(self, name: str, content: bytes) -> None:
        await self._storage.upload(
            BUCKET,
            name,
            content,
            parameters={"ifGenerationMatch": "0"},
            metadata={"metadata": {"write": "bare"}},
            force_resumable_upload=False,
        )


@asynccontextmanager
async def open_bare(recorded: RecordedService) -> AsyncIterator[Bare]:
    """Open the clients on the addresses that the API uses."""
    target = recorded.api.environment["CLOUD_RUN_EMULATOR_HOST"]
    async with aiohttp.ClientSession() as http, grpc.aio.insecure_channel(target) as channel:
        yield Bare(http, channel, recorded.api)


async def measure(recorded: RecordedService, runs: int) -> None:
    """Measure submissions to the service and by bare clients, alternately."""
    service, job = recorded.service, recorded.deployment.cloud_run.job
    # Workers would use the processor, so none is started.
    recorded.deployment.cloud_run.launch_seconds = float("inf")
    pairs: dict[str, list[tuple[float, float]]] = {"POST /run-async, answered": [], "POST /run, stream open": []}
    async with open_bare(recorded) as bare:
        for number in range(-1, runs):
            started = time.monotonic()
            await bare.submit(f"bare{number}", job)
            submitted = time.monotonic() - started
            await bare.open_stream(f"bare{number}")
            opened = time.monotonic() - started
            started = time.monotonic()
            await service.submit(taskId=f"async{number}")
            asynchronous = time.monotonic() - started
            started = time.monotonic()
            body = service.body(taskId=f"sync{number}")
            async with service.http.post(f"{service.url}/run", json=body) as response:
                await response.content.readline()
                synchronous = time.monotonic() - started
            # The first pair only opens connections.
            if number >= 0:
                pairs["POST /run-async, answered"].append((submitted, asynchronous))
                pairs["POST /run, stream open"].append((opened, synchronous))
    print(f"\n{runs} runs of each, medians, milliseconds\n")
    print(f"{'':<34}{'bare calls':>12}{'ccrun':>10}{'added':>10}{'ratio':>8}")
    for label, times in pairs.items():
        print(
            f"{label:<34}{median(one for one, _ in times) * 1000:>12.1f}{median(other for _, other in times) * 1000:>10.1f}"
            f"{median(other - one for one, other in times) * 1000:>+10.1f}{median(other / one for one, other in times):>8.2f}"
        )


async def main(runs: int) -> bool:
    """Run the benchmark and print the results. Return whether no limit was exceeded."""
    log.configure(LogFormat.JSON, "ERROR")
    report = Report()
    async with open_receiver() as receiver, recorded_service(script) as recorded:
        await count(report, recorded, receiver)
        await measure(recorded, runs)
    return not report.has_failed


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_RUNS)) else 1)

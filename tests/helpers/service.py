"""A whole service as its callers see it: what tests say to it and read from it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import IO, Any, Final, Protocol

import aiohttp
import attrs
import psutil
from standins.cloudrun import CloudRun
from standins.gcs import BUCKET, Gcs
from standins.kms import PROJECT, Kms

from ccrun import config
from ccrun.backends.gcp.blobs import open_blobs
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.server import sweep_once
from ccrun.store import Store
from ccrun.task import TaskId, TaskRecord
from ccrun.task_directories import remove_leftovers
from ccrun.testing.model import Script, ScriptedModel

#: Seconds. The longest wait of a test, with room for a busy machine.
WAIT_SECONDS: Final = 90.0
MADE_UP_KEY: Final = "made-up-key-of-the-tests"
CALLBACK_SECRET: Final = "made-up-callback-secret-of-the-tests"


@attrs.frozen(kw_only=True)
class Event:
    """A server-sent event as a client receives it."""

    name: str
    data: Any
    id: str | None = None


async def read_events(response: aiohttp.ClientResponse) -> AsyncIterator[Event]:
    """Yield the events of a stream until it ends."""
    fields: dict[str, str] = {}
    buffer = b""
    async for piece in response.content.iter_any():
        buffer += piece
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            if line:
                field, _, value = line.decode().partition(": ")
                fields[field] = value
            elif "data" in fields:
                yield Event(name=fields.get("event", "message"), data=json.loads(fields["data"]), id=fields.get("id"))
                fields = {}
            else:
                fields = {}


class Deployment(Protocol):
    """The storage and the workers of a service, and what a test does to them."""

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment variables of the service and the workers."""
        ...

    @property
    def store(self) -> Store:
        """The store, opened without the service."""
        ...

    async def kill_worker(self, task_id: str) -> None:
        """Kill the worker of a task with SIGKILL, as the kernel does when memory is exhausted."""
        ...

    async def sweep(self) -> None:
        """Run a sweep, unless the service runs its own sweeps."""
        ...


@attrs.frozen(kw_only=True)
class LocalDeployment:
    """A data directory, with workers as local processes."""

    data_dir: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"CCRUN_DATA_DIR": str(self.data_dir)}

    @property
    def store(self) -> Store:
        return Store(DirectoryBlobs(self.data_dir))

    async def kill_worker(self, task_id: str) -> None:
        os.kill(int((self.data_dir / ".workers" / task_id).read_text()), signal.SIGKILL)

    async def sweep(self) -> None: ...


@attrs.frozen(kw_only=True)
class CloudDeployment:
    """Stand-ins of Cloud Storage, Cloud KMS and Cloud Run on loopback."""

    environment: dict[str, str]
    store: Store
    cloud_run: CloudRun
    gcs: Gcs
    kms: Kms
    sweep_environment: dict[str, str]

    async def kill_worker(self, task_id: str) -> None:
        name = next(
            name for name, execution in self.cloud_run.executions.items() if execution.overrides["TASK_ID"] == task_id
        )
        self.cloud_run.kill(name)

    async def sweep(self) -> None:
        await sweep_once(await asyncio.to_thread(config.load, self.sweep_environment))


@contextlib.asynccontextmanager
async def cloud_deployment(environment: Mapping[str, str]) -> AsyncIterator[CloudDeployment]:
    """Start the stand-ins; the job runs real workers in this environment."""
    async with Gcs() as gcs, Kms() as kms:
        settings = {
            "CCRUN_BACKEND": "gcp",
            "PROJECT_ID": PROJECT,
            "GCS_LOGS_BUCKET": BUCKET,
            "STORAGE_EMULATOR_HOST": gcs.url,
            "KMS_EMULATOR_HOST": kms.host,
            "POLL_SECONDS": "0.2",
            "CALLBACK_ALLOWED_HOSTS": "127.0.0.1",
        }
        worker_environment = {**environment, **settings}
        command = (sys.executable, "-P", "-m", "ccrun.worker")
        async with (
            CloudRun(command=command, environment=worker_environment) as cloud_run,
            open_blobs(BUCKET, emulator=gcs.direct) as blobs,
        ):
            settings["CLOUD_RUN_EMULATOR_HOST"] = cloud_run.host
            yield CloudDeployment(
                environment=settings,
                store=Store(blobs),
                cloud_run=cloud_run,
                gcs=gcs,
                kms=kms,
                sweep_environment={**environment, **settings},
            )


@attrs.frozen(kw_only=True)
class Service:
    """A running service with its model, its storage and an HTTP client."""

    url: str
    http: aiohttp.ClientSession
    model: ScriptedModel
    deployment: Deployment
    store: Store

    @property
    def data_dir(self) -> Path:
        """The data directory of a service on the local backend."""
        assert isinstance(self.deployment, LocalDeployment)
        return self.deployment.data_dir

    def body(self, **fields: Any) -> dict[str, Any]:
        """Return a valid request body with these fields."""
        return {"prompt": "Do it.", "anthropicApiKey": MADE_UP_KEY, **fields}

    async def run(self, **fields: Any) -> list[Event]:
        """Run a task over POST /run and return all of its events."""
        async with (
            asyncio.timeout(WAIT_SECONDS),
            self.http.post(f"{self.url}/run", json=self.body(**fields)) as response,
        ):
            assert response.status == 200, await response.text()
            return [event async for event in read_events(response)]

    async def submit(self, **fields: Any) -> dict[str, Any]:
        """Submit a task over POST /run-async, by default with an unreachable callback URL, and return the response."""
        fields.setdefault("callbackUrl", "http://127.0.0.1:9/")
        async with self.http.post(f"{self.url}/run-async", json=self.body(**fields)) as response:
            assert response.status == 202, await response.text()
            return dict(await response.json())

    async def get(self, path: str) -> dict[str, Any]:
        """Return the JSON response to a GET."""
        async with self.http.get(self.url + path) as response:
            assert response.status == 200, await response.text()
            return dict(await response.json())

    async def events(self, task_id: str, *, query: str = "", last_event_id: str | None = None) -> list[Event]:
        """Return all events of a task."""
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        async with (
            asyncio.timeout(WAIT_SECONDS),
            self.http.get(f"{self.url}/tasks/{task_id}/events{query}", headers=headers) as response,
        ):
            assert response.status == 200, await response.text()
            return [event async for event in read_events(response)]

    async def until(self, task_id: str, condition: Callable[[TaskRecord], bool]) -> TaskRecord:
        """Wait until the record of a task satisfies a condition."""
        return await until_record(self.store, task_id, condition)

    async def until_final(self, task_id: str) -> TaskRecord:
        """Wait until a task is final."""
        return await self.until(task_id, lambda record: record.status.is_final)


async def until_record(store: Store, task_id: str, condition: Callable[[TaskRecord], bool]) -> TaskRecord:
    """Wait until the record of a task satisfies a condition."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition(record := await store.record(TaskId(task_id))):
            await asyncio.sleep(0.02)
    return record


class StartService(Protocol):
    """Start a service, and stop it when the context exits."""

    def __call__(
        self, script: Script | None = None, *, data_dir: Path | None = None, **settings: str
    ) -> AbstractAsyncContextManager[Service]:
        """Start a service with a scripted model and these additional settings."""


@attrs.frozen(kw_only=True)
class ServeProcess:
    """A `ccrun serve` in a separate process, which a test can kill."""

    process: asyncio.subprocess.Process
    url: str

    async def kill(self) -> None:
        """Kill the process with SIGKILL."""
        self.process.kill()
        await self.process.wait()


def remove_workers(data_dir: Path) -> None:
    """Kill the workers that a local service has left running, and remove their workspaces. Blocks."""
    killed = []
    for worker in psutil.process_iter():
        # A process may exit at any time, and others may belong to another user.
        with contextlib.suppress(psutil.Error):
            environment = worker.environ()
            if environment.get("CCRUN_DATA_DIR") == str(data_dir) and "TASK_ID" in environment:
                killed += [
                    (TaskId(environment["TASK_ID"]), each) for each in (*worker.children(recursive=True), worker)
                ]
    for _, process in killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs([process for _, process in killed], timeout=WAIT_SECONDS)
    for task_id in {task_id for task_id, _ in killed}:
        remove_leftovers(task_id)


@contextlib.asynccontextmanager
async def serve_process(
    data_dir: Path, log_file: Path | None = None, *, open_files: int | None = None, **settings: str
) -> AsyncIterator[ServeProcess]:
    """Start `ccrun serve` and wait until it listens; send SIGTERM when the context exits. Its workers keep running.

    Args:
        open_files: The maximum number of its open files, None for that of this process.
    """
    limited = () if open_files is None else ("bash", "-c", f'ulimit -n {open_files} && exec "$@"', "bash")
    environment = {**os.environ, "PORT": "0", "CCRUN_DATA_DIR": str(data_dir), "LOG_FORMAT": "json", **settings}
    # Not a pipe: workers would keep it open, and asyncio waits until a pipe is closed. Appended to, since the position is shared
    # with the service, which would write over its first line while it is read here.
    with log_file.open("a+b") if log_file else tempfile.TemporaryFile("a+b") as log:
        process = await asyncio.create_subprocess_exec(
            *(*limited, sys.executable, "-P", "-m", "ccrun", "serve"), env=environment, stdout=log
        )
        try:
            yield ServeProcess(process=process, url=await _listening(log, process))
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            async with asyncio.timeout(WAIT_SECONDS):
                await process.wait()


async def _listening(log: IO[bytes], process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            log.seek(0)
            for line in log.read().splitlines():
                if b'"service_listening"' in line:
                    return str(json.loads(line)["url"])
            assert process.returncode is None, "the service exited before it listened"
            await asyncio.sleep(0.02)

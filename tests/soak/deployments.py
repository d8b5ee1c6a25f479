"""The service of a soak test: a process that is killed and started again, on both backends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

import aiohttp
import attrs
import psutil
from helpers.service import CALLBACK_SECRET, MADE_UP_KEY, CloudDeployment, ServeProcess, cloud_deployment, serve_process
from soak.conftest import SoakDirectories

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.backends.local.layout import process_marker
from ccrun.names import active_name, payload_name
from ccrun.process import cgroup
from ccrun.store import Store
from ccrun.task import TaskId

#: Seconds until a request is answered. The service may be killed several times before that, and a busy machine starts it slowly.
ANSWER_SECONDS: Final = 180.0
#: Seconds between two attempts of a request.
RETRY_SECONDS: Final = 0.05
#: Seconds between two sweeps in the cloud, where a schedule starts them.
SWEEP_SECONDS: Final = 2.0
#: Seconds by which the files of interrupted writes are made older, more than `ccrun.backends.local.blobs.SCRATCH_SECONDS`.
AGE_SECONDS: Final = 3600.0


class Platform(Protocol):
    """The backend of a soak test.

    Args:
        max_unfinished: How many tasks a run submits before the first of them are final.
    """

    max_unfinished: ClassVar[int]

    @property
    def store(self) -> Store:
        """The store, opened without the service."""
        ...

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment variables of the service."""
        ...

    def workers(self) -> list[TaskId]:
        """Return the tasks with a running worker."""
        ...

    def kill_worker(self, task_id: TaskId, number: signal.Signals) -> None:
        """Kill the worker of a task with SIGKILL, or stop it with SIGTERM."""
        ...

    async def leftovers(self, task_ids: list[TaskId]) -> list[str]:
        """Return what the tasks have left on the platform."""
        ...

    async def run_forever(self) -> None:
        """Run the scheduled sweeps of the platform."""
        ...

    def save_logs(self) -> None:
        """Save the logs of the workers, unless they are in those of the service."""
        ...


@attrs.frozen(kw_only=True)
class LocalPlatform:
    """A data directory, with workers as local processes."""

    #: Most of them are queued, and the queue is what a kill of the service loses.
    max_unfinished: ClassVar[int] = 1_000
    directories: SoakDirectories

    @property
    def store(self) -> Store:
        return Store(DirectoryBlobs(self.directories.data))

    @property
    def environment(self) -> dict[str, str]:
        return {"CCRUN_DATA_DIR": str(self.directories.data)}

    def workers(self) -> list[TaskId]:
        with contextlib.suppress(FileNotFoundError):
            return [TaskId(path.name) for path in sorted((self.directories.data / ".workers").iterdir())]
        return []

    def kill_worker(self, task_id: TaskId, number: signal.Signals) -> None:
        with contextlib.suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
            worker = psutil.Process(int((self.directories.data / ".workers" / task_id).read_text()))
            # The file of a lost worker may name a process that has nothing to do with it.
            if worker.environ().get("TASK_ID") == task_id:
                worker.send_signal(number)

    async def leftovers(self, task_ids: list[TaskId]) -> list[str]:
        data = self.directories.data
        # Nothing writes any more, so each of these files was left by an interrupted write, whenever it was.
        old = time.time() - AGE_SECONDS
        for path in (data / ".scratch").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, (old, old))
        groups = {cgroup._name(process_marker(data, task_id)) for task_id in task_ids}
        paths = [*(data / ".scratch").glob("*"), *(data / ".workers").glob("*"), *self.directories.temporary.glob("*")]
        found = [f"file {path}" for path in paths]
        found += [f"control group {path}" for path in Path("/sys/fs/cgroup").rglob("ccrun-*") if path.name in groups]
        return found

    async def run_forever(self) -> None:
        await asyncio.Event().wait()

    def save_logs(self) -> None: ...


@attrs.frozen(kw_only=True)
class CloudPlatform:
    """The stand-ins of Google Cloud."""

    #: Each has a worker immediately, and a worker needs a second of a core to start.
    max_unfinished: ClassVar[int] = 8
    directories: SoakDirectories
    deployment: CloudDeployment

    @property
    def store(self) -> Store:
        return self.deployment.store

    @property
    def environment(self) -> dict[str, str]:
        return self.deployment.environment

    def workers(self) -> list[TaskId]:
        return sorted(self._running())

    def _running(self) -> dict[TaskId, str]:
        executions = self.deployment.cloud_run.executions.items()
        return {
            TaskId(execution.overrides["TASK_ID"]): name
            for name, execution in executions
            if not execution.finished.is_set()
        }

    def kill_worker(self, task_id: TaskId, number: signal.Signals) -> None:
        if name := self._running().get(task_id):
            # A cancelled execution gets SIGTERM.
            run = self.deployment.cloud_run
            (run.kill if number is signal.SIGKILL else run.cancel)(name)

    async def leftovers(self, task_ids: list[TaskId]) -> list[str]:
        return [f"execution of task {task_id}" for task_id in self._running()]

    async def run_forever(self) -> None:
        while True:
            await self.deployment.sweep()
            await asyncio.sleep(SWEEP_SECONDS)

    def save_logs(self) -> None:
        for name, execution in self.deployment.cloud_run.executions.items():
            (self.directories.logs / name).write_text(execution.output, encoding="utf-8")


@attrs.define
class SoakService:
    """A service that can be killed at any time."""

    platform: Platform
    directories: SoakDirectories
    environment: Mapping[str, str]
    http: aiohttp.ClientSession
    _process: ServeProcess | None = None
    _starts: int = 0
    _open: contextlib.AsyncExitStack = attrs.field(factory=contextlib.AsyncExitStack)

    @property
    def pid(self) -> int:
        """The process ID of the running service."""
        assert self._process is not None
        return self._process.process.pid

    async def start(self) -> None:
        """Start the service."""
        self._starts += 1
        log_file = self.directories.logs / f"service-{self._starts}"
        serving = serve_process(self.directories.data, log_file, open_files=None, **self.environment)
        self._process = await self._open.enter_async_context(serving)

    async def stop(self, number: signal.Signals) -> None:
        """Stop the service with a signal, and wait until it has exited."""
        process, self._process = self._process, None
        assert process is not None
        process.process.send_signal(number)
        await self._open.aclose()

    async def request(self, method: str, path: str, **arguments: Any) -> tuple[int, dict[str, Any]] | None:
        """Return status and body of one attempt; None if the service could not be reached, or was killed before it answered."""
        if self._process is None:
            return None
        try:
            async with self.http.request(method, self._process.url + path, **arguments) as response:
                return response.status, await response.json()
        except (aiohttp.ClientError, ConnectionError):
            return None

    async def submit(self, *, key: str | None, **fields: Any) -> TaskId | None:
        """Submit a task and return its ID. Without an Idempotency-Key there is one attempt, and None if it was not answered."""
        headers = {} if key is None else {"Idempotency-Key": key}
        body = {"anthropicApiKey": MADE_UP_KEY, "timeoutMinutes": 5, **fields}
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                was_running = self._process is not None
                answer = await self.request("POST", "/run-async", json=body, headers=headers)
                if answer is not None and answer[0] == 202:
                    return TaskId(answer[1]["taskId"])
                # 502: the launch has failed. 503: the first attempt is not stored yet, or the storage was not reached.
                assert answer is None or answer[0] in (502, 503), answer
                if key is None and answer is None and was_running:
                    return None
                await asyncio.sleep(RETRY_SECONDS)

    async def cancel(self, task_id: TaskId) -> bool:
        """Cancel a task. Return whether the service accepted that; False also if the task had finished before."""
        async with asyncio.timeout(ANSWER_SECONDS):
            while (answer := await self.request("POST", f"/cancel/{task_id}")) is None or answer[0] == 503:
                await asyncio.sleep(RETRY_SECONDS)
        assert answer[0] in (200, 409), answer
        return answer[0] == 200

    async def leftovers(self, task_ids: list[TaskId]) -> list[str]:
        """Return what is left of the tasks: processes, files, marks and payloads."""
        found = await asyncio.to_thread(self._processes)
        found += await self.platform.leftovers(task_ids)
        found += [f"mark {active_name(mark.task_id)}" for mark in await self.platform.store.active()]
        for task_id in task_ids:
            with contextlib.suppress(Exception):
                await self.platform.store.payload(task_id)
                found.append(payload_name(task_id))
        return found

    def _processes(self) -> list[str]:
        found = []
        needles = (str(self.directories.oracle), str(self.directories.cli))
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                is_worker = "ccrun.worker" in command and self._is_ours(process)
                if process.status() != psutil.STATUS_ZOMBIE and (is_worker or any(n in command for n in needles)):
                    found.append(f"process {process.pid}: {command[:100]}")
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        return process.environ().get("CLAUDE_CLI") == str(self.directories.cli)


@contextlib.asynccontextmanager
async def soak_service(backend: str, directories: SoakDirectories, **settings: str) -> AsyncIterator[SoakService]:
    """Run a service on a backend, with its sweeps, until the context exits."""
    settings = {
        "CLAUDE_CLI": str(directories.cli),
        "CLOUDRUN_CALLBACK_SECRET": CALLBACK_SECRET,
        "ANTHROPIC_BASE_URL": "http://127.0.0.1:9",
        "TMPDIR": str(directories.temporary),
        "MAX_CONCURRENT_TASKS": "4",
        "LOG_LEVEL": "INFO",
        **settings,
    }
    async with contextlib.AsyncExitStack() as stack:
        if backend == "local":
            platform: Platform = LocalPlatform(directories=directories)
        else:
            cloud = await stack.enter_async_context(cloud_deployment({**os.environ, **settings}))
            platform = CloudPlatform(directories=directories, deployment=cloud)
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        service = SoakService(platform, directories, {**settings, **platform.environment}, http)
        stack.callback(platform.save_logs)
        sweeping = asyncio.create_task(platform.run_forever())
        stack.push_async_callback(_cancelled, sweeping)
        await service.start()
        stack.push_async_callback(service._open.aclose)
        yield service


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task

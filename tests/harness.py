"""A whole service as its callers see it: what tests say to it and read from it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import IO, Any, Final, Protocol

import aiohttp
import attrs

from ccrun.demo.model import Script, ScriptedModel
from ccrun.store import Store
from ccrun.task import TaskId, TaskRecord

#: Seconds. No wait of a test is longer than this, however busy the machine is.
PATIENCE: Final = 90.0
MADE_UP_KEY: Final = "made-up-key-of-the-tests"


@attrs.frozen(kw_only=True)
class Event:
    """A server-sent event as a client sees it."""

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


@attrs.frozen(kw_only=True)
class Service:
    """A running ccrun and what is around it."""

    url: str
    http: aiohttp.ClientSession
    model: ScriptedModel
    data_dir: Path
    store: Store

    def body(self, **fields: Any) -> dict[str, Any]:
        """Return a request body that works, with these fields."""
        return {"prompt": "Do it.", "anthropicApiKey": MADE_UP_KEY, **fields}

    async def run(self, **fields: Any) -> list[Event]:
        """Run a task over POST /run and return all of its events."""
        async with asyncio.timeout(PATIENCE), self.http.post(f"{self.url}/run", json=self.body(**fields)) as response:
            assert response.status == 200, await response.text()
            return [event async for event in read_events(response)]

    async def submit(self, **fields: Any) -> dict[str, Any]:
        """Submit a task over POST /run-async, by default with a callback to nowhere, and return the answer."""
        fields.setdefault("callbackUrl", "http://127.0.0.1:9/")
        async with self.http.post(f"{self.url}/run-async", json=self.body(**fields)) as response:
            assert response.status == 202, await response.text()
            return dict(await response.json())

    async def get(self, path: str) -> dict[str, Any]:
        """Return the JSON answer to a GET."""
        async with self.http.get(self.url + path) as response:
            assert response.status == 200, await response.text()
            return dict(await response.json())

    async def events(self, task_id: str, *, query: str = "", last_event_id: str | None = None) -> list[Event]:
        """Return all events of a task."""
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        async with (
            asyncio.timeout(PATIENCE),
            self.http.get(f"{self.url}/tasks/{task_id}/events{query}", headers=headers) as response,
        ):
            assert response.status == 200, await response.text()
            return [event async for event in read_events(response)]

    async def until(self, task_id: str, holds: Callable[[TaskRecord], bool]) -> TaskRecord:
        """Wait until something holds of a task's record."""
        return await until_record(self.store, task_id, holds)

    async def until_over(self, task_id: str) -> TaskRecord:
        """Wait until a task is over."""
        return await self.until(task_id, lambda record: record.status.is_final)


async def until_record(store: Store, task_id: str, holds: Callable[[TaskRecord], bool]) -> TaskRecord:
    """Wait until something holds of a task's record."""
    async with asyncio.timeout(PATIENCE):
        while not holds(record := await store.record(TaskId(task_id))):
            await asyncio.sleep(0.02)
    return record


class StartService(Protocol):
    """Starts a service; closes it when the context is left."""

    def __call__(
        self, script: Script | None = None, *, data_dir: Path | None = None, **settings: str
    ) -> AbstractAsyncContextManager[Service]:
        """Start one with a scripted model and these settings besides the usual ones."""


@attrs.frozen(kw_only=True)
class ServeProcess:
    """A `ccrun serve` in a process of its own, to be killed."""

    process: asyncio.subprocess.Process
    url: str

    async def kill(self) -> None:
        """Kill it as the kernel does when memory runs out."""
        self.process.kill()
        await self.process.wait()


@contextlib.asynccontextmanager
async def serve_process(data_dir: Path, log_file: Path | None = None, **settings: str) -> AsyncIterator[ServeProcess]:
    """Start `ccrun serve` and wait until it listens; it gets SIGTERM when the context is left."""
    environment = {**os.environ, "PORT": "0", "CCRUN_DATA_DIR": str(data_dir), "LOG_FORMAT": "json", **settings}
    # No pipe: its workers would hold it open, and asyncio waits for that.
    with log_file.open("w+b") if log_file else tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "ccrun", "serve"), env=environment, stdout=log
        )
        try:
            yield ServeProcess(process=process, url=await _listening(log, process))
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            async with asyncio.timeout(PATIENCE):
                await process.wait()


async def _listening(log: IO[bytes], process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(PATIENCE):
        while True:
            log.seek(0)
            for line in log.read().splitlines():
                if b'"ccrun listens"' in line:
                    return str(json.loads(line)["url"])
            assert process.returncode is None, "the service ended before it listened"
            await asyncio.sleep(0.02)

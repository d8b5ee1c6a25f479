"""The API alone, over real HTTP on a folder, with a place for workers that only notes what it is told.

For tests of what is said, not of what is run: a test plays the worker by writing to the store itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import attrs
from aiohttp import web

from ccrun import lifecycle
from ccrun.api.app import make_app
from ccrun.api.dependencies import ApiDependencies
from ccrun.api.dispatch import Dispatcher
from ccrun.api.feed import Feed, PollPolicy
from ccrun.api.request import Defaults
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.backends.local.key import LocalKey
from ccrun.blobs import Blob, BlobInfo
from ccrun.jobs import ExecutionState
from ccrun.store import Store
from ccrun.task import Outcome, Reason, Status, TaskId, TaskRecord
from helpers.service import MADE_UP_KEY, PATIENCE, Event, read_events

#: Bytes of a request body that the API under test takes.
MAX_REQUEST_BYTES: Final = 256 * 1024
COMPLETED: Final = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0, turns=1)
FAILED: Final = Outcome(
    status=Status.FAILED, reason=Reason.AGENT_ERROR, exit_code=1, error="Claude process exited with code 1"
)


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.005)


class Breakable:
    """Something that raises `fault` as long as there is one, after it has waited for `gate` if there is one."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.waiting = 0

    async def _pass(self) -> None:
        if self.gate is not None:
            self.waiting += 1
            await self.gate.wait()
        if self.fault is not None:
            raise self.fault


class NotingJobs(Breakable):
    """A place for workers that starts none."""

    max_running: int | None = 2
    start_timeout: dt.timedelta | None = None

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[TaskId] = []
        self.cancelled: list[TaskId] = []
        self.states: dict[TaskId, ExecutionState] = {}
        self.looks = 0

    def check_capacity(self) -> None: ...

    async def launch(self, task_id: TaskId) -> str | None:
        await self._pass()
        self.launched.append(task_id)
        return f"executions/{task_id}"

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        self.cancelled.append(task_id)

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        self.looks += 1
        await self._pass()
        return self.states.get(task_id, ExecutionState.RUNNING)

    async def clear(self, task_id: TaskId) -> None:
        await self._pass()


class BreakableKey(Breakable):
    """A key service that can be made to fail."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._key = LocalKey(path)

    async def wrap(self, key: bytes) -> bytes:
        await self._pass()
        return await self._key.wrap(key)

    async def unwrap(self, wrapped: bytes) -> bytes:
        raise AssertionError("the API never opens anything")

    async def check(self) -> None:
        await self._pass()
        await self._key.check()


class BreakableBlobs(DirectoryBlobs, Breakable):
    """A folder that can be made to fail, and that notes what is read."""

    def __init__(self, root: Path) -> None:
        DirectoryBlobs.__init__(self, root)
        Breakable.__init__(self)
        self.names_read: list[str] = []

    async def read(self, name: str) -> Blob:
        await self._pass()
        self.names_read.append(name)
        return await super().read(name)

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        await self._pass()
        return await super().create(name, content)

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        await self._pass()
        return await super().replace(name, content, generation=generation)

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        await self._pass()
        return await super().entries(prefix, after=after, before=before, limit=limit)

    async def check(self) -> None:
        await self._pass()
        await super().check()


@attrs.frozen(kw_only=True)
class Answer:
    """What the API said to one request."""

    status: int
    body: Any
    text: str
    headers: Any


@attrs.frozen(kw_only=True)
class Api:
    """A running API and what is behind it."""

    url: str
    port: int
    folder: Path
    http: aiohttp.ClientSession
    store: Store
    feed: Feed
    blobs: BreakableBlobs
    jobs: NotingJobs
    key: BreakableKey
    owed: list[None]

    def body(self, **fields: Any) -> dict[str, Any]:
        """Return a request body that works, with these fields."""
        return {"prompt": "Do it.", "anthropicApiKey": MADE_UP_KEY, **fields}

    async def call(self, method: str, path: str, **request: Any) -> Answer:
        """Send one request."""
        async with self.http.request(method, self.url + path, allow_redirects=False, **request) as response:
            text = await response.text()
            body = await response.json() if response.content_type == "application/json" and text else None
            return Answer(status=response.status, body=body, text=text, headers=response.headers)

    async def submit(self, **fields: Any) -> TaskId:
        """Submit a task over `POST /run-async`; return its ID."""
        fields.setdefault("callbackUrl", "http://127.0.0.1:9/")
        answer = await self.call("POST", "/run-async", json=self.body(**fields))
        assert answer.status == 202, answer.text
        return TaskId(answer.body["taskId"])

    async def begin(self, task_id: TaskId) -> TaskRecord:
        """Do what a worker does when it takes up a task."""
        return await self.store.update(task_id, lambda record: lifecycle.start(record, at=dt.datetime.now(dt.UTC)))

    async def write(self, task_id: TaskId, number: int, *lines: bytes) -> None:
        """Write one chunk of a task's log, as its worker does."""
        await self.store.add_chunk(task_id, number, lines, dt.datetime.now(dt.UTC))

    async def end(self, task_id: TaskId, outcome: Outcome = COMPLETED) -> TaskRecord:
        """Write a task's final record, as its worker does."""
        return await self.store.update(
            task_id, lambda record: lifecycle.finish(record, outcome, at=dt.datetime.now(dt.UTC))
        )

    async def events(self, path: str, **request: Any) -> list[Event]:
        """Return all events of a stream that ends."""
        async with self.http.get(self.url + path, **request) as response:
            assert response.status == 200, await response.text()
            return [event async for event in read_events(response)]

    async def raw(self, request: bytes) -> bytes:
        """Send these very bytes on a connection of their own; return all that comes until it is closed."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def api_on(folder: Path, *, host: str = "127.0.0.1", **deps: Any) -> AsyncIterator[Api]:
    """Serve the API on a folder, with these parts instead of the usual ones."""
    blobs, jobs, key = BreakableBlobs(folder), NotingJobs(), BreakableKey(folder / ".keys" / "sealing.key")
    store = Store(blobs)
    owed: list[None] = []
    usual = ApiDependencies(
        store=store,
        jobs=jobs,
        wrapper=key,
        dispatcher=Dispatcher(store=store, jobs=jobs, wrapper=key, callback_owed=lambda: owed.append(None)),
        feed=Feed(store, PollPolicy(min_seconds=0.01, max_seconds=0.05)),
        defaults=Defaults(max_timeout_minutes=60),
        max_request_bytes=MAX_REQUEST_BYTES,
        backend="local",
    )
    app = make_app(attrs.evolve(usual, **deps))
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, 0).start()
        port = runner.addresses[0][1]
        shown = f"[{host}]" if ":" in host else host
        async with aiohttp.ClientSession() as http:
            yield Api(
                url=f"http://{shown}:{port}",
                port=port,
                folder=folder,
                http=http,
                store=store,
                feed=usual.feed,
                blobs=blobs,
                jobs=jobs,
                key=key,
                owed=owed,
            )
    finally:
        await runner.cleanup()

"""The API without workers: real HTTP, a directory as storage, and a backend that only records its calls.

A test plays the worker by writing to the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import attrs
from aiohttp import web

from ccrun import codec, lifecycle
from ccrun.api.app import RUNNER_OPTIONS, make_app
from ccrun.api.connection import HEAD_SECONDS
from ccrun.api.dependencies import ApiDependencies
from ccrun.api.dispatch import Dispatcher
from ccrun.api.feed import Feed
from ccrun.api.listen import Listener
from ccrun.api.poller import PollPolicy
from ccrun.api.request import Defaults
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.backends.local.key import LocalKey
from ccrun.blobs import Blob, BlobInfo
from ccrun.jobs import ExecutionState
from ccrun.store import Store
from ccrun.task import Outcome, Reason, Status, TaskId, TaskRecord
from helpers.service import MADE_UP_KEY, WAIT_SECONDS, Event, read_events

#: `ApiDependencies.max_request_bytes` of the API under test.
MAX_REQUEST_BYTES: Final = 256 * 1024
MAX_CONNECTIONS: Final = 1024
#: A callback URL that accepts no connections.
CALLBACK_URL: Final = "http://127.0.0.1:9/"
TOKEN: Final = "first-token-of-the-tests"
OTHER_TOKEN: Final = "second-token-of-the-tests"
#: The error for every exception that is not a `CcrunError`.
INTERNAL_ERROR: Final = "An internal error occurred; the log of the service has the details."
#: The routes with a task ID, which replaces `{}`.
TASK_ROUTES: Final = (
    ("GET", "/tasks/{}"),
    ("GET", "/tasks/{}/events"),
    ("GET", "/tasks/{}/logs"),
    ("POST", "/tasks/{}/webhook"),
    ("POST", "/cancel/{}"),
)
#: All routes that use the storage.
STORAGE_ROUTES: Final = (
    *TASK_ROUTES,
    ("GET", "/tasks"),
    ("GET", "/tasks/status"),
    ("POST", "/run"),
    ("POST", "/run-async"),
    ("GET", "/ready"),
)
COMPLETED: Final = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0, turns=1)
FAILED: Final = Outcome(
    status=Status.FAILED, reason=Reason.AGENT_ERROR, exit_code=1, error="Claude process exited with code 1"
)


def bearer(token: str) -> dict[str, str]:
    """Return the header for a token."""
    return {"Authorization": f"Bearer {token}"}


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


class Faulty:
    """A dependency of the API that a test can delay and make fail.

    While `gate` is set, each call waits for it; `waiting` counts these calls. While `error` is set, each call then raises it.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.waiting = 0

    async def _fail_or_wait(self) -> None:
        if self.gate is not None:
            self.waiting += 1
            await self.gate.wait()
        if self.error is not None:
            raise self.error


class RecordingJobs(Faulty):
    """A backend that records its calls and starts no workers."""

    max_running: int | None = 2
    start_timeout: dt.timedelta | None = None
    launch_time: dt.timedelta = dt.timedelta(0)

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[TaskId] = []
        self.cancelled: list[TaskId] = []
        self.states: dict[TaskId, ExecutionState] = {}
        self.state_calls = 0
        self.positions: dict[TaskId, int] = {}

    def check_capacity(self) -> None: ...

    def queue_position(self, task_id: TaskId) -> int | None:
        return self.positions.get(task_id)

    async def launch(self, task_id: TaskId) -> str | None:
        await self._fail_or_wait()
        self.launched.append(task_id)
        return f"executions/{task_id}"

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        self.cancelled.append(task_id)

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        self.state_calls += 1
        await self._fail_or_wait()
        return self.states.get(task_id, ExecutionState.RUNNING)

    async def launched_states(self, task_ids: Collection[TaskId]) -> Mapping[TaskId, ExecutionState]:
        return {task_id: await self.state(task_id, None) for task_id in task_ids}

    async def clear(self, task_id: TaskId) -> None:
        await self._fail_or_wait()

    async def leftovers(self) -> list[TaskId]:
        return []


class FaultyKey(Faulty):
    """A key service that can fail, and cannot unwrap keys."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._key = LocalKey(path)

    async def wrap(self, key: bytes) -> bytes:
        await self._fail_or_wait()
        return await self._key.wrap(key)

    async def unwrap(self, wrapped: bytes) -> bytes:
        raise AssertionError("the API must not open payloads")

    async def check(self) -> None:
        await self._fail_or_wait()
        await self._key.check()


class FaultyBlobs(DirectoryBlobs, Faulty):
    """A directory that can fail, and records the names of the objects that are read."""

    def __init__(self, root: Path) -> None:
        DirectoryBlobs.__init__(self, root)
        Faulty.__init__(self)
        self.names_read: list[str] = []

    async def read(self, name: str) -> Blob:
        await self._fail_or_wait()
        self.names_read.append(name)
        return await super().read(name)

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        await self._fail_or_wait()
        return await super().create(name, content)

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        await self._fail_or_wait()
        return await super().replace(name, content, generation=generation)

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        await self._fail_or_wait()
        return await super().entries(prefix, after=after, before=before, limit=limit)

    async def check(self) -> None:
        await self._fail_or_wait()
        await super().check()


@attrs.frozen(kw_only=True)
class ApiResponse:
    """A response that has been read completely. `body` is the parsed JSON, None if there is none."""

    status: int
    body: Any
    text: str
    headers: Any


@attrs.frozen(kw_only=True)
class Api:
    """A running API and its dependencies. `owed` has an entry for each callback that became due."""

    url: str
    port: int
    directory: Path
    http: aiohttp.ClientSession
    store: Store
    feed: Feed
    blobs: FaultyBlobs
    jobs: RecordingJobs
    key: FaultyKey
    owed: list[None]

    def body(self, **fields: Any) -> dict[str, Any]:
        """Return a valid request body with these fields."""
        return {"prompt": "Do it.", "anthropicApiKey": MADE_UP_KEY, **fields}

    async def call(self, method: str, path: str, **request: Any) -> ApiResponse:
        """Send a request and read the response."""
        async with self.http.request(method, self.url + path, allow_redirects=False, **request) as response:
            text = await response.text()
            body = await response.json() if response.content_type == "application/json" and text else None
            return ApiResponse(status=response.status, body=body, text=text, headers=response.headers)

    async def run_async(self, *, headers: dict[str, str] | None = None, **fields: Any) -> ApiResponse:
        """Send `POST /run-async` with a valid body and these fields."""
        fields.setdefault("callbackUrl", CALLBACK_URL)
        return await self.call("POST", "/run-async", json=self.body(**fields), headers=headers)

    async def submit(self, **fields: Any) -> TaskId:
        """Submit a task over `POST /run-async`; return its ID."""
        response = await self.run_async(**fields)
        assert response.status == 202, response.text
        return TaskId(response.body["taskId"])

    async def start(self, task_id: TaskId) -> TaskRecord:
        """Change the record as a worker does that starts the task."""
        return await self.store.update(task_id, lambda record: lifecycle.start(record, at=dt.datetime.now(dt.UTC)))

    async def add_chunk(self, task_id: TaskId, number: int, *lines: bytes) -> None:
        """Write a chunk of the log, as the worker does."""
        await self.store.logs.add_chunk(task_id, number, lines, dt.datetime.now(dt.UTC))

    async def finish(self, task_id: TaskId, outcome: Outcome = COMPLETED) -> TaskRecord:
        """Write the final record, as the worker does."""
        return await self.store.update(
            task_id, lambda record: lifecycle.finish(record, outcome, at=dt.datetime.now(dt.UTC))
        )

    async def submit_started(self, **fields: Any) -> TaskId:
        """Return the ID of a running task."""
        task_id = await self.submit(**fields)
        await self.start(task_id)
        return task_id

    async def submit_finished(self, outcome: Outcome = COMPLETED, **fields: Any) -> TaskId:
        """Return the ID of a task that has finished with this outcome."""
        task_id = await self.submit_started(**fields)
        await self.finish(task_id, outcome)
        return task_id

    async def events(self, path: str, **request: Any) -> list[Event]:
        """Return all events of a stream that ends."""
        async with self.http.get(self.url + path, **request) as response:
            assert response.status == 200, await response.text()
            return [event async for event in read_events(response)]

    async def done_event(self, task_id: TaskId) -> bytes:
        """Return the last event of the stream of a finished task."""
        body = codec.callback_body(await self.store.record(task_id)).replace(b"\xe2\x80\xa8", b"\\u2028")
        return b"id: end\nevent: done\ndata: %b\n\n" % body

    async def raw(self, request: bytes) -> bytes:
        """Send bytes on a new connection; return all bytes until the server closes it."""
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
async def api_on(
    directory: Path, *, host: str = "127.0.0.1", head_seconds: float = HEAD_SECONDS, **deps: Any
) -> AsyncIterator[Api]:
    """Serve the API on a directory.

    Args:
        directory: The root of the storage. The key is in it too.
        host: The address to listen on.
        head_seconds: See `Listener`.
        deps: Fields of `ApiDependencies` that differ from the defaults here.
    """
    blobs, jobs, key = FaultyBlobs(directory), RecordingJobs(), FaultyKey(directory / ".keys" / "sealing.key")
    store = Store(blobs)
    owed: list[None] = []
    defaults = ApiDependencies(
        store=store,
        jobs=jobs,
        wrapper=key,
        dispatcher=Dispatcher(store=store, jobs=jobs, wrapper=key, callback_owed=lambda: owed.append(None)),
        feed=Feed(store, PollPolicy(min_seconds=0.01, max_seconds=0.05), queue_position=jobs.queue_position),
        defaults=Defaults(max_timeout_minutes=60),
        max_request_bytes=MAX_REQUEST_BYTES,
        backend="local",
    )
    app = make_app(attrs.evolve(defaults, **deps))
    listener = Listener(app, max_connections=MAX_CONNECTIONS, head_seconds=head_seconds)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, **RUNNER_OPTIONS)
    await runner.setup()
    try:
        assert runner.server is not None
        url_host = f"[{host}]" if ":" in host else host
        async with listener.listening(runner.server, host, 0) as port, aiohttp.ClientSession() as http:
            yield Api(
                url=f"http://{url_host}:{port}",
                port=port,
                directory=directory,
                http=http,
                store=store,
                feed=defaults.feed,
                blobs=blobs,
                jobs=jobs,
                key=key,
                owed=owed,
            )
    finally:
        await runner.cleanup()

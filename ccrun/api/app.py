"""HTTP: routes, the one table from an error to its status, the event stream, the life of the app.

What a request means is told by `wire`, what it does by `dispatch`, what a reader sees by `feed`; here it is only spoken.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import re
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeVar

import attrs
import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from aiohttp_sse import EventSourceResponse

from ccrun import __version__, codec
from ccrun.api import sse
from ccrun.api.dispatch import Dispatcher, Idempotency, Submitted
from ccrun.api.feed import CaughtUp, Feed, FeedReader, Finished, Idle, Lines
from ccrun.api.request import Defaults, parse_request
from ccrun.api.sse import Cursor
from ccrun.errors import (
    BlobNotFound,
    Busy,
    CcrunError,
    FieldError,
    InvalidRequest,
    KeyServiceError,
    LaunchFailed,
    NotConfigured,
    NotRedeliverable,
    StorageError,
    TaskAlreadyFinished,
    TaskExists,
    TaskNotFound,
)
from ccrun.jobs import Jobs
from ccrun.log import bound, trace_name
from ccrun.seal import KeyWrapper
from ccrun.settle import settle
from ccrun.store import Store
from ccrun.task import TASK_ID_PATTERN, Secret, Status, TaskId, TaskRecord, TaskType

log = structlog.get_logger()

T = TypeVar("T")
BackgroundTask = Callable[[], AbstractAsyncContextManager[object]]

#: The one table from an error to its HTTP status; the first class that fits counts.
STATUS: Final[Sequence[tuple[type[CcrunError], int]]] = (
    (InvalidRequest, 400),
    (TaskNotFound, 404),
    (TaskExists, 409),
    (TaskAlreadyFinished, 409),
    (NotRedeliverable, 409),
    (NotConfigured, 500),
    (LaunchFailed, 502),
    (Busy, 503),
    (KeyServiceError, 503),
    (StorageError, 503),
)

#: Seconds after which a caller may try again when the storage or the key service does not answer.
RETRY_AFTER_SECONDS: Final = 5
#: Tasks on one page of `GET /tasks`.
MAX_PAGE: Final = 100
DEFAULT_PAGE: Final = 50
#: Tasks of which the last look at their execution is remembered.
MAX_SETTLED: Final = 10_000
#: Bytes. A stream is written in pieces of this size, so that a reader that stops holds few of them.
WRITE_BYTES: Final = 256 * 1024
#: An Idempotency-Key is an opaque short string: draft-ietf-httpapi-idempotency-key-header.
IDEMPOTENCY_KEY: Final = re.compile(r"[\x20-\x7e]{1,255}")
#: Paths that need no token: they tell a load balancer whether the service lives.
OPEN_PATHS: Final = frozenset({"/", "/health", "/healthz", "/ready"})
#: A page of another site can reach a service on loopback under a name of its own (DNS rebinding); it cannot use these.
LOOPBACK_HOST: Final = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]*)?", re.IGNORECASE)
#: It can also send a request without being able to read the answer, which is enough to cancel a task.
LOOPBACK_ORIGIN: Final = re.compile(rf"https?://{LOOPBACK_HOST.pattern}", re.IGNORECASE)

ENDPOINTS: Final = (
    "POST /run",
    "POST /run-async",
    "GET /tasks",
    "GET /tasks/status",
    "GET /tasks/{taskId}",
    "GET /tasks/{taskId}/events",
    "GET /tasks/{taskId}/logs",
    "POST /tasks/{taskId}/webhook",
    "POST /cancel/{taskId}",
    "GET /health",
    "GET /ready",
)


@attrs.frozen(kw_only=True)
class ApiTimeouts:
    """How long the API waits, in seconds."""

    #: A comment keeps proxies awake and finds readers that are gone.
    heartbeat: float = 15.0
    #: A reader that takes no piece of a stream for so long is cut off; it can come back with its cursor.
    send: float = 60.0
    #: A task's record is given out without a look at its execution when that takes longer.
    settle: float = 2.0
    #: Between two looks at the execution of one task: callers poll, and each look is a call with a quota.
    settle_retry: float = 2.0
    #: How long after its client left a task of `/run` is given up.
    abandon: float = 30.0
    #: What a client may take to send a body; at 10 MiB that is a slow mobile line.
    body: float = 60.0
    #: What the storage and the key service have to answer `GET /ready`.
    ready: float = 5.0


@attrs.frozen(kw_only=True)
class ApiDependencies:
    """What the app is made of.

    Args:
        dispatcher: The use cases.
        feed: The streams.
        defaults: What a request may leave out.
        tokens: Bearer tokens that open the door; none means that somebody else guards it.
        only_loopback: The service listens on loopback without a token, so only names of loopback may be asked for.
        max_request_bytes: Of a body.
        unavailable: Why tasks cannot be taken at all, when something is not configured.
        callbacks_unavailable: Why tasks with a callback cannot be taken.
        project_id: Where the traces of requests are, for the log.
        backend: Its name, for `/health?verbose=true`.
        companions: What lives as long as the app does.
    """

    store: Store
    jobs: Jobs
    wrapper: KeyWrapper
    dispatcher: Dispatcher
    feed: Feed
    defaults: Defaults
    tokens: Sequence[Secret] = ()
    loopback_only: bool = False
    max_request_bytes: int
    unavailable: str | None = None
    callbacks_unavailable: str | None = None
    project_id: str | None = None
    backend: str
    timeouts: ApiTimeouts = attrs.field(factory=ApiTimeouts)
    background_tasks: Sequence[BackgroundTask] = ()


def make_app(deps: ApiDependencies) -> web.Application:
    """Return the app; run it with `handler_cancellation`, so that a client that leaves is seen at once."""
    api = _Api(deps)
    app = web.Application(
        client_max_size=deps.max_request_bytes, middlewares=[api.bind_trace, api.handle_errors, api.authorize]
    )
    app.add_routes(
        [
            web.get("/", api.index),
            web.get("/health", api.health),
            web.get("/healthz", api.health),
            web.get("/ready", api.ready),
            web.post("/run", api.run),
            web.post("/run-async", api.run_async),
            web.get("/tasks", api.tasks),
            web.get("/tasks/status", api.tasks_status),
            web.get("/tasks/{task_id}", api.task),
            web.get("/tasks/{task_id}/events", api.events),
            web.get("/tasks/{task_id}/logs", api.logs),
            web.post("/tasks/{task_id}/webhook", api.redeliver),
            web.post("/cancel/{task_id}", api.cancel),
        ]
    )
    for companion in deps.background_tasks:
        app.cleanup_ctx.append(_living_with(companion))
    app.on_shutdown.append(api.stop_streams)
    app.cleanup_ctx.append(api.background)
    return app


def _living_with(companion: BackgroundTask) -> Callable[[web.Application], AsyncIterator[None]]:
    async def context(_: web.Application) -> AsyncIterator[None]:
        async with companion():
            yield

    return context


class _Api:
    """The handlers, and what runs beside them."""

    def __init__(self, deps: ApiDependencies) -> None:
        self._deps = deps
        self._token_digests = [_digest(token.reveal()) for token in deps.tokens]
        self._streams: set[asyncio.Task[object]] = set()
        self._background: set[asyncio.Task[object]] = set()
        self._is_closing = False
        #: When a task's execution was last asked about.
        self._settled_at: OrderedDict[TaskId, float] = OrderedDict()

    # --- life --------------------------------------------------------------------------------------------------------

    async def stop_streams(self, _: web.Application) -> None:
        """Close every stream, before the server waits for its connections."""
        self._is_closing = True
        for stream in self._streams:
            stream.cancel()

    async def background(self, _: web.Application) -> AsyncIterator[None]:
        """Own what goes on after its request."""
        yield
        for work in self._background:
            work.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Do work to its end even when the client leaves meanwhile: half a birth helps nobody."""
        return await asyncio.shield(self._spawn(work))

    # --- middlewares -------------------------------------------------------------------------------------------------

    @web.middleware
    async def bind_trace(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Have every line that is logged for a request name its trace."""
        headers = (request.headers.get("traceparent"), request.headers.get("X-Cloud-Trace-Context"))
        with bound(trace=trace_name(self._deps.project_id, *headers)):
            return await handler(request)

    @web.middleware
    async def handle_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turn whatever is raised into a JSON answer without a stack trace, a secret or a local path."""
        try:
            return await handler(request)
        except Exception as error:
            is_gone = request.transport is None or request.transport.is_closing()
            if not is_gone and request.writer.output_size == 0:
                return self._answer_to(request, error)
            # The answer has begun, so that its end can be told by breaking off alone. A client that left or stalled is no
            # fault; what such a one has not taken cannot be sent, and closing in order would wait for it.
            if not isinstance(error, ConnectionError | TimeoutError):
                log.warning("response_aborted", message="Response aborted", path=request.path, error=_sentence(error))
            if request.transport is not None:
                request.transport.abort()
            return web.Response()

    def _answer_to(self, request: web.Request, error: Exception) -> web.Response:
        match error:
            case InvalidRequest():
                details = [{"field": fault.field, "message": fault.message} for fault in error.errors]
                return _json({"error": error.message, "details": details}, status=400)
            case CcrunError():
                status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
                if status >= 500:
                    log.warning(
                        "request_failed",
                        message="Request failed",
                        path=request.path,
                        status=status,
                        error=error.message,
                    )
                return _error(status, error.message, retry_after=_retry_after(error) if status == 503 else None)
            case web.HTTPMethodNotAllowed():
                allowed = ", ".join(sorted(error.allowed_methods))
                return _error(405, f"{request.method} is not allowed here; use {allowed}.", headers={"Allow": allowed})
            case web.HTTPRequestEntityTooLarge():
                most = self._deps.max_request_bytes
                return _error(413, f"The body is too large: at most {most} bytes are allowed.")
            case web.HTTPNotFound():
                return _error(404, f"There is no {request.method} {request.path}; GET / lists what there is.")
            case web.HTTPException():
                return _error(error.status, f"{error.reason}.")
            case _:
                log.exception(
                    "request_crashed", message="Unexpected error in a request", path=request.path, exc_info=error
                )
                return _error(500, "Something went wrong inside ccrun; its log tells what.")

    @web.middleware
    async def authorize(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let in who may come in."""
        # Of a request without the header aiohttp would look up a name; no browser sends one.
        host = request.headers.get("Host", "localhost")
        if self._deps.loopback_only and not LOOPBACK_HOST.fullmatch(host):
            return _error(421, "This service answers only to localhost, 127.0.0.1 and [::1].")
        origin = request.headers.get("Origin")
        if self._deps.loopback_only and origin is not None and not LOOPBACK_ORIGIN.fullmatch(origin):
            return _error(403, "This service without tokens takes no requests from pages of other sites.")
        if self._token_digests and request.path not in OPEN_PATHS and self._caller(request) is None:
            return _error(
                401,
                "A valid bearer token is required in the Authorization header.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._deps.unavailable and request.path not in OPEN_PATHS:
            raise NotConfigured(self._deps.unavailable)
        return await handler(request)

    def _caller(self, request: web.Request) -> str | None:
        """Return who calls: the digest of a token that is known."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        given = _digest(token.strip())
        # All are compared, so that the time tells nothing.
        known = [digest for digest in self._token_digests if hmac.compare_digest(digest, given)]
        return known[0] if known else None

    # --- health ------------------------------------------------------------------------------------------------------

    async def index(self, _: web.Request) -> web.Response:
        """`GET /`."""
        return _json({"name": "ccrun", "version": __version__, "endpoints": ENDPOINTS})

    async def health(self, request: web.Request) -> web.Response:
        """`GET /health`: the process lives. With `?verbose=true`, what it stands on."""
        if request.query.get("verbose") != "true":
            return _json({"status": "ok"})
        unavailable = self._deps.unavailable
        checks = {"configuration": unavailable} if unavailable else await self._checks()
        return _json(
            {
                "status": "ok",
                "version": __version__,
                "backend": self._deps.backend,
                "checks": {name: fault or "ok" for name, fault in checks.items()},
                "callbacks": "ok" if self._deps.callbacks_unavailable is None else self._deps.callbacks_unavailable,
            }
        )

    async def ready(self, _: web.Request) -> web.Response:
        """`GET /ready`: tasks can be taken."""
        if self._deps.unavailable:
            errors = {"configuration": self._deps.unavailable}
        else:
            errors = {name: fault for name, fault in (await self._checks()).items() if fault is not None}
        if not errors:
            return _json({"status": "ready"})
        answer = {"error": " ".join(errors.values()), "failing": sorted(errors)}
        return _json(answer, status=503, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})

    async def _checks(self) -> dict[str, str | None]:
        async def fault(check: Awaitable[None], silence: str) -> str | None:
            try:
                async with asyncio.timeout(self._deps.timeouts.ready):
                    await check
            except CcrunError as error:
                return error.message
            except TimeoutError:
                return silence
            return None

        storage, keys = await asyncio.gather(
            fault(self._deps.store.check(), "The storage does not answer."),
            fault(self._deps.wrapper.check(), "The key service does not answer."),
        )
        return {"storage": storage, "keyService": keys}

    # --- submitting --------------------------------------------------------------------------------------------------

    async def run_async(self, request: web.Request) -> web.Response:
        """`POST /run-async`: store the task, start it, answer at once."""
        submitted = await asyncio.shield(await self._begin(request, TaskType.ASYNC))
        record = submitted.record
        answer = {
            "taskId": record.task_id,
            "status": record.status,
            "logsPath": record.logs_path,
            "createdAt": codec.record_to_public(record)["createdAt"],
        }
        if record.execution_name:
            answer["executionName"] = record.execution_name
        return _json(answer, status=202, headers=_submitted_headers(submitted))

    async def run(self, request: web.Request) -> web.StreamResponse:
        """`POST /run`: the same, and stream the task's life."""
        birth = await self._begin(request, TaskType.SYNC)
        try:
            submitted = await asyncio.shield(birth)
            headers = _submitted_headers(submitted)
            return await self._stream(request, submitted.record.task_id, after=Cursor(), headers=headers)
        except BaseException:
            # However the stream ended, its client has not seen the task's end.
            if not self._is_closing:
                self._spawn(self._abandon(birth))
            raise

    async def _abandon(self, birth: asyncio.Task[Submitted]) -> None:
        """Cancel a task whose client left, unless somebody reads it by the end of the grace."""
        await asyncio.wait([birth])
        if birth.cancelled() or birth.exception() is not None:
            return
        task_id = birth.result().record.task_id
        await asyncio.sleep(self._deps.timeouts.abandon)
        if self._deps.feed.readers(task_id):
            return
        try:
            await self._deps.dispatcher.cancel(task_id)
            log.info("task_abandoned", message="Task cancelled because its client left", taskId=task_id)
        except (TaskAlreadyFinished, TaskNotFound):
            pass
        except CcrunError as error:
            log.warning(
                "abandoned_task_cancel_failed",
                message="Task whose client left could not be cancelled",
                taskId=task_id,
                error=error.message,
            )

    async def _begin(self, request: web.Request, kind: TaskType) -> asyncio.Task[Submitted]:
        """Check a request and begin what it asks for; that goes on when the client leaves."""
        idempotency = self._idempotency(request)
        body = await _body(request, seconds=self._deps.timeouts.body)
        # In a thread: ten megabytes that mean ill take seconds.
        spec = await asyncio.to_thread(
            parse_request,
            body,
            type=kind,
            task_id=idempotency.task_id if idempotency else TaskId(str(uuid.uuid4())),
            defaults=self._deps.defaults,
        )
        if spec.callback_url is not None and self._deps.callbacks_unavailable:
            raise NotConfigured(self._deps.callbacks_unavailable)
        digest = idempotency.digest(body) if idempotency else None
        return self._spawn(self._deps.dispatcher.submit(spec, idempotency_digest=digest))

    def _idempotency(self, request: web.Request) -> Idempotency | None:
        key = request.headers.get("Idempotency-Key")
        if key is None:
            return None
        if not IDEMPOTENCY_KEY.fullmatch(key):
            raise _invalid("Idempotency-Key", "Idempotency-Key must have 1 to 255 printable ASCII characters")
        return Idempotency(key=key, caller=self._caller(request) or "")

    # --- tasks -------------------------------------------------------------------------------------------------------

    async def tasks(self, request: web.Request) -> web.Response:
        """`GET /tasks`: newest first, a page at a time."""
        query = request.query
        errors = []
        limit = query.get("limit", str(DEFAULT_PAGE))
        if not (limit.isascii() and limit.isdigit() and len(limit) <= 3 and 1 <= int(limit) <= MAX_PAGE):
            errors.append(FieldError("limit", f"limit must be a whole number from 1 to {MAX_PAGE}"))
        status = query.get("status")
        if status is not None and status not in tuple(Status):
            errors.append(FieldError("status", f"status must be one of {', '.join(Status)}"))
        if errors:
            raise InvalidRequest(errors)
        try:
            page = await self._deps.store.page(
                limit=int(limit), cursor=query.get("cursor"), status=Status(status) if status else None
            )
        except ValueError as error:
            raise _invalid("cursor", str(error)) from None
        return _json(
            {"tasks": [codec.record_to_public(record) for record in page.tasks], "nextCursor": page.next_cursor}
        )

    async def tasks_status(self, _: web.Request) -> web.Response:
        """`GET /tasks/status`: what runs now."""
        marks = await self._deps.store.active()
        records = [record for record in await self._deps.store.records([mark.task_id for mark in marks]) if record]
        running = [codec.record_to_public(record) for record in records if record.status is Status.RUNNING]
        cancelling = {record.task_id for record in records if record.is_cancelling}
        return _json(
            {
                "active": len(running),
                "max": self._deps.jobs.max_running,
                "queued": sum(record.status is Status.PENDING for record in records),
                "tasks": [
                    {
                        "taskId": record["taskId"],
                        "type": record["type"],
                        "startedAt": record["startedAt"],
                        "cancelling": record["taskId"] in cancelling,
                    }
                    for record in running
                ],
            }
        )

    async def task(self, request: web.Request) -> web.Response:
        """`GET /tasks/{taskId}`: the record."""
        return _json(codec.record_to_public(await self._present_record(_task_id(request))))

    async def _present_record(self, task_id: TaskId) -> TaskRecord:
        """Return the record, and settle a task whose worker is gone on the way, unless that takes long."""
        record = await self._deps.store.record(task_id)
        now = asyncio.get_running_loop().time()
        if record.status.is_final or now < self._settled_at.get(task_id, -math.inf) + self._deps.timeouts.settle_retry:
            return record
        self._settled_at[task_id] = now
        self._settled_at.move_to_end(task_id)
        if len(self._settled_at) > MAX_SETTLED:
            self._settled_at.popitem(last=False)
        settling = self._spawn(settle(self._deps.store, self._deps.jobs, record))
        await asyncio.wait([settling], timeout=self._deps.timeouts.settle)
        return settling.result() if settling.done() else record

    async def cancel(self, request: web.Request) -> web.Response:
        """`POST /cancel/{taskId}`."""
        task_id = _task_id(request)
        cancelled = await self._finish(self._deps.dispatcher.cancel(task_id))
        message = "The task is being cancelled already" if cancelled.was_already_requested else "The task was cancelled"
        status = "cancelling" if cancelled.was_already_requested else "cancelled"
        return _json({"message": message, "taskId": task_id, "status": status})

    async def redeliver(self, request: web.Request) -> web.Response:
        """`POST /tasks/{taskId}/webhook`: deliver the callback again."""
        task_id = _task_id(request)
        await self._finish(self._deps.dispatcher.redeliver(task_id))
        return _json({"message": "The callback will be delivered again", "taskId": task_id}, status=202)

    # --- the log -----------------------------------------------------------------------------------------------------

    async def events(self, request: web.Request) -> web.StreamResponse:
        """`GET /tasks/{taskId}/events`: the stream of any task, from the start, the present end or a cursor on."""
        task_id = _task_id(request)
        origin = request.query.get("from", "start")
        if origin not in ("start", "tail"):
            raise _invalid("from", "from must be start or tail")
        last_id = request.headers.get("Last-Event-ID") or request.query.get("lastEventId")
        if last_id == sse.LAST_ID:
            await self._deps.store.record(task_id)
            # The one answer that keeps a browser's EventSource from connecting again.
            return web.Response(status=204)
        after = sse.parse_cursor(last_id) if last_id else None
        if after is None and origin == "start":
            after = Cursor()
        return await self._stream(request, task_id, after=after)

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """`GET /tasks/{taskId}/logs`: the lines that there are, as they are stored."""
        task_id = _task_id(request)
        await self._deps.store.record(task_id)
        listing = await self._deps.store.listing(task_id, first=1)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "X-Accel-Buffering": "no"})
        await response.prepare(request)
        while listing.chunks and request.method != hdrs.METH_HEAD:
            for chunk in listing.chunks:
                try:
                    content = await self._deps.store.read_chunk(chunk)
                except BlobNotFound:
                    continue
                await self._write(response, content)
            if listing.record_generation is not None:
                break
            listing = await self._deps.store.listing(task_id, first=listing.chunks[-1].number + 1)
        await response.write_eof()
        return response

    async def _stream(
        self, request: web.Request, task_id: TaskId, *, after: Cursor | None, headers: Mapping[str, str] | None = None
    ) -> web.StreamResponse:
        stream = asyncio.current_task()
        assert stream is not None  # noqa: S101 - a handler always runs in a task
        self._streams.add(stream)
        try:
            async with self._deps.feed.follow(task_id, after=after) as reader:
                # The pings of aiohttp-sse come at any time, also in the middle of an event that is written in pieces.
                response = EventSourceResponse(
                    headers=headers,
                    sep="\n",
                    allow_all_methods=True,
                    ping_interval=math.inf,
                    send_timeout=self._deps.timeouts.send,
                )
                await response.prepare(request)
                async with response:
                    if request.method != hdrs.METH_HEAD:
                        async for frames in self._frames(reader):
                            await self._write(response, frames)
                await response.write_eof()
                return response
        finally:
            self._streams.discard(stream)

    async def _frames(self, reader: FeedReader) -> AsyncIterator[bytes]:
        record = reader.record
        yield sse.opening() + sse.json_event(
            "task", {"taskId": record.task_id, "status": record.status, "logsPath": record.logs_path}
        )
        async for item in reader.items(idle_seconds=self._deps.timeouts.heartbeat):
            match item:
                case Lines():
                    yield item.frames
                case CaughtUp():
                    yield sse.json_event("caught_up", {})
                case Idle():
                    yield sse.HEARTBEAT
                case Finished():
                    yield _ending(item.record)

    async def _write(self, response: web.StreamResponse, content: bytes) -> None:
        """Write in pieces, each within a bound, so that a reader that stops costs little and not for ever."""
        view = memoryview(content)
        for start in range(0, len(view), WRITE_BYTES):
            async with asyncio.timeout(self._deps.timeouts.send):
                await response.write(view[start : start + WRITE_BYTES])

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, work: asyncio.Task[Any]) -> None:
        self._background.discard(work)
        # What failed after its caller had left was told by whoever failed; asyncio need not tell it again.
        if not work.cancelled():
            work.exception()


def _ending(record: TaskRecord) -> bytes:
    body = codec.callback_body(record)
    first = b""
    if record.status is Status.FAILED:
        first = sse.json_event("error", {"error": record.error, "exitCode": record.exit_code})
    elif record.status is Status.CANCELLED:
        first = sse.json_event("cancelled", {"taskId": record.task_id})
    return first + sse.event("done", body, event_id=sse.LAST_ID)


def _submitted_headers(submitted: Submitted) -> dict[str, str]:
    headers = {"X-Task-Id": str(submitted.record.task_id)}
    if submitted.is_replay:
        headers["Idempotent-Replay"] = "true"
    return headers


async def _body(request: web.Request, *, seconds: float) -> bytes:
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(reason="The body must be JSON, with Content-Type: application/json")
    try:
        async with asyncio.timeout(seconds):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason=f"The body did not arrive within {seconds:g} s") from None
    except web.RequestPayloadError:
        raise web.HTTPBadRequest(reason="The body is not encoded as its headers say") from None


def _task_id(request: web.Request) -> TaskId:
    task_id = request.match_info["task_id"]
    if not TASK_ID_PATTERN.fullmatch(task_id):
        raise TaskNotFound("There is no task of that ID: an ID has letters, digits, underscores and hyphens only.")
    return TaskId(task_id)


def _invalid(field: str, message: str) -> InvalidRequest:
    return InvalidRequest([FieldError(field, message)])


def _sentence(error: Exception) -> str:
    return error.message if isinstance(error, CcrunError) else type(error).__name__


def _retry_after(error: CcrunError) -> int:
    return error.retry_after if isinstance(error, Busy) else RETRY_AFTER_SECONDS


def _digest(token: str) -> str:
    # Digests have one length, so comparing them tells nothing of the tokens'. A header may hold any bytes.
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()


def _json(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=codec.to_json(value), status=status, headers=headers, content_type="application/json")


def _error(
    status: int, message: str, *, retry_after: int | None = None, headers: Mapping[str, str] | None = None
) -> web.Response:
    extra = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return _json({"error": message}, status=status, headers={**(headers or {}), **extra})

"""The events of a task as an HTTP response."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from typing import Final

from aiohttp import hdrs, web
from aiohttp_sse import EventSourceResponse

from ccrun import codec
from ccrun.api import sse
from ccrun.api.abandoned import AbandonedTasks
from ccrun.api.dependencies import ApiDependencies
from ccrun.api.feed import CaughtUp, FeedReader, Finished, Idle, Lines, StatusChanged
from ccrun.api.responses import check_query, invalid, whole_number
from ccrun.api.sse import Cursor
from ccrun.api.tasks import task_id_of
from ccrun.errors import Busy
from ccrun.task import Status, TaskId, TaskRecord

#: Seconds after which a client should retry when too many streams are open.
STREAM_RETRY_SECONDS: Final = 15
#: Seconds after which a browser reconnects when its connection breaks.
RECONNECT_SECONDS: Final = 1
#: What a client may ask for with `maxLineBytes`: enough for all lines but those with content, to the longest line of a log.
LINE_BYTES_RANGE: Final = (1024, 64 * 1024 * 1024)
#: Bytes. A stream is written in pieces of this size, so that little is buffered for a reader that stalls.
WRITE_BYTES: Final = 256 * 1024


class StreamRoutes:
    """The handlers, and the streams that are open."""

    def __init__(self, deps: ApiDependencies, abandoned: AbandonedTasks) -> None:
        self._deps = deps
        self._abandoned = abandoned
        self._streams: set[asyncio.Task[object]] = set()
        self.is_closing = False

    async def close(self, _: web.Application) -> None:
        """Close all streams. To be called before the server waits for its connections."""
        self.is_closing = True
        for stream in self._streams:
            stream.cancel()

    def check_capacity(self) -> None:
        """Check that another stream may be opened.

        Raises:
            Busy: There are too many.
        """
        if len(self._streams) >= self._deps.max_streams:
            raise Busy(f"{self._deps.max_streams} streams are already open.", retry_after=STREAM_RETRY_SECONDS)

    async def events(self, request: web.Request) -> web.StreamResponse:
        """`GET /tasks/{taskId}/events`: the events of a task, from the start, from now on, or after a cursor."""
        check_query(request, "from", "lastEventId", "heartbeat", "maxLineBytes")
        self.check_capacity()
        task_id = task_id_of(request)
        origin = request.query.get("from", "start")
        if origin not in ("start", "tail"):
            raise invalid("from", "from must be start or tail")
        return await self.resume(request, task_id, start=Cursor() if origin == "start" else None)

    async def resume(
        self, request: web.Request, task_id: TaskId, *, start: Cursor | None, headers: Mapping[str, str] | None = None
    ) -> web.StreamResponse:
        """Stream the events of a task after the one that the client has received last.

        Args:
            start: Where to start if it names none; None for the end of what is stored.
            headers: Additional headers of the response.
        """
        last_id = request.headers.get("Last-Event-ID") or request.query.get("lastEventId")
        if last_id == sse.LAST_ID:
            await self._deps.store.record(task_id)
            # The only status that keeps a browser's EventSource from reconnecting.
            return web.Response(status=204, headers=headers)
        after = sse.parse_cursor(last_id) if last_id else None
        return await self.follow(request, task_id, after=start if after is None else after, headers=headers)

    async def follow(
        self, request: web.Request, task_id: TaskId, *, after: Cursor | None, headers: Mapping[str, str] | None = None
    ) -> web.StreamResponse:
        """Stream the events of a task until it has finished.

        Args:
            after: Where to start; None for the end of what is stored.
            headers: Additional headers of the response.
        """
        ping_seconds, max_line_bytes = self._heartbeat(request), _max_line_bytes(request)
        stream = asyncio.current_task()
        assert stream is not None  # noqa: S101 - a handler always runs in a task
        self._streams.add(stream)
        reader: FeedReader | None = None
        try:
            async with self._deps.feed.follow(task_id, after=after) as reader:
                # aiohttp-sse would send its pings at any time, even in the middle of an event that is written in pieces.
                response = EventSourceResponse(
                    headers=headers,
                    sep="\n",
                    allow_all_methods=True,
                    ping_interval=math.inf,
                    send_timeout=self._deps.timeouts.send,
                )
                # A proxy that compresses would hold events back.
                response.headers["Cache-Control"] = "no-cache, no-transform"
                await response.prepare(request)
                async with response:
                    if request.method != hdrs.METH_HEAD:
                        async for events in self._events(reader, ping_seconds, max_line_bytes):
                            await write_in_pieces(response, events, seconds=self._deps.timeouts.send)
                await response.write_eof()
                return response
        finally:
            self._streams.discard(stream)
            if reader is not None and not self.is_closing:
                self._abandoned.reader_left(reader)

    def _heartbeat(self, request: web.Request) -> int | None:
        """Return the seconds between the `ping` events that a client asks for; None if it asks for none."""
        text = request.query.get("heartbeat")
        if text is None:
            return None
        longest = int(self._deps.timeouts.heartbeat)
        seconds = whole_number(text, 1, longest)
        if seconds is None:
            raise invalid("heartbeat", f"heartbeat must be a whole number of seconds from 1 to {longest}")
        return seconds

    async def _events(
        self, reader: FeedReader, ping_seconds: int | None, max_line_bytes: int | None
    ) -> AsyncIterator[bytes]:
        record = reader.record
        yield sse.retry(RECONNECT_SECONDS) + sse.json_event(
            "task",
            {"taskId": record.task_id, "status": record.status, "logsPath": record.logs_path},
            at=reader.cursor,
        )
        async for item in reader.items(idle_seconds=ping_seconds or self._deps.timeouts.heartbeat):
            match item:
                case Lines():
                    if max_line_bytes is not None and len(item.events) > max_line_bytes:
                        # In a thread, since a line can have many megabytes.
                        path = f"/tasks/{record.task_id}/logs"
                        yield await asyncio.to_thread(sse.cut, item.events, max_line_bytes, path)
                    else:
                        yield item.events
                case CaughtUp():
                    yield sse.json_event("caught_up", {}, at=item.cursor)
                case StatusChanged():
                    data = {"status": item.status, "queuePosition": item.queue_position}
                    yield sse.json_event("status", data, at=item.cursor)
                case Idle():
                    yield sse.HEARTBEAT if ping_seconds is None else sse.json_event("ping", {})
                case Finished():
                    yield _last_events(item.record)


async def write_in_pieces(response: web.StreamResponse, content: bytes | memoryview, *, seconds: float) -> None:
    """Write in pieces, each with a timeout, so that a reader that stalls holds little memory and is disconnected."""
    view = memoryview(content)
    for start in range(0, len(view), WRITE_BYTES):
        async with asyncio.timeout(seconds):
            await response.write(view[start : start + WRITE_BYTES])


def _max_line_bytes(request: web.Request) -> int | None:
    """Return the length above which lines are cut; None if the client wants them whole."""
    text = request.query.get("maxLineBytes")
    if text is None:
        return None
    least, most = LINE_BYTES_RANGE
    length = whole_number(text, least, most)
    if length is None:
        raise invalid("maxLineBytes", f"maxLineBytes must be a whole number from {least} to {most}")
    return length


def _last_events(record: TaskRecord) -> bytes:
    first = b""
    if record.status is Status.FAILED:
        first = sse.json_event("error", {"error": record.error, "exitCode": record.exit_code})
    elif record.status is Status.CANCELLED:
        first = sse.json_event("cancelled", {"taskId": record.task_id})
    return first + sse.event("done", codec.callback_body(record), event_id=sse.LAST_ID)

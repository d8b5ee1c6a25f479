"""The connection of a client: how long it may take for a request, and when it is closed.

The head of a request must arrive soon after its first byte, so that many incomplete requests do not occupy the connections.

A client may close its side of the connection and wait for the response. asyncio closes a connection when the client sends its
end, before the response is written. A client that half-closes, as `nc -N` does, would start a task and not learn its ID. An
open event stream still ends then, because a client that has left closes its side too; and so does a request whose body is
incomplete.
"""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler
from aiohttp_sse import EventSourceResponse

#: Seconds for the head of a request after its first byte. A slow mobile connection needs one or two.
HEAD_SECONDS: Final = 10.0
#: Seconds that a request which arrived just before the end of its connection has to reach its handler.
START_SECONDS: Final = 1.0


class Connection(asyncio.Protocol):
    """A connection with a limit on the time for the head of a request.

    It stays open until the response is written, though the client has closed its side.

    Args:
        head_seconds: That limit.
        inner: The protocol of aiohttp's server, which ignores the client's end. `track_request` must be a middleware of its
            app, and `note_stream` a handler of its `on_response_prepare`.
    """

    #: The request that is handled now.
    request: web.Request | None = None
    #: Whether its response is an event stream that has begun.
    is_streaming = False
    #: Whether the client has closed its side.
    is_half_closed = False

    def __init__(self, inner: asyncio.Protocol, *, head_seconds: float = HEAD_SECONDS) -> None:
        self._inner = inner
        self._head_seconds = head_seconds
        self._transport: asyncio.Transport | None = None
        #: Closes the connection unless a request begins.
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - connections are TCP
        self._transport = transport
        self._inner.connection_made(transport)

    def eof_received(self) -> bool:
        self._inner.eof_received()
        if self.request is not None and (self.is_streaming or not self._has_request):
            return False
        self.is_half_closed = True
        asyncio.get_running_loop().call_later(START_SECONDS, self._close_unused)
        return True

    def _close_unused(self) -> None:
        if self._transport is not None and not self._has_request:
            self._transport.close()

    @property
    def _has_request(self) -> bool:
        return self.request is not None and self.request.content.is_eof()

    def data_received(self, data: bytes) -> None:
        if self.request is None and self._head_timer is None and self._transport is not None:
            self._head_timer = asyncio.get_running_loop().call_later(self._head_seconds, self._transport.close)
        self._inner.data_received(data)

    def begin(self, request: web.Request) -> None:
        """Note that the head of a request has arrived."""
        self.request = request
        self._stop_head_timer()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._inner.connection_lost(exc)


@web.middleware
async def track_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Tell the connection which request is handled. Close a half-closed one after the response."""
    connection = _connection_of(request)
    if connection is None:
        return await handler(request)
    connection.begin(request)
    try:
        response = await handler(request)
    finally:
        connection.request, connection.is_streaming = None, False
    if connection.is_half_closed:
        response.force_close()
    return response


async def note_stream(request: web.Request, response: web.StreamResponse) -> None:
    """Tell the connection that an event stream begins."""
    connection = _connection_of(request)
    if connection is not None and isinstance(response, EventSourceResponse):
        connection.is_streaming = True


def _connection_of(request: web.Request) -> Connection | None:
    protocol = None if request.transport is None else request.transport.get_protocol()
    return protocol if isinstance(protocol, Connection) else None

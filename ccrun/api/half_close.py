"""Clients that close their side of the connection and wait for the response.

asyncio closes a connection when the client sends its end, before the response is written. A client that half-closes, as
`nc -N` does, would start a task and not learn its ID.
"""

from __future__ import annotations

import asyncio
from typing import Final
from weakref import WeakKeyDictionary, WeakSet

from aiohttp import web
from aiohttp.typedefs import Handler
from aiohttp_sse import EventSourceResponse

#: Seconds that a request which arrived just before the end of its connection has to reach its handler.
START_SECONDS: Final = 1.0


class HalfClose:
    """Keeps half-closed connections of an app open until the response is written.

    An event stream ends when the client closes its side, because a client that has left does the same. So does a request
    whose body is incomplete.

    Args:
        app: The app, which must not be set up yet.
    """

    def __init__(self, app: web.Application) -> None:
        self._requests: WeakKeyDictionary[asyncio.BaseTransport, web.Request] = WeakKeyDictionary()
        self._streaming: WeakSet[asyncio.BaseTransport] = WeakSet()
        self._half_closed: WeakSet[asyncio.BaseTransport] = WeakSet()
        app.middlewares.insert(0, self._track)
        app.on_response_prepare.append(self._note_stream)

    def protocol(self, server: web.Server) -> asyncio.Protocol:
        """Return the protocol of a new connection."""
        return _Protocol(server(), self)

    def keeps_open(self, transport: asyncio.Transport) -> bool:
        """Return whether the connection stays open, now that the client has closed its side."""
        if transport in self._requests and (transport in self._streaming or not self._is_received(transport)):
            return False
        self._half_closed.add(transport)
        asyncio.get_running_loop().call_later(START_SECONDS, self._close_unused, transport)
        return True

    def _close_unused(self, transport: asyncio.Transport) -> None:
        if not self._is_received(transport):
            transport.close()

    def _is_received(self, transport: asyncio.Transport) -> bool:
        request = self._requests.get(transport)
        return request is not None and request.content.is_eof()

    async def _note_stream(self, request: web.Request, response: web.StreamResponse) -> None:
        if isinstance(response, EventSourceResponse) and request.transport is not None:
            self._streaming.add(request.transport)

    @web.middleware
    async def _track(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        transport = request.transport
        if transport is None:
            return await handler(request)
        self._requests[transport] = request
        try:
            response = await handler(request)
        finally:
            del self._requests[transport]
            self._streaming.discard(transport)
        if transport in self._half_closed:
            response.force_close()
        return response


class _Protocol(asyncio.Protocol):
    # aiohttp's protocol ignores the client's end, and asyncio then closes the connection.

    def __init__(self, inner: asyncio.Protocol, half_close: HalfClose) -> None:
        self._inner = inner
        self._half_close = half_close
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - connections are TCP
        self._transport = transport
        self._inner.connection_made(transport)

    def eof_received(self) -> bool:
        self._inner.eof_received()
        return self._transport is not None and self._half_close.keeps_open(self._transport)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)

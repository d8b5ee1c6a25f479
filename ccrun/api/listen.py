"""Accepting connections, with a limit on how many are open.

asyncio's own server accepts all that wait, however few files may be open, and reports each failure once for each place in its
backlog.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator
from typing import Final

import structlog
from aiohttp import web

from ccrun.api.connection import HEAD_SECONDS, Connection, note_stream, track_request
from ccrun.errors import CcrunError

log = structlog.get_logger()

#: Connections that wait to be accepted, for bursts of clients.
BACKLOG: Final = 1024
#: Seconds between two checks for a free connection, while the maximum number is open.
FULL_POLL_SECONDS: Final = 0.02
#: Seconds before accepting is retried after an error of the system.
ERROR_DELAY_SECONDS: Final = 1.0
#: Seconds between two log lines about connections that have to wait.
LOG_SECONDS: Final = 60.0


class Listener:
    """Accepts connections for an app.

    At the maximum, further connections wait. From half of it on, a connection is closed after its response, so that idle ones
    leave room for others.

    Args:
        app: The app, which must not be set up yet.
        max_connections: The maximum number of open connections.
        head_seconds: The time for the head of a request after its first byte.
    """

    def __init__(self, app: web.Application, *, max_connections: int, head_seconds: float = HEAD_SECONDS) -> None:
        self._max_connections = max_connections
        self._head_seconds = head_seconds
        self._server: web.Server | None = None
        app.middlewares.insert(0, track_request)
        app.on_response_prepare.extend((note_stream, self._close_when_busy))

    @contextlib.asynccontextmanager
    async def listening(self, server: web.Server, host: str, port: int) -> AsyncIterator[int]:
        """Accept connections while the context is open. Yield the port.

        Raises:
            CcrunError: The address cannot be used.
        """
        self._server = server
        with contextlib.ExitStack() as stack:
            try:
                sockets = [stack.enter_context(sock) for sock in await _bind(host, port)]
            except OSError as error:
                raise CcrunError(f"ccrun cannot start: {_reason(error, host, port)}.") from None
            accepting = [asyncio.create_task(self._accept(sock, server)) for sock in sockets]
            try:
                yield int(sockets[0].getsockname()[1])
            finally:
                for task in accepting:
                    task.cancel()
                await asyncio.gather(*accepting, return_exceptions=True)

    async def _accept(self, sock: socket.socket, server: web.Server) -> None:
        loop = asyncio.get_running_loop()
        next_log = 0.0
        while True:
            delay = FULL_POLL_SECONDS
            if len(server.connections) < self._max_connections:
                try:
                    connection, _ = await loop.sock_accept(sock)
                    await loop.connect_accepted_socket(
                        lambda: Connection(server(), head_seconds=self._head_seconds), connection
                    )
                    continue
                except ConnectionError:
                    # The client has left.
                    continue
                except OSError:
                    delay = ERROR_DELAY_SECONDS
            if loop.time() >= next_log:
                next_log = loop.time() + LOG_SECONDS
                log.warning(
                    "connections_waiting",
                    message="Too many connections are open; others wait",
                    limit=self._max_connections,
                )
            await asyncio.sleep(delay)

    async def _close_when_busy(self, _: web.Request, response: web.StreamResponse) -> None:
        if self._server is not None and len(self._server.connections) > self._max_connections // 2:
            response.force_close()


async def _bind(host: str, port: int) -> list[socket.socket]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets = []
    for family, _, _, _, address in dict.fromkeys(found):
        sockets.append(socket.create_server(address[:2], family=family, backlog=BACKLOG))
        sockets[-1].setblocking(False)
    return sockets


def _reason(error: OSError, host: str, port: int) -> str:
    where = f"port {port} on {host}"
    match error.errno:
        case errno.EADDRINUSE:
            return f"{where} is in use: stop what listens there, or set PORT to a free one"
        case errno.EACCES:
            return f"{where} may not be used by this user: set PORT to one above 1023"
        case _:
            return f"{where} cannot be listened on ({error.strerror}): set HOST to an address of this machine"

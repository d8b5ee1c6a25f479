"""The HTTP proxy through which an agent in a sandbox reaches other servers, and what it may not reach.

It connects to public addresses only, checked on the address of each connection, and to private ones that the operator allows.
Written here because the proxies that are kept up as libraries check names, not the addresses that they resolve to. See
CONNECT and the absolute form in RFC 9110, section 9.3.6, and RFC 9112, section 3.2.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator
from typing import Final
from urllib.parse import urlsplit

import attrs
import structlog

from ccrun.callbacks.guard import is_public
from ccrun.egress import Egress

log = structlog.get_logger()

#: The port in the sandbox. Outside of the range from which the system chooses ports for programs (32768-60999).
PORT: Final = 61080
#: Bytes of the head of a request.
MAX_HEAD_BYTES: Final = 64 * 1024
#: Seconds for the head of a request.
HEAD_SECONDS: Final = 10.0
#: Seconds for a connection to a server, with the resolution of its name.
CONNECT_SECONDS: Final = 30.0
#: Seconds without a byte in either direction after which a connection is closed.
IDLE_SECONDS: Final = 600.0
#: Connections of a task. Others wait.
MAX_CONNECTIONS: Final = 256
#: Bytes that are forwarded at once.
READ_BYTES: Final = 64 * 1024
#: Hosts that are remembered as refused.
MAX_REFUSED: Final = 50
#: Characters of a host that are remembered.
MAX_HOST_CHARS: Final = 260

_REQUEST_LINE: Final = re.compile(rb"([A-Z][A-Z-]*) (\S+) HTTP/1\.[01]")
#: The headers that concern one connection.
_NOT_FORWARDED: Final = re.compile(rb"(?i)(connection|keep-alive|proxy-[a-z-]+):")


@attrs.frozen(kw_only=True)
class HostPolicy:
    """Which hosts an agent may reach.

    Args:
        allowed: Lists of names, or `*.example.com` for all below one; a host must be in each of them. Without a list, all are.
        private: Names and addresses that may have an address that is not public.
    """

    allowed: tuple[frozenset[str], ...] = ()
    private: frozenset[str] = frozenset()

    def allows(self, host: str) -> bool:
        """Return whether a host may be reached at a public address."""
        return self.allows_private(host) or all(_matches(host, names) for names in self.allowed)

    def allows_private(self, host: str) -> bool:
        """Return whether a host may be reached at any address."""
        return _matches(host, self.private)


def _matches(host: str, names: frozenset[str]) -> bool:
    return any(host.endswith(name[1:]) if name.startswith("*.") else host == name for name in names)


class _Refused(Exception):
    """A request that is answered with this status and this text."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class EgressProxy:
    """The proxy of one task.

    Args:
        policy: What the agent may reach.
        egress: The operator's proxy for the agent, if there is one: connections then go through it.
    """

    def __init__(self, policy: HostPolicy, egress: Egress) -> None:
        #: Hosts, with their ports, to which connections were refused.
        self.refused: dict[str, None] = {}
        self._policy = policy
        self._egress = egress
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)

    @contextlib.asynccontextmanager
    async def serve(self, listener: socket.socket) -> AsyncIterator[None]:
        """Serve the connections of a listener while the context is open."""
        connections: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._connection(reader, writer))
            connections.add(task)
            task.add_done_callback(connections.discard)

        server = await asyncio.start_server(accept, sock=listener, limit=MAX_HEAD_BYTES)
        try:
            yield
        finally:
            server.close()
            for task in connections:
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._free:
            try:
                await self._request(reader, writer)
            except _Refused as refused:
                body = f"{refused.text}\n".encode()
                head = f"HTTP/1.1 {refused.status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
                writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
                with contextlib.suppress(OSError):
                    await writer.drain()
            except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                pass
            finally:
                writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(HEAD_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
        line, *headers = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        match = _REQUEST_LINE.fullmatch(line)
        if match is None:
            raise _Refused("400 Bad Request", "This is a proxy: it takes CONNECT requests and absolute http URLs.")
        method, target = match[1].decode(), match[2].decode("latin-1")
        host, port, path = _destination(method, target)
        scheme = "https" if method == "CONNECT" else "http"
        server_reader, server_writer, forwarded = await self._connect(scheme, host, port)
        try:
            if method == "CONNECT":
                if forwarded:
                    await _connect_through(server_reader, server_writer, host, port)
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                # One request for each connection: a second one could name another host.
                kept = [header for header in headers if not _NOT_FORWARDED.match(header)]
                first = f"{method} {target if forwarded else path} HTTP/1.1".encode("latin-1")
                server_writer.write(b"\r\n".join([first, *kept, b"Connection: close", b"", b""]))
            await _forward((reader, server_writer), (server_reader, writer))
        finally:
            server_writer.close()

    async def _connect(
        self, scheme: str, host: str, port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bool]:
        """Return a connection to a server, and whether it is one to the operator's proxy instead."""
        if not self._policy.allows(host):
            raise self._refusal(host, port, "it is not among the hosts that this task may reach")
        proxy = self._egress.agent_proxy_for(f"{scheme}://{_bracketed(host)}:{port}")
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                if proxy is not None:
                    self._check_literal(host, port)
                    parts = urlsplit(proxy)
                    return *await asyncio.open_connection(parts.hostname, parts.port or 80), True
                return *await self._connect_directly(host, port), False
        except TimeoutError:
            raise _Refused("504 Gateway Timeout", f"{host} did not respond in time.") from None
        except OSError as error:
            raise _Refused("502 Bad Gateway", f"{host} cannot be reached ({type(error).__name__}).") from None

    async def _connect_directly(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        allowed = [address for address in addresses if self._policy.allows_private(host) or is_public(address)]
        if not allowed:
            raise self._refusal(host, port, "it has no public address")
        failure: OSError = OSError()
        for address in allowed:
            try:
                return await asyncio.open_connection(address, port)
            except OSError as error:
                failure = error
        raise failure

    def _check_literal(self, host: str, port: int) -> None:
        # The operator's proxy resolves names, so only addresses can be checked here, in any form that a system reads.
        with contextlib.suppress(OSError):
            address = socket.inet_ntoa(socket.inet_aton(host)) if ":" not in host else host
            if not is_public(address) and not self._policy.allows_private(host):
                raise self._refusal(host, port, "it is no public address")

    def _refusal(self, host: str, port: int, reason: str) -> _Refused:
        if len(self.refused) < MAX_REFUSED:
            self.refused.setdefault(f"{host if len(host) <= MAX_HOST_CHARS else f'{host[:MAX_HOST_CHARS]}…'}:{port}")
        return _Refused("403 Forbidden", f"The agent may not reach {host}: {reason}.")


def _destination(method: str, target: str) -> tuple[str, int, str]:
    """Return host, port and path of a request."""
    try:
        parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
        port = parts.port
        host = (parts.hostname or "").rstrip(".")
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    is_complete = port is not None and not parts.path if method == "CONNECT" else parts.scheme == "http"
    if not host or not host.isascii() or not is_complete:
        raise _Refused("400 Bad Request", "The request names no host that this proxy can reach.")
    path = target.partition("//")[2]
    return host, port or 80, path[path.index("/") :] if "/" in path else "/"


async def _connect_through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
    """Open a tunnel through the operator's proxy."""
    name = f"{_bracketed(host)}:{port}"
    writer.write(f"CONNECT {name} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
    async with asyncio.timeout(CONNECT_SECONDS):
        head = await reader.readuntil(b"\r\n\r\n")
    if not re.match(rb"HTTP/1\.[01] 2\d\d\b", head):
        raise _Refused("502 Bad Gateway", f"The proxy of the operator did not connect to {host}.")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _forward(*directions: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
    """Copy bytes in both directions until both have ended, or none has moved for `IDLE_SECONDS`."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(IDLE_SECONDS) as idle:

        async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(READ_BYTES):
                idle.reschedule(loop.time() + IDLE_SECONDS)
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()

        try:
            async with asyncio.TaskGroup() as group:
                for direction in directions:
                    group.create_task(copy(*direction))
        except* OSError:
            # One of the two has left, which ends the connection.
            pass

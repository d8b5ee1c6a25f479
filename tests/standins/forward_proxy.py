"""A stand-in for a company's HTTP proxy: forwards requests and CONNECT tunnels of any host to servers on loopback."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Mapping
from typing import Self
from urllib.parse import urlsplit

#: Bytes of one read.
CHUNK_BYTES = 64 * 1024


class ForwardProxy:
    """The proxy.

    Args:
        ports: The ports on loopback to which hosts lead, by name. Other hosts get 502.
        credential: `user:password` that each request must have.
    """

    def __init__(self, ports: Mapping[str, int], *, credential: str | None = None) -> None:
        self._ports = ports
        self._credential = credential
        #: The request lines that the proxy got.
        self.requests: list[str] = []
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        user = f"{self._credential}@" if self._credential else ""
        self.url = f"http://{user}127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()

    @property
    def hosts(self) -> set[str]:
        """The hosts that were asked for."""
        targets = (line.split()[1] for line in self.requests)
        return {urlsplit(target if "://" in target else f"//{target}").hostname or "" for target in targets}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await self._handle(reader, writer)
        writer.close()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        line, _, rest = head.decode("latin-1").partition("\r\n")
        self.requests.append(line)
        method, target, version = line.split(" ")
        wanted = base64.b64encode((self._credential or "").encode()).decode()
        if self._credential and f"Basic {wanted}" not in rest:
            writer.write(
                b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=proxy\r\n"
                b"Connection: close\r\nContent-Length: 0\r\n\r\n"
            )
            return
        parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
        port = self._ports.get(parts.hostname or "")
        if port is None:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        else:
            path = parts._replace(scheme="", netloc="").geturl() or "/"
            # One request for each connection, so that no later one passes unseen.
            kept = [field for field in rest.split("\r\n") if not field.lower().startswith(("connection:", "proxy-"))]
            fields = "\r\n".join(kept).strip()
            upstream_writer.write(
                f"{method} {path} {version}\r\nConnection: close\r\n{fields}\r\n\r\n".encode("latin-1")
            )
        await asyncio.gather(copy(reader, upstream_writer), copy(upstream_reader, writer))


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy all bytes from one connection to another, and close that."""
    with contextlib.suppress(OSError):
        while chunk := await reader.read(CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
    writer.close()

"""Receivers of callbacks on loopback, and deliveries to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

import attrs
from aiohttp import web
from aiohttp.test_utils import TestServer

from ccrun.callbacks.deliver import Delivery, RetryPolicy, deliver
from ccrun.callbacks.guard import CallbackGuard
from ccrun.callbacks.oidc import IdentityTokens
from ccrun.task import Secret

SECRET = Secret("made-up secret, ünïcödé")

BODY = b'{"taskId":"t-1","status":"completed"}'

EVERYWHERE = CallbackGuard(everywhere=True)

PUBLIC_ONLY = CallbackGuard()

QUICK = RetryPolicy(attempt_seconds=5, attempts=4, total_seconds=20, first_delay_seconds=0.01)


async def send(
    url: str,
    body: bytes = BODY,
    guard: CallbackGuard = EVERYWHERE,
    policy: RetryPolicy = QUICK,
    tokens: IdentityTokens | None = None,
) -> Delivery:
    """Deliver a callback with short delays, by default to any address."""
    return await deliver(
        Secret(url), body, webhook_id="msg-t-1", secret=SECRET, guard=guard, tokens=tokens, policy=policy
    )


Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


@attrs.define
class ScriptedReceiver:
    """Sends the responses of a script, and the last one to all later requests. Records the requests."""

    script: list[Handler]
    requests: list[tuple[dict[str, str], bytes]] = attrs.field(factory=list)
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Respond to one request."""
        self.requests.append(({name.lower(): value for name, value in request.headers.items()}, await request.read()))
        return await self.script[min(len(self.requests), len(self.script)) - 1](request)


def respond(status: int, **headers: str) -> Handler:
    """Return a handler that responds with this status and these headers."""

    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return handle


@asynccontextmanager
async def receiver(*script: Handler) -> AsyncIterator[ScriptedReceiver]:
    """Start a receiver on loopback."""
    scripted = ScriptedReceiver(list(script))
    app = web.Application(client_max_size=64 * 1024**2)
    app.router.add_route("*", "/{path:.*}", scripted.handle)
    async with TestServer(app) as server:
        scripted.url = str(server.make_url("/hook"))
        yield scripted


Connection: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw_receiver(serve: Connection) -> AsyncIterator[str]:
    """Start a TCP server on loopback, which need not use HTTP; yield its URL."""
    connections: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            with contextlib.suppress(ConnectionError, EOFError):
                await serve(reader, writer)
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
        for connection in connections:
            connection.cancel()
        await asyncio.wait(connections)

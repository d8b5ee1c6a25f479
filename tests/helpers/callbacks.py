"""Receivers of callbacks on loopback, and deliveries to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import attrs
from aiohttp import web
from aiohttp.test_utils import TestServer

from ccrun.callbacks.deliver import Delivery, RetryPolicy, deliver
from ccrun.callbacks.guard import CallbackGuard
from ccrun.task import Secret

SECRET = Secret("made-up secret, ünïcödé")

BODY = b'{"taskId":"t-1","status":"completed"}'

EVERYWHERE = CallbackGuard(everywhere=True)

PUBLIC_ONLY = CallbackGuard()

QUICK = RetryPolicy(attempt_seconds=5, attempts=4, total_seconds=20, first_delay_seconds=0.01)


async def send(
    url: str, body: bytes = BODY, guard: CallbackGuard = EVERYWHERE, policy: RetryPolicy = QUICK
) -> Delivery:
    """Deliver as the tests commonly do: quickly, and to loopback too."""
    return await deliver(Secret(url), body, webhook_id="msg-t-1", secret=SECRET, guard=guard, policy=policy)


@attrs.define
class Receiver:
    """Answers as a script says, its last line for ever, and keeps what it got."""

    script: list[Callable[[web.Request], Awaitable[web.StreamResponse]]]
    got: list[tuple[dict[str, str], bytes]] = attrs.field(factory=list)
    url: str = ""

    async def take(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        self.got.append(({name.lower(): value for name, value in request.headers.items()}, await request.read()))
        return await self.script[min(len(self.got), len(self.script)) - 1](request)


def answer(status: int, **headers: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return a line of a script."""

    async def give(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return give


@asynccontextmanager
async def receiver(*script: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[Receiver]:
    """A receiver on loopback."""
    scripted = Receiver(list(script))
    app = web.Application(client_max_size=64 * 1024**2)
    app.router.add_route("*", "/{path:.*}", scripted.take)
    async with TestServer(app) as server:
        scripted.url = str(server.make_url("/hook"))
        yield scripted


Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw_receiver(converse: Conversation) -> AsyncIterator[str]:
    """A receiver on loopback that need not speak HTTP; its URL."""
    conversations: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        conversations.add(task)
        try:
            with contextlib.suppress(ConnectionError, EOFError):
                await converse(reader, writer)
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
        for conversation in conversations:
            conversation.cancel()
        await asyncio.wait(conversations)

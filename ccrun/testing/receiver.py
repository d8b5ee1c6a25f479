"""A receiver of callbacks on loopback. It verifies signatures as a user's program would.

It does not use `ccrun.callbacks.sign`: a mistake in shared code would not show.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

import attrs
from aiohttp import web

from ccrun.task import Secret

#: An older callback may be a recorded one that is sent again.
MAX_AGE_SECONDS: Final = 300
#: A callback has some KB; its largest parts, `metadata` and `result`, have at most 64 KiB each.
MAX_BODY_BYTES: Final = 4 * 1024 * 1024
#: Seconds that responses may take when the receiver stops.
STOP_SECONDS: Final = 0.1


class InvalidCallback(Exception):
    """A callback whose signature is wrong or old."""


@attrs.frozen(kw_only=True)
class ReceivedCallback:
    """A callback as it was received."""

    headers: Mapping[str, str]
    body: bytes


def verify(callback: ReceivedCallback, *, secret: Secret, now: float) -> float:
    """Return the age of a callback in seconds, if its signature is valid and recent.

    The signature covers the raw bytes, so it is verified before they are parsed.

    Args:
        now: Unix time in seconds.

    Raises:
        InvalidCallback: It is not.
    """
    # As bytes, since a header may hold anything.
    timestamp, signature = (
        callback.headers.get(name, "").encode(errors="surrogateescape")
        for name in ("X-Webhook-Timestamp", "X-Webhook-Signature")
    )
    signed = hmac.new(secret.reveal().encode(), timestamp + b"." + callback.body, hashlib.sha256)
    if not hmac.compare_digest(b"sha256=" + signed.hexdigest().encode(), signature):
        raise InvalidCallback("X-Webhook-Signature does not fit the body")
    age = now - int(timestamp)
    if abs(age) > MAX_AGE_SECONDS:
        raise InvalidCallback(f"X-Webhook-Timestamp is {age:.0f} s old")
    return age


class Receiver:
    """Receives callbacks on a free port of 127.0.0.1 while its context is open. Responds with 401 to invalid ones."""

    def __init__(self, secret: Secret) -> None:
        self._secret = secret
        self._first: asyncio.Future[ReceivedCallback] = asyncio.get_running_loop().create_future()
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/callback", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_SECONDS)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        """The callback URL."""
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/callback"

    async def first(self) -> ReceivedCallback:
        """Return the first valid callback, as soon as it has arrived."""
        return await asyncio.shield(self._first)

    async def _take(self, request: web.Request) -> web.Response:
        callback = ReceivedCallback(headers=request.headers, body=await request.read())
        try:
            verify(callback, secret=self._secret, now=time.time())
        except InvalidCallback as error:
            return web.json_response({"error": f"{error}."}, status=401)
        if not self._first.done():
            self._first.set_result(callback)
        return web.json_response({"received": True})

"""A receiver of callbacks on loopback, as a user would write one: it trusts nothing but the signature.

It uses nothing of `ccrun.callbacks.sign`, which signs: two that share a mistake would agree with each other.
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

#: An older signature may be one that somebody has recorded and sends again.
MAX_AGE_SECONDS: Final = 300
#: A callback is a few KB; `metadata` and `result`, the parts without a size of their own, have at most 64 KiB each.
MAX_BODY_BYTES: Final = 4 * 1024 * 1024
#: How long an answer that is under way may take when the receiver is told to stop.
STOP_SECONDS: Final = 0.1


class InvalidCallback(Exception):
    """A callback that must not be believed; says why."""


@attrs.frozen(kw_only=True)
class ReceivedCallback:
    """A callback as it came in."""

    headers: Mapping[str, str]
    body: bytes


def verify(callback: ReceivedCallback, *, secret: Secret, now: float) -> float:
    """Return the age of a callback in seconds, if it is from ccrun and fresh.

    The signature covers the bytes as they were sent, so it is checked before anything is parsed.

    Args:
        now: Unix time in seconds.

    Raises:
        NotGenuine: It is not.
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
    """Takes callbacks on a free port of 127.0.0.1 for as long as the context lasts; answers 401 to what is not genuine."""

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
        """Where callbacks go."""
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/callback"

    async def first(self) -> ReceivedCallback:
        """Wait for the first genuine callback."""
        return await asyncio.shield(self._first)

    async def _take(self, request: web.Request) -> web.Response:
        callback = ReceivedCallback(headers=request.headers, body=await request.read())
        try:
            verify(callback, secret=self._secret, now=time.time())
        except InvalidCallback as fault:
            return web.json_response({"error": f"{fault}."}, status=401)
        if not self._first.done():
            self._first.set_result(callback)
        return web.json_response({"received": True})

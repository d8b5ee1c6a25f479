"""How the commands call a service, and how signals stop them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Final

import aiohttp

from ccrun.errors import CcrunError

#: Seconds for the response to a request that starts nothing.
RESPONSE_SECONDS: Final = 10.0


class DemoFailed(CcrunError):
    """The service did not do what it should."""


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[list[int]]:
    """Cancel the current task on SIGTERM and SIGHUP, as Ctrl-C does. Yield the list of signals that were received."""
    received: list[int] = []
    loop, current = asyncio.get_running_loop(), asyncio.current_task()
    assert current is not None  # noqa: S101 - a coroutine runs in a task

    def cancel(number: int) -> None:
        received.append(number)
        current.cancel()

    numbers = (signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, cancel, number)
    try:
        yield received
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def check_response(response: aiohttp.ClientResponse) -> None:
    """Check that a request was successful.

    Raises:
        DemoFailed: It was not; the message has the body of the response.
    """
    if not response.ok:
        raise DemoFailed(f"The service responded with {response.status}: {await response.text()}")


def check_completed(payload: Mapping[str, Any]) -> None:
    """Check that a task has completed, by its `done` event, its callback or its record.

    Raises:
        DemoFailed: It has not.
    """
    if payload.get("status") != "completed":
        raise DemoFailed(payload.get("error") or "The stream ended before the task had finished.")


async def record_of(client: aiohttp.ClientSession, task_id: str) -> dict[str, Any]:
    """Return the record of a task."""
    timeout = aiohttp.ClientTimeout(total=RESPONSE_SECONDS)
    async with client.get(f"/tasks/{task_id}", timeout=timeout) as response:
        await check_response(response)
        record: dict[str, Any] = await response.json()
        return record


@contextlib.asynccontextmanager
async def cancelled_on_failure(client: aiohttp.ClientSession, task_id: str) -> AsyncIterator[None]:
    """Cancel the task when the command fails: its worker would keep running where the system has no subreapers."""
    try:
        yield
    except BaseException:
        timeout = aiohttp.ClientTimeout(total=RESPONSE_SECONDS)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with client.post(f"/cancel/{task_id}", timeout=timeout):
                pass
        raise


async def events_of(content: aiohttp.StreamReader) -> AsyncIterator[tuple[str, Any]]:
    """Yield the name and the data of each event of a stream.

    Implemented here because aiohttp has no client for server-sent events, and libraries for them reconnect, which the commands
    do not want.
    """
    buffer = bytearray()
    async for piece in content.iter_any():
        buffer += piece
        *frames, buffer = buffer.split(b"\n\n")
        for frame in frames:
            fields = dict(line.split(": ", 1) for line in frame.decode().split("\n") if ": " in line)
            if "data" in fields:
                yield fields.get("event", "message"), json.loads(fields["data"])

"""A service as the demo and the checks see it: started as a child in a folder of its own, asked over HTTP.

All that is started here is ended when its context is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import attrs

from ccrun import config
from ccrun.claude_cli import find_cli
from ccrun.errors import CcrunError
from ccrun.process.child import Child, spawn
from ccrun.task import Secret
from ccrun.testing.model import Script, ScriptedModel

#: What the service gets of the environment: no setting of the user's own but what leads to the CLI and the model.
PASSED_VARIABLES: Final = (
    *("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "CLAUDE_CLI"),
    *("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_BASE_URL"),
)
#: Seconds. The service starts within one; a machine that is busy, or that imports everything for the first time, takes longer.
START_SECONDS: Final = 60.0
#: Seconds that the service has to answer a question that starts nothing.
ANSWER_SECONDS: Final = 10.0
CALLBACK_SECRET_BYTES: Final = 32
#: What the service complained about last is shown when the demo fails.
MAX_WARNINGS: Final = 5


class DemoFailed(CcrunError):
    """The demo did not go as it should."""


# --- what is started ---------------------------------------------------------------------------------------------------


async def environment_with_model(stack: contextlib.AsyncExitStack, script: Script) -> tuple[dict[str, str], bool]:
    """Return what a service gets of the environment, and whether a real model answers; else the script does."""
    given = config.environment()
    environment = {name: given[name] for name in PASSED_VARIABLES if given.get(name, "").strip()}
    # What is missing is told before anything is started.
    await asyncio.to_thread(find_cli, environment.get("CLAUDE_CLI"), environment.get("PATH", os.defpath))
    if config.load(environment).operator_has_credential:
        return environment, True
    model = await stack.enter_async_context(ScriptedModel(script))
    return {**environment, "ANTHROPIC_API_KEY": "made-up-key", "ANTHROPIC_BASE_URL": model.url}, False


@attrs.frozen(kw_only=True)
class Service:
    """The service as it runs. `complaints` are its latest warnings and errors."""

    url: str
    callback_secret: Secret
    complaints: deque[str]


@contextlib.asynccontextmanager
async def running_service(environment: Mapping[str, str], folder: Path) -> AsyncIterator[Service]:
    """Run `ccrun serve` in that folder, and end it with all that it has started."""
    temporary = folder / "tmp"
    callback_secret = Secret(secrets.token_hex(CALLBACK_SECRET_BYTES))
    await asyncio.to_thread(temporary.mkdir)
    environment = {
        **environment,
        "HOME": str(folder),
        "TMPDIR": str(temporary),
        "CCRUN_BACKEND": "local",
        "CCRUN_DATA_DIR": str(folder / "data"),
        "CLOUDRUN_CALLBACK_SECRET": callback_secret.reveal(),
        "HOST": "127.0.0.1",
        "PORT": "0",
        "LOG_FORMAT": "json",
        # So that what is shown is as fluent as the agent.
        "FLUSH_SECONDS": "0.1",
    }
    # -P: what lies in the folder where it starts is not imported.
    async with spawn((sys.executable, "-P", "-m", "ccrun", "serve"), env=environment, cwd=folder) as child:
        complaints: deque[str] = deque(maxlen=MAX_WARNINGS)
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        # It is read to the end: a log that nobody reads would hold up the service.
        reading = asyncio.create_task(_read_log(child, address, complaints))
        try:
            waited: set[asyncio.Future[Any]] = {address, reading}
            await asyncio.wait(waited, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not address.done():
                said = child.stderr_tail.decode(errors="replace").strip() or "it said nothing about why"
                raise DemoFailed(f"The service did not start: {said}")
            yield Service(url=address.result(), callback_secret=callback_secret, complaints=complaints)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


async def _read_log(child: Child, address: asyncio.Future[str], complaints: deque[str]) -> None:
    async for line in child.lines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("event") == "service_listening" and not address.done():
            address.set_result(entry["url"])
        elif entry.get("severity") not in ("DEBUG", "INFO"):
            complaints.append(f"{entry.get('message')}: {entry.get('error', '')}")


@contextlib.asynccontextmanager
async def temporary_folder() -> AsyncIterator[Path]:
    """Make a folder, and remove it with all that is in it."""
    folder = tempfile.TemporaryDirectory(prefix="ccrun-demo-", ignore_cleanup_errors=True)
    try:
        yield Path(folder.name)
    finally:
        await asyncio.shield(asyncio.to_thread(folder.cleanup))


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[list[int]]:
    """Have SIGTERM and SIGHUP break off the demo as Ctrl-C does; gives the signals that came."""
    came: list[int] = []
    loop, demo = asyncio.get_running_loop(), asyncio.current_task()
    assert demo is not None  # noqa: S101 - a coroutine runs in a task

    def break_off(number: int) -> None:
        came.append(number)
        demo.cancel()

    numbers = (signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, break_off, number)
    try:
        yield came
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


# --- what is asked -----------------------------------------------------------------------------------------------------


async def check(answer: aiohttp.ClientResponse) -> None:
    """See to it that the service did what it was asked.

    Raises:
        DemoFailed: It did not, with what it said.
    """
    if not answer.ok:
        raise DemoFailed(f"The service answered {answer.status}: {await answer.text()}")


def check_completed(payload: Mapping[str, Any]) -> None:
    """See to it that a task went well, by the last event of its stream, its callback or its record.

    Raises:
        DemoFailed: It did not.
    """
    if payload.get("status") != "completed":
        raise DemoFailed(payload.get("error") or "The stream ended before the task did.")


async def record_of(client: aiohttp.ClientSession, task_id: str) -> dict[str, Any]:
    """Return the record of a task."""
    async with client.get(f"/tasks/{task_id}", timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as answer:
        await check(answer)
        record: dict[str, Any] = await answer.json()
        return record


@contextlib.asynccontextmanager
async def cancelled_on_failure(client: aiohttp.ClientSession, task_id: str) -> AsyncIterator[None]:
    """Cancel the task when the demo is broken off: where the system has no subreapers, its worker would go on."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with client.post(f"/cancel/{task_id}", timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)):
                pass
        raise


async def events_of(content: aiohttp.StreamReader) -> AsyncIterator[tuple[str, Any]]:
    """Yield the events of a stream, name and data.

    By hand, since aiohttp has no client for server-sent events, and what a library adds (connecting again) is not wanted.
    """
    buffer = bytearray()
    async for piece in content.iter_any():
        buffer += piece
        *frames, buffer = buffer.split(b"\n\n")
        for frame in frames:
            fields = dict(line.split(": ", 1) for line in frame.decode().split("\n") if ": " in line)
            if "data" in fields:
                yield fields.get("event", "message"), json.loads(fields["data"])

"""Shows a task from the request to the verified callback: the real service and the real CLI, on this machine alone.

The model is a script unless there is a key. All that it starts and writes is gone when it returns, for whatever reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shlex
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import attrs

from ccrun import __version__, config, process
from ccrun.backend import callback_secret_file
from ccrun.demo.model import ScriptedModel, demo_script
from ccrun.demo.receiver import Callback, NotGenuine, Receiver, verify
from ccrun.demo.screen import Screen, figures, rows
from ccrun.errors import CcrunError
from ccrun.process import Child
from ccrun.task import Secret
from ccrun.worker import claude

#: What the service gets of the environment: no setting of the user's own but what leads to the CLI and the model.
PASSED_ON: Final = (
    *("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "CLAUDE_CLI"),
    *("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_BASE_URL"),
)
#: Seconds. The service starts within one; a machine that is busy, or that imports everything for the first time, takes longer.
START_SECONDS: Final = 60.0
#: Seconds for each of the two tasks with its callback. A script is done in some five; a model may take a minute or two.
ACT_SECONDS: Final = 600.0
#: Seconds that the service has to answer a question that starts nothing.
ANSWER_SECONDS: Final = 10.0
#: Seconds between two looks at the task that is waited for.
LOOK_SECONDS: Final = 0.1
#: What the service complained about last is shown when the demo fails.
MAX_COMPLAINTS: Final = 5

PROMPT: Final = "Write a short note into NOTE.md, read it back, and tell me what it says."
TOOLS: Final = ("Bash",)

STAND_IN: Final = (
    "No model: neither ANTHROPIC_API_KEY nor CLAUDE_CODE_OAUTH_TOKEN is set, so a scripted stand-in answers, and every "
    "word of the agent was written beforehand. The rest is real: the service, the Claude Code CLI and the commands it "
    "runs, the stream, the callback."
)
REAL_MODEL: Final = (
    "A real model, at the cost of your credential. The agent may run commands here, with your rights; it begins in a "
    "temporary folder."
)
PROMPT_UNREAD: Final = "Your prompt is sent, but a script does not read it: set ANTHROPIC_API_KEY to have it answered."


class DemoFailed(CcrunError):
    """The demo did not go as it should."""


async def show(prompt: str | None) -> int:
    """Show one task of `POST /run` and one of `POST /run-async`; print what to type next.

    Returns:
        The exit status: 0 if all went as it should, 1 if not, 128 + n after signal n.
    """
    # As in the service: an agent of the same user must not read the key in our environment.
    process.harden()
    # Workers outlive their service; so they become our children and are ended with the rest.
    process.become_subreaper()
    screen = Screen()
    with _ended_by_signals() as ended_by:
        try:
            screen.heading(f"ccrun {__version__}: a task, from request to verified callback, on this machine alone")
            async with contextlib.AsyncExitStack() as story:
                await _play(story, screen, prompt)
        except CcrunError as error:
            screen.row("failed", error.message)
            return 1
        except asyncio.CancelledError:
            if not ended_by:
                raise
            return 128 + ended_by[0]
    screen.heading("Next, with a key of your own")
    screen.verbatim(_next_steps())
    return 0


async def _play(story: contextlib.AsyncExitStack, screen: Screen, prompt: str | None) -> None:
    folder = await story.enter_async_context(_temporary_folder())
    given = config.environment()
    environment = {name: given[name] for name in PASSED_ON if given.get(name, "").strip()}
    settings = config.load(environment)
    await asyncio.to_thread(claude.find_cli, environment.get("CLAUDE_CLI"), environment.get("PATH", os.defpath))
    if settings.operator_has_credential:
        screen.row("model", REAL_MODEL)
    else:
        model = await story.enter_async_context(ScriptedModel(demo_script))
        environment |= {"ANTHROPIC_API_KEY": "made-up-key", "ANTHROPIC_BASE_URL": model.url}
        screen.row("model", STAND_IN)
        if prompt is not None:
            screen.row("prompt", PROMPT_UNREAD)
    service = await story.enter_async_context(_service(environment, folder))
    screen.row("service", f"ccrun serve listens on {service.url}; its data is in a temporary folder.")
    receiver = await story.enter_async_context(Receiver(service.callback_secret))
    client = await story.enter_async_context(aiohttp.ClientSession(service.url))
    body = {"prompt": prompt or PROMPT, "allowedTools": TOOLS}
    try:
        async with asyncio.timeout(ACT_SECONDS):
            await _show_stream(client, screen, body)
        async with asyncio.timeout(ACT_SECONDS):
            await _show_callback(client, screen, body, receiver, service.callback_secret)
    except (aiohttp.ClientError, TimeoutError) as error:
        fault = str(error) or "it took too long"
        raise DemoFailed(
            " ".join([f"The service did not answer as it should: {fault}.", *service.complaints])
        ) from None


# --- the two acts ------------------------------------------------------------------------------------------------------


async def _show_stream(client: aiohttp.ClientSession, screen: Screen, body: Mapping[str, Any]) -> None:
    screen.heading("POST /run: the answer is the task's life, as it happens")
    body = {**body, "taskId": _task_id()}
    screen.row("request", json.dumps(body, ensure_ascii=False))
    ending: Mapping[str, Any] = {}
    async with (
        _cancelled_on_failure(client, body["taskId"]),
        client.post("/run", json=body, timeout=aiohttp.ClientTimeout(total=None)) as answer,
    ):
        await _check(answer)
        async for name, data in _events(answer.content):
            for row in rows(name, data):
                screen.row(row.label, row.text)
            if name == "done":
                ending = data
    _check_completed(ending)


async def _show_callback(
    client: aiohttp.ClientSession, screen: Screen, body: Mapping[str, Any], receiver: Receiver, secret: Secret
) -> None:
    screen.heading("POST /run-async: answered at once, called back when the task is over")
    task_id = _task_id()
    body = {**body, "taskId": task_id, "callbackUrl": receiver.url, "metadata": {"shownBy": "ccrun demo"}}
    screen.row("request", json.dumps(body, ensure_ascii=False))
    async with _cancelled_on_failure(client, task_id):
        async with client.post("/run-async", json=body) as answer:
            await _check(answer)
            screen.row(str(answer.status), json.dumps(await answer.json()))
        record = await _called_back(client, screen, task_id)
        callback = await receiver.first()
    payload = json.loads(callback.body)
    screen.row("callback", f"{payload['taskId']} is {payload['status']}: {figures(payload)}")
    age = verify(callback, secret=secret, now=time.time())
    screen.row("verified", f"X-Webhook-Signature fits the body, byte by byte, and is {age:.0f} s old.")
    _show_forgery(screen, callback, secret, task_id)
    screen.row("record", f"GET /tasks/{task_id}: {record['status']}, callback delivered.")
    _check_completed(payload)


def _show_forgery(screen: Screen, callback: Callback, secret: Secret, task_id: str) -> None:
    forged = attrs.evolve(callback, body=callback.body.replace(task_id.encode(), b"another-task"))
    try:
        verify(forged, secret=secret, now=time.time())
    except NotGenuine as fault:
        screen.row("refused", f"The same callback in the name of another task: {fault}.")
    else:
        raise DemoFailed("A callback that was changed on its way passed for genuine.")


async def _called_back(client: aiohttp.ClientSession, screen: Screen, task_id: str) -> dict[str, Any]:
    """Show each state that the task comes to; return its record when its callback was delivered."""
    shown = "pending"
    while True:
        record = await _record(client, task_id)
        if record["status"] != shown:
            shown = record["status"]
            screen.row("task", f"GET /tasks/{task_id}: {shown}")
        match record["webhook"]:
            case {"state": "delivered"}:
                return record
            case {"state": "owed", "lastError": error}:
                raise DemoFailed(f"The callback was not delivered: {error}")
        await asyncio.sleep(LOOK_SECONDS)


# --- what is asked of the service --------------------------------------------------------------------------------------


def _task_id() -> str:
    # Any ID will do; this one is short to read, and no other demo on this machine has it.
    return f"demo-{secrets.token_hex(4)}"


async def _check(answer: aiohttp.ClientResponse) -> None:
    if not answer.ok:
        raise DemoFailed(f"The service answered {answer.status}: {await answer.text()}")


def _check_completed(payload: Mapping[str, Any]) -> None:
    if payload.get("status") != "completed":
        raise DemoFailed(payload.get("error") or "The stream ended before the task did.")


async def _record(client: aiohttp.ClientSession, task_id: str) -> dict[str, Any]:
    async with client.get(f"/tasks/{task_id}", timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as answer:
        await _check(answer)
        record: dict[str, Any] = await answer.json()
        return record


@contextlib.asynccontextmanager
async def _cancelled_on_failure(client: aiohttp.ClientSession, task_id: str) -> AsyncIterator[None]:
    """Cancel the task when the demo is broken off: where the system has no subreapers, its worker would go on."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with client.post(f"/cancel/{task_id}", timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)):
                pass
        raise


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[str, Any]]:
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


# --- what is started ---------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class _Service:
    """The service as it runs. `complaints` are its latest warnings and errors."""

    url: str
    callback_secret: Secret
    complaints: deque[str]


@contextlib.asynccontextmanager
async def _service(environment: Mapping[str, str], folder: Path) -> AsyncIterator[_Service]:
    """Run `ccrun serve` in that folder, and end it with all that it has started."""
    temporary, data = folder / "tmp", folder / "data"
    await asyncio.to_thread(temporary.mkdir)
    environment = {
        **environment,
        "HOME": str(folder),
        "TMPDIR": str(temporary),
        "CCRUN_BACKEND": "local",
        "CCRUN_DATA_DIR": str(data),
        "HOST": "127.0.0.1",
        "PORT": "0",
        "LOG_FORMAT": "json",
        # So that what is shown is as fluent as the agent.
        "FLUSH_SECONDS": "0.1",
    }
    # -P: what lies in the folder where it starts is not imported.
    async with process.spawn((sys.executable, "-P", "-m", "ccrun", "serve"), env=environment, cwd=folder) as child:
        complaints: deque[str] = deque(maxlen=MAX_COMPLAINTS)
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        # It is read to the end: a log that nobody reads would hold up the service.
        reading = asyncio.create_task(_read_log(child, address, complaints))
        try:
            waited: set[asyncio.Future[Any]] = {address, reading}
            await asyncio.wait(waited, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not address.done():
                said = child.stderr_tail.decode(errors="replace").strip() or "it said nothing about why"
                raise DemoFailed(f"The service did not start: {said}")
            secret = await asyncio.to_thread(callback_secret_file(data).read_text)
            yield _Service(url=address.result(), callback_secret=Secret(secret.strip()), complaints=complaints)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


async def _read_log(child: Child, address: asyncio.Future[str], complaints: deque[str]) -> None:
    async for line in child.lines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("message") == "ccrun listens" and not address.done():
            address.set_result(entry["url"])
        elif entry.get("severity") not in ("DEBUG", "INFO"):
            complaints.append(f"{entry.get('message')}: {entry.get('fault', '')}")


@contextlib.asynccontextmanager
async def _temporary_folder() -> AsyncIterator[Path]:
    folder = tempfile.TemporaryDirectory(prefix="ccrun-demo-", ignore_cleanup_errors=True)
    try:
        yield Path(folder.name)
    finally:
        await asyncio.shield(asyncio.to_thread(folder.cleanup))


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[list[int]]:
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


# --- the last words ----------------------------------------------------------------------------------------------------


def _next_steps() -> str:
    beside, here = Path(sys.executable).with_name("ccrun"), Path.cwd()
    ccrun = shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))
    return f"""\
  export ANTHROPIC_API_KEY=...    # or send "anthropicApiKey" in each request
  {ccrun} serve

and in another terminal:

  curl -N http://127.0.0.1:8080/run -H 'Content-Type: application/json' \\
    -d '{{"prompt": "What can you do here?", "allowedTools": ["Bash"]}}'
  curl http://127.0.0.1:8080/tasks
"""

"""`ccrun demo`: shows a task from the request to the verified callback, with the real service and the real CLI on this machine.

The model is a script unless there is a key. Everything that the demo starts and writes is gone when it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import attrs

from ccrun import __version__
from ccrun.cli.client import (
    DemoFailed,
    cancelled_by_signals,
    cancelled_on_failure,
    check_completed,
    check_response,
    events_of,
    record_of,
)
from ccrun.cli.screen import Screen, figures, rows
from ccrun.errors import CcrunError
from ccrun.process import linux
from ccrun.task import Secret
from ccrun.testing.model import demo_script
from ccrun.testing.receiver import InvalidCallback, ReceivedCallback, Receiver, verify
from ccrun.testing.service import environment_with_model, running_service, temporary_directory

#: Seconds for each of the two tasks with its callback. A script takes about five; a model may take a minute or two.
TASK_SECONDS: Final = 600.0
#: Seconds between two polls of the task.
POLL_SECONDS: Final = 0.1

PROMPT: Final = "Write a short note into NOTE.md, read it back, and tell me what it says."
TOOLS: Final = ("Bash",)

NO_MODEL: Final = (
    "No model: neither ANTHROPIC_API_KEY nor CLAUDE_CODE_OAUTH_TOKEN is set, so a script replies in its place. The rest is "
    "real: the service, the Claude Code CLI and the commands it runs, the stream, the callback."
)
REAL_MODEL: Final = (
    "A real model, billed to your credential. The agent may run commands here; it starts in a temporary directory."
)
PROMPT_UNREAD: Final = "Your prompt is sent, but a script does not read it: set ANTHROPIC_API_KEY to have it answered."


async def show(prompt: str | None) -> int:
    """Show one task of `POST /run` and one of `POST /run-async`, and print what to do next.

    Returns:
        The exit status: 0 on success, 1 on failure, 128 + n after signal n.
    """
    # As in the service: an agent of the same user must not read the key in this environment.
    linux.harden()
    # Workers outlive their service. As a subreaper, this process becomes their parent and can kill them.
    linux.become_subreaper()
    screen = Screen()
    with cancelled_by_signals() as signals:
        try:
            screen.heading(f"ccrun {__version__}: a task, from request to verified callback, on this machine")
            async with contextlib.AsyncExitStack() as stack:
                await _run_tasks(stack, screen, prompt)
        except CcrunError as error:
            screen.row("failed", error.message)
            return 1
        except asyncio.CancelledError:
            if not signals:
                raise
            return 128 + signals[0]
    screen.heading("Next, with a key of your own")
    screen.verbatim(_next_steps())
    return 0


async def _run_tasks(stack: contextlib.AsyncExitStack, screen: Screen, prompt: str | None) -> None:
    directory = await stack.enter_async_context(temporary_directory())
    environment, is_real = await environment_with_model(stack, demo_script)
    screen.row("model", REAL_MODEL if is_real else NO_MODEL)
    if prompt is not None and not is_real:
        screen.row("prompt", PROMPT_UNREAD)
    service = await stack.enter_async_context(running_service(environment, directory))
    screen.row("service", f"ccrun serve listens on {service.url}; its data is in a temporary directory.")
    receiver = await stack.enter_async_context(Receiver(service.callback_secret))
    client = await stack.enter_async_context(aiohttp.ClientSession(service.url))
    screen.row("agents", await _isolation(client))
    body = {"prompt": prompt or PROMPT, "allowedTools": TOOLS}
    try:
        async with asyncio.timeout(TASK_SECONDS):
            await _show_stream(client, screen, body)
        async with asyncio.timeout(TASK_SECONDS):
            await _show_callback(client, screen, body, receiver, service.callback_secret)
    except (aiohttp.ClientError, TimeoutError) as error:
        reason = str(error) or "it took too long"
        raise DemoFailed(" ".join([f"The service failed: {reason}.", *service.warnings])) from None


async def _isolation(client: aiohttp.ClientSession) -> str:
    """Return a sentence about what the agents of the service can reach."""
    async with client.get("/health?verbose=true") as response:
        await check_response(response)
        isolation = (await response.json())["isolation"]
    if isolation["level"] == "sandbox":
        return "run in a sandbox: they see the programs of this machine and their own task."
    return f"run with the rights of their user. {' '.join(isolation['reasons'])}"


# --- the two tasks -----------------------------------------------------------------------------------------------------


async def _show_stream(client: aiohttp.ClientSession, screen: Screen, body: Mapping[str, Any]) -> None:
    screen.heading("POST /run: the response streams the events of the task")
    body = {**body, "taskId": _task_id()}
    screen.row("request", json.dumps(body, ensure_ascii=False))
    last: Mapping[str, Any] = {}
    async with (
        cancelled_on_failure(client, body["taskId"]),
        client.post("/run", json=body, timeout=aiohttp.ClientTimeout(total=None)) as response,
    ):
        await check_response(response)
        async for name, data in events_of(response.content):
            for row in rows(name, data):
                screen.row(row.label, row.text)
            if name == "done":
                last = data
    check_completed(last)


async def _show_callback(
    client: aiohttp.ClientSession, screen: Screen, body: Mapping[str, Any], receiver: Receiver, secret: Secret
) -> None:
    screen.heading("POST /run-async: an immediate response, and a callback when the task has finished")
    task_id = _task_id()
    body = {**body, "taskId": task_id, "callbackUrl": receiver.url, "metadata": {"shownBy": "ccrun demo"}}
    screen.row("request", json.dumps(body, ensure_ascii=False))
    async with cancelled_on_failure(client, task_id):
        async with client.post("/run-async", json=body) as response:
            await check_response(response)
            screen.row(str(response.status), json.dumps(await response.json()))
        record = await _called_back(client, screen, task_id)
        callback = await receiver.first()
    payload = json.loads(callback.body)
    screen.row("callback", f"{payload['taskId']} is {payload['status']}: {figures(payload)}")
    age = verify(callback, secret=secret, now=time.time())
    screen.row("verified", f"X-Webhook-Signature matches the body and is {age:.0f} s old.")
    _show_forgery(screen, callback, secret, task_id)
    screen.row("record", f"GET /tasks/{task_id}: {record['status']}, callback delivered.")
    check_completed(payload)


def _show_forgery(screen: Screen, callback: ReceivedCallback, secret: Secret, task_id: str) -> None:
    forged = attrs.evolve(callback, body=callback.body.replace(task_id.encode(), b"another-task"))
    try:
        verify(forged, secret=secret, now=time.time())
    except InvalidCallback as error:
        screen.row("rejected", f"The same callback with another task ID: {error}.")
    else:
        raise DemoFailed("A callback that was changed was accepted.")


async def _called_back(client: aiohttp.ClientSession, screen: Screen, task_id: str) -> dict[str, Any]:
    """Show each status of the task; return its record when the callback was delivered."""
    shown = "pending"
    while True:
        record = await record_of(client, task_id)
        if record["status"] != shown:
            shown = record["status"]
            screen.row("task", f"GET /tasks/{task_id}: {shown}")
        match record["webhook"]:
            case {"state": "delivered"}:
                return record
            case {"state": "owed", "lastError": error}:
                raise DemoFailed(f"The callback was not delivered: {error}")
        await asyncio.sleep(POLL_SECONDS)


def _task_id() -> str:
    # Short, and different from that of another demo on this machine.
    return f"demo-{secrets.token_hex(4)}"


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

"""Shows a task from the request to the verified callback: the real service and the real CLI, on this machine alone.

The model is a script unless there is a key. All that it starts and writes is gone when it returns, for whatever reason.
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
from ccrun.cli.local_service import (
    DemoFailed,
    cancelled_by_signals,
    cancelled_on_failure,
    check,
    check_completed,
    environment_with_model,
    events_of,
    record_of,
    running_service,
    temporary_folder,
)
from ccrun.cli.screen import Screen, figures, rows
from ccrun.errors import CcrunError
from ccrun.process import linux
from ccrun.task import Secret
from ccrun.testing.model import demo_script
from ccrun.testing.receiver import InvalidCallback, ReceivedCallback, Receiver, verify

#: Seconds for each of the two tasks with its callback. A script is done in some five; a model may take a minute or two.
TASK_SECONDS: Final = 600.0
#: Seconds between two looks at the task that is waited for.
POLL_SECONDS: Final = 0.1

PROMPT: Final = "Write a short note into NOTE.md, read it back, and tell me what it says."
TOOLS: Final = ("Bash",)

NO_MODEL: Final = (
    "No model: neither ANTHROPIC_API_KEY nor CLAUDE_CODE_OAUTH_TOKEN is set, so a scripted stand-in answers, and every "
    "word of the agent was written beforehand. The rest is real: the service, the Claude Code CLI and the commands it "
    "runs, the stream, the callback."
)
REAL_MODEL: Final = (
    "A real model, at the cost of your credential. The agent may run commands here, with your rights; it begins in a "
    "temporary folder."
)
PROMPT_UNREAD: Final = "Your prompt is sent, but a script does not read it: set ANTHROPIC_API_KEY to have it answered."


async def show(prompt: str | None) -> int:
    """Show one task of `POST /run` and one of `POST /run-async`; print what to type next.

    Returns:
        The exit status: 0 if all went as it should, 1 if not, 128 + n after signal n.
    """
    # As in the service: an agent of the same user must not read the key in our environment.
    linux.harden()
    # Workers outlive their service; so they become our children and are ended with the rest.
    linux.become_subreaper()
    screen = Screen()
    with cancelled_by_signals() as ended_by:
        try:
            screen.heading(f"ccrun {__version__}: a task, from request to verified callback, on this machine alone")
            async with contextlib.AsyncExitStack() as stack:
                await _play(stack, screen, prompt)
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


async def _play(stack: contextlib.AsyncExitStack, screen: Screen, prompt: str | None) -> None:
    folder = await stack.enter_async_context(temporary_folder())
    environment, is_real = await environment_with_model(stack, demo_script)
    screen.row("model", REAL_MODEL if is_real else NO_MODEL)
    if prompt is not None and not is_real:
        screen.row("prompt", PROMPT_UNREAD)
    service = await stack.enter_async_context(running_service(environment, folder))
    screen.row("service", f"ccrun serve listens on {service.url}; its data is in a temporary folder.")
    receiver = await stack.enter_async_context(Receiver(service.callback_secret))
    client = await stack.enter_async_context(aiohttp.ClientSession(service.url))
    body = {"prompt": prompt or PROMPT, "allowedTools": TOOLS}
    try:
        async with asyncio.timeout(TASK_SECONDS):
            await _show_stream(client, screen, body)
        async with asyncio.timeout(TASK_SECONDS):
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
        cancelled_on_failure(client, body["taskId"]),
        client.post("/run", json=body, timeout=aiohttp.ClientTimeout(total=None)) as answer,
    ):
        await check(answer)
        async for name, data in events_of(answer.content):
            for row in rows(name, data):
                screen.row(row.label, row.text)
            if name == "done":
                ending = data
    check_completed(ending)


async def _show_callback(
    client: aiohttp.ClientSession, screen: Screen, body: Mapping[str, Any], receiver: Receiver, secret: Secret
) -> None:
    screen.heading("POST /run-async: answered at once, called back when the task is over")
    task_id = _task_id()
    body = {**body, "taskId": task_id, "callbackUrl": receiver.url, "metadata": {"shownBy": "ccrun demo"}}
    screen.row("request", json.dumps(body, ensure_ascii=False))
    async with cancelled_on_failure(client, task_id):
        async with client.post("/run-async", json=body) as answer:
            await check(answer)
            screen.row(str(answer.status), json.dumps(await answer.json()))
        record = await _called_back(client, screen, task_id)
        callback = await receiver.first()
    payload = json.loads(callback.body)
    screen.row("callback", f"{payload['taskId']} is {payload['status']}: {figures(payload)}")
    age = verify(callback, secret=secret, now=time.time())
    screen.row("verified", f"X-Webhook-Signature fits the body, byte by byte, and is {age:.0f} s old.")
    _show_forgery(screen, callback, secret, task_id)
    screen.row("record", f"GET /tasks/{task_id}: {record['status']}, callback delivered.")
    check_completed(payload)


def _show_forgery(screen: Screen, callback: ReceivedCallback, secret: Secret, task_id: str) -> None:
    forged = attrs.evolve(callback, body=callback.body.replace(task_id.encode(), b"another-task"))
    try:
        verify(forged, secret=secret, now=time.time())
    except InvalidCallback as fault:
        screen.row("refused", f"The same callback in the name of another task: {fault}.")
    else:
        raise DemoFailed("A callback that was changed on its way passed for genuine.")


async def _called_back(client: aiohttp.ClientSession, screen: Screen, task_id: str) -> dict[str, Any]:
    """Show each state that the task comes to; return its record when its callback was delivered."""
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


# --- a task of the demo --------------------------------------------------------------------------------------


def _task_id() -> str:
    # Any ID will do; this one is short to read, and no other demo on this machine has it.
    return f"demo-{secrets.token_hex(4)}"


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

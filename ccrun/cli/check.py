"""`ccrun check`: checks a service from outside, as its clients see it.

    local          a service that is started here, with a scripted model unless there is a credential
    remote         the service at SERVICE_URL: is it healthy, does POST /run stream a task until it has finished?
    remote-async   the same service: does a task of POST /run-async finish, and is its callback sent?
    auth           the same service: does it reject requests without a token or with a wrong one?
    examples       requests from files: are they accepted, and do their tasks complete? At SERVICE_URL if it is set, else here

AUTH_TOKEN is the bearer token to send; TEST_CALLBACK_URL is where callbacks go. A credential for the model in the environment is
sent with each request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import aiohttp
import attrs

from ccrun.cli.client import (
    RESPONSE_SECONDS,
    DemoFailed,
    cancelled_by_signals,
    cancelled_on_failure,
    check_completed,
    check_response,
    events_of,
    record_of,
)
from ccrun.cli.screen import Screen, figures
from ccrun.errors import CcrunError
from ccrun.process import linux
from ccrun.task import Secret
from ccrun.testing.model import Say, sequence
from ccrun.testing.receiver import Receiver
from ccrun.testing.service import environment_with_model, running_service, temporary_directory

#: Seconds for one task with its callback. In the cloud its container starts first, and a model may take a minute.
TASK_SECONDS: Final = 900.0
#: Seconds between two polls of a task.
TASK_POLL_SECONDS: Final = 0.5
#: The request of a check: as little as shows that the model answers.
REQUEST: Final = {"prompt": "Say hello in one short sentence.", "maxTurns": 1, "timeoutMinutes": 5}
ANSWER: Final = "Hello from a script: no model stands behind this answer."
REJECTIONS: Final = (401, 403)


@attrs.frozen(kw_only=True)
class Target:
    """A service to check, and what is sent to it.

    Args:
        credential: Fields of each request.
        callback_url: Where callbacks go, when there is no receiver.
        receiver: Receives and verifies callbacks. Only a service on this machine can reach it.
    """

    client: aiohttp.ClientSession
    url: str
    credential: Mapping[str, str]
    token: Secret | None = None
    callback_url: str | None = None
    receiver: Receiver | None = None


#: Returns what was found, or raises `DemoFailed`.
Check: TypeAlias = Callable[[Target], Awaitable[str]]


# --- the checks --------------------------------------------------------------------------------------------------------


async def health(target: Target) -> str:
    """Check that the service is alive."""
    async with target.client.get("/health", timeout=aiohttp.ClientTimeout(total=RESPONSE_SECONDS)) as response:
        await check_response(response)
        if await response.json() != {"status": "ok"}:
            raise DemoFailed("GET /health does not report a healthy service.")
    return "GET /health: the service is alive"


async def ready(target: Target) -> str:
    """Check that the service reaches its storage and its key."""
    async with target.client.get("/ready", timeout=aiohttp.ClientTimeout(total=RESPONSE_SECONDS)) as response:
        await check_response(response)
    return "GET /ready: it reaches its storage and its key"


async def run(target: Target) -> str:
    """Check that a task is streamed until it has finished, and can be read afterwards."""
    return await _run(target, REQUEST)


async def run_async(target: Target) -> str:
    """Check that a task finishes in the background, and its callback is sent."""
    return await _run_async(target, REQUEST)


async def closed(target: Target) -> str:
    """Check that requests without a token or with a wrong one are rejected, and those with the right one are not."""
    rejected: dict[str, dict[str, str]] = {
        "no token": {},
        "a wrong token": {"Authorization": "Bearer made-up-wrong-token"},
    }
    async with aiohttp.ClientSession(target.url, timeout=aiohttp.ClientTimeout(total=RESPONSE_SECONDS)) as client:
        for name, headers in rejected.items():
            async with client.get("/tasks", headers=headers) as response:
                if response.status not in REJECTIONS:
                    raise DemoFailed(
                        f"GET /tasks with {name} gives {response.status}: anyone who reaches this service can use it."
                    )
    if target.token is None:
        return "GET /tasks: rejected without a token and with a wrong one (AUTH_TOKEN is not set: the right one was not tried)"
    async with target.client.get("/tasks", timeout=aiohttp.ClientTimeout(total=RESPONSE_SECONDS)) as response:
        await check_response(response)
    return "GET /tasks: rejected without a token and with a wrong one, accepted with the right one"


def example(file: Path, environment: Mapping[str, str]) -> Check:
    """Return the check of a request in a file. A request with a `callbackUrl` goes to `/run-async`.

    A field `${NAME}` gets the value of that variable; a file that needs one which is not set is skipped.
    """

    async def accepted(target: Target) -> str:
        try:
            body = json.loads(await asyncio.to_thread(file.read_bytes))
        except (OSError, ValueError) as error:
            raise DemoFailed(f"{file.name} cannot be read: {error}.") from None
        if not isinstance(body, dict):
            raise DemoFailed(f"{file.name} is not a JSON object.")
        try:
            body = _filled(body, environment)
        except Skipped as error:
            raise Skipped(f"{file.name}: {error.message}") from None
        # These are examples in the file, and would prevent a second run.
        for name in ("taskId", "anthropicApiKey", "anthropicOAuthToken", "anthropicAuthToken"):
            body.pop(name, None)
        send = _run_async if body.pop("callbackUrl", None) else _run
        try:
            return f"{file.name}: {await send(target, body)}"
        except CcrunError as error:
            raise DemoFailed(f"{file.name}: {error.message}") from None

    return accepted


class Skipped(CcrunError):
    """A check that cannot be run."""


def _filled(body: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    filled = dict(body)
    for field, value in body.items():
        if isinstance(value, str) and (named := re.fullmatch(r"\$\{([A-Z_]+)\}", value)):
            if not environment.get(named[1]):
                raise Skipped(f"it needs {named[1]}, which is not set.")
            filled[field] = environment[named[1]]
    return filled


async def _run(target: Target, body: Mapping[str, Any]) -> str:
    last: Mapping[str, Any] = {}
    names: list[str] = []
    async with target.client.post("/run", json={**body, **target.credential}) as response:
        await check_response(response)
        task_id = response.headers.get("X-Task-Id", "")
        async with cancelled_on_failure(target.client, task_id):
            async for name, data in events_of(response.content):
                names.append(name)
                if name == "done":
                    last = data
    check_completed(last)
    if names[0] != "task" or names[-1] != "done":
        raise DemoFailed(
            f"The events of {task_id} start with {names[0]} and end with {names[-1]}, not with task and done."
        )
    record = await record_of(target.client, task_id)
    check_completed(record)
    async with target.client.get(f"/tasks/{task_id}/logs") as response:
        await check_response(response)
        lines = len((await response.read()).splitlines())
    streamed = names.count("message")
    if lines != streamed:
        raise DemoFailed(f"The log of {task_id} has {lines} lines, its stream had {streamed}.")
    return f"POST /run: {task_id} was streamed until it had finished, {lines} lines ({figures(record)})"


async def _run_async(target: Target, body: Mapping[str, Any]) -> str:
    url = target.receiver.url if target.receiver else target.callback_url or target.url
    async with target.client.post("/run-async", json={**body, **target.credential, "callbackUrl": url}) as response:
        await check_response(response)
        task_id = (await response.json())["taskId"]
    async with cancelled_on_failure(target.client, task_id):
        record = await _called_back(target, task_id)
    check_completed(record)
    found = f"POST /run-async: {task_id} is completed ({figures(record)}), "
    webhook = record["webhook"]
    if webhook["state"] == "delivered":
        return found + ("its callback was delivered" + (" and verified" if target.receiver else ""))
    if target.receiver or target.callback_url:
        raise DemoFailed(f"The callback of {task_id} was not delivered: {webhook.get('lastError')}.")
    return (
        found + "its callback was sent, and rejected by the service itself: set TEST_CALLBACK_URL to see it delivered"
    )


async def _called_back(target: Target, task_id: str) -> dict[str, Any]:
    """Wait until the task has finished and a delivery of its callback was attempted; return its record."""
    while True:
        record = await record_of(target.client, task_id)
        webhook = record["webhook"]
        if webhook["state"] in ("delivered", "abandoned") or (webhook["state"] == "owed" and webhook["attempts"]):
            return record
        await asyncio.sleep(TASK_POLL_SECONDS)


# --- what is checked -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def local_target(screen: Screen) -> AsyncIterator[Target]:
    """Start a service on this machine, and a receiver for its callbacks."""
    async with contextlib.AsyncExitStack() as stack:
        folder = await stack.enter_async_context(temporary_directory())
        environment, is_real = await environment_with_model(stack, sequence(Say(ANSWER)))
        screen.row("model", "a real one, billed to your credential" if is_real else "none: a script responds")
        service = await stack.enter_async_context(running_service(environment, folder))
        receiver = await stack.enter_async_context(Receiver(service.callback_secret))
        timeout = aiohttp.ClientTimeout(total=TASK_SECONDS)
        client = await stack.enter_async_context(aiohttp.ClientSession(service.url, timeout=timeout))
        screen.row("service", f"ccrun serve, started here: {service.url}")
        yield Target(
            client=client,
            url=service.url,
            credential={},
            receiver=receiver,
        )


@contextlib.asynccontextmanager
async def remote_target(screen: Screen, environment: Mapping[str, str]) -> AsyncIterator[Target]:
    """Connect to the service at SERVICE_URL.

    Raises:
        DemoFailed: It is not set, or a token would be sent without encryption.
    """
    url = environment.get("SERVICE_URL", "").rstrip("/")
    if not url:
        raise DemoFailed("SERVICE_URL is not set: it names the service to check.")
    token = environment.get("AUTH_TOKEN")
    is_loopback = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    if token and not url.startswith("https:") and not is_loopback:
        raise DemoFailed("SERVICE_URL must begin with https: the token would be sent without encryption.")
    names = {
        "anthropicAuthToken": "ANTHROPIC_AUTH_TOKEN",
        "anthropicApiKey": "ANTHROPIC_API_KEY",
        "anthropicOAuthToken": "CLAUDE_CODE_OAUTH_TOKEN",
    }
    credentials = {field: environment[name] for field, name in names.items() if environment.get(name)}
    screen.row("service", url)
    async with aiohttp.ClientSession(
        url,
        headers={"Authorization": f"Bearer {token}"} if token else {},
        timeout=aiohttp.ClientTimeout(total=TASK_SECONDS),
    ) as client:
        yield Target(
            client=client,
            url=url,
            # One is enough.
            credential=dict(list(credentials.items())[:1]),
            token=Secret(token) if token else None,
            callback_url=environment.get("TEST_CALLBACK_URL") or None,
        )


async def run_checks(name: str, files: Sequence[Path], environment: Mapping[str, str]) -> int:
    """Run checks, and print what each found.

    Args:
        name: Which checks; the module docstring lists them.
        files: The requests of `examples`.

    Returns:
        The exit status: 0 when all passed, 1 when one failed, 128 + n after signal n.
    """
    checks: dict[str, Sequence[Check]] = {
        "local": (health, ready, run, run_async),
        "remote": (health, ready, run),
        "remote-async": (run_async,),
        "auth": (closed,),
        "examples": tuple(example(file, environment) for file in files),
    }
    screen = Screen()
    if not checks[name]:
        screen.row("failed", "No example was named, and there is none in docs/examples.")
        return 1
    is_local = name == "local" or (name == "examples" and not environment.get("SERVICE_URL"))
    # As in the service: an agent of the same user must not read this environment.
    linux.harden()
    linux.become_subreaper()
    failed = 0
    with cancelled_by_signals() as signals:
        try:
            async with local_target(screen) if is_local else remote_target(screen, environment) as target:
                for each in checks[name]:
                    failed += not await _passes(each, target, screen)
        except CcrunError as error:
            screen.row("failed", error.message)
            return 1
        except asyncio.CancelledError:
            if not signals:
                raise
            return 128 + signals[0]
    return 1 if failed else 0


async def _passes(each: Check, target: Target, screen: Screen) -> bool:
    try:
        async with asyncio.timeout(TASK_SECONDS):
            screen.row("passed", await each(target))
    except Skipped as error:
        screen.row("skipped", error.message)
        return True
    except CcrunError as error:
        screen.row("failed", error.message)
    except (aiohttp.ClientError, TimeoutError) as error:
        screen.row("failed", f"The service does not respond: {str(error) or 'it takes too long'}.")
    else:
        return True
    return False

"""Checks of a service from outside, as its callers see it; `scripts/test.sh` runs them by name.

    local          of a service that is started here, with a scripted model unless there is a credential
    remote         of the service at SERVICE_URL: is it well, does POST /run stream a task to its end?
    remote-async   of the same: does a task of POST /run-async come to its end, and is its callback sent?
    auth           of the same: is it closed to whoever brings no token, or a wrong one?
    examples       are these files taken as requests, and do their tasks go well? At SERVICE_URL if it is set, else here

AUTH_TOKEN is the bearer token to bring; TEST_CALLBACK_URL is where callbacks go. A credential for the model that is in the
environment goes with each request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import aiohttp
import attrs

from ccrun import config
from ccrun.cli.local_service import (
    ANSWER_SECONDS,
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
from ccrun.cli.screen import Screen, figures
from ccrun.errors import CcrunError
from ccrun.process import linux
from ccrun.task import Secret
from ccrun.testing.model import Say, sequence
from ccrun.testing.receiver import Receiver

#: Seconds for one task with its callback. In the cloud its container starts first, and a model may take a minute.
TASK_SECONDS: Final = 900.0
#: Seconds between two looks at a task that is waited for.
TASK_POLL_SECONDS: Final = 0.5
#: What is asked of the model: as little as shows that it answers.
REQUEST: Final = {"prompt": "Say hello in one short sentence.", "maxTurns": 1, "timeoutMinutes": 5}
ANSWER: Final = "Hello from a script: no model stands behind this answer."
REFUSALS: Final = (401, 403)


@attrs.frozen(kw_only=True)
class Target:
    """A service that is checked, and what is brought along.

    With `receiver` callbacks go there; it takes none that is not genuine. A service elsewhere cannot reach it.
    """

    client: aiohttp.ClientSession
    url: str
    credential: Mapping[str, str]
    token: Secret | None = None
    callback_url: str | None = None
    receiver: Receiver | None = None


#: Says what was found; raises DemoFailed when it is not what it should be.
Check: TypeAlias = Callable[[Target], Awaitable[str]]


# --- the checks --------------------------------------------------------------------------------------------------------


async def health(visit: Target) -> str:
    """The service lives."""
    async with visit.client.get("/health", timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as answer:
        await check(answer)
        if await answer.json() != {"status": "ok"}:
            raise DemoFailed("GET /health does not say that the service is well.")
    return "GET /health: the service lives"


async def ready(visit: Target) -> str:
    """It reaches storage and key."""
    async with visit.client.get("/ready", timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as answer:
        await check(answer)
    return "GET /ready: it reaches its storage and its key"


async def run(visit: Target) -> str:
    """A task is streamed to its end, and can be read afterwards."""
    return await _run(visit, REQUEST)


async def run_async(visit: Target) -> str:
    """A task comes to its end in the background, and its callback is sent."""
    return await _run_async(visit, REQUEST)


async def closed(visit: Target) -> str:
    """Who brings no token, or a wrong one, is turned away; who brings the right one is not."""
    strangers: dict[str, dict[str, str]] = {
        "no token": {},
        "a wrong token": {"Authorization": "Bearer made-up-token-of-a-stranger"},
    }
    async with aiohttp.ClientSession(visit.url, timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as stranger:
        for name, headers in strangers.items():
            async with stranger.get("/tasks", headers=headers) as answer:
                if answer.status not in REFUSALS:
                    raise DemoFailed(
                        f"GET /tasks with {name} is answered with {answer.status}: whoever reaches this service may use it."
                    )
    if visit.token is None:
        return "GET /tasks: refused without a token and with a wrong one (AUTH_TOKEN is not set: a right one was not tried)"
    async with visit.client.get("/tasks", timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as answer:
        await check(answer)
    return "GET /tasks: refused without a token and with a wrong one, answered with the right one"


def example(file: Path, environment: Mapping[str, str]) -> Check:
    """Return the check of one request that is kept in a file: with a `callbackUrl` it is one for `/run-async`.

    A field `${NAME}` has the value of that variable; a file that needs one which is not set is left out.
    """

    async def taken(visit: Target) -> str:
        try:
            body = json.loads(await asyncio.to_thread(file.read_bytes))
        except (OSError, ValueError) as error:
            raise DemoFailed(f"{file.name} cannot be read: {error}.") from None
        if not isinstance(body, dict):
            raise DemoFailed(f"{file.name} is no JSON object.")
        try:
            body = _filled(body, environment)
        except Skipped as error:
            raise Skipped(f"{file.name}: {error.message}") from None
        # Made up in the file, and in the way of a second run.
        for name in ("taskId", "anthropicApiKey", "anthropicOAuthToken"):
            body.pop(name, None)
        send = _run_async if body.pop("callbackUrl", None) else _run
        try:
            return f"{file.name}: {await send(visit, body)}"
        except CcrunError as error:
            raise DemoFailed(f"{file.name}: {error.message}") from None

    return taken


class Skipped(CcrunError):
    """A check that cannot be made."""


def _filled(body: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    filled = dict(body)
    for field, value in body.items():
        if isinstance(value, str) and (named := re.fullmatch(r"\$\{([A-Z_]+)\}", value)):
            if not environment.get(named[1]):
                raise Skipped(f"it needs {named[1]}, which is not set.")
            filled[field] = environment[named[1]]
    return filled


async def _run(visit: Target, body: Mapping[str, Any]) -> str:
    ending: Mapping[str, Any] = {}
    names: list[str] = []
    async with visit.client.post("/run", json={**body, **visit.credential}) as answer:
        await check(answer)
        task_id = answer.headers.get("X-Task-Id", "")
        async with cancelled_on_failure(visit.client, task_id):
            async for name, data in events_of(answer.content):
                names.append(name)
                if name == "done":
                    ending = data
    check_completed(ending)
    if names[0] != "task" or names[-1] != "done":
        raise DemoFailed(
            f"The stream of {task_id} begins with {names[0]} and ends with {names[-1]}, not with task and done."
        )
    record = await record_of(visit.client, task_id)
    check_completed(record)
    async with visit.client.get(f"/tasks/{task_id}/logs") as answer:
        await check(answer)
        lines = len((await answer.read()).splitlines())
    streamed = names.count("message")
    if lines != streamed:
        raise DemoFailed(f"The log of {task_id} has {lines} lines, its stream had {streamed}.")
    return f"POST /run: {task_id} was streamed to its end, {lines} lines ({figures(record)})"


async def _run_async(visit: Target, body: Mapping[str, Any]) -> str:
    target = visit.receiver.url if visit.receiver else visit.callback_url or visit.url
    async with visit.client.post("/run-async", json={**body, **visit.credential, "callbackUrl": target}) as answer:
        await check(answer)
        task_id = (await answer.json())["taskId"]
    async with cancelled_on_failure(visit.client, task_id):
        record = await _called_back(visit, task_id)
    check_completed(record)
    said = f"POST /run-async: {task_id} is completed ({figures(record)}), "
    webhook = record["webhook"]
    if webhook["state"] == "delivered":
        return said + ("its callback was delivered" + (" and verified" if visit.receiver else ""))
    if visit.receiver or visit.callback_url:
        raise DemoFailed(f"The callback of {task_id} was not delivered: {webhook.get('lastError')}.")
    return said + "its callback was sent, and refused by the service itself: set TEST_CALLBACK_URL to see it delivered"


async def _called_back(visit: Target, task_id: str) -> dict[str, Any]:
    """Wait until the task is over and its callback was tried; return its record."""
    while True:
        record = await record_of(visit.client, task_id)
        webhook = record["webhook"]
        if webhook["state"] in ("delivered", "abandoned") or (webhook["state"] == "owed" and webhook["attempts"]):
            return record
        await asyncio.sleep(TASK_POLL_SECONDS)


# --- what is checked -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def local_target(screen: Screen) -> AsyncIterator[Target]:
    """Start a service on this machine, and a receiver of its callbacks."""
    async with contextlib.AsyncExitStack() as stack:
        folder = await stack.enter_async_context(temporary_folder())
        environment, is_real = await environment_with_model(stack, sequence(Say(ANSWER)))
        screen.row("model", "a real one, at the cost of your credential" if is_real else "none: a script answers")
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
    """Go to the service at SERVICE_URL.

    Raises:
        DemoFailed: It is not set, or a token would go over the wire for all to read.
    """
    url = environment.get("SERVICE_URL", "").rstrip("/")
    if not url:
        raise DemoFailed("SERVICE_URL is not set: it names the service to check.")
    token = environment.get("AUTH_TOKEN")
    is_near = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    if token and not url.startswith("https:") and not is_near:
        raise DemoFailed("SERVICE_URL must begin with https: the token would be there for all to read.")
    names = {"anthropicApiKey": "ANTHROPIC_API_KEY", "anthropicOAuthToken": "CLAUDE_CODE_OAUTH_TOKEN"}
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
            # One is enough: the first.
            credential=dict(list(credentials.items())[:1]),
            token=Secret(token) if token else None,
            callback_url=environment.get("TEST_CALLBACK_URL") or None,
        )


async def run_checks(word: str, files: Sequence[Path], environment: Mapping[str, str]) -> int:
    """Run the checks of that name, and print what each found.

    Returns:
        The exit status: 0 if all is as it should be, 1 if not, 2 if there is no such word, 128 + n after signal n.
    """
    checks: dict[str, Sequence[Check]] = {
        "local": (health, ready, run, run_async),
        "remote": (health, ready, run),
        "remote-async": (run_async,),
        "auth": (closed,),
        "examples": tuple(example(file, environment) for file in files),
    }
    screen = Screen()
    if word not in checks:
        screen.row("failed", f"There is no check {word}; there are {', '.join(checks)}.")
        return 2
    if not checks[word]:
        screen.row("failed", "No example was named, and there is none in docs/examples.")
        return 1
    is_here = word == "local" or (word == "examples" and not environment.get("SERVICE_URL"))
    # As in the service: an agent of the same user must not read what is in our environment.
    linux.harden()
    linux.become_subreaper()
    failed = 0
    with cancelled_by_signals() as ended_by:
        try:
            async with local_target(screen) if is_here else remote_target(screen, environment) as visit:
                for each in checks[word]:
                    failed += not await _passes(each, visit, screen)
        except CcrunError as error:
            screen.row("failed", error.message)
            return 1
        except asyncio.CancelledError:
            if not ended_by:
                raise
            return 128 + ended_by[0]
    return 1 if failed else 0


async def _passes(each: Check, visit: Target, screen: Screen) -> bool:
    try:
        async with asyncio.timeout(TASK_SECONDS):
            screen.row("passed", await each(visit))
    except Skipped as error:
        screen.row("left out", error.message)
        return True
    except CcrunError as error:
        screen.row("failed", error.message)
    except (aiohttp.ClientError, TimeoutError) as error:
        screen.row("failed", f"The service does not answer: {str(error) or 'it takes too long'}.")
    else:
        return True
    return False


def main() -> int:
    """Run what the arguments name."""
    word, *files = sys.argv[1:] or [""]
    return asyncio.run(run_checks(word, [Path(file) for file in files], config.environment()))


if __name__ == "__main__":
    sys.exit(main())

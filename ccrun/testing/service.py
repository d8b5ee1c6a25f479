"""A ccrun service in a child process, on the local backend and on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from ccrun import config
from ccrun.claude_cli import find_cli
from ccrun.errors import CcrunError
from ccrun.process.child import Child, spawn
from ccrun.task import Secret
from ccrun.testing.model import Script, ScriptedModel

#: Variables of the environment that the service gets: those that lead to the CLI and the model, and no setting of ccrun.
PASSED_VARIABLES: Final = (
    *("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "CLAUDE_CLI"),
    *("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_BASE_URL"),
)
#: Seconds. The service starts within one; a busy machine, or one that imports everything for the first time, needs more.
START_SECONDS: Final = 60.0
#: Warnings and errors of the service that are kept.
MAX_WARNINGS: Final = 5
CALLBACK_SECRET_BYTES: Final = 32


class ServiceNotStarted(CcrunError):
    """The service did not start."""


@attrs.frozen(kw_only=True)
class Service:
    """A running service.

    Args:
        callback_secret: The key of its callback signatures.
        warnings: Its latest warnings and errors.
    """

    url: str
    callback_secret: Secret
    warnings: deque[str]


@contextlib.asynccontextmanager
async def local_service(script: Script) -> AsyncIterator[Service]:
    """Run a service whose agent is the real CLI and whose model is a script. It needs no account and no key.

    Raises:
        CcrunError: There is no CLI, or the service did not start.
    """
    async with contextlib.AsyncExitStack() as stack:
        directory = await stack.enter_async_context(temporary_directory())
        given = config.environment()
        environment = {name: given[name] for name in ("PATH", "CLAUDE_CLI") if given.get(name, "").strip()}
        environment = await with_scripted_model(stack, environment, script)
        yield await stack.enter_async_context(running_service(environment, directory))


async def environment_with_model(stack: contextlib.AsyncExitStack, script: Script) -> tuple[dict[str, str], bool]:
    """Return the environment for a service, and whether a real model answers it.

    Args:
        script: Answers when there is no credential in the environment.

    Raises:
        CcrunError: There is no CLI, or a setting is wrong.
    """
    given = config.environment()
    environment = {name: given[name] for name in PASSED_VARIABLES if given.get(name, "").strip()}
    # Checked here, so that nothing is started when it is missing.
    await asyncio.to_thread(find_cli, environment.get("CLAUDE_CLI"), environment.get("PATH", os.defpath))
    if config.load(environment).operator_has_credential:
        return environment, True
    return await with_scripted_model(stack, environment, script), False


async def with_scripted_model(
    stack: contextlib.AsyncExitStack, environment: Mapping[str, str], script: Script
) -> dict[str, str]:
    """Start a scripted model, and return the environment for a service that uses it."""
    model = await stack.enter_async_context(ScriptedModel(script))
    return {**environment, "ANTHROPIC_API_KEY": "made-up-key", "ANTHROPIC_BASE_URL": model.url}


@contextlib.asynccontextmanager
async def running_service(environment: Mapping[str, str], directory: Path) -> AsyncIterator[Service]:
    """Run `ccrun serve` with its data in that directory. All processes that it has started stop with it.

    Raises:
        ServiceNotStarted: It did not start within `START_SECONDS`.
    """
    temporary = directory / "tmp"
    callback_secret = Secret(secrets.token_hex(CALLBACK_SECRET_BYTES))
    await asyncio.to_thread(temporary.mkdir)
    environment = {
        **environment,
        "HOME": str(directory),
        "TMPDIR": str(temporary),
        "CCRUN_BACKEND": "local",
        "CCRUN_DATA_DIR": str(directory / "data"),
        "CLOUDRUN_CALLBACK_SECRET": callback_secret.reveal(),
        "HOST": "127.0.0.1",
        "PORT": "0",
        "LOG_FORMAT": "json",
        # Events appear as the agent produces them.
        "FLUSH_SECONDS": "0.1",
    }
    # -P: modules in the current directory are not imported.
    async with spawn((sys.executable, "-P", "-m", "ccrun", "serve"), env=environment, cwd=directory) as child:
        warnings: deque[str] = deque(maxlen=MAX_WARNINGS)
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        # The log is read until the service exits: a full pipe would block the service.
        reading = asyncio.create_task(_read_log(child, address, warnings))
        try:
            waited: set[asyncio.Future[Any]] = {address, reading}
            await asyncio.wait(waited, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not address.done():
                output = child.stderr_tail.decode(errors="replace").strip() or "it printed no reason"
                raise ServiceNotStarted(f"The service did not start: {output}")
            yield Service(url=address.result(), callback_secret=callback_secret, warnings=warnings)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


async def _read_log(child: Child, address: asyncio.Future[str], warnings: deque[str]) -> None:
    async for line in child.lines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("event") == "service_listening" and not address.done():
            address.set_result(entry["url"])
        elif entry.get("severity") not in ("DEBUG", "INFO"):
            warnings.append(f"{entry.get('message')}: {entry.get('error', '')}")


@contextlib.asynccontextmanager
async def temporary_directory() -> AsyncIterator[Path]:
    """Create a directory, and remove it afterwards with everything in it."""
    directory = await asyncio.to_thread(
        tempfile.TemporaryDirectory[str], prefix="ccrun-testing-", ignore_cleanup_errors=True
    )
    try:
        yield Path(directory.name)
    finally:
        await asyncio.shield(asyncio.to_thread(directory.cleanup))

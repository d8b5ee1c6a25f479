"""What every test has: an event loop that may not be blocked, and an environment without this machine's settings.

Also a whole service on the local backend, with real workers, the real CLI and the scripted model; see `start_service`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shlex
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final

import aiohttp
import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from helpers.service import (
    CALLBACK_SECRET,
    Deployment,
    LocalDeployment,
    Service,
    StartService,
    cloud_deployment,
    remove_workers,
)

from ccrun import config, log
from ccrun.config import LogFormat
from ccrun.server import serving
from ccrun.testing.model import Say, Script, ScriptedModel, sequence

#: The environment variables that child processes need. All others are removed, since they could change a result.
KEPT_VARIABLES: Final = frozenset({"PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV"})


def pytest_collection_finish() -> None:
    """Exclude the test modules from garbage collection, which took a seventh of the processor time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def unblocked_loop() -> Iterator[BlockBuster]:
    """Fail a test in which ccrun blocks the event loop."""
    with blockbuster_ctx("ccrun") as guard:
        # Coverage locks its data briefly, also in the event loop.
        guard.functions["threading.Lock.acquire"].can_block_in("coverage/collector.py", "lock_data")
        yield guard


@pytest.fixture(autouse=True, scope="session")
def quiet_log() -> None:
    """Log as the service does, at WARNING and above."""
    log.configure(LogFormat.JSON, "WARNING")


@pytest.fixture(autouse=True, scope="session")
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove the environment of the machine: its settings, credentials and home directory."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update({name: value for name, value in before.items() if name in KEPT_VARIABLES})
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def backend_name() -> str:
    """The backend of the services of a test."""
    return "local"


@pytest.fixture
def start_service(tmp_path: Path, backend_name: str) -> Iterator[StartService]:
    """Return a function that starts a service in this process, with real worker processes. None is left after the test."""
    data_dirs = set()

    @contextlib.asynccontextmanager
    async def start(
        script: Script | None = None, *, data_dir: Path | None = None, **settings: str
    ) -> AsyncIterator[Service]:
        async with contextlib.AsyncExitStack() as stack:
            model = await stack.enter_async_context(ScriptedModel(script or sequence(Say("Done."))))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            environment = {
                **os.environ,
                "PORT": "0",
                "ANTHROPIC_BASE_URL": model.url,
                "LOG_LEVEL": "WARNING",
                "MAX_CONCURRENT_TASKS": "2",
                "CLOUDRUN_CALLBACK_SECRET": CALLBACK_SECRET,
                **settings,
            }
            if backend_name == "local":
                directory = data_dir or tmp_path / "data"
                data_dirs.add(directory)
                deployment: Deployment = LocalDeployment(data_dir=directory)
            else:
                deployment = await stack.enter_async_context(cloud_deployment(environment))
            environment.update(deployment.environment)
            url = await stack.enter_async_context(
                serving(await asyncio.to_thread(config.load, environment), environment)
            )
            yield Service(url=url, http=http, model=model, deployment=deployment, store=deployment.store)

    yield start
    for each in data_dirs:
        remove_workers(each)


@pytest.fixture
async def service(start_service: StartService) -> AsyncIterator[Service]:
    """Return a service whose model always replies `Done.`."""
    async with start_service() as running:
        yield running


@pytest.fixture
def fake_cli(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes an executable from a Python script, for failures that the real CLI cannot produce."""

    def make(script: str) -> Path:
        path = tmp_path / f"fake-cli-{time.monotonic_ns()}"
        # A shebang cannot have a path with a space. The line that sh executes is a string literal to Python.
        header = f"#!/bin/sh\n'''exec' {shlex.quote(sys.executable)} \"$0\" \"$@\"\n' '''\n"
        path.write_text(header + script, encoding="utf-8")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def quick_cli(tmp_path: Path) -> Path:
    """Return a program that succeeds at once, for tests in which it does not matter what the agent does."""
    path = tmp_path / "quick-cli"
    path.write_text('#!/bin/sh\ncat >/dev/null\necho \'{"type":"result","is_error":false,"num_turns":1}\'\n')
    path.chmod(0o755)
    return path

"""Run one task in the process of the test: a store, a dispatcher that creates the task, and the parts of a worker."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from ccrun.api.dispatch import Dispatcher
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.backends.local.key import LocalKey
from ccrun.claude_cli import find_cli
from ccrun.errors import ConfigError
from ccrun.jobs import ExecutionState
from ccrun.process.user import User, find_user
from ccrun.spec import TaskSpec
from ccrun.store import Store
from ccrun.task import Secret, TaskId, TaskRecord, TaskType
from ccrun.testing.model import Script, ScriptedModel
from ccrun.urls import parse_git_url
from ccrun.worker.dependencies import WorkerDependencies, WorkerTimeouts
from ccrun.worker.git.run import SYSTEM_PATH
from ccrun.worker.isolation import IsolationPolicy
from ccrun.worker.log_writer import FlushPolicy
from ccrun.worker.run import run_task
from helpers.service import MADE_UP_KEY, WAIT_SECONDS

#: Other processes may run these tests at the same time, with workspaces in the same directory.
TASK = TaskId(f"task-{os.getpid()}")
RESULT = {
    "type": "result",
    "subtype": "success",
    "is_error": False,
    "num_turns": 2,
    "total_cost_usd": 0.25,
    "session_id": "session-1",
    "result": "All done.",
    "usage": {"input_tokens": 3},
}
#: The first lines of every fake CLI.
PRELUDE = """
import json, os, signal, subprocess, sys, time
def say(**line): print(json.dumps(line, separators=(",", ":")), flush=True)
def result(**more): say(**{**json.loads(%r), **more})
prompt = sys.stdin.read()
""" % json.dumps(RESULT)  # noqa: UP031

FakeCli = Callable[[str], Path]
#: Makes a CLI from a bash script, see `agent`.
Agent = Callable[..., Callable[[], Path]]


class NoJobs:
    """A platform that starts no workers; the tests run them."""

    max_running: int | None = None
    start_timeout: dt.timedelta | None = None
    launch_time: dt.timedelta = dt.timedelta(0)

    def check_capacity(self) -> None: ...

    def queue_position(self, task_id: TaskId) -> int | None:
        return None

    async def launch(self, task_id: TaskId) -> str | None:
        return None

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None: ...

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        return ExecutionState.RUNNING

    async def launched_states(self, task_ids: Collection[TaskId]) -> Mapping[TaskId, ExecutionState]:
        return {task_id: await self.state(task_id, None) for task_id in task_ids}

    async def clear(self, task_id: TaskId) -> None: ...

    async def leftovers(self) -> list[TaskId]:
        return []


@attrs.frozen(kw_only=True)
class WorkerSetup:
    """A store with a task, and what a worker needs to run it."""

    deps: WorkerDependencies
    dispatcher: Dispatcher
    shutdown: asyncio.Event = attrs.field(factory=asyncio.Event)

    async def submit(self, **fields: Any) -> None:
        """Create the task."""
        defaults: dict[str, Any] = {
            "task_id": TASK,
            "type": TaskType.ASYNC,
            "prompt": "Do it.",
            "timeout_minutes": 1.0,
            "anthropic_api_key": Secret(MADE_UP_KEY),
        }
        if (url := fields.get("git_repo")) is not None:
            fields["git_repo"] = parse_git_url(url)
        await self.dispatcher.submit(TaskSpec(**{**defaults, **fields}))

    async def run(self, *, agent_user: User | None = None, **changes: Any) -> TaskRecord:
        """Run the worker of the task until it returns, and return the final record.

        Args:
            agent_user: The user of the agent, None for that of the worker.
            changes: Fields of `WorkerDependencies` that differ.
        """
        changes.setdefault("isolation", IsolationPolicy(user=agent_user))
        async with asyncio.timeout(WAIT_SECONDS):
            await run_task(attrs.evolve(self.deps, **changes), TASK, shutdown=self.shutdown)
        return await self.deps.store.record(TASK)

    async def log(self) -> list[dict[str, Any]]:
        """Return the lines of the log of the task."""
        listing = await self.deps.store.logs.listing(TASK, first=1)
        contents = [await self.deps.store.logs.read_chunk(chunk) for chunk in listing.chunks]
        return [json.loads(line) for content in contents for line in content.splitlines()]


@pytest.fixture
async def worker_setup(tmp_path: Path) -> WorkerSetup:
    """A store in a directory, and a worker whose model API does not exist."""
    store, wrapper = Store(DirectoryBlobs(tmp_path / "data")), LocalKey(tmp_path / "keys" / "key")
    deps = WorkerDependencies(
        store=store,
        wrapper=wrapper,
        callbacks=None,
        cli=lambda: find_cli(None, ""),
        upstream="http://127.0.0.1:9",
        marker=str(tmp_path),
        git_protocols="https:ssh:http:file",
        inherited={"PATH": os.environ["PATH"], "SERVICE_SECRET": "of-the-service"},
        flush_policy=FlushPolicy(flush_seconds=0.05, first_flush_seconds=0.01, retry_seconds=0.5),
        timeouts=WorkerTimeouts(term_grace=0.3, cancel_poll=0.02),
    )
    dispatcher = Dispatcher(store=store, jobs=NoJobs(), wrapper=wrapper, callback_owed=lambda: None)
    return WorkerSetup(deps=deps, dispatcher=dispatcher)


@pytest.fixture
async def serve_model() -> AsyncIterator[Callable[[Script], Any]]:
    """Return a function that serves a script as the model API until the test ends."""
    models: list[ScriptedModel] = []

    async def serve(script: Script) -> ScriptedModel:
        models.append(await ScriptedModel(script).__aenter__())
        return models[-1]

    yield serve
    for model in models:
        await model.__aexit__(None, None, None)


# --- agents that are scripts ---------------------------------------------------------------------------------------------


@pytest.fixture
def agent() -> Iterator[Callable[[str], Callable[[], Path]]]:
    """Return a function that makes a CLI from a bash script; the CLI then reports success, and any user may run it."""
    folder = Path(tempfile.mkdtemp(prefix="ccrun-test-"))
    folder.chmod(0o755)

    def make(script: str, *, last: str = f"echo {shlex.quote(json.dumps(RESULT, separators=(',', ':')))}") -> Any:
        path = folder / f"agent-{len(list(folder.iterdir()))}"
        path.write_text(f"#!/bin/bash\ncat >/dev/null\n{script}\n{last}\n", encoding="utf-8")
        path.chmod(0o755)
        return lambda: path

    yield make
    shutil.rmtree(folder)


@pytest.fixture(name="agent_user")
async def separate_user() -> User | None:
    """A separate user, or the worker's own where this process may not switch users. For tests of which one kind is enough."""
    with contextlib.suppress(ConfigError):
        return await asyncio.to_thread(find_user, "61237", SYSTEM_PATH)
    return None


@pytest.fixture(params=["same user", "separate user"])
async def agent_user(request: pytest.FixtureRequest) -> User | None:
    """The user of the agent: the user of the worker (None), or a separate one."""
    if request.param == "same user":
        return None
    try:
        return await asyncio.to_thread(find_user, "61237", SYSTEM_PATH)
    except ConfigError:
        pytest.skip("this process may not switch users")

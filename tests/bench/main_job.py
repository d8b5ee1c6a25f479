"""What ccrun adds to the bare CLI, stage by stage: `.venv/bin/python tests/bench/main_job.py [RUNS]`.

Each run calls the scripted model once through the bare CLI and once through `POST /run` of a real service. The two alternate, so
that a machine that becomes slower affects both. Times are in seconds, as the median of all runs. The ratio is the median of
the ratios of the pairs.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Final

import aiohttp
import attrs

sys.path.insert(0, str(Path(__file__).parent.parent))
from helpers.service import MADE_UP_KEY, WAIT_SECONDS, read_events, serve_process

from ccrun.claude_cli import find_cli
from ccrun.process.child import spawn
from ccrun.spec import TaskSpec
from ccrun.task import TaskId, TaskType
from ccrun.testing.model import Say, ScriptedModel, sequence
from ccrun.worker import claude

DEFAULT_RUNS: Final = 7


@attrs.frozen(kw_only=True)
class Bare:
    """A run of the CLI alone: the seconds until its first line and until its exit."""

    first_line: float
    total: float


@attrs.frozen(kw_only=True)
class Served:
    """A run through `/run`: the seconds since the request was sent."""

    stream_opened: float
    worker_claimed: float
    cli_spawned: float
    first_line: float
    total: float


async def run_bare(model: ScriptedModel, directory: Path) -> Bare:
    """Run the CLI with the arguments and the environment that a worker gives it."""
    workspace = {name: directory / name for name in ("home", "config", "tmp", "work")}
    for path in workspace.values():
        path.mkdir(parents=True)
    spec = TaskSpec(task_id=TaskId("bare"), type=TaskType.SYNC, prompt="Do it.", timeout_minutes=1.0)
    environment = claude.environment(
        spec,
        inherited=os.environ,
        network={},
        home=workspace["home"],
        config=workspace["config"],
        temporary=workspace["tmp"],
        model_api={"ANTHROPIC_BASE_URL": model.url, "ANTHROPIC_API_KEY": MADE_UP_KEY},
        is_root=os.geteuid() == 0,
        marker="bare",
    )
    argv = claude.argv(spec, cli=find_cli(None, ""), files={}, config=workspace["config"])
    started = time.monotonic()
    first_line = 0.0
    async with spawn(argv, env=environment, cwd=workspace["work"], stdin=spec.prompt.encode()) as child:
        async for _ in child.lines():
            first_line = first_line or time.monotonic() - started
        await child.wait()
    return Bare(first_line=first_line, total=time.monotonic() - started)


async def run_served(http: aiohttp.ClientSession, url: str, log: Path) -> Served:
    """Run the same prompt through the service."""
    started, started_at = time.monotonic(), dt.datetime.now(dt.UTC)
    first_line = 0.0
    body = {"prompt": "Do it.", "anthropicApiKey": MADE_UP_KEY}
    async with http.post(f"{url}/run", json=body) as response:
        opened = time.monotonic() - started
        async for event in read_events(response):
            if event.name == "message":
                first_line = first_line or time.monotonic() - started
        total = time.monotonic() - started
        task_id = response.headers["X-Task-Id"]
    logged = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if entry.get("taskId") == task_id:
            logged[entry["event"]] = (dt.datetime.fromisoformat(entry["time"]) - started_at).total_seconds()
    return Served(
        stream_opened=opened,
        worker_claimed=logged["task_started"],
        cli_spawned=logged["agent_started"],
        first_line=first_line,
        total=total,
    )


async def main(runs: int) -> None:
    """Run the benchmark and print the results."""
    bare: list[Bare] = []
    served: list[Served] = []
    with tempfile.TemporaryDirectory() as name:
        directory, log = Path(name), Path(name, "serve.log")
        async with (
            ScriptedModel(sequence(Say("Done."))) as model,
            serve_process(directory / "data", log_file=log, ANTHROPIC_BASE_URL=model.url) as service,
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT_SECONDS)) as http,
        ):
            for number in range(-1, runs):
                one, other = (
                    await run_bare(model, directory / f"bare{number}"),
                    await run_served(http, service.url, log),
                )
                # The first pair only fills the disk cache.
                if number >= 0:
                    bare.append(one)
                    served.append(other)
    print(f"{runs} runs of each, medians, seconds since the request was sent (bare: since the CLI was started)\n")
    print(f"{'stage':<34}{'bare CLI':>10}{'/run':>10}{'added':>10}{'ratio':>8}")
    for label, field in (
        ("stored, stream open", "stream_opened"),
        ("worker runs, task claimed", "worker_claimed"),
        ("CLI spawned", "cli_spawned"),
    ):
        print(f"{label:<34}{'':>10}{median(getattr(run, field) for run in served):>10.3f}")
    for label, field in (("first line of the CLI", "first_line"), ("total task", "total")):
        pairs = [(getattr(one, field), getattr(other, field)) for one, other in zip(bare, served, strict=True)]
        print(
            f"{label:<34}{median(one for one, _ in pairs):>10.3f}{median(other for _, other in pairs):>10.3f}"
            f"{median(other - one for one, other in pairs):>+10.3f}{median(other / one for one, other in pairs):>8.2f}"
        )


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_RUNS))

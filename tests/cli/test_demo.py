from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import attrs
import pytest

from ccrun.testing.model import Fail, Say, ScriptedModel

#: The demo takes about eight seconds, longer on a busy machine.
DEMO_SECONDS = 100.0

#: Runs the demo, then writes to stderr which of its processes still run. Orphans become children of this process.
SUPERVISOR = """
import signal, subprocess, sys
import psutil
from ccrun.process import linux

linux.become_subreaper()
# A terminal sends signals to the whole group; this process must not exit before the demo.
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
finished = subprocess.run(sys.argv[1:])
for child in psutil.Process().children(recursive=True):
    if child.status() != psutil.STATUS_ZOMBIE:
        print("still running:", child.cmdline(), file=sys.stderr)
sys.exit(finished.returncode % 256)
"""


@attrs.frozen(kw_only=True)
class DemoResult:
    """A finished demo. `output` has one line for each row, without times."""

    code: int
    output: str
    #: Its stderr, with the processes that still run, and its temporary files.
    leftovers: list[str]


@attrs.frozen
class RunningDemo:
    """A running demo."""

    process: asyncio.subprocess.Process
    temporary: Path

    async def until(self, text: str) -> None:
        """Wait until the demo prints a line that contains the text."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DEMO_SECONDS):
            while line := await self.process.stdout.readline():
                if text in line.decode():
                    return
        pytest.fail(f"the demo exited without {text!r}")

    async def finish(self) -> DemoResult:
        """Wait until the demo exits."""
        async with asyncio.timeout(DEMO_SECONDS):
            output, stderr = await self.process.communicate()
        assert self.process.returncode is not None
        return DemoResult(
            code=self.process.returncode,
            output=re.sub(r"\n {17}", " ", re.sub(r"(?m)^ {0,4}\d+\.\ds ", "", output.decode())),
            leftovers=[*stderr.decode().splitlines(), *map(str, self.temporary.iterdir())],
        )


Start: TypeAlias = Callable[..., Awaitable[RunningDemo]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Return a function that starts `ccrun demo` in a clean environment."""
    temporary, home = tmp_path / "tmp", tmp_path / "home"
    temporary.mkdir()
    home.mkdir()
    started = []

    async def start(*arguments: str, **environment: str) -> RunningDemo:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", SUPERVISOR),
            *(sys.executable, "-P", "-m", "ccrun", "demo", *arguments),
            env={"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(temporary), **environment},
            cwd=home,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        return RunningDemo(process, temporary)

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def test_demo_runs_without_a_key(start: Start, tmp_path: Path) -> None:
    """The demo says that it has no model, shows a stream, verifies a callback, rejects a forged one, and cleans up."""
    result = await (await start()).finish()
    steps = [
        r"^model +No model: .* a script replies in its place",
        r"^service +ccrun serve listens on http://127\.0\.0\.1:\d+",
        r"^agents +run (in a sandbox|with the rights of their user)",
        r"^POST /run:",
        r'^request +{"prompt": ',
        r"^task +demo-\w+ is pending",
        r"^agent +Claude Code \d.* starts",
        r"^agent +This is a scripted demo",
        r"^tool +Bash: printf .* > NOTE\.md",
        r"^tool +Bash: cat NOTE\.md",
        r"^output +Written by the agent of the ccrun demo\.",
        r"^completed exit code 0, 3 turns, \d+\.\d s, \$0",
        r"^POST /run-async:",
        r"^202 .*\"status\": \"pending\"",
        r"^callback +demo-\w+ is completed: exit code 0",
        r"^verified +X-Webhook-Signature matches",
        r"^rejected +The same callback with another task ID",
        r"^record +GET /tasks/demo-\w+: completed, callback delivered",
        r"^  export ANTHROPIC_API_KEY=",
        r"^  \S.*/ccrun'? serve$",
        r"^  curl -N http://127\.0\.0\.1:8080/run ",
        r"^  curl http://127\.0\.0\.1:8080/tasks$",
    ]
    found = [re.search(step, result.output, re.MULTILINE) for step in steps]
    assert [] == [step for step, match in zip(steps, found, strict=True) if match is None], result
    positions = [match.start() for match in found if match]
    assert positions == sorted(positions)
    assert (0, [], []) == (result.code, result.leftovers, list((tmp_path / "home").iterdir()))
    assert "\x1b" not in result.output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_interrupted_demo_leaves_nothing(start: Start, number: int, code: int) -> None:
    """A signal during a task stops the demo and all processes that it has started."""
    demo = await start("--prompt", "Hello")
    await demo.until("a script does not read it")
    await demo.until("Claude Code")
    os.killpg(demo.process.pid, number)
    result = await demo.finish()
    assert (code, []) == (result.code, result.leftovers)


async def test_demo_with_a_key_uses_the_api_of_the_environment(start: Start) -> None:
    """No scripted model is started: both tasks send the prompt to the API of the environment, with its key."""
    conversations = []

    def script(conversation: object) -> Say:
        conversations.append(conversation)
        return Say("A made-up reply.")

    async with ScriptedModel(script) as model:
        demo = await start("--prompt", "Héllo", ANTHROPIC_API_KEY="made-up-key", ANTHROPIC_BASE_URL=model.url)
        result = await demo.finish()
        keys = {request.headers.get("x-api-key") for request in model.requests if request.method == "POST"}
    assert (0, []) == (result.code, result.leftovers)
    assert {"made-up-key"} == keys
    assert ["Héllo", "Héllo"] == [getattr(conversation, "prompt", None) for conversation in conversations]
    assert "A made-up reply." in result.output
    assert "No model" not in result.output


async def test_rejected_key_stops_the_demo(start: Start) -> None:
    """The demo prints the error of the API, and its exit status is 1."""
    refusal = Fail(401, "authentication_error", "invalid x-api-key", headers={"x-should-retry": "false"})
    async with ScriptedModel(lambda _: refusal) as model:
        result = await (await start(ANTHROPIC_API_KEY="made-up-key", ANTHROPIC_BASE_URL=model.url)).finish()
    assert (1, []) == (result.code, result.leftovers)
    assert re.search(r"(?m)^failed .*(invalid x-api-key|Invalid API key)", result.output), result


async def test_missing_cli_stops_the_demo(start: Start) -> None:
    """The demo prints which setting is wrong, and starts no service."""
    result = await (await start(CLAUDE_CLI="/missing/claude")).finish()
    assert (1, []) == (result.code, result.leftovers)
    assert "CLAUDE_CLI does not name a program" in result.output
    assert "service" not in result.output

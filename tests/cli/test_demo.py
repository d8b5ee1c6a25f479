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

#: The demo takes some eight seconds; a machine that is busy takes longer.
DEMO_SECONDS = 100.0

#: Runs the demo, then says on stderr what of it lives on: what loses its parent falls to this process.
SUPERVISOR = """
import signal, subprocess, sys
import psutil
from ccrun.process import linux

linux.become_subreaper()
# What a terminal sends goes to the whole group; this process has to outlive it.
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
ended = subprocess.run(sys.argv[1:])
for child in psutil.Process().children(recursive=True):
    if child.status() != psutil.STATUS_ZOMBIE:
        print("lives on:", child.cmdline(), file=sys.stderr)
sys.exit(ended.returncode % 256)
"""


@attrs.frozen(kw_only=True)
class Shown:
    """A demo that is over. `output` has one row a line, without the times and the line breaks inside a row."""

    code: int
    output: str
    #: What is still there of it: complaints, processes, files.
    left: list[str]


@attrs.frozen
class Demo:
    """A demo that runs."""

    process: asyncio.subprocess.Process
    temporary: Path

    async def until(self, text: str) -> None:
        """Wait until it prints a line with that text."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DEMO_SECONDS):
            while line := await self.process.stdout.readline():
                if text in line.decode():
                    return
        pytest.fail(f"the demo ended without {text!r}")

    async def end(self) -> Shown:
        """Wait until it is over."""
        async with asyncio.timeout(DEMO_SECONDS):
            output, complaints = await self.process.communicate()
        assert self.process.returncode is not None
        return Shown(
            code=self.process.returncode,
            output=re.sub(r"\n {17}", " ", re.sub(r"(?m)^ {0,4}\d+\.\ds ", "", output.decode())),
            left=[*complaints.decode().splitlines(), *map(str, self.temporary.iterdir())],
        )


Start: TypeAlias = Callable[..., Awaitable[Demo]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start `ccrun demo` in a clean environment."""
    temporary, home = tmp_path / "tmp", tmp_path / "home"
    temporary.mkdir()
    home.mkdir()
    started = []

    async def start(*arguments: str, **environment: str) -> Demo:
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
        return Demo(process, temporary)

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def test_the_whole_story_is_shown_without_a_key(start: Start, tmp_path: Path) -> None:
    """Stand-in named as such, stream, verified callback, refused forgery, next steps; then all of it is gone."""
    shown = await (await start()).end()
    steps = [
        r"^model +No model: .* a script replies in its place",
        r"^service +ccrun serve listens on http://127\.0\.0\.1:\d+",
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
    found = [re.search(step, shown.output, re.MULTILINE) for step in steps]
    assert [] == [step for step, match in zip(steps, found, strict=True) if match is None], shown
    positions = [match.start() for match in found if match]
    assert positions == sorted(positions)
    assert (0, [], []) == (shown.code, shown.left, list((tmp_path / "home").iterdir()))
    assert "\x1b" not in shown.output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_nothing_is_left_when_it_is_broken_off(start: Start, number: int, code: int) -> None:
    """In the middle of a task, a signal ends it within seconds with all that it has started."""
    demo = await start("--prompt", "Hello")
    await demo.until("a script does not read it")
    await demo.until("Claude Code")
    os.killpg(demo.process.pid, number)
    shown = await demo.end()
    assert (code, []) == (shown.code, shown.left)


async def test_with_a_key_the_prompt_goes_to_the_model_of_the_environment(start: Start) -> None:
    """No stand-in is started: both tasks ask the API that the environment names, with its key."""
    asked = []

    def script(conversation: object) -> Say:
        asked.append(conversation)
        return Say("A made-up answer.")

    async with ScriptedModel(script) as model:
        demo = await start("--prompt", "Héllo", ANTHROPIC_API_KEY="made-up-key", ANTHROPIC_BASE_URL=model.url)
        shown = await demo.end()
        keys = {request.headers.get("x-api-key") for request in model.requests if request.method == "POST"}
    assert (0, []) == (shown.code, shown.left)
    assert {"made-up-key"} == keys
    assert ["Héllo", "Héllo"] == [getattr(conversation, "prompt", None) for conversation in asked]
    assert "A made-up answer." in shown.output
    assert "No model" not in shown.output


async def test_a_key_that_is_refused_ends_it_with_the_reason(start: Start) -> None:
    """One sentence says what is wrong, and the exit status is 1."""
    refusal = Fail(401, "authentication_error", "invalid x-api-key", headers={"x-should-retry": "false"})
    async with ScriptedModel(lambda _: refusal) as model:
        shown = await (await start(ANTHROPIC_API_KEY="made-up-key", ANTHROPIC_BASE_URL=model.url)).end()
    assert (1, []) == (shown.code, shown.left)
    assert re.search(r"(?m)^failed .*(invalid x-api-key|Invalid API key)", shown.output), shown


async def test_without_the_cli_it_says_what_is_missing(start: Start) -> None:
    """Nothing is started when the CLI is not there."""
    shown = await (await start(CLAUDE_CLI="/nowhere/claude")).end()
    assert (1, []) == (shown.code, shown.left)
    assert "CLAUDE_CLI does not name a program" in shown.output
    assert "service" not in shown.output

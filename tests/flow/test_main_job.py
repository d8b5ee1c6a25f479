"""The main job from end to end: the API, real worker processes, the real CLI, the scripted model."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.service import CALLBACK_SECRET, MADE_UP_KEY, WAIT_SECONDS, Service, StartService, read_events

from ccrun.task import CallbackState, Reason, Status
from ccrun.testing.model import Conversation, Hang, Reply, Say, UseTool, sequence

FakeCli = Callable[[str], Path]


@attrs.frozen(kw_only=True)
class Receiver:
    """A receiver of callbacks: what it got, and the statuses that it answers with, 200 when none is left."""

    url: str
    got: asyncio.Queue[tuple[bytes, dict[str, str]]]
    statuses: list[int]

    async def next(self) -> tuple[bytes, dict[str, str]]:
        """Return body and headers of the next callback."""
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.got.get()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver on loopback."""
    got: asyncio.Queue[tuple[bytes, dict[str, str]]] = asyncio.Queue()
    statuses: list[int] = []

    async def receive(request: web.Request) -> web.Response:
        got.put_nowait((await request.read(), dict(request.headers)))
        return web.Response(status=statuses.pop(0) if statuses else 200)

    app = web.Application()
    app.router.add_post("/hook", receive)
    async with TestServer(app) as server:
        yield Receiver(url=str(server.make_url("/hook")), got=got, statuses=statuses)


async def test_run_streams_the_task_from_its_first_line_to_its_outcome(service: Service) -> None:
    """`/run` gives the task, each line of the CLI with its cursor, and the outcome last."""
    events = await service.run()
    assert ["task", "caught_up", "done"] == [event.name for event in events if event.name != "message"]
    assert "done" == events[-1].name
    assert "completed" == events[-1].data["status"]
    lines = [event.data for event in events if event.name == "message"]
    assert ("system", "result") == (lines[0]["type"], lines[-1]["type"])


async def test_the_stream_is_live(start_service: StartService) -> None:
    """A reader sees a line while the agent is still at work, not when all is over."""
    said = sequence(UseTool("Bash", {"command": "true"}, text="I begin."), Hang())
    async with start_service(said) as service:
        body = service.body(allowedTools=["Bash"])
        async with asyncio.timeout(WAIT_SECONDS), service.http.post(f"{service.url}/run", json=body) as response:
            async for event in read_events(response):
                if "I begin." in str(event.data):
                    break
            task_id = response.headers["X-Task-Id"]
            assert "running" == (await service.get(f"/tasks/{task_id}"))["status"]
            await service.http.post(f"{service.url}/cancel/{task_id}")
        await service.until_final(task_id)


async def test_the_log_the_events_and_a_resumed_stream_agree(service: Service) -> None:
    """`/logs`, a replay and a stream that goes on after any event tell the same lines, none missing, none twice."""
    live = [event for event in await service.run() if event.name == "message"]
    [task] = (await service.get("/tasks"))["tasks"]
    replay = [event for event in await service.events(task["taskId"]) if event.name == "message"]
    async with service.http.get(f"{service.url}/tasks/{task['taskId']}/logs") as response:
        logged = [json.loads(line) for line in (await response.read()).splitlines()]
    assert live == replay
    assert [event.data for event in live] == logged
    resumed = await service.events(task["taskId"], last_event_id=live[0].id)
    assert live[1:] == [event for event in resumed if event.name == "message"]


async def test_an_async_task_calls_back_signed_and_once(service: Service, receiver: Receiver) -> None:
    """The receiver gets the outcome with a signature over its very bytes, and the record tells of the delivery."""
    answer = await service.submit(callbackUrl=receiver.url, metadata={"order": 7})
    body, headers = await receiver.next()
    signed = f"{headers['X-Webhook-Timestamp']}.".encode() + body
    expected = "sha256=" + hmac.new(CALLBACK_SECRET.encode(), signed, hashlib.sha256).hexdigest()
    assert expected == headers["X-Webhook-Signature"]
    told = json.loads(body)
    assert (answer["taskId"], "completed", {"order": 7}) == (told["taskId"], told["status"], told["metadata"])
    record = await service.until(
        answer["taskId"], lambda record: bool(record.webhook and record.webhook.state is CallbackState.DELIVERED)
    )
    assert record.webhook is not None
    assert 1 == record.webhook.attempts
    assert receiver.got.empty()


async def test_a_callback_is_delivered_again_on_demand(service: Service, receiver: Receiver) -> None:
    """The redelivery has the same body and the same `webhook-id`, so that a receiver can tell it from a new one."""
    answer = await service.submit(callbackUrl=receiver.url)
    first = await receiver.next()
    await service.until(
        answer["taskId"], lambda record: bool(record.webhook and record.webhook.state is CallbackState.DELIVERED)
    )
    async with service.http.post(f"{service.url}/tasks/{answer['taskId']}/webhook") as response:
        assert 202 == response.status
    await service.deployment.sweep()
    second = await receiver.next()
    assert (first[0], first[1]["webhook-id"]) == (second[0], second[1]["webhook-id"])


async def test_a_running_task_is_cancelled_and_calls_back(start_service: StartService, receiver: Receiver) -> None:
    """A cancel ends the agent, the stream, the record and the debt of the callback alike."""
    async with start_service(lambda _: Hang()) as service:
        answer = await service.submit(callbackUrl=receiver.url)
        await service.until(answer["taskId"], lambda record: record.status is Status.RUNNING)
        async with service.http.post(f"{service.url}/cancel/{answer['taskId']}") as response:
            assert {"taskId": answer["taskId"], "status": "cancelled"}.items() <= (await response.json()).items()
        body, _ = await receiver.next()
        assert ("cancelled", 130) == (json.loads(body)["status"], json.loads(body)["exitCode"])
        events = await service.events(answer["taskId"])
        assert ["cancelled", "done"] == [event.name for event in events[-2:]]


async def test_twenty_tasks_at_once_all_finish(start_service: StartService, backend_name: str) -> None:
    """On one machine two run at a time and the others wait as pending; none is lost."""
    async with start_service(MAX_CONCURRENT_TASKS="2") as service:
        answers = await asyncio.gather(*(service.submit() for _ in range(20)))
        status = await service.get("/tasks/status")
        assert {"local": 2, "gcp": None}[backend_name] == status["max"]
        assert status["active"] <= (status["max"] or 20)
        records = await asyncio.gather(*(service.until_final(answer["taskId"]) for answer in answers))
        assert [Status.COMPLETED] * 20 == [record.status for record in records]


async def test_a_client_that_leaves_does_not_disturb_a_reader_of_its_task(start_service: StartService) -> None:
    """The stream of one reader goes on when another breaks off in the middle."""
    script = sequence(UseTool("Bash", {"command": "true"}, text="I begin."), Say("Done."))
    async with start_service(script) as service:
        body = service.body(allowedTools=["Bash"])
        async with asyncio.timeout(WAIT_SECONDS), service.http.post(f"{service.url}/run", json=body) as response:
            task_id = response.headers["X-Task-Id"]
            reading = asyncio.create_task(service.events(task_id))
            await response.content.readany()
        assert "done" == (await reading)[-1].name


# --- what the agent must not reach -----------------------------------------------------------------------------------------


def look_around(conversation: Conversation) -> Reply:
    """Have the agent print all that it can reach of processes and files."""
    command = (
        # The CLI cuts long output in the middle, also inside of a line, and other processes of the machine have much of it.
        "env; { cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n'; cat ~/../*/*; } 2>/dev/null"
        " | grep -aE '_API_KEY=|made-up|private'"
    )
    if conversation.turn == 0:
        return UseTool("Bash", {"command": command})
    return Say("Done.")


async def test_no_credential_is_in_the_agents_reach(start_service: StartService) -> None:
    """Neither the caller's key nor the prompt is in an argument or a file, nor is the key in an environment, of the task.

    The credential of the operator in the environment of the service is kept from other users and, by PR_SET_DUMPABLE, from
    the same user; root reads everything, so the test runs the question as it is asked: does the log have the key?
    """
    async with start_service(look_around) as service:
        events = await service.run(allowedTools=["Bash"], prompt="The prompt is private.")
        printed = "".join(
            str(block["content"])
            for event in events
            if event.name == "message" and event.data["type"] == "user"
            for block in event.data["message"]["content"]
        )
        assert "ANTHROPIC_BASE_URL=" in printed
        assert MADE_UP_KEY not in printed
        # Masked is not enough: the mask stands only where the run's own token was printed.
        assert {"ANTHROPIC_API_KEY=***"} == {line for line in printed.splitlines() if line.endswith("=***")}
        assert not [line for line in printed.splitlines() if "The prompt is private." in line and "claude" in line]


# --- a lot of output -------------------------------------------------------------------------------------------------------

PEAK = """
import os, re
def peak(pid):
    return int(re.search(r"VmHWM:\\s+(\\d+)", open(f"/proc/{pid}/status").read())[1])
"""


async def test_a_line_of_64_mib_and_100_000_lines_pass_intact(
    start_service: StartService, fake_cli: FakeCli, backend_name: str
) -> None:
    """Nothing is cut or lost, and the worker's memory stays bounded: below 200 MiB on one machine.

    In the cloud the library for uploads holds such a line twice more.
    """
    cli = fake_cli(
        PEAK
        + """
import hashlib, json, sys
sys.stdin.read()
out = sys.stdout.buffer
digest = hashlib.sha256()
def say(line):
    digest.update(line); out.write(line)
say(b'{"type":"big","text":"' + b"x" * (64 * 1024 * 1024) + b'"}\\n')
for number in range(100_000):
    say(b'{"type":"line","number":%d}\\n' % number)
out.flush()
print(json.dumps({"type":"result","is_error":False,"num_turns":1,"digest":digest.hexdigest(),
    "kib":peak(os.getppid())},separators=(",",":")))
"""
    )
    async with start_service(CLAUDE_CLI=str(cli)) as service:
        answer = await service.submit()
        record = await service.until_final(answer["taskId"])
        assert Status.COMPLETED == record.status
        digest, lines = hashlib.sha256(), 0
        async with service.http.get(f"{service.url}/tasks/{answer['taskId']}/logs") as response:
            content = await response.read()
        *kept, last = content.splitlines(keepends=True)
        for line in kept:
            digest.update(line)
            lines += 1
        result: dict[str, Any] = json.loads(last)
        assert (100_001, digest.hexdigest()) == (lines, result["digest"])
        assert result["kib"] < {"local": 200, "gcp": 300}[backend_name] * 1024


# --- faults ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend_name", ["local"])
async def test_two_services_on_one_folder_share_it(start_service: StartService, tmp_path: Path) -> None:
    """A task submitted to one is read, streamed and cancelled over the other."""
    async with (
        start_service(lambda _: Hang(), data_dir=tmp_path / "shared") as one,
        start_service(data_dir=tmp_path / "shared") as other,
    ):
        answer = await one.submit()
        await other.until(answer["taskId"], lambda record: record.status is Status.RUNNING)
        async with other.http.post(f"{other.url}/cancel/{answer['taskId']}") as response:
            assert 200 == response.status
        assert Reason.CANCELLED == (await one.until_final(answer["taskId"])).reason


async def test_a_worker_killed_outright_is_settled_at_once(start_service: StartService, receiver: Receiver) -> None:
    """The task fails as `worker_lost`, the callback comes, and nothing of the agent goes on."""
    async with start_service(lambda _: Hang()) as service:
        answer = await service.submit(callbackUrl=receiver.url)
        async with asyncio.timeout(WAIT_SECONDS):
            # The agent is at work.
            while not service.model.requests:
                await asyncio.sleep(0.02)
        await service.deployment.kill_worker(answer["taskId"])
        async with asyncio.timeout(WAIT_SECONDS):
            # Whoever asks for the task settles it.
            while "running" == (await service.get(f"/tasks/{answer['taskId']}"))["status"]:
                await asyncio.sleep(0.05)
        await service.deployment.sweep()
        body, _ = await receiver.next()
        assert "failed" == json.loads(body)["status"]
        record = await service.until_final(answer["taskId"])
        assert Reason.WORKER_LOST == record.reason
        async with asyncio.timeout(WAIT_SECONDS):
            while Path(f"/tmp/ws-{answer['taskId']}").exists():
                await asyncio.sleep(0.05)

"""Tasks without a repository, end to end: the API, real worker processes, the real CLI and the scripted model."""

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
    """A receiver of callbacks, and the callbacks that it got."""

    url: str
    callbacks: asyncio.Queue[tuple[bytes, dict[str, str]]]
    statuses: list[int]

    async def next(self) -> tuple[bytes, dict[str, str]]:
        """Return the body and the headers of the next callback."""
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.callbacks.get()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """Start a receiver on loopback."""
    callbacks: asyncio.Queue[tuple[bytes, dict[str, str]]] = asyncio.Queue()
    statuses: list[int] = []

    async def receive(request: web.Request) -> web.Response:
        callbacks.put_nowait((await request.read(), dict(request.headers)))
        return web.Response(status=statuses.pop(0) if statuses else 200)

    app = web.Application()
    app.router.add_post("/hook", receive)
    async with TestServer(app) as server:
        yield Receiver(url=str(server.make_url("/hook")), callbacks=callbacks, statuses=statuses)


async def test_run_streams_the_whole_task(service: Service) -> None:
    """`/run` streams the task, all lines of the CLI, and the outcome as the last event."""
    events = await service.run()
    assert ["task", "caught_up", "status", "done"] == [event.name for event in events if event.name != "message"]
    assert {"status": "running", "queuePosition": None} == next(e.data for e in events if e.name == "status")
    assert "done" == events[-1].name
    assert "completed" == events[-1].data["status"]
    lines = [event.data for event in events if event.name == "message"]
    assert ("system", "result") == (lines[0]["type"], lines[-1]["type"])


async def test_stream_is_live(start_service: StartService) -> None:
    """A reader gets a line while the agent is running."""
    script = sequence(UseTool("Bash", {"command": "true"}, text="I start."), Hang())
    async with start_service(script) as service:
        body = service.body(allowedTools=["Bash"])
        async with asyncio.timeout(WAIT_SECONDS), service.http.post(f"{service.url}/run", json=body) as response:
            async for event in read_events(response):
                if "I start." in str(event.data):
                    break
            task_id = response.headers["X-Task-Id"]
            assert "running" == (await service.get(f"/tasks/{task_id}"))["status"]
            await service.http.post(f"{service.url}/cancel/{task_id}")
        await service.until_final(task_id)


async def test_log_and_streams_have_the_same_lines(service: Service) -> None:
    """`/logs`, a live stream, a replay and a resumed stream have the same lines, each once."""
    live = [event for event in await service.run() if event.name == "message"]
    [task] = (await service.get("/tasks"))["tasks"]
    replay = [event for event in await service.events(task["taskId"]) if event.name == "message"]
    async with service.http.get(f"{service.url}/tasks/{task['taskId']}/logs") as response:
        logged = [json.loads(line) for line in (await response.read()).splitlines()]
    assert live == replay
    assert [event.data for event in live] == logged
    resumed = await service.events(task["taskId"], last_event_id=live[0].id)
    assert live[1:] == [event for event in resumed if event.name == "message"]


async def test_callback_is_signed_and_delivered_once(service: Service, receiver: Receiver) -> None:
    """The receiver gets the outcome once, with a valid signature, and the record has the delivery."""
    submitted = await service.submit(callbackUrl=receiver.url, metadata={"order": 7})
    body, headers = await receiver.next()
    signed = f"{headers['X-Webhook-Timestamp']}.".encode() + body
    expected = "sha256=" + hmac.new(CALLBACK_SECRET.encode(), signed, hashlib.sha256).hexdigest()
    assert expected == headers["X-Webhook-Signature"]
    payload = json.loads(body)
    assert (submitted["taskId"], "completed", {"order": 7}) == (
        payload["taskId"],
        payload["status"],
        payload["metadata"],
    )
    record = await service.until(
        submitted["taskId"], lambda record: bool(record.webhook and record.webhook.state is CallbackState.DELIVERED)
    )
    assert record.webhook is not None
    assert 1 == record.webhook.attempts
    assert receiver.callbacks.empty()


async def test_callback_can_be_redelivered(service: Service, receiver: Receiver) -> None:
    """A redelivery has the same body and the same `webhook-id`, so that a receiver can detect a duplicate."""
    submitted = await service.submit(callbackUrl=receiver.url)
    first = await receiver.next()
    await service.until(
        submitted["taskId"], lambda record: bool(record.webhook and record.webhook.state is CallbackState.DELIVERED)
    )
    async with service.http.post(f"{service.url}/tasks/{submitted['taskId']}/webhook") as response:
        assert 202 == response.status
    await service.deployment.sweep()
    second = await receiver.next()
    assert (first[0], first[1]["webhook-id"]) == (second[0], second[1]["webhook-id"])


async def test_running_task_is_cancelled(start_service: StartService, receiver: Receiver) -> None:
    """After a cancellation, the callback, the stream and the record have the status `cancelled`."""
    async with start_service(lambda _: Hang()) as service:
        submitted = await service.submit(callbackUrl=receiver.url)
        await service.until(submitted["taskId"], lambda record: record.status is Status.RUNNING)
        async with service.http.post(f"{service.url}/cancel/{submitted['taskId']}") as response:
            assert {"taskId": submitted["taskId"], "status": "cancelled"}.items() <= (await response.json()).items()
        body, _ = await receiver.next()
        assert ("cancelled", 130) == (json.loads(body)["status"], json.loads(body)["exitCode"])
        events = await service.events(submitted["taskId"])
        assert ["cancelled", "done"] == [event.name for event in events[-2:]]


async def test_concurrent_tasks_all_finish(start_service: StartService, quick_cli: Path, backend_name: str) -> None:
    """Ten tasks complete; on the local backend, two run at a time and the others are pending."""
    async with start_service(MAX_CONCURRENT_TASKS="2", CLAUDE_CLI=str(quick_cli)) as service:
        submissions = await asyncio.gather(*(service.submit() for _ in range(10)))
        status = await service.get("/tasks/status")
        assert {"local": 2, "gcp": None}[backend_name] == status["max"]
        assert status["active"] <= (status["max"] or 10)
        records = await asyncio.gather(*(service.until_final(submitted["taskId"]) for submitted in submissions))
        assert [Status.COMPLETED] * 10 == [record.status for record in records]


async def test_disconnect_of_a_client_does_not_affect_readers(start_service: StartService) -> None:
    """When the client that submitted the task disconnects, another reader gets the stream to its end."""
    script = sequence(UseTool("Bash", {"command": "true"}, text="I start."), Say("Done."))
    async with start_service(script) as service:
        body = service.body(allowedTools=["Bash"])
        async with asyncio.timeout(WAIT_SECONDS), service.http.post(f"{service.url}/run", json=body) as response:
            task_id = response.headers["X-Task-Id"]
            reading = asyncio.create_task(service.events(task_id))
            await response.content.readany()
        assert "done" == (await reading)[-1].name


# --- isolation of the agent -----------------------------------------------------------------------------------------


def print_environment(conversation: Conversation) -> Reply:
    """Have the agent print the environments, arguments and files that it can read."""
    command = (
        # Filtered, because the CLI cuts long output, also inside a line, and other processes of the machine cause much of it.
        "env; { cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n'; cat ~/../*/*; } 2>/dev/null"
        " | grep -aE '_API_KEY=|made-up|private'"
    )
    if conversation.turn == 0:
        return UseTool("Bash", {"command": command})
    return Say("Done.")


async def test_agent_cannot_read_a_credential(start_service: StartService) -> None:
    """No argument or file of the task has the client's key or the prompt, and no environment has the key.

    PR_SET_DUMPABLE protects the credential in the environment of the service. Root can read it in any case, so the test checks
    only whether the log has the key of the client.
    """
    async with start_service(print_environment) as service:
        events = await service.run(allowedTools=["Bash"], prompt="The prompt is private.")
        printed = "".join(
            str(block["content"])
            for event in events
            if event.name == "message" and event.data["type"] == "user"
            for block in event.data["message"]["content"]
        )
        assert "ANTHROPIC_BASE_URL=" in printed
        assert MADE_UP_KEY not in printed
        # Redaction is not enough: only the token of the run may have been printed and redacted.
        assert {"ANTHROPIC_API_KEY=***"} == {line for line in printed.splitlines() if line.endswith("=***")}
        assert not [line for line in printed.splitlines() if "The prompt is private." in line and "claude" in line]


# --- large output -------------------------------------------------------------------------------------------------------

PEAK = """
import os, re
def peak(pid):
    return int(re.search(r"VmHWM:\\s+(\\d+)", open(f"/proc/{pid}/status").read())[1])
"""


async def test_long_line_and_many_lines_are_stored(
    start_service: StartService, fake_cli: FakeCli, backend_name: str
) -> None:
    """A line of 64 MiB, the longest possible, and 100,000 lines are stored completely. The memory of the worker is bounded.

    The bound is 200 MiB on the local backend. On Google Cloud the upload library holds two more copies of a line.
    """
    cli = fake_cli(
        PEAK
        + """
import hashlib, json, sys
sys.stdin.read()
out = sys.stdout.buffer
digest = hashlib.sha256()
def write(line):
    digest.update(line); out.write(line)
write(b'{"type":"big","text":"' + b"x" * (64 * 1024 * 1024 - 24) + b'"}\\n')
for number in range(100_000):
    write(b'{"type":"line","number":%d}\\n' % number)
out.flush()
print(json.dumps({"type":"result","is_error":False,"num_turns":1,"digest":digest.hexdigest(),
    "kib":peak(os.getppid())},separators=(",",":")))
"""
    )
    # The script measures the worker, which is its parent.
    async with start_service(CLAUDE_CLI=str(cli), CCRUN_SANDBOX="off") as service:
        submitted = await service.submit()
        record = await service.until_final(submitted["taskId"])
        assert Status.COMPLETED == record.status
        digest, lines = hashlib.sha256(), 0
        async with service.http.get(f"{service.url}/tasks/{submitted['taskId']}/logs") as response:
            content = await response.read()
        *lines_written, last = content.splitlines(keepends=True)
        for line in lines_written:
            digest.update(line)
            lines += 1
        result: dict[str, Any] = json.loads(last)
        assert (100_001, digest.hexdigest()) == (lines, result["digest"])
        assert result["kib"] < {"local": 200, "gcp": 300}[backend_name] * 1024


# --- failures ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend_name", ["local"])
async def test_two_services_can_share_a_data_directory(start_service: StartService, tmp_path: Path) -> None:
    """A task that was submitted to one service can be read and cancelled with the other."""
    async with (
        start_service(lambda _: Hang(), data_dir=tmp_path / "shared") as one,
        start_service(data_dir=tmp_path / "shared") as other,
    ):
        submitted = await one.submit()
        await other.until(submitted["taskId"], lambda record: record.status is Status.RUNNING)
        async with other.http.post(f"{other.url}/cancel/{submitted['taskId']}") as response:
            assert 200 == response.status
        assert Reason.CANCELLED == (await one.until_final(submitted["taskId"])).reason


async def test_task_of_a_killed_worker_is_settled(start_service: StartService, receiver: Receiver) -> None:
    """The task fails as `worker_lost`, its callback is delivered, and its workspace is deleted."""
    async with start_service(lambda _: Hang()) as service:
        submitted = await service.submit(callbackUrl=receiver.url)
        async with asyncio.timeout(WAIT_SECONDS):
            # The agent is running when it has sent a request.
            while not service.model.requests:
                await asyncio.sleep(0.02)
        await service.deployment.kill_worker(submitted["taskId"])
        async with asyncio.timeout(WAIT_SECONDS):
            # Reading the task settles it.
            while "running" == (await service.get(f"/tasks/{submitted['taskId']}"))["status"]:
                await asyncio.sleep(0.05)
        await service.deployment.sweep()
        body, _ = await receiver.next()
        assert "failed" == json.loads(body)["status"]
        record = await service.until_final(submitted["taskId"])
        assert Reason.WORKER_LOST == record.reason
        async with asyncio.timeout(WAIT_SECONDS):
            while Path(f"/tmp/ws-{submitted['taskId']}").exists():
                await asyncio.sleep(0.05)

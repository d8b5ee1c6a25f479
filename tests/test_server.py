"""The service as a process: its start, its shutdown, and its recovery after a kill."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.process import is_alive
from helpers.service import MADE_UP_KEY, WAIT_SECONDS, remove_workers, serve_process, until_record

from ccrun import config
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.backends.local.layout import process_marker
from ccrun.lifecycle import finish
from ccrun.process import tree
from ccrun.server import RESERVED_CONNECTIONS, RESERVED_FILES, serving
from ccrun.store import Store
from ccrun.task import CallbackState, Outcome, Reason, Status, TaskId
from ccrun.testing.model import Hang, Say, ScriptedModel, UseTool


async def run_ccrun(*arguments: str, **settings: str) -> tuple[int, str, str]:
    """Run a command; return its exit status, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "ccrun", *arguments),
        env={**os.environ, **settings},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(WAIT_SECONDS):
        stdout, stderr = await process.communicate()
    assert process.returncode is not None
    return process.returncode, stdout.decode(), stderr.decode()


#: A CLI that succeeds.
SUCCESS = """
import json, sys
sys.stdin.read()
print(json.dumps({"type": "result", "is_error": False, "num_turns": 1}, separators=(",", ":")))
"""


async def submit(url: str, **fields: Any) -> str:
    """Submit a task; return its ID."""
    body = {"prompt": "Do it.", "anthropicApiKey": MADE_UP_KEY, "callbackUrl": "http://127.0.0.1:9/", **fields}
    async with aiohttp.ClientSession() as http, http.post(f"{url}/run-async", json=body) as response:
        assert response.status == 202, await response.text()
        return str((await response.json())["taskId"])


async def test_service_does_not_start_on_a_port_in_use(tmp_path: Path) -> None:
    """The error has the port and says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        status, _, stderr = await run_ccrun("serve", PORT=str(port), CCRUN_DATA_DIR=str(tmp_path))
    expected = f"port {port} on 127.0.0.1 is in use: stop what listens there, or set PORT to a free one."
    assert (70, f"ccrun cannot start: {expected}\n") == (status, stderr)


async def test_service_does_not_start_with_an_invalid_setting() -> None:
    """The error is one line with the variable, its value and the allowed values."""
    status, _, stderr = await run_ccrun("serve", MAX_TIMEOUT_MINUTES="soon")
    assert (78, 'MAX_TIMEOUT_MINUTES must be a number from 1 to 1440, not "soon".\n') == (status, stderr)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.com"])
async def test_service_without_tokens_does_not_start_for_other_machines(tmp_path: Path, host: str) -> None:
    """Anyone on the network could run code on the machine."""
    status, _, stderr = await run_ccrun("serve", HOST=host, PORT="0", CCRUN_DATA_DIR=str(tmp_path))
    assert (78, True) == (
        status,
        stderr.startswith(f"HOST is {host}, where other machines can run tasks without a token: "),
    )


@pytest.mark.parametrize("settings", [{"CCRUN_ALLOW_ANYBODY": "1"}, {"CCRUN_API_TOKENS": "made-up-token-0123"}])
async def test_service_starts_for_other_machines_if_that_is_wanted(tmp_path: Path, settings: dict[str, Any]) -> None:
    """With tokens, or when the operator says so. The log says that requests must bring a credential."""
    log_file = tmp_path / "log"
    async with serve_process(tmp_path / "data", log_file, HOST="0.0.0.0", **settings):
        async with asyncio.timeout(WAIT_SECONDS):
            while "model_credential_missing" not in (text := await asyncio.to_thread(log_file.read_text)):
                await asyncio.sleep(0.02)
    assert ("CCRUN_ALLOW_ANYBODY" in settings) == ("api_unprotected" in text)


async def test_service_does_not_start_with_an_incomplete_cloud(tmp_path: Path) -> None:
    """Its workers would fail one after the other."""
    settings = {"CLAUDE_CODE_USE_BEDROCK": "1", "CCRUN_DATA_DIR": str(tmp_path), "PORT": "0"}
    status, _, stderr = await run_ccrun("serve", **settings)
    assert (78, "CLAUDE_CODE_USE_BEDROCK needs AWS_REGION.\n") == (status, stderr)


async def test_service_does_not_start_with_fewer_users_than_tasks(tmp_path: Path) -> None:
    """Its tasks would wait for users in vain."""
    settings = {"CCRUN_AGENT_USERS": "61300-61301", "MAX_CONCURRENT_TASKS": "3", "CCRUN_DATA_DIR": str(tmp_path)}
    status, _, stderr = await run_ccrun("serve", PORT="0", **settings)
    error = "CCRUN_AGENT_USERS has 2 users, fewer than MAX_CONCURRENT_TASKS (3): each concurrent task needs one."
    assert (78, f"{error}\n") == (status, stderr)


async def test_service_does_not_start_without_its_data_directory(tmp_path: Path) -> None:
    """The error says why the directory cannot be created."""
    (tmp_path / "data").touch()
    status, _, stderr = await run_ccrun("serve", PORT="0", CCRUN_DATA_DIR=str(tmp_path / "data"))
    expected = "CCRUN_DATA_DIR must name a directory that exists or can be created: File exists.\n"
    assert (78, expected) == (status, stderr)


async def test_sigterm_stops_the_service(tmp_path: Path) -> None:
    """An idle service exits soon, with status 0."""
    async with serve_process(tmp_path) as service:
        service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert 0 == await service.process.wait()


async def test_sigterm_closes_a_hundred_streams_in_time(tmp_path: Path) -> None:
    """SIGTERM closes the connections of all readers before the platform would kill the service; the task keeps running."""
    store = Store(DirectoryBlobs(tmp_path))
    async with (
        ScriptedModel(lambda _: Hang()) as model,
        serve_process(tmp_path, ANTHROPIC_BASE_URL=model.url) as service,
    ):
        task_id = await submit(service.url)
        await until_record(store, task_id, lambda record: record.status is Status.RUNNING)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            streams = [await http.get(f"{service.url}/tasks/{task_id}/events") for _ in range(100)]
            for stream in streams:
                await stream.content.readline()
            service.process.send_signal(signal.SIGTERM)
            # Cloud Run sends SIGKILL after ten seconds. An idle machine needs a tenth of a second.
            async with asyncio.timeout(9):
                await asyncio.gather(*(stream.content.read() for stream in streams), return_exceptions=True)
                assert 0 == await service.process.wait()
        assert Status.RUNNING == (await store.record(TaskId(task_id))).status
    async with serve_process(tmp_path) as service, aiohttp.ClientSession() as http:
        await http.post(f"{service.url}/cancel/{task_id}")
        await until_record(store, task_id, lambda record: record.status is Status.CANCELLED)


async def test_streams_leave_room_for_other_requests(tmp_path: Path) -> None:
    """With few open files, streams above a limit get 503 with Retry-After, other requests are served, and the log stays short."""
    log_file = tmp_path / "log"
    async with (
        ScriptedModel(lambda _: Hang()) as model,
        serve_process(tmp_path / "data", log_file, open_files=128, ANTHROPIC_BASE_URL=model.url) as service,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        task_id = await submit(service.url)
        streams = await asyncio.gather(*(http.get(f"{service.url}/tasks/{task_id}/events") for _ in range(200)))
        statuses = Counter(stream.status for stream in streams)
        allowed = 128 - RESERVED_FILES - RESERVED_CONNECTIONS
        assert {200: allowed, 503: 200 - allowed} == statuses
        assert {"15"} == {stream.headers["Retry-After"] for stream in streams if stream.status == 503}
        for _ in range(3):
            await submit(service.url)
        for stream in streams:
            stream.close()
        await http.post(f"{service.url}/cancel/{task_id}")
    assert len((await asyncio.to_thread(log_file.read_text)).splitlines()) < 250
    await asyncio.to_thread(remove_workers, tmp_path / "data")


async def test_waiting_connections_are_logged_once(tmp_path: Path) -> None:
    """If no further connection can be accepted, the log says so once a minute, and the service recovers."""
    log_file = tmp_path / "log"
    async with serve_process(tmp_path / "data", log_file, open_files=96) as service:
        port = int(service.url.rpartition(":")[2])
        connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        async with asyncio.timeout(WAIT_SECONDS):
            while "connections_waiting" not in await asyncio.to_thread(log_file.read_text):
                await asyncio.sleep(0.05)
        for _, writer in connections:
            writer.close()
        async with aiohttp.ClientSession() as http, http.get(f"{service.url}/health") as response:
            assert 200 == response.status
    assert 1 == (await asyncio.to_thread(log_file.read_text)).count("connections_waiting")


async def test_start_logs_proxies_and_isolation(tmp_path: Path) -> None:
    """The log has no password. It says that agents do not get a proxy whose URL has one, and that they can call the service."""
    log_file = tmp_path / "log"
    settings: dict[str, Any] = {
        "HTTPS_PROXY": "http://me:made-up-password@proxy.invalid:3128",
        "NO_PROXY": "corp.example",
        "CCRUN_SANDBOX": "off",
    }

    def logged() -> list[dict[str, Any]]:
        return [json.loads(line) for line in log_file.read_text().splitlines()]

    async with serve_process(tmp_path / "data", log_file, **settings):
        async with asyncio.timeout(WAIT_SECONDS):
            while not (lines := {line["event"]: line for line in await asyncio.to_thread(logged)}).keys() >= {
                "proxy_used",
                "agent_proxy_missing",
                "agents_not_isolated",
            }:
                await asyncio.sleep(0.02)
    used = lines["proxy_used"]
    assert ("http://proxy.invalid:3128", "corp.example") == (used["httpsProxy"], used["noProxy"])
    assert "made-up-password" not in str(lines)
    message = "Agents run outside of a sandbox; agents can call this API unless CCRUN_API_TOKENS is set"
    isolation = lines["agents_not_isolated"]
    assert (message, "process", "CCRUN_SANDBOX is off.") == tuple(
        isolation[name] for name in ("message", "level", "error")
    )


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"],
    ids=["nothing", "half a line", "half of the headers", "a request"],
)
async def test_idle_connection_is_closed(tmp_path: Path, sent: bytes) -> None:
    """A connection on which no complete request follows is closed."""
    environment = {"PORT": "0", "CCRUN_DATA_DIR": str(tmp_path)}
    settings = await asyncio.to_thread(config.load, environment)
    async with serving(settings, environment, idle_seconds=0.2) as url, asyncio.timeout(WAIT_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(sent)
        assert (b"HTTP/1.1 200 OK" in await reader.read()) == sent.endswith(b"\r\n\r\n")
        writer.close()


async def test_next_service_continues_after_a_kill(tmp_path: Path) -> None:
    """After SIGKILL of the service, a running task continues; the next service launches queued tasks and settles lost ones."""
    store = Store(DirectoryBlobs(tmp_path))
    async with ScriptedModel(lambda c: Say("Done.") if "quick" in c.prompt else Hang()) as model:
        async with serve_process(tmp_path, MAX_CONCURRENT_TASKS="1", ANTHROPIC_BASE_URL=model.url) as service:
            stuck = await submit(service.url)
            queued = [await submit(service.url, prompt="Be quick.") for _ in range(3)]
            await until_record(store, stuck, lambda record: record.status is Status.RUNNING)
            await service.kill()
        assert [Status.PENDING] * 3 == [(await store.record(TaskId(task_id))).status for task_id in queued]
        worker = int((tmp_path / ".workers" / stuck).read_text())
        async with serve_process(tmp_path, MAX_CONCURRENT_TASKS="1", ANTHROPIC_BASE_URL=model.url):
            for task_id in queued:
                record = await until_record(store, task_id, lambda record: record.status.is_final)
                assert Status.COMPLETED == record.status
            # Its worker still runs.
            assert Status.RUNNING == (await store.record(TaskId(stuck))).status
            os.kill(worker, signal.SIGKILL)
            record = await until_record(store, stuck, lambda record: record.status.is_final)
            assert Reason.WORKER_LOST == record.reason


async def test_next_service_removes_what_a_lost_worker_has_left(tmp_path: Path) -> None:
    """If the service was killed after it recorded that a worker was lost, the next one kills the agent and removes its files."""
    data_dir = tmp_path / "data"
    store = Store(DirectoryBlobs(data_dir))
    async with (
        ScriptedModel(lambda _: UseTool("Bash", {"command": "tail -f /dev/null"})) as model,
        # The processes in a sandbox end with the worker.
        serve_process(data_dir, ANTHROPIC_BASE_URL=model.url, CCRUN_SANDBOX="off") as service,
    ):
        task_id = await submit(service.url, allowedTools=["Bash"])
        workspace = Path(tempfile.gettempdir()) / f"ws-{task_id}"
        agent = await until_process(process_marker(data_dir, TaskId(task_id)), "tail")
        await service.kill()
    worker = psutil.Process(int((data_dir / ".workers" / task_id).read_text()))
    # Its guardian would kill the agent at once.
    guardian = worker.parent()
    assert guardian is not None
    guardian.kill()
    worker.kill()
    lost = Outcome(status=Status.FAILED, reason=Reason.WORKER_LOST, exit_code=1)
    await store.update(TaskId(task_id), lambda record: finish(record, lost, at=dt.datetime.now(dt.UTC)))
    assert workspace.exists()
    assert psutil.pid_exists(agent)
    async with serve_process(data_dir), asyncio.timeout(WAIT_SECONDS):
        while workspace.exists() or is_alive(agent) or any((data_dir / ".workers").iterdir()):
            await asyncio.sleep(0.02)


async def until_process(marker: str, name: str) -> int:
    """Wait until a process of a task runs, and return its ID."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if process.name() == name and process.environ().get(tree.MARKER_VARIABLE) == marker:
                        return process.pid
            await asyncio.sleep(0.05)


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[str, asyncio.Queue[bytes]]]:
    """Start a receiver of callbacks; return its URL and the queue of the bodies that it gets."""
    bodies: asyncio.Queue[bytes] = asyncio.Queue()

    async def receive(request: web.Request) -> web.Response:
        bodies.put_nowait(await request.read())
        return web.Response()

    app = web.Application()
    app.router.add_post("/", receive)
    async with TestServer(app) as server:
        yield str(server.make_url("/")), bodies


async def run_and_kill(data_dir: Path, callback_url: str) -> str:
    """Start a task, kill the service and the worker, and return the task ID."""
    async with (
        ScriptedModel(lambda _: Hang()) as model,
        serve_process(data_dir, ANTHROPIC_BASE_URL=model.url) as service,
    ):
        task_id = await submit(service.url, callbackUrl=callback_url)
        await until_record(Store(DirectoryBlobs(data_dir)), task_id, lambda record: record.status is Status.RUNNING)
        await service.kill()
    os.kill(int((data_dir / ".workers" / task_id).read_text()), signal.SIGKILL)
    return task_id


async def test_next_service_delivers_the_callback_of_a_lost_task(
    tmp_path: Path, receiver: tuple[str, asyncio.Queue[bytes]]
) -> None:
    """After service and worker were killed, the next service settles the task and delivers its callback."""
    url, bodies = receiver
    task_id = await run_and_kill(tmp_path, url)
    async with serve_process(tmp_path):
        async with asyncio.timeout(WAIT_SECONDS):
            body = json.loads(await bodies.get())
        assert (task_id, "failed") == (body["taskId"], body["status"])
        await until_record(
            Store(DirectoryBlobs(tmp_path)),
            task_id,
            lambda record: bool(record.webhook and record.webhook.state is CallbackState.DELIVERED),
        )


async def test_sweep_command_works_without_a_service(
    tmp_path: Path, receiver: tuple[str, asyncio.Queue[bytes]]
) -> None:
    """`ccrun sweep` settles a lost task and delivers its callback while no service runs."""
    url, bodies = receiver
    await run_and_kill(tmp_path, url)
    status, stdout, _ = await run_ccrun("sweep", CCRUN_DATA_DIR=str(tmp_path), LOG_FORMAT="json")
    assert 0 == status
    last = json.loads(stdout.splitlines()[-1])
    assert (1, 1) == (last["settled"], last["delivered"])
    assert 1 == bodies.qsize()


async def test_second_service_leaves_queued_tasks_to_the_first(tmp_path: Path, fake_cli: Callable[[str], Path]) -> None:
    """A sweep of one service launches nothing that another has queued: each task has one worker, and none starts for nothing."""
    data, cli = tmp_path / "data", str(fake_cli(SUCCESS))
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    async with serve_process(data, logs[0], CLAUDE_CLI=cli, MAX_CONCURRENT_TASKS="1") as first:
        task_ids = [await submit(first.url) for _ in range(6)]
        async with serve_process(data, logs[1], CLAUDE_CLI=cli, MAX_CONCURRENT_TASKS="1"):
            for task_id in task_ids:
                await until_record(
                    Store(DirectoryBlobs(data)), task_id, lambda record: record.status is Status.COMPLETED
                )
    texts = [await asyncio.to_thread(log.read_text) for log in logs]
    assert [6, 0] == [text.count('"task_started"') for text in texts]
    assert [0, 0] == [text.count('"task_not_claimed"') for text in texts]

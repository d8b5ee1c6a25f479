"""The service as a process: how it starts, how it ends, what it finds after it was killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.service import MADE_UP_KEY, WAIT_SECONDS, serve_process, until_record

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.store import Store
from ccrun.task import CallbackState, Reason, Status, TaskId
from ccrun.testing.model import Hang, Say, ScriptedModel


async def run_ccrun(*arguments: str, **settings: str) -> tuple[int, str, str]:
    """Run a command to its end; return exit status, stdout and stderr."""
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


async def submit(url: str, **fields: Any) -> str:
    """Submit a task; return its ID."""
    body = {"prompt": "Do it.", "anthropicApiKey": MADE_UP_KEY, "callbackUrl": "http://127.0.0.1:9/", **fields}
    async with aiohttp.ClientSession() as http, http.post(f"{url}/run-async", json=body) as response:
        assert response.status == 202, await response.text()
        return str((await response.json())["taskId"])


async def test_a_port_in_use_stops_the_start_with_one_sentence(tmp_path: Path) -> None:
    """The operator is told which port, and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, stderr = await run_ccrun("serve", PORT=str(port), CCRUN_DATA_DIR=str(tmp_path))
    expected = f"port {port} on 127.0.0.1 is in use: stop what listens there, or set PORT to a free one."
    assert (70, f"ccrun cannot start: {expected}\n") == (status, stderr)


async def test_a_wrong_setting_stops_the_start_with_one_line() -> None:
    """The line names the variable, its fault and what is allowed."""
    status, _, stderr = await run_ccrun("serve", MAX_TIMEOUT_MINUTES="soon")
    assert (78, 'MAX_TIMEOUT_MINUTES must be a number from 1 to 1440, not "soon".\n') == (status, stderr)


async def test_a_data_folder_that_cannot_be_made_stops_the_start_with_one_sentence(tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "data").touch()
    status, _, stderr = await run_ccrun("serve", PORT="0", CCRUN_DATA_DIR=str(tmp_path / "data"))
    expected = "CCRUN_DATA_DIR must name a directory that exists or can be created: File exists.\n"
    assert (78, expected) == (status, stderr)


async def test_sigterm_ends_the_service_in_order(tmp_path: Path) -> None:
    """A service that is told to end does so at once, with exit status 0."""
    async with serve_process(tmp_path) as service:
        service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(2):
            assert 0 == await service.process.wait()


async def test_sigterm_closes_a_hundred_streams_in_time(tmp_path: Path) -> None:
    """All readers see their connection close before the platform would kill the service; the task keeps running."""
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


async def test_after_kill_9_the_next_start_finishes_what_was_left(tmp_path: Path) -> None:
    """A running task goes on by itself, queued ones are started, and a lost worker's task is settled."""
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
            # It was not disturbed: its worker lives.
            assert Status.RUNNING == (await store.record(TaskId(stuck))).status
            os.kill(worker, signal.SIGKILL)
            record = await until_record(store, stuck, lambda record: record.status.is_final)
            assert Reason.WORKER_LOST == record.reason


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[str, asyncio.Queue[bytes]]]:
    """A receiver of callbacks, and what it gets."""
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def receive(request: web.Request) -> web.Response:
        got.put_nowait(await request.read())
        return web.Response()

    app = web.Application()
    app.router.add_post("/", receive)
    async with TestServer(app) as server:
        yield str(server.make_url("/")), got


async def left_by_killed_ones(data_dir: Path, callback_url: str) -> str:
    """Run a task until the agent is at work, kill service and worker, and return the task's ID."""
    async with (
        ScriptedModel(lambda _: Hang()) as model,
        serve_process(data_dir, ANTHROPIC_BASE_URL=model.url) as service,
    ):
        task_id = await submit(service.url, callbackUrl=callback_url)
        await until_record(Store(DirectoryBlobs(data_dir)), task_id, lambda record: record.status is Status.RUNNING)
        await service.kill()
    os.kill(int((data_dir / ".workers" / task_id).read_text()), signal.SIGKILL)
    return task_id


async def test_a_callback_owed_by_a_killed_worker_is_delivered_by_the_next_service(
    tmp_path: Path, receiver: tuple[str, asyncio.Queue[bytes]]
) -> None:
    """Service and worker are both killed; the next service settles the task and calls the receiver."""
    url, got = receiver
    task_id = await left_by_killed_ones(tmp_path, url)
    async with serve_process(tmp_path):
        async with asyncio.timeout(WAIT_SECONDS):
            body = json.loads(await got.get())
        assert (task_id, "failed") == (body["taskId"], body["status"])
        await until_record(
            Store(DirectoryBlobs(tmp_path)),
            task_id,
            lambda record: bool(record.webhook and record.webhook.state is CallbackState.DELIVERED),
        )


async def test_a_sweep_by_hand_settles_without_a_service(
    tmp_path: Path, receiver: tuple[str, asyncio.Queue[bytes]]
) -> None:
    """`ccrun sweep` finds a task whose worker is gone, with no service running, and delivers its callback."""
    url, got = receiver
    await left_by_killed_ones(tmp_path, url)
    status, stdout, _ = await run_ccrun("sweep", CCRUN_DATA_DIR=str(tmp_path), LOG_FORMAT="json")
    assert 0 == status
    last = json.loads(stdout.splitlines()[-1])
    assert (1, 1) == (last["settled"], last["delivered"])
    assert 1 == got.qsize()

"""The examples of the documents: tasks that a running service completes, and receivers that accept its callbacks."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from helpers.git import GitSetup, git_setup
from helpers.service import CALLBACK_SECRET, WAIT_SECONDS, StartService
from standins.githttp import TOKEN, GitHttp
from standins.gitssh import GitSsh, key_pair, needs_ssh

from ccrun.task import CallbackState, Status

__all__ = ["git_setup"]

EXAMPLES: Final = Path(__file__).resolve().parents[2] / "docs" / "examples"
FILES: Final = sorted(EXAMPLES.glob("*.json"))


@needs_ssh
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
async def test_task_of_an_example_completes(file: Path, start_service: StartService, git_setup: GitSetup) -> None:
    """A service completes each example; only its variables and its callback URL are replaced."""
    await git_setup.repos.create("demo", {"README.md": "# Demo\n"})
    async with GitSsh(git_setup.repos) as ssh, GitHttp(git_setup.repos) as http, start_service() as service:
        variables = {
            "${GIT_REPO}": http.url("demo"),
            "${GIT_TOKEN}": TOKEN,
            "${GIT_REPO_SSH}": ssh.url("demo"),
            "${SSH_KEY}": key_pair().openssh,
        }
        body: dict[str, Any] = json.loads(file.read_text())
        body = {
            field: variables.get(value, value) if isinstance(value, str) else value for field, value in body.items()
        }
        submitted = await service.submit(**{**body, "callbackUrl": "http://127.0.0.1:9/"})
        record = await service.until_final(submitted["taskId"])
    assert (Status.COMPLETED, None) == (record.status, record.error)
    assert not [error for error in record.action_errors if error.action != "uploadFiles"]


async def until_listening(process: asyncio.subprocess.Process) -> str:
    """Wait until a receiver prints its port; return its URL."""
    assert process.stdout is not None
    async with asyncio.timeout(WAIT_SECONDS):
        async for line in process.stdout:
            if line.startswith(b"listening on "):
                return f"http://127.0.0.1:{int(line.split()[2])}/"
    raise AssertionError("the receiver has exited")


PYTHON: Final = """
import sys
from werkzeug.serving import make_server
sys.path.insert(0, sys.argv[1])
from receiver import app
server = make_server("127.0.0.1", 0, app)
print(f"listening on {server.port}", flush=True)
server.serve_forever()
"""


@pytest.fixture(params=["js", "py", "go"])
async def receiver(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """Start the receiver of the documents in each language."""
    directory = EXAMPLES / "receivers"
    program = {"js": "node", "py": sys.executable, "go": "go"}[request.param]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    environment = {
        **os.environ,
        "CLOUDRUN_CALLBACK_SECRET": CALLBACK_SECRET,
        "PORT": "0",
        "HOME": str(tmp_path),
        "GOCACHE": str(tmp_path / "go"),
    }
    match request.param:
        case "js":
            argv = ["node", str(directory / "receiver.js")]
        case "py":
            argv = [sys.executable, "-B", "-c", PYTHON, str(directory)]
        case _:
            # Built first, because killing `go run` does not kill the program that it started.
            argv = [str(tmp_path / "receiver")]
            build = ("go", "build", "-o", *argv, str(directory / "receiver.go"))
            building = await asyncio.create_subprocess_exec(*build, env=environment)
            async with asyncio.timeout(WAIT_SECONDS):
                assert 0 == await building.wait()
    process = await asyncio.create_subprocess_exec(*argv, env=environment, stdout=asyncio.subprocess.PIPE)
    try:
        yield await until_listening(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_receiver_accepts_a_callback(receiver: str, start_service: StartService) -> None:
    """The receiver verifies a callback of the service with special characters and numbers."""
    async with start_service() as service:
        submitted = await service.submit(callbackUrl=receiver, metadata={"text": "äöü ☃ \u2028", "number": 1e-7})
        record = await service.until(
            submitted["taskId"],
            lambda record: bool(
                record.webhook and record.webhook.state in (CallbackState.DELIVERED, CallbackState.OWED)
            ),
        )
    assert record.webhook is not None
    assert (CallbackState.DELIVERED, 1) == (record.webhook.state, record.webhook.attempts)


@pytest.mark.parametrize("fault", ["body", "old", "signature", "missing"])
async def test_receiver_rejects_a_forged_callback(receiver: str, fault: str) -> None:
    """A changed body, an old timestamp, a wrong signature or missing headers give 401."""
    body = b'{"taskId":"t-1","status":"completed","error":null}'
    timestamp = str(int(time.time()) - (400 if fault == "old" else 0))
    signature = hmac.new(CALLBACK_SECRET.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    headers = {"X-Webhook-Timestamp": timestamp, "X-Webhook-Signature": f"sha256={signature}"}
    match fault:
        case "body":
            body = body.replace(b"t-1", b"t-2")
        case "signature":
            headers["X-Webhook-Signature"] = "sha256=" + "0" * 64
        case "missing":
            headers = {}
    async with (
        aiohttp.ClientSession() as http,
        http.post(receiver, data=body, headers={**headers, "Content-Type": "application/json"}) as response,
    ):
        assert 401 == response.status

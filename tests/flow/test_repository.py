"""Tasks with a repository, end to end: the API, real worker processes, the real CLI, real git servers and a scripted model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.git import GitSetup, git_setup
from helpers.service import WAIT_SECONDS, Service, StartService
from standins.githttp import TOKEN, GitHttp
from standins.gitssh import GitSsh, key_pair, needs_ssh
from standins.repos import Repository

from ccrun.task import Status
from ccrun.testing.model import Hang, Say, Script, UseTool, sequence

__all__ = ["git_setup"]
pytestmark = needs_ssh

COMMIT = {"git": {"commit": True, "commitMessage": "Update test snapshots", "push": True, "branch": "main"}}


def run_command(command: str) -> Script:
    """Return a script in which the agent runs a command and finishes."""
    return sequence(UseTool("Bash", {"command": command}), Say("Done."))


@pytest.fixture
async def repository(git_setup: GitSetup) -> Repository:
    """Create a repository with two files."""
    return await git_setup.repos.create("org/code", {"src/a.txt": "old\n", "README.md": "# Code\n"})


@pytest.fixture
async def ssh(git_setup: GitSetup) -> AsyncIterator[GitSsh]:
    """Start an SSH server for the repositories."""
    async with GitSsh(git_setup.repos) as server:
        yield server


async def read_upload(service: Service, gcs_path: str) -> bytes:
    """Return the content of an upload, whose URL is in the record."""
    name = "sessions/" + gcs_path.partition("/sessions/")[2]
    return (await service.store._blobs.read(name)).content


async def test_task_edits_a_repository(start_service: StartService, repository: Repository, ssh: GitSsh) -> None:
    """The worker clones, commits, pushes and uploads; the record, the callback and the server have the same commit."""
    callbacks: asyncio.Queue[dict[str, object]] = asyncio.Queue()

    async def receive(request: web.Request) -> web.Response:
        callbacks.put_nowait(await request.json())
        return web.Response()

    app = web.Application()
    app.router.add_post("/hook", receive)
    script = run_command(
        "cat prepared.txt >>src/a.txt; mkdir -p .out/deep; echo video >.out/deep/v.webm; rm prepared.txt; cat .env"
    )
    async with TestServer(app) as receiver, start_service(script) as service:
        submitted = await service.submit(
            callbackUrl=str(receiver.make_url("/hook")),
            gitRepo=ssh.url("org/code"),
            sshKey=key_pair().openssh,
            allowedTools=["Bash"],
            environmentSecrets={"A_SECRET": "made-up-value"},
            preExecutionCommands=["echo prepared >prepared.txt"],
            postExecutionActions={
                **COMMIT,
                "uploadFiles": {"glob Patterns": [".out/**/*.webm", "*.md"], "gcsPrefix": "artifacts"},
            },
        )
        async with asyncio.timeout(WAIT_SECONDS):
            callback = await callbacks.get()
        record = await service.until_final(submitted["taskId"])
        public = await service.get(f"/tasks/{submitted['taskId']}")
        sha = await repository.sha("main")
        assert (Status.COMPLETED, ()) == (record.status, record.action_errors)
        assert {"sha": sha, "message": "Update test snapshots", "pushed": True, "branch": "main"} == callback[
            "gitCommit"
        ]
        assert {"src/a.txt": b"old\nprepared\n", ".out/deep/v.webm": b"video\n", "README.md": b"# Code\n"} == (
            await repository.files("main")
        )
        assert (public["gitCommit"], public["uploadedFiles"]) == (callback["gitCommit"], callback["uploadedFiles"])
        uploaded = {file["originalPath"]: file for file in public["uploadedFiles"]}
        assert {".out/deep/v.webm", "README.md"} == set(uploaded)
        prefix = f"{submitted['logsPath']}uploads/artifacts/"
        assert {prefix + path for path in uploaded} == {file["gcsPath"] for file in uploaded.values()}
        assert b"video\n" == await read_upload(service, uploaded[".out/deep/v.webm"]["gcsPath"])
        async with service.http.get(f"{service.url}/tasks/{submitted['taskId']}/logs") as response:
            log = await response.text()
        assert "made-up-value" not in log
        assert "A_SECRET='***'" in log
        steps = [line.get("step") for line in map(json.loads, log.splitlines()) if line["type"] == "worker"]
        assert ["clone", "command", "command", "git", "git", "upload"] == steps


async def test_rejected_ssh_key_fails_the_task(
    start_service: StartService, repository: Repository, ssh: GitSsh
) -> None:
    """The stream has an error that names the field of the key."""
    async with start_service() as service:
        events = await service.run(gitRepo=ssh.url("org/code"), sshKey=key_pair(number=1).openssh)
    error = {event.name: event.data for event in events}["error"]
    assert "127.0.0.1 rejected the SSH login: check sshKey." == error["error"]
    assert "prepare_failed" == events[-1].data["status"] or "failed" == events[-1].data["status"]


async def test_changes_of_a_cancelled_task_are_rescued(
    start_service: StartService, repository: Repository, ssh: GitSsh
) -> None:
    """The changes are uploaded as a patch, which is in the record."""
    script = sequence(UseTool("Bash", {"command": "echo new >src/a.txt"}, text="I start."), Hang())
    async with start_service(script) as service:
        submitted = await service.submit(gitRepo=ssh.url("org/code"), sshKey=key_pair().openssh, allowedTools=["Bash"])
        async with asyncio.timeout(WAIT_SECONDS):
            # The second request contains the result of the tool.
            while len(service.model.requests) < 2:
                await asyncio.sleep(0.02)
        async with service.http.post(f"{service.url}/cancel/{submitted['taskId']}") as response:
            assert 200 == response.status
        record = await service.until_final(submitted["taskId"])
        assert Status.CANCELLED == record.status
        [patch] = record.uploaded_files or ()
        assert "rescue.patch" == patch.original_path
        assert b"+new" in await read_upload(service, patch.gcs_path)


@pytest.mark.parametrize("backend_name", ["local"])
async def test_token_is_used_and_hidden_from_the_agent(
    start_service: StartService, git_setup: GitSetup, repository: Repository
) -> None:
    """The worker clones and pushes with the token; no argument, file or environment that the agent can read contains it."""
    command = (
        "cat .git/config; { env; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'; } "
        f"| grep -c {TOKEN}; echo new >src/a.txt"
    )
    async with GitHttp(git_setup.repos) as server, start_service(run_command(command)) as service:
        events = await service.run(
            gitRepo=server.url("org/code"), gitToken=TOKEN, allowedTools=["Bash"], postExecutionActions=COMMIT
        )
        [task] = (await service.get("/tasks"))["tasks"]
    assert await repository.sha("main") == task["gitCommit"]["sha"]
    [printed] = [
        block["content"]
        for event in events
        if event.name == "message" and event.data["type"] == "user"
        for block in event.data["message"]["content"]
    ]
    # Only the command of the test itself contains the token.
    *config, count = str(printed).splitlines()
    assert f"url = {server.url('org/code')}" in str(config)
    assert TOKEN not in str(config)
    assert count.isdecimal()


async def test_workspace_is_deleted(start_service: StartService, repository: Repository, ssh: GitSsh) -> None:
    """After the task, the directories of the agent and of the worker are deleted."""
    async with start_service(run_command("echo new >src/a.txt")) as service:
        submitted = await service.submit(
            gitRepo=ssh.url("org/code"), sshKey=key_pair().openssh, allowedTools=["Bash"], postExecutionActions=COMMIT
        )
        await service.until_final(submitted["taskId"])
        async with asyncio.timeout(WAIT_SECONDS):
            while list(Path("/tmp").glob(f"ws-{submitted['taskId']}*")):
                await asyncio.sleep(0.02)

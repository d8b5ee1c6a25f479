"""A task with a repository, from end to end: the API, real worker processes, the real CLI, real git servers, a scripted model."""

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


def editing(command: str) -> Script:
    """Have the agent run a command, and say that it is done."""
    return sequence(UseTool("Bash", {"command": command}), Say("Done."))


@pytest.fixture
async def repository(git_setup: GitSetup) -> Repository:
    """A repository with a little code."""
    return await git_setup.repos.create("org/code", {"src/a.txt": "old\n", "README.md": "# Code\n"})


@pytest.fixture
async def ssh(git_setup: GitSetup) -> AsyncIterator[GitSsh]:
    """Its server."""
    async with GitSsh(git_setup.repos) as server:
        yield server


async def stored(service: Service, gcs_path: str) -> bytes:
    """Return an uploaded file, found as the record names it."""
    name = "sessions/" + gcs_path.partition("/sessions/")[2]
    return (await service.store._blobs.read(name)).content


async def test_an_agent_edits_a_repository_and_the_callback_tells_what_became_of_it(
    start_service: StartService, repository: Repository, ssh: GitSsh
) -> None:
    """Clone, preparation, agent, commit, push and uploads; record, callback and server agree."""
    got: asyncio.Queue[dict[str, object]] = asyncio.Queue()

    async def receive(request: web.Request) -> web.Response:
        got.put_nowait(await request.json())
        return web.Response()

    app = web.Application()
    app.router.add_post("/hook", receive)
    script = editing(
        "cat prepared.txt >>src/a.txt; mkdir -p .out/deep; echo video >.out/deep/v.webm; rm prepared.txt; cat .env"
    )
    async with TestServer(app) as receiver, start_service(script) as service:
        answer = await service.submit(
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
            told = await got.get()
        record = await service.until_final(answer["taskId"])
        public = await service.get(f"/tasks/{answer['taskId']}")
        sha = await repository.sha("main")
        assert (Status.COMPLETED, ()) == (record.status, record.action_errors)
        assert {"sha": sha, "message": "Update test snapshots", "pushed": True, "branch": "main"} == told["gitCommit"]
        assert {"src/a.txt": b"old\nprepared\n", ".out/deep/v.webm": b"video\n", "README.md": b"# Code\n"} == (
            await repository.files("main")
        )
        assert (public["gitCommit"], public["uploadedFiles"]) == (told["gitCommit"], told["uploadedFiles"])
        uploaded = {file["originalPath"]: file for file in public["uploadedFiles"]}
        assert {".out/deep/v.webm", "README.md"} == set(uploaded)
        prefix = f"{answer['logsPath']}uploads/artifacts/"
        assert {prefix + path for path in uploaded} == {file["gcsPath"] for file in uploaded.values()}
        assert b"video\n" == await stored(service, uploaded[".out/deep/v.webm"]["gcsPath"])
        async with service.http.get(f"{service.url}/tasks/{answer['taskId']}/logs") as response:
            log = await response.text()
        assert "made-up-value" not in log
        assert "A_SECRET='***'" in log
        steps = [line.get("step") for line in map(json.loads, log.splitlines()) if line["type"] == "worker"]
        assert ["clone", "command", "command", "git", "git", "upload"] == steps


async def test_a_refused_key_is_one_clear_sentence(
    start_service: StartService, repository: Repository, ssh: GitSsh
) -> None:
    """On the record and in the stream."""
    async with start_service() as service:
        events = await service.run(gitRepo=ssh.url("org/code"), sshKey=key_pair(number=1).openssh)
    error = {event.name: event.data for event in events}["error"]
    assert "127.0.0.1 refused the SSH login: check sshKey." == error["error"]
    assert "prepare_failed" == events[-1].data["status"] or "failed" == events[-1].data["status"]


async def test_a_cancelled_task_keeps_its_changes(
    start_service: StartService, repository: Repository, ssh: GitSsh
) -> None:
    """The patch is named on the record."""
    script = sequence(UseTool("Bash", {"command": "echo new >src/a.txt"}, text="I begin."), Hang())
    async with start_service(script) as service:
        answer = await service.submit(gitRepo=ssh.url("org/code"), sshKey=key_pair().openssh, allowedTools=["Bash"])
        async with asyncio.timeout(WAIT_SECONDS):
            # The tool has run when its result is sent.
            while len(service.model.requests) < 2:
                await asyncio.sleep(0.02)
        async with service.http.post(f"{service.url}/cancel/{answer['taskId']}") as response:
            assert 200 == response.status
        record = await service.until_final(answer["taskId"])
        assert Status.CANCELLED == record.status
        [kept] = record.uploaded_files or ()
        assert "rescue.patch" == kept.original_path
        assert b"+new" in await stored(service, kept.gcs_path)


@pytest.mark.parametrize("backend_name", ["local"])
async def test_a_token_opens_a_repository_over_http(
    start_service: StartService, git_setup: GitSetup, repository: Repository
) -> None:
    """From clone to push; it is in no argument, file or environment that the agent can see."""
    look = (
        "cat .git/config; { env; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'; } "
        f"| grep -c {TOKEN}; echo new >src/a.txt"
    )
    async with GitHttp(git_setup.repos) as server, start_service(editing(look)) as service:
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
    # The command of the test names the token itself; nothing else that the agent sees does.
    *config, count = str(printed).splitlines()
    assert f"url = {server.url('org/code')}" in str(config)
    assert TOKEN not in str(config)
    assert count.isdecimal()


async def test_workspaces_leave_nothing_behind(
    start_service: StartService, repository: Repository, ssh: GitSsh
) -> None:
    """Neither the agent's nor the worker's own folders."""
    async with start_service(editing("echo new >src/a.txt")) as service:
        answer = await service.submit(
            gitRepo=ssh.url("org/code"), sshKey=key_pair().openssh, allowedTools=["Bash"], postExecutionActions=COMMIT
        )
        await service.until_final(answer["taskId"])
        async with asyncio.timeout(WAIT_SECONDS):
            while list(Path("/tmp").glob(f"ws-{answer['taskId']}*")):
                await asyncio.sleep(0.02)

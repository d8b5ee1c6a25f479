"""docs/permissions.md tells the truth: it lists what each side calls of Google's, all of it and nothing else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import attrs
import grpc
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.service import PATIENCE, read_events
from helpers.sides import Call, Sides, open_sides
from standins import cloudrun
from standins.gcs import FINE, Fault

from ccrun.task import CallbackState, Status, TaskRecord
from ccrun.testing.model import Conversation, Hang, Reply, Say, UseTool

DOCUMENT: Final = Path(__file__).parents[3] / "docs" / "permissions.md"
#: What Google asks for: https://cloud.google.com/storage/docs/access-control/iam-json,
#: https://cloud.google.com/kms/docs/reference/permissions-and-roles,
#: https://cloud.google.com/run/docs/reference/iam/permissions
PERMISSIONS: Final = {
    "objects.insert": {"storage.objects.create"},
    "objects.insert over": {"storage.objects.create", "storage.objects.delete"},
    "objects.get": {"storage.objects.get"},
    "objects.list": {"storage.objects.list"},
    "objects.delete": {"storage.objects.delete"},
    "cryptoKeys.encrypt": {"cloudkms.cryptoKeyVersions.useToEncrypt"},
    "cryptoKeys.decrypt": {"cloudkms.cryptoKeyVersions.useToDecrypt"},
    "Jobs.RunJob": {"run.jobs.run", "run.jobs.runWithOverrides"},
    "Executions.GetExecution": {"run.executions.get"},
    "Executions.CancelExecution": {"run.executions.cancel"},
}
#: Of Google's own roles: https://cloud.google.com/kms/docs/reference/permissions-and-roles
PREDEFINED: Final = {
    "roles/cloudkms.cryptoKeyEncrypter": PERMISSIONS["cryptoKeys.encrypt"],
    "roles/cloudkms.cryptoKeyDecrypter": PERMISSIONS["cryptoKeys.decrypt"],
}
#: Late enough for something to happen between an effect and its answer.
LATE: Final = Fault(silence_seconds=2.0)
#: The call has its effect, its answer does not come.
LOST: Final = Fault(reset="after")

Table = dict[Call, set[str]]


def documented() -> dict[str, Table]:
    """Return what the document lists: by side, each call and its permissions."""
    sections = re.findall(r"^### (\w+) calls\n(.*?)(?=^#|\Z)", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return {side.lower(): table(section) for side, section in sections}


def table(section: str) -> Table:
    """Return the rows of the table in a section; a row may name several resources."""
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {
        Call(method.replace("`", "").strip(), resource): set(re.findall(r"`([^`]+)`", permissions))
        for method, resources, permissions, _ in rows
        for resource in re.findall(r"`([^`]+)`", resources)
    }


def granted() -> dict[str, dict[str, str]]:
    """Return what the document grants: by side, each permission and its condition."""
    section = DOCUMENT.read_text().partition("\n## Grants\n")[2].partition("\n## ")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in section.splitlines() if "`" in line]
    roles = {**PREDEFINED, **{row[0]: set(row[1].split("` `")) for row in rows if len(row) == 2}}
    sides: dict[str, dict[str, str]] = {}
    side = ""
    for identity, role, _, condition in (row for row in rows if len(row) == 4):
        side = identity.removeprefix("ccrun-") or side
        sides.setdefault(side, {}).update(dict.fromkeys(roles[role], condition))
    return sides


def script(conversation: Conversation) -> Reply:
    """Wait for ever when told to, or make some files, else be done."""
    if "Make" in conversation.prompt and conversation.turn == 0:
        return UseTool("Bash", {"command": "touch 1.txt 2.txt"})
    return Hang() if "Wait" in conversation.prompt else Say("Done.")


def test_grants_are_what_the_calls_need() -> None:
    """Each identity is granted the permissions that its calls need and no others, and no condition forbids one of them."""
    conditions: dict[str, Callable[[str], bool]] = {
        "NOT_LOGS": lambda resource: not resource.endswith(".jsonl"),
        "NOT_INDEX": lambda resource: not resource.startswith("index/"),
        "ONLY_ACTIVE": lambda resource: resource.startswith("active/"),
        "none": lambda _: True,
    }
    grants, calls = granted(), documented()
    assert {side: set().union(*table.values()) for side, table in calls.items()} == {
        side: set(permissions) for side, permissions in grants.items()
    }
    refused = [
        (side, call, permission)
        for side, table in calls.items()
        for call, permissions in table.items()
        for permission in permissions
        for condition in grants[side][permission].split(" && ")
        if not conditions[condition](call.resource)
    ]
    assert [] == refused


@attrs.frozen(kw_only=True)
class Scene:
    """Where all that ccrun does is done once."""

    sides: Sides
    receiver: str

    async def submit(self, task_id: str, prompt: str = "Do it.") -> None:
        """Submit a task with a callback."""
        await self.sides.service.submit(taskId=task_id, prompt=prompt, callbackUrl=self.receiver)

    async def post(self, path: str, *, status: int) -> None:
        """Make a request that has that answer."""
        async with self.sides.service.http.post(self.sides.service.url + path) as response:
            assert status == response.status, await response.text()

    async def until_running(self, task_id: str) -> None:
        """Wait until a worker has begun the task."""
        await self.sides.service.until(task_id, lambda record: record.status is Status.RUNNING)

    async def until_delivered(self, task_id: str) -> None:
        """Wait until the callback of a task is delivered."""

        def is_delivered(record: TaskRecord) -> bool:
            return record.webhook is not None and record.webhook.state is CallbackState.DELIVERED

        await self.sides.service.until(task_id, is_delivered)

    async def until_ended(self, task_id: str) -> None:
        """Wait until the execution of a task has ended."""
        found = (
            each for each in self.sides.place.cloud_run.executions.values() if each.overrides["TASK_ID"] == task_id
        )
        async with asyncio.timeout(PATIENCE):
            await next(found).ended.wait()


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    """A service, workers, and a receiver of callbacks that takes them all."""

    async def take(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/hook", take)
    async with TestServer(app) as server, open_sides(script) as sides:
        yield Scene(sides=sides, receiver=str(server.make_url("/hook")))


async def test_each_side_calls_what_the_document_lists(scene: Scene) -> None:
    """Over all that ccrun does, each side makes the calls that its table lists, and no other, with those permissions."""
    await ordinary_life(scene)
    await uploads(scene)
    await deliveries(scene)
    await cancels(scene)
    await deaths(scene)
    doors = {"api": scene.sides.api, "worker": scene.sides.worker, "sweep": scene.sides.sweep}
    seen = {side: {call: PERMISSIONS[call.method] for call in door.calls} for side, door in doors.items()}
    assert documented() == seen


async def ordinary_life(scene: Scene) -> None:
    """Run a task, read all there is to read of it, try to submit it again."""
    service = scene.sides.service
    await service.run(taskId="plain")
    for path in ("/ready", "/tasks", "/tasks/status", "/tasks/plain"):
        await service.get(path)
    assert "done" == (await service.events("plain"))[-1].name
    async with service.http.get(f"{service.url}/tasks/plain/logs") as response:
        assert 200 == response.status
    async with service.http.post(f"{service.url}/run", json=service.body(taskId="plain")) as response:
        assert 409 == response.status


async def uploads(scene: Scene) -> None:
    """Keep what a task makes, while the answer to one of the uploads is lost."""
    service, gcs = scene.sides.service, scene.sides.place.gcs
    gcs.fail_object("storage.objects.create", "uploads/1.txt", LOST)
    body = {"allowedTools": ["Bash"], "postExecutionActions": {"uploadFiles": {"globPatterns": ["*.txt"]}}}
    await service.submit(taskId="kept", prompt="Make files.", callbackUrl=scene.receiver, **body)
    record = await service.until_over("kept")
    assert 2 == len(record.uploaded_files or ())
    await scene.until_delivered("kept")
    gcs.heal()


async def deliveries(scene: Scene) -> None:
    """Ask for callbacks again just when worker and sweep take away the mark of the task; lose a few answers besides."""
    gcs = scene.sides.place.gcs
    await scene.submit("called-back")
    # Of the worker: that it began, and its first chunk.
    gcs.fail("storage.objects.create", LOST, FINE, LOST)
    # Of the worker: the payload, then the mark.
    gcs.fail("storage.objects.delete", FINE, LATE)
    await scene.until_delivered("called-back")
    await scene.post("/tasks/called-back/webhook", status=202)
    await scene.until_ended("called-back")
    gcs.fail("storage.objects.delete", FINE, LATE)
    sweeping = asyncio.create_task(scene.sides.place.sweep())
    await scene.until_delivered("called-back")
    await scene.post("/tasks/called-back/webhook", status=202)
    await sweeping
    gcs.heal()


async def cancels(scene: Scene) -> None:
    """Cancel a task that runs, and one that has not begun."""
    service = scene.sides.service
    await scene.submit("running", "Wait.")
    await scene.until_running("running")
    await scene.post("/cancel/running", status=200)
    await scene.until_delivered("running")
    scene.sides.place.cloud_run.launch_seconds = float("inf")
    body = service.body(taskId="pending")
    async with asyncio.timeout(PATIENCE), service.http.post(f"{service.url}/run", json=body) as response:
        await scene.post("/cancel/pending", status=200)
        assert ["cancelled", "done"] == [event.name async for event in read_events(response)][-2:]


async def deaths(scene: Scene) -> None:
    """Let a launch fail, and end executions in the ways that the API and the sweep have to settle."""
    service, place = scene.sides.service, scene.sides.place
    place.cloud_run.fail("RunJob", cloudrun.Fault(code=grpc.StatusCode.NOT_FOUND))
    body = service.body(taskId="unlaunched")
    async with service.http.post(f"{service.url}/run", json=body) as response:
        assert 502 == response.status
    place.cloud_run.launch_seconds = 0.0
    # So that the payload is still there when the worker dies.
    place.gcs.fail_always("storage.objects.delete", Fault(status=503))
    for task_id in ("settled-by-api", "settled-by-sweep"):
        await scene.submit(task_id)
        await scene.until_running(task_id)
        await place.kill_worker(task_id)
        await scene.until_ended(task_id)
    place.gcs.heal()
    assert "failed" == (await service.get("/tasks/settled-by-api"))["status"]
    await place.sweep()
    for task_id in ("settled-by-api", "settled-by-sweep"):
        await scene.until_delivered(task_id)

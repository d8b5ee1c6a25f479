"""Checks that docs/permissions.md lists exactly the calls of Google's services that each side makes."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import aiohttp
import attrs
import grpc
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.recording import Call, RecordedService, recorded_service
from helpers.service import WAIT_SECONDS, read_events
from standins import cloudrun
from standins.gcs import NO_FAULT, Fault

from ccrun.api.dispatch import Idempotency
from ccrun.seal import Sealed
from ccrun.store import Store
from ccrun.task import CallbackState, Status, TaskId, TaskRecord, TaskType
from ccrun.testing.model import Conversation, Hang, Reply, Say, UseTool

DOCUMENT: Final = Path(__file__).parents[3] / "docs" / "permissions.md"
#: The permissions that a call needs: https://cloud.google.com/storage/docs/access-control/iam-json,
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
    "Executions.ListExecutions": {"run.executions.list"},
    "Executions.CancelExecution": {"run.executions.cancel"},
}
#: The permissions of predefined roles: https://cloud.google.com/kms/docs/reference/permissions-and-roles
PREDEFINED_ROLES: Final = {
    "roles/cloudkms.cryptoKeyEncrypter": PERMISSIONS["cryptoKeys.encrypt"],
    "roles/cloudkms.cryptoKeyDecrypter": PERMISSIONS["cryptoKeys.decrypt"],
}
#: The response comes late, so that something can happen between the effect and the response.
LATE: Final = Fault(response_delay_seconds=2.0)
#: The call takes effect, but its response is lost.
LOST: Final = Fault(reset="after")

Table = dict[Call, set[str]]


def documented() -> dict[str, Table]:
    """Return the calls that the document lists, with their permissions, by side."""
    sections = re.findall(r"^### (\w+) calls\n(.*?)(?=^#|\Z)", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return {side.lower(): table(section) for side, section in sections}


def table(section: str) -> Table:
    """Return the rows of the table in a section. A row may name several resources."""
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {
        Call(method.replace("`", "").strip(), resource): set(re.findall(r"`([^`]+)`", permissions))
        for method, resources, permissions, _ in rows
        for resource in re.findall(r"`([^`]+)`", resources)
    }


def granted() -> dict[str, dict[str, str]]:
    """Return the permissions that the document grants, with their conditions, by side."""
    section = DOCUMENT.read_text().partition("\n## Grants\n")[2].partition("\n## ")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in section.splitlines() if "`" in line]
    roles = {**PREDEFINED_ROLES, **{row[0]: set(row[1].split("` `")) for row in rows if len(row) == 2}}
    recorded: dict[str, dict[str, str]] = {}
    side = ""
    for identity, role, _, condition in (row for row in rows if len(row) == 4):
        side = identity.removeprefix("ccrun-") or side
        recorded.setdefault(side, {}).update(dict.fromkeys(roles[role], condition))
    return recorded


def script(conversation: Conversation) -> Reply:
    """Create files if the prompt says `Make`, hang if it says `Wait`, otherwise finish."""
    if "Make" in conversation.prompt and conversation.turn == 0:
        return UseTool("Bash", {"command": "touch 1.txt 2.txt"})
    return Hang() if "Wait" in conversation.prompt else Say("Done.")


def test_grants_match_the_calls() -> None:
    """Each identity is granted exactly the permissions that its calls need, and no condition excludes one of the calls."""
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
    excluded = [
        (side, call, permission)
        for side, table in calls.items()
        for call, permissions in table.items()
        for permission in permissions
        for condition in grants[side][permission].split(" && ")
        if not conditions[condition](call.resource)
    ]
    assert [] == excluded


@attrs.frozen(kw_only=True)
class Scene:
    """A service, workers, and the URL of a receiver that accepts all callbacks."""

    recorded: RecordedService
    receiver: str

    async def submit(self, task_id: str, prompt: str = "Do it.") -> None:
        """Submit a task with a callback."""
        await self.recorded.service.submit(taskId=task_id, prompt=prompt, callbackUrl=self.receiver)

    async def post(self, path: str, *, status: int) -> None:
        """Send a POST request, and check the status of the response."""
        async with self.recorded.service.http.post(self.recorded.service.url + path) as response:
            assert status == response.status, await response.text()

    async def until_running(self, task_id: str) -> None:
        """Wait until a worker has started the task."""
        await self.recorded.service.until(task_id, lambda record: record.status is Status.RUNNING)

    async def until_delivered(self, task_id: str) -> None:
        """Wait until the callback of a task is delivered."""

        def is_delivered(record: TaskRecord) -> bool:
            return record.webhook is not None and record.webhook.state is CallbackState.DELIVERED

        await self.recorded.service.until(task_id, is_delivered)

    async def until_execution_finished(self, task_id: str) -> None:
        """Wait until the execution of a task has finished."""
        found = (
            each
            for each in self.recorded.deployment.cloud_run.executions.values()
            if each.overrides["TASK_ID"] == task_id
        )
        async with asyncio.timeout(WAIT_SECONDS):
            await next(found).finished.wait()


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    """Start the scene."""

    async def receive(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/hook", receive)
    async with TestServer(app) as server, recorded_service(script) as recorded:
        yield Scene(recorded=recorded, receiver=str(server.make_url("/hook")))


async def test_each_side_makes_the_documented_calls(scene: Scene) -> None:
    """When ccrun does everything it can do, each side makes exactly the calls in its table, with the listed permissions."""
    await successful_task(scene)
    await interrupted_request(scene)
    await uploads(scene)
    await deliveries(scene)
    await cancels(scene)
    await lost_workers(scene)
    await unlaunched_task(scene)
    await clients_that_leave(scene)
    doors = {"api": scene.recorded.api, "worker": scene.recorded.worker, "sweep": scene.recorded.sweep}
    seen = {side: {call: PERMISSIONS[call.method] for call in door.calls} for side, door in doors.items()}
    assert documented() == seen


async def successful_task(scene: Scene) -> None:
    """Run a task, read everything about it, and submit it a second time."""
    service = scene.recorded.service
    await service.run(taskId="plain")
    for path in ("/ready", "/tasks", "/tasks/status", "/tasks/plain"):
        await service.get(path)
    assert "done" == (await service.events("plain"))[-1].name
    async with service.http.get(f"{service.url}/tasks/plain/logs") as response:
        assert 200 == response.status
    async with service.http.post(f"{service.url}/run", json=service.body(taskId="plain")) as response:
        assert 409 == response.status


async def interrupted_request(scene: Scene) -> None:
    """Retry a request whose process was killed after it had stored the payload."""
    service, store = scene.recorded.service, scene.recorded.deployment.store
    body = json.dumps(service.body(taskId="interrupted")).encode()
    await store.mark_active(TaskId("interrupted"), request_digest=Idempotency(key="key-1", caller="").digest(body))
    await store.add_payload(TaskId("interrupted"), Sealed(b"of the killed process"))
    headers = {"Content-Type": "application/json", "Idempotency-Key": "key-1"}
    async with service.http.post(f"{service.url}/run", data=body, headers=headers) as response:
        assert ["done"] == [event.name async for event in read_events(response)][-1:]


async def uploads(scene: Scene) -> None:
    """Upload the files of a task. The response to one of the uploads is lost."""
    service, gcs = scene.recorded.service, scene.recorded.deployment.gcs
    gcs.fail_object("storage.objects.create", "uploads/1.txt", LOST)
    body = {"allowedTools": ["Bash"], "postExecutionActions": {"uploadFiles": {"globPatterns": ["*.txt"]}}}
    await service.submit(taskId="uploaded", prompt="Make files.", callbackUrl=scene.receiver, **body)
    record = await service.until_final("uploaded")
    assert 2 == len(record.uploaded_files or ())
    await scene.until_delivered("uploaded")
    gcs.clear_faults()


async def deliveries(scene: Scene) -> None:
    """Request redeliveries while the worker and the sweep delete the active marker. Some responses are lost."""
    gcs = scene.recorded.deployment.gcs
    await scene.submit("called-back")
    # The worker's first record and first chunk.
    gcs.fail("storage.objects.create", LOST, NO_FAULT, LOST)
    # The worker deletes the payload, then the active marker.
    gcs.fail("storage.objects.delete", NO_FAULT, LATE)
    await scene.until_delivered("called-back")
    await scene.post("/tasks/called-back/webhook", status=202)
    await scene.until_execution_finished("called-back")
    gcs.fail("storage.objects.delete", NO_FAULT, LATE)
    sweeping = asyncio.create_task(scene.recorded.deployment.sweep())
    await scene.until_delivered("called-back")
    await scene.post("/tasks/called-back/webhook", status=202)
    await sweeping
    gcs.clear_faults()


async def cancels(scene: Scene) -> None:
    """Cancel a running task, and one that has not started."""
    service = scene.recorded.service
    await scene.submit("running", "Wait.")
    await scene.until_running("running")
    await scene.post("/cancel/running", status=200)
    await scene.until_delivered("running")
    scene.recorded.deployment.cloud_run.launch_seconds = float("inf")
    body = service.body(taskId="pending")
    async with asyncio.timeout(WAIT_SECONDS), service.http.post(f"{service.url}/run", json=body) as response:
        await scene.post("/cancel/pending", status=200)
        assert ["cancelled", "done"] == [event.name async for event in read_events(response)][-2:]


async def lost_workers(scene: Scene) -> None:
    """Fail a launch, and lose workers whose tasks the API and the sweep settle."""
    service, deployment = scene.recorded.service, scene.recorded.deployment
    deployment.cloud_run.fail("RunJob", cloudrun.Fault(code=grpc.StatusCode.NOT_FOUND))
    body = service.body(taskId="unlaunched")
    async with service.http.post(f"{service.url}/run", json=body) as response:
        assert 502 == response.status
    deployment.cloud_run.launch_seconds = 0.0
    # The payload is still there when the worker is killed.
    deployment.gcs.fail_always("storage.objects.delete", Fault(status=503))
    for task_id in ("settled-by-api", "settled-by-sweep"):
        await scene.submit(task_id)
        await scene.until_running(task_id)
        await deployment.kill_worker(task_id)
        await scene.until_execution_finished(task_id)
    deployment.gcs.clear_faults()
    assert "failed" == (await service.get("/tasks/settled-by-api"))["status"]
    await deployment.sweep()
    for task_id in ("settled-by-api", "settled-by-sweep"):
        await scene.until_delivered(task_id)


async def clients_that_leave(scene: Scene) -> None:
    """Let a client of `POST /run` leave and another one read the task; then leave a task whose instance was killed."""
    service, store = scene.recorded.service, scene.recorded.deployment.store
    for task_id in (TaskId("left"), TaskId("abandoned")):
        body = service.body(taskId=task_id, prompt="Wait.")
        async with aiohttp.ClientSession() as http, http.post(f"{service.url}/run", json=body) as response:
            await scene.until_running(task_id)
            await response.content.readline()
    first = await until_lease(store, TaskId("left"))
    reading = asyncio.create_task(service.events("left"))
    await until_lease(store, TaskId("left"), other_than=first)
    await scene.post("/cancel/left", status=200)
    assert "done" == (await reading)[-1].name
    await until_lease(store, TaskId("abandoned"))
    await store.leases.write(TaskId("abandoned"), at=dt.datetime.now(dt.UTC) - dt.timedelta(hours=1))
    await scene.recorded.deployment.sweep()
    await service.until_final("abandoned")


async def until_lease(store: Store, task_id: TaskId, *, other_than: int | None = None) -> int:
    """Wait for a lease on the task that has another generation; return its generation."""
    async with asyncio.timeout(WAIT_SECONDS):
        while (lease := await store.leases.get(task_id)) is None or lease.generation == other_than:
            await asyncio.sleep(0.05)
        return lease.generation


async def unlaunched_task(scene: Scene) -> None:
    """Let a sweep launch a task whose API was killed before it launched the task."""
    store, task_id = scene.recorded.deployment.store, TaskId("never-launched")
    await store.mark_active(task_id)
    await store.add_payload(task_id, Sealed(b"of the killed process"))
    a_minute_ago = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=1)
    await store.add(
        TaskRecord(
            task_id=task_id,
            type=TaskType.ASYNC,
            status=Status.PENDING,
            created_at=a_minute_ago,
            logs_path=store.logs_path(task_id),
        )
    )
    await scene.recorded.deployment.sweep()
    await scene.until_execution_finished(task_id)

"""The service on the gcp backend: how tasks are created and run, also when calls to Google Cloud fail."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import math
from typing import Literal

import pytest
from grpc import StatusCode
from helpers.cloud import Cloud, Receiver
from helpers.service import MADE_UP_KEY, WAIT_SECONDS, StartService
from standins import cloudrun, gcs, kms
from standins.execution import JOB
from standins.gcs import BUCKET

from ccrun import config
from ccrun.server import serving
from ccrun.task import CallbackState, Reason, Status, TaskId

CREATE: Literal["storage.objects.create"] = "storage.objects.create"
#: More often than any call is attempted.
ALWAYS = 1000
#: Addresses at which no emulator listens.
UNREACHABLE = {
    "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9",
    "KMS_EMULATOR_HOST": "127.0.0.1:9",
    "CLOUD_RUN_EMULATOR_HOST": "127.0.0.1:9",
}


# --- documented behaviour --------------------------------------------------------------------------------------------


async def test_task_is_created_as_documented(cloud: Cloud) -> None:
    """The response has the documented fields, the objects have the documented names, and no other objects are written."""
    cloud.deployment.cloud_run.launch_seconds = math.inf
    response = await cloud.post_task(taskId="task-a")
    [execution] = cloud.executions("task-a")
    assert {
        "taskId": "task-a",
        "status": "pending",
        "logsPath": f"gs://{BUCKET}/sessions/task-a/",
        "createdAt": response.body["createdAt"],
        "executionName": execution.short_name,
    } == response.body
    assert {"encrypted-payload.bin", "metadata.json"} == {
        name for name in await cloud.names("task-a") if not name.startswith(("index", "active"))
    }


async def test_launch_overrides_two_variables(cloud: Cloud) -> None:
    """`TASK_ID` and `ENCRYPTED_PAYLOAD_PATH` are the only variables that a launch adds."""
    await cloud.post_task(taskId="task-a", environmentSecrets={"TOKEN": "made-up"})
    [execution] = cloud.executions("task-a")
    expected = {"TASK_ID": "task-a", "ENCRYPTED_PAYLOAD_PATH": "sessions/task-a/encrypted-payload.bin"}
    assert expected == execution.overrides


async def test_chunks_have_the_documented_names(cloud: Cloud) -> None:
    """Chunks are named `NNN-YYYYMMDD-HHMMSS.jsonl`, starting at 001. The payload of a finished task is deleted."""
    await cloud.submit(taskId="task-a", prompt="Write 3.")
    await cloud.until_final("task-a")
    names = await cloud.names("task-a")
    chunks = sorted(name for name in names if name.endswith(".jsonl"))
    assert "001" == chunks[0].partition("-")[0]
    for chunk in chunks:
        dt.datetime.strptime(chunk[4:], "%Y%m%d-%H%M%S.jsonl").replace(tzinfo=dt.UTC)
    assert "encrypted-payload.bin" not in names


async def test_creation_makes_four_writes_one_encryption_and_one_launch(cloud: Cloud) -> None:
    """Payload, record, index entry and active marker are written once each, and nothing is read."""
    cloud.deployment.cloud_run.launch_seconds = math.inf
    cloud.deployment.gcs.calls.clear()
    await cloud.submit()
    assert ({CREATE: 4}, {"encrypt": 1}, {"RunJob": 1}) == (
        dict(cloud.deployment.gcs.calls),
        dict(cloud.deployment.kms.calls),
        dict(cloud.deployment.cloud_run.calls),
    )


async def test_missing_bucket_setting_has_the_documented_error(start_service: StartService) -> None:
    """Requests about tasks get 500 with the documented error, `/ready` reports it too, and `/health` still works."""
    message = "Async task support not configured (missing GCS_LOGS_BUCKET)"
    environment = {"CCRUN_BACKEND": "gcp", "PROJECT_ID": "p", "PORT": "0", **UNREACHABLE}
    settings = await asyncio.to_thread(config.load, environment)
    async with start_service() as service, serving(settings, {}) as url:
        for method, path in (("POST", "/run-async"), ("POST", "/run"), ("GET", "/tasks"), ("GET", "/tasks/t")):
            async with service.http.request(method, url + path, json=service.body()) as response:
                assert (500, {"error": message}) == (response.status, await response.json())
        async with service.http.get(f"{url}/ready") as response:
            assert (503, message) == (response.status, (await response.json())["error"])
        async with service.http.get(f"{url}/health") as response:
            assert 200 == response.status


async def test_callback_without_a_secret_is_rejected(start_service: StartService) -> None:
    """The gcp backend generates no callback secret: 500 names the setting, and nothing is stored."""
    async with start_service(CLOUDRUN_CALLBACK_SECRET="") as service:
        body = service.body(callbackUrl="https://example.com/")
        async with service.http.post(f"{service.url}/run-async", json=body) as response:
            assert 500 == response.status
            assert "CLOUDRUN_CALLBACK_SECRET" in (await response.json())["error"]
        assert [] == (await service.get("/tasks"))["tasks"]


# --- failed launches -------------------------------------------------------------------------------------------------


async def is_failed_without_leftovers(cloud: Cloud, task_id: str) -> bool:
    """Return whether a task is stored as failed, without a payload, an active marker or an owed callback."""
    record = await cloud.store.record(TaskId(task_id))
    remaining = {name for name in await cloud.names(task_id) if not name.startswith("index")}
    return (Status.FAILED, Reason.LAUNCH_FAILED, None, {"metadata.json"}) == (
        record.status,
        record.reason,
        record.webhook,
        remaining,
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (StatusCode.NOT_FOUND, ("Cloud Run", JOB, "CLOUDRUN_JOB_NAME")),
        (StatusCode.PERMISSION_DENIED, ("Cloud Run", JOB, "run.jobs.run")),
        (StatusCode.UNAUTHENTICATED, ("Cloud Run", "service account")),
        (StatusCode.UNAVAILABLE, ("Cloud Run", JOB)),
    ],
)
async def test_rejected_launch_is_a_502_that_says_what_to_check(
    cloud: Cloud, code: StatusCode, words: tuple[str, ...]
) -> None:
    """The response reports the failure, so the task is stored as failed and owes no callback."""
    cloud.deployment.cloud_run.fail("RunJob", cloudrun.Fault(code=code), times=ALWAYS)
    response = await cloud.post_task(taskId="task-a")
    assert (502, []) == (response.status, [word for word in words if word not in response.body["error"]])
    assert await is_failed_without_leftovers(cloud, "task-a")


async def test_exhausted_quota_is_a_503_with_retry_after(cloud: Cloud) -> None:
    """`Retry-After` is the delay that Google asks for, and the task is stored as failed."""
    fault = cloudrun.Fault(code=StatusCode.RESOURCE_EXHAUSTED, retry_seconds=17)
    cloud.deployment.cloud_run.fail("RunJob", fault, times=ALWAYS)
    response = await cloud.post_task(taskId="task-a")
    assert (503, "17") == (response.status, response.headers["Retry-After"])
    assert "Cloud Run" in response.body["error"]
    assert await is_failed_without_leftovers(cloud, "task-a")


async def test_unreachable_cloud_run_is_a_503(cloud: Cloud) -> None:
    """Nothing was launched, so the client can retry safely. The task is stored as failed."""
    cloud.deployment.cloud_run.stop_listening()
    response = await cloud.post_task(taskId="task-a")
    assert (503, True) == (response.status, "Retry-After" in response.headers)
    assert "Cloud Run cannot be reached" in response.body["error"]
    assert await is_failed_without_leftovers(cloud, "task-a")


async def test_launch_with_a_lost_response_is_not_retried(cloud: Cloud) -> None:
    """The response is 502. The execution that did start finds that the task has failed, and exits with 0."""
    cloud.deployment.cloud_run.launch_seconds = 0.5
    cloud.deployment.cloud_run.fail("RunJob", cloudrun.Fault(reset="after"))
    response = await cloud.post_task(taskId="task-a")
    assert (502, 1) == (response.status, cloud.deployment.cloud_run.calls["RunJob"])
    await cloud.until_executions_finished("task-a")
    assert [0] == [execution.exit_code for execution in cloud.executions("task-a")]
    assert await is_failed_without_leftovers(cloud, "task-a")


async def test_running_task_does_not_fail_when_the_launch_response_is_lost(cloud: Cloud) -> None:
    """A task that a worker has started was launched: the response is 202, and the task completes."""
    cloud.deployment.cloud_run.fail("RunJob", cloudrun.Fault(response_delay_seconds=3600))
    posting = asyncio.create_task(cloud.post_task(taskId="task-a", prompt="Write 1."))
    async with asyncio.timeout(WAIT_SECONDS):
        while not cloud.executions("task-a"):
            await asyncio.sleep(0.01)
    await cloud.until_running("task-a")
    cloud.deployment.cloud_run.reset_connections()
    response = await posting
    assert (202, 1) == (response.status, cloud.deployment.cloud_run.calls["RunJob"]), response.text
    assert Reason.COMPLETED == (await cloud.until_final("task-a")).reason


async def test_retry_of_a_failed_launch_launches_the_task(cloud: Cloud) -> None:
    """A retry with the same Idempotency-Key launches the task with its callback; later ones return it."""
    cloud.deployment.cloud_run.fail("RunJob", cloudrun.Fault(code=StatusCode.NOT_FOUND))
    key = {"Idempotency-Key": "key-1"}
    assert 502 == (await cloud.post_task(headers=key)).status
    retry = await cloud.post_task(headers=key)
    assert (202, "pending", None) == (retry.status, retry.body["status"], retry.headers.get("Idempotent-Replay"))
    assert 2 == cloud.deployment.cloud_run.calls["RunJob"]
    # It will owe its callback.
    assert (await cloud.until_running(retry.body["taskId"])).webhook is not None
    replay = await cloud.post_task(headers=key)
    assert (202, "true") == (replay.status, replay.headers["Idempotent-Replay"])
    assert 2 == cloud.deployment.cloud_run.calls["RunJob"]


async def test_worker_waits_for_the_key_service(cloud: Cloud) -> None:
    """A worker that cannot open its payload for ten seconds, because Cloud KMS is unavailable, then does its task."""
    cloud.deployment.kms.fail("decrypt", kms.Fault(status=503), times=6)
    task_id = await cloud.submit()
    async with asyncio.timeout(WAIT_SECONDS):
        while not any(name.endswith(".jsonl") for name in await cloud.names(task_id)):
            assert not (await cloud.store.record(task_id)).status.is_final
            await asyncio.sleep(0.05)


# --- faults of storage and key service during creation ---------------------------------------------------------------

#: Substrings of the names of the four objects of a new task.
OBJECTS = ("active/", "encrypted-payload.bin", "metadata.json", "index/")


@pytest.mark.parametrize("substring", OBJECTS)
@pytest.mark.parametrize("reset", ["before", "after", None])
async def test_failed_write_during_creation_is_retried(
    cloud: Cloud, substring: str, reset: Literal["before", "after"] | None
) -> None:
    """After a 503, a lost request or a lost response the write is retried, takes effect once, and the response is 202."""
    cloud.deployment.cloud_run.launch_seconds = math.inf
    fault = gcs.Fault(reset=reset) if reset else gcs.Fault(status=503)
    cloud.deployment.gcs.fail_object(CREATE, substring, fault)
    await cloud.submit(taskId="task-a")
    assert {"encrypted-payload.bin", "metadata.json"} < await cloud.names("task-a")
    assert 4 == len(await cloud.names("task-a"))


@pytest.mark.parametrize("substring", OBJECTS)
@pytest.mark.parametrize("reset", ["before", "after", None])
async def test_permanent_write_fault_during_creation_is_a_503(
    cloud: Cloud, receiver: Receiver, substring: str, reset: Literal["before", "after"] | None
) -> None:
    """If any write fails permanently, nothing is launched. After a sweep there is no payload and no active task."""
    cloud.jobs.start_timeout = dt.timedelta(0)
    fault = gcs.Fault(reset=reset) if reset else gcs.Fault(status=503)
    cloud.deployment.gcs.fail_object(CREATE, substring, fault, times=ALWAYS)
    response = await cloud.post_task(taskId="task-a", callbackUrl=receiver.url)
    cloud.deployment.gcs.clear_faults()
    assert (503, True, 0) == (
        response.status,
        "Cloud Storage" in response.body["error"],
        cloud.deployment.cloud_run.calls["RunJob"],
    )
    await cloud.sweep()
    remaining = {name for name in await cloud.names("task-a") if not name.startswith("index")}
    assert remaining <= {"metadata.json"}
    if remaining:
        assert (await cloud.store.record(TaskId("task-a"))).status is Status.FAILED
    await cloud.sweep()
    assert [] == await cloud.store.active()


async def test_failed_key_service_is_a_503(cloud: Cloud) -> None:
    """The error names Cloud KMS and the missing permission, and nothing is stored."""
    cloud.deployment.kms.denied.add("encrypt")
    response = await cloud.post_task(taskId="task-a")
    assert (503, set()) == (response.status, await cloud.names("task-a"))
    assert "Cloud KMS" in response.body["error"]
    assert "useToEncrypt" in response.body["error"]


@pytest.mark.parametrize("fault", [kms.Fault(status=503), kms.Fault(reset="before"), kms.Fault(reset="after")])
async def test_transient_fault_of_the_key_service_is_retried(cloud: Cloud, fault: kms.Fault) -> None:
    """Encryption and decryption are retried, and the worker opens the payload."""
    cloud.deployment.kms.fail("encrypt", fault)
    cloud.deployment.kms.fail("decrypt", fault)
    task_id = await cloud.submit(prompt="Write 1.")
    assert Reason.COMPLETED == (await cloud.until_final(task_id)).reason


# --- faults while a task runs ----------------------------------------------------------------------------------------


async def test_repeated_storage_faults_lose_no_line(cloud: Cloud) -> None:
    """If every third call of the worker and the API fails, the log, the stream and the final status are still complete."""
    faults = (gcs.Fault(status=503), gcs.Fault(reset="before"), gcs.Fault(reset="after"))
    sequence = [fault for each in faults for fault in (gcs.NO_FAULT, gcs.NO_FAULT, each)]
    task_id = await cloud.submit(prompt="Write 300.")
    for method in ("storage.objects.create", "storage.objects.get", "storage.objects.delete"):
        cloud.deployment.gcs.fail(method, *sequence, times=20)
    streamed = [event.data for event in await cloud.events(task_id) if event.data.get("type") == "line"]
    cloud.deployment.gcs.clear_faults()
    assert Reason.COMPLETED == (await cloud.until_final(task_id)).reason
    async with cloud.http.get(f"{cloud.url}/tasks/{task_id}/logs") as response:
        logged = [json.loads(line) for line in (await response.read()).splitlines()]
    expected = [{"type": "line", "number": number} for number in range(300)]
    assert (expected, expected) == (streamed, [line for line in logged if line["type"] == "line"])


async def test_denied_decryption_fails_the_task(cloud: Cloud) -> None:
    """The task fails, and its error names the missing permission."""
    cloud.deployment.kms.denied.add("decrypt")
    task_id = await cloud.submit()
    record = await cloud.until_final(task_id)
    assert (Status.FAILED, Reason.PREPARE_FAILED) == (record.status, record.reason)
    assert "Cloud KMS" in str(record.error)
    assert "useToDecrypt" in str(record.error)


async def test_unopened_payload_is_deleted_with_the_task(cloud: Cloud) -> None:
    """A task that fails before its payload is opened leaves no payload, also without a callback."""
    cloud.deployment.kms.denied.add("decrypt")
    body = {"prompt": "Hang.", "anthropicApiKey": MADE_UP_KEY, "taskId": "task-a"}
    async with cloud.http.post(f"{cloud.url}/run", json=body) as response:
        await response.read()
    await cloud.until_executions_finished("task-a")
    assert "encrypted-payload.bin" not in await cloud.names("task-a")
    assert [] == await cloud.store.active()


async def test_undeleted_active_marker_does_not_fail_the_task(cloud: Cloud) -> None:
    """The outcome is stored, so the worker exits with 0. A later sweep deletes the marker."""
    cloud.deployment.gcs.fail_object("storage.objects.delete", "active", gcs.Fault(status=403), times=ALWAYS)
    body = {"prompt": "Write 1.", "anthropicApiKey": MADE_UP_KEY, "taskId": "task-a"}
    async with cloud.http.post(f"{cloud.url}/run", json=body) as response:
        await response.read()
    await cloud.until_executions_finished("task-a")
    assert [0] == [execution.exit_code for execution in cloud.executions("task-a")]
    cloud.deployment.gcs.clear_faults()
    assert 1 == len(await cloud.store.active())
    await cloud.sweep()
    assert [] == await cloud.store.active()


# --- concurrent executions -------------------------------------------------------------------------------------------


async def test_second_execution_changes_nothing(cloud: Cloud) -> None:
    """A worker that finds its task already running exits with 0 and does not change the record."""
    task_id = await cloud.submit()
    before = await cloud.until_running(task_id)
    second = await cloud.jobs.launch(task_id)
    assert second is not None
    execution = cloud.deployment.cloud_run.executions[second]
    await execution.finished.wait()
    assert 0 == execution.exit_code, execution.output
    assert before == await cloud.store.record(task_id)


async def test_one_of_several_executions_runs_the_task(cloud: Cloud, receiver: Receiver) -> None:
    """All executions exit with 0, the log is written once, and one callback is delivered."""
    cloud.deployment.cloud_run.launch_seconds = 0.3
    task_id = await cloud.submit(prompt="Write 3.", callbackUrl=receiver.url)
    await asyncio.gather(*(cloud.jobs.launch(task_id) for _ in range(2)))
    await cloud.until_executions_finished(task_id)
    assert [0, 0, 0] == [execution.exit_code for execution in cloud.executions(task_id)]
    assert 3 == sum(event.data.get("type") == "line" for event in await cloud.events(task_id))
    assert ["completed"] == [callback["status"] for callback in receiver.received]


async def test_execution_of_a_cancelled_task_does_nothing(cloud: Cloud, receiver: Receiver) -> None:
    """It exits with 0, and the task stays cancelled."""
    cloud.deployment.cloud_run.launch_seconds = 0.3
    task_id = await cloud.submit(callbackUrl=receiver.url)
    response = await cloud.call("POST", f"/cancel/{task_id}")
    assert (200, "cancelled") == (response.status, response.body["status"])
    before = await cloud.store.record(task_id)
    await cloud.until_executions_finished(task_id)
    assert [0] == [execution.exit_code for execution in cloud.executions(task_id)]
    assert (before, []) == (await cloud.store.record(task_id), receiver.received)
    assert before.webhook is not None
    assert CallbackState.OWED is before.webhook.state

"""The service on the gcp backend: how tasks are born, also when Google Cloud fails meanwhile, and what is told of them."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import math
from typing import Literal

import pytest
from grpc import StatusCode
from helpers.cloud import Cloud, Receiver
from helpers.service import MADE_UP_KEY, PATIENCE, StartService
from standins import cloudrun, gcs, kms
from standins.cloudrun import JOB
from standins.gcs import BUCKET

from ccrun import config
from ccrun.server import serving
from ccrun.task import CallbackState, Reason, Status, TaskId

CREATE: Literal["storage.objects.create"] = "storage.objects.create"
#: More than anybody tries.
ALWAYS = 1000
#: Emulators at addresses where nobody listens.
NOBODY = {
    "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9",
    "KMS_EMULATOR_HOST": "127.0.0.1:9",
    "CLOUD_RUN_EMULATOR_HOST": "127.0.0.1:9",
}


# --- what callers and operators rely on ------------------------------------------------------------------------------------


async def test_a_task_is_told_and_kept_as_documented(cloud: Cloud) -> None:
    """202 gives the place of the logs and the execution; its objects have the documented names, and nothing else is written."""
    cloud.place.cloud_run.launch_seconds = math.inf
    answer = await cloud.ask(taskId="task-a")
    [execution] = cloud.executions("task-a")
    assert {
        "taskId": "task-a",
        "status": "pending",
        "logsPath": f"gs://{BUCKET}/sessions/task-a/",
        "createdAt": answer.body["createdAt"],
        "executionName": execution.short_name,
    } == answer.body
    assert {"encrypted-payload.bin", "metadata.json"} == {
        name for name in await cloud.names("task-a") if not name.startswith(("index", "active"))
    }


async def test_a_worker_is_told_its_task_and_its_payload_alone(cloud: Cloud) -> None:
    """`TASK_ID` and `ENCRYPTED_PAYLOAD_PATH` are the only overrides of the job."""
    await cloud.ask(taskId="task-a", environmentSecrets={"TOKEN": "made-up"})
    [execution] = cloud.executions("task-a")
    expected = {"TASK_ID": "task-a", "ENCRYPTED_PAYLOAD_PATH": "sessions/task-a/encrypted-payload.bin"}
    assert expected == execution.overrides


async def test_chunks_have_the_documented_names(cloud: Cloud) -> None:
    """A log is `NNN-YYYYMMDD-HHMMSS.jsonl` from 001 on, and the payload is gone when the task is over."""
    await cloud.submit(taskId="task-a", prompt="Write 3.")
    await cloud.until_over("task-a")
    names = await cloud.names("task-a")
    chunks = sorted(name for name in names if name.endswith(".jsonl"))
    assert "001" == chunks[0].partition("-")[0]
    for chunk in chunks:
        dt.datetime.strptime(chunk[4:], "%Y%m%d-%H%M%S.jsonl").replace(tzinfo=dt.UTC)
    assert "encrypted-payload.bin" not in names


async def test_a_birth_takes_four_writes_one_key_and_one_launch(cloud: Cloud) -> None:
    """Payload, record, index and mark are written once each; nothing is read."""
    cloud.place.cloud_run.launch_seconds = math.inf
    cloud.place.gcs.calls.clear()
    await cloud.submit()
    assert ({CREATE: 4}, {"encrypt": 1}, {"RunJob": 1}) == (
        dict(cloud.place.gcs.calls),
        dict(cloud.place.kms.calls),
        dict(cloud.place.cloud_run.calls),
    )


async def test_without_a_bucket_every_task_is_refused_in_the_documented_words(start_service: StartService) -> None:
    """The answer is 500 for whatever concerns tasks, and `/ready` says the same; `/health` goes on."""
    sentence = "Async task support not configured (missing GCS_LOGS_BUCKET)"
    environment = {"CCRUN_BACKEND": "gcp", "PROJECT_ID": "p", "PORT": "0", **NOBODY}
    settings = await asyncio.to_thread(config.load, environment)
    async with start_service() as service, serving(settings, {}) as url:
        for method, path in (("POST", "/run-async"), ("POST", "/run"), ("GET", "/tasks"), ("GET", "/tasks/t")):
            async with service.http.request(method, url + path, json=service.body()) as response:
                assert (500, {"error": sentence}) == (response.status, await response.json())
        async with service.http.get(f"{url}/ready") as response:
            assert (503, sentence) == (response.status, (await response.json())["error"])
        async with service.http.get(f"{url}/health") as response:
            assert 200 == response.status


async def test_without_a_callback_secret_a_task_with_a_callback_is_refused(start_service: StartService) -> None:
    """No secret is made up in the cloud: 500 names the setting, and nothing is stored."""
    async with start_service(CLOUDRUN_CALLBACK_SECRET="") as service:
        body = service.body(callbackUrl="https://example.com/")
        async with service.http.post(f"{service.url}/run-async", json=body) as response:
            assert 500 == response.status
            assert "CLOUDRUN_CALLBACK_SECRET" in (await response.json())["error"]
        assert [] == (await service.get("/tasks"))["tasks"]


# --- launches that fail ----------------------------------------------------------------------------------------------------


async def is_buried(cloud: Cloud, task_id: str) -> bool:
    """Return whether a task is kept as failed and nothing is left to do for it."""
    record = await cloud.store.record(TaskId(task_id))
    left = {name for name in await cloud.names(task_id) if not name.startswith("index")}
    return (Status.FAILED, Reason.LAUNCH_FAILED, None, {"metadata.json"}) == (
        record.status,
        record.reason,
        record.webhook,
        left,
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
async def test_a_launch_that_google_refuses_is_a_502_that_tells_what_to_check(
    cloud: Cloud, code: StatusCode, words: tuple[str, ...]
) -> None:
    """The caller is told at once, so the task is kept as failed, without payload or mark, and owes no callback."""
    cloud.place.cloud_run.fail("RunJob", cloudrun.Fault(code=code), times=ALWAYS)
    answer = await cloud.ask(taskId="task-a")
    assert (502, []) == (answer.status, [word for word in words if word not in answer.body["error"]])
    assert await is_buried(cloud, "task-a")


async def test_a_quota_that_is_used_up_is_a_503_that_tells_when_to_come_back(cloud: Cloud) -> None:
    """`Retry-After` is what Google says; the task is kept as failed."""
    fault = cloudrun.Fault(code=StatusCode.RESOURCE_EXHAUSTED, retry_seconds=17)
    cloud.place.cloud_run.fail("RunJob", fault, times=ALWAYS)
    answer = await cloud.ask(taskId="task-a")
    assert (503, "17") == (answer.status, answer.headers["Retry-After"])
    assert "Cloud Run" in answer.body["error"]
    assert await is_buried(cloud, "task-a")


async def test_a_cloud_run_that_cannot_be_reached_is_a_503(cloud: Cloud) -> None:
    """Nothing was launched, so a later try is safe; the task is kept as failed."""
    cloud.place.cloud_run.stop_listening()
    answer = await cloud.ask(taskId="task-a")
    assert (503, True) == (answer.status, "Retry-After" in answer.headers)
    assert "Cloud Run cannot be reached" in answer.body["error"]
    assert await is_buried(cloud, "task-a")


async def test_a_launch_whose_answer_is_lost_starts_no_second_execution(cloud: Cloud) -> None:
    """RunJob is never repeated blindly: the caller is told, and what was started finds the task over and ends well."""
    cloud.place.cloud_run.launch_seconds = 0.5
    cloud.place.cloud_run.fail("RunJob", cloudrun.Fault(reset="after"))
    answer = await cloud.ask(taskId="task-a")
    assert (502, 1) == (answer.status, cloud.place.cloud_run.calls["RunJob"])
    await cloud.until_ended("task-a")
    assert [0] == [execution.exit_code for execution in cloud.executions("task-a")]
    assert await is_buried(cloud, "task-a")


async def test_a_task_that_runs_is_not_buried_when_the_answer_to_its_launch_is_lost(cloud: Cloud) -> None:
    """A worker that has begun shows that the launch worked: the caller is told so, and the task comes to its end."""
    cloud.place.cloud_run.fail("RunJob", cloudrun.Fault(silence_seconds=3600))
    asking = asyncio.create_task(cloud.ask(taskId="task-a", prompt="Write 1."))
    async with asyncio.timeout(PATIENCE):
        while not cloud.executions("task-a"):
            await asyncio.sleep(0.01)
    await cloud.until_running("task-a")
    cloud.place.cloud_run.reset_connections()
    answer = await asking
    assert (202, 1) == (answer.status, cloud.place.cloud_run.calls["RunJob"]), answer.text
    assert Reason.COMPLETED == (await cloud.until_over("task-a")).reason


async def test_a_repeat_of_a_request_whose_launch_failed_starts_nothing(cloud: Cloud) -> None:
    """The same Idempotency-Key gives the same failed task; a caller who wants another try takes another key."""
    cloud.place.cloud_run.fail("RunJob", cloudrun.Fault(code=StatusCode.NOT_FOUND))
    key = {"Idempotency-Key": "key-1"}
    assert 502 == (await cloud.ask(headers=key)).status
    replay = await cloud.ask(headers=key)
    assert (202, "failed", "true") == (replay.status, replay.body["status"], replay.headers["Idempotent-Replay"])
    assert 1 == cloud.place.cloud_run.calls["RunJob"]
    assert 202 == (await cloud.ask(headers={"Idempotency-Key": "key-2"})).status


# --- storage and keys that fail during a birth -------------------------------------------------------------------------------

OBJECTS = ("active/", "encrypted-payload.bin", "metadata.json", "index/")


@pytest.mark.parametrize("part", OBJECTS)
@pytest.mark.parametrize("reset", ["before", "after", None])
async def test_a_birth_survives_one_failure_of_each_write(
    cloud: Cloud, part: str, reset: Literal["before", "after"] | None
) -> None:
    """A 503, a lost request, a lost answer: the write is made again, once in effect, and the caller gets a 202."""
    cloud.place.cloud_run.launch_seconds = math.inf
    fault = gcs.Fault(reset=reset) if reset else gcs.Fault(status=503)
    cloud.place.gcs.fail_object(CREATE, part, fault)
    await cloud.submit(taskId="task-a")
    assert {"encrypted-payload.bin", "metadata.json"} < await cloud.names("task-a")
    assert 4 == len(await cloud.names("task-a"))


@pytest.mark.parametrize("part", OBJECTS)
@pytest.mark.parametrize("reset", ["before", "after", None])
async def test_a_birth_that_cannot_be_stored_is_a_503_and_leaves_nothing_half_born(
    cloud: Cloud, receiver: Receiver, part: str, reset: Literal["before", "after"] | None
) -> None:
    """Whichever write fails for good, with or without effect: no launch, and after a sweep no payload and no task that waits."""
    cloud.jobs.start_timeout = dt.timedelta(0)
    fault = gcs.Fault(reset=reset) if reset else gcs.Fault(status=503)
    cloud.place.gcs.fail_object(CREATE, part, fault, times=ALWAYS)
    answer = await cloud.ask(taskId="task-a", callbackUrl=receiver.url)
    cloud.place.gcs.heal()
    assert (503, True, 0) == (
        answer.status,
        "Cloud Storage" in answer.body["error"],
        cloud.place.cloud_run.calls["RunJob"],
    )
    await cloud.sweep()
    left = {name for name in await cloud.names("task-a") if not name.startswith("index")}
    assert left <= {"metadata.json"}
    if left:
        assert (await cloud.store.record(TaskId("task-a"))).status is Status.FAILED
    await cloud.sweep()
    assert [] == await cloud.store.active()


async def test_a_key_service_that_fails_is_a_503_and_nothing_is_stored(cloud: Cloud) -> None:
    """The sentence names Cloud KMS and what to check."""
    cloud.place.kms.denied.add("encrypt")
    answer = await cloud.ask(taskId="task-a")
    assert (503, set()) == (answer.status, await cloud.names("task-a"))
    assert "Cloud KMS" in answer.body["error"]
    assert "useToEncrypt" in answer.body["error"]


@pytest.mark.parametrize("fault", [kms.Fault(status=503), kms.Fault(reset="before"), kms.Fault(reset="after")])
async def test_a_birth_survives_one_failure_of_the_key_service(cloud: Cloud, fault: kms.Fault) -> None:
    """The key is wrapped at the next try, and the worker can open what was sealed."""
    cloud.place.kms.fail("encrypt", fault)
    cloud.place.kms.fail("decrypt", fault)
    task_id = await cloud.submit(prompt="Write 1.")
    assert Reason.COMPLETED == (await cloud.until_over(task_id)).reason


# --- faults while a task runs ------------------------------------------------------------------------------------------------


async def test_a_storage_that_fails_again_and_again_loses_no_line(cloud: Cloud) -> None:
    """Every third call of worker and API fails in turn by 503, lost request, lost answer: log, stream and outcome are whole."""
    errors = (gcs.Fault(status=503), gcs.Fault(reset="before"), gcs.Fault(reset="after"))
    mixed = [fault for each in errors for fault in (gcs.FINE, gcs.FINE, each)]
    task_id = await cloud.submit(prompt="Write 300.")
    for method in ("storage.objects.create", "storage.objects.get", "storage.objects.delete"):
        cloud.place.gcs.fail(method, *mixed, times=20)
    streamed = [event.data for event in await cloud.events(task_id) if event.data.get("type") == "line"]
    cloud.place.gcs.heal()
    assert Reason.COMPLETED == (await cloud.until_over(task_id)).reason
    async with cloud.http.get(f"{cloud.url}/tasks/{task_id}/logs") as response:
        logged = [json.loads(line) for line in (await response.read()).splitlines()]
    expected = [{"type": "line", "number": number} for number in range(300)]
    assert (expected, expected) == (streamed, [line for line in logged if line["type"] == "line"])


async def test_a_worker_that_may_not_decrypt_says_so(cloud: Cloud) -> None:
    """The task fails, and its error names the permission that is missing."""
    cloud.place.kms.denied.add("decrypt")
    task_id = await cloud.submit()
    record = await cloud.until_over(task_id)
    assert (Status.FAILED, Reason.PREPARE_FAILED) == (record.status, record.reason)
    assert "Cloud KMS" in str(record.error)
    assert "useToDecrypt" in str(record.error)


async def test_a_payload_that_was_not_opened_goes_with_its_task(cloud: Cloud) -> None:
    """A task that ends before its payload is opened leaves none behind, not even when it has no callback."""
    cloud.place.kms.denied.add("decrypt")
    body = {"prompt": "Hang.", "anthropicApiKey": MADE_UP_KEY, "taskId": "task-a"}
    async with cloud.http.post(f"{cloud.url}/run", json=body) as response:
        await response.read()
    await cloud.until_ended("task-a")
    assert "encrypted-payload.bin" not in await cloud.names("task-a")
    assert [] == await cloud.store.active()


async def test_a_mark_that_cannot_be_removed_is_no_fault_of_the_task(cloud: Cloud) -> None:
    """The outcome is recorded, so the worker exits 0; a later sweep removes the mark."""
    cloud.place.gcs.fail_object("storage.objects.delete", "active", gcs.Fault(status=403), times=ALWAYS)
    body = {"prompt": "Write 1.", "anthropicApiKey": MADE_UP_KEY, "taskId": "task-a"}
    async with cloud.http.post(f"{cloud.url}/run", json=body) as response:
        await response.read()
    await cloud.until_ended("task-a")
    assert [0] == [execution.exit_code for execution in cloud.executions("task-a")]
    cloud.place.gcs.heal()
    assert 1 == len(await cloud.store.active())
    await cloud.sweep()
    assert [] == await cloud.store.active()


# --- the claim ---------------------------------------------------------------------------------------------------------------


async def test_a_second_execution_of_a_task_that_runs_ends_at_once_and_changes_nothing(cloud: Cloud) -> None:
    """The worker claims its task by compare-and-swap: the one that finds it taken exits 0."""
    task_id = await cloud.submit()
    before = await cloud.until_running(task_id)
    second = await cloud.jobs.launch(task_id)
    assert second is not None
    execution = cloud.place.cloud_run.executions[second]
    await execution.ended.wait()
    assert 0 == execution.exit_code, execution.output
    assert before == await cloud.store.record(task_id)


async def test_of_executions_that_start_together_one_runs_the_task(cloud: Cloud, receiver: Receiver) -> None:
    """All exit 0; the log is written once and one callback is delivered."""
    cloud.place.cloud_run.launch_seconds = 0.3
    task_id = await cloud.submit(prompt="Write 3.", callbackUrl=receiver.url)
    await asyncio.gather(*(cloud.jobs.launch(task_id) for _ in range(2)))
    await cloud.until_ended(task_id)
    assert [0, 0, 0] == [execution.exit_code for execution in cloud.executions(task_id)]
    assert 3 == sum(event.data.get("type") == "line" for event in await cloud.events(task_id))
    assert ["completed"] == [told["status"] for told in receiver.got]


async def test_an_execution_that_starts_after_a_cancel_does_nothing(cloud: Cloud, receiver: Receiver) -> None:
    """It exits 0, and the task stays cancelled."""
    cloud.place.cloud_run.launch_seconds = 0.3
    task_id = await cloud.submit(callbackUrl=receiver.url)
    answer = await cloud.call("POST", f"/cancel/{task_id}")
    assert (200, "cancelled") == (answer.status, answer.body["status"])
    before = await cloud.store.record(task_id)
    await cloud.until_ended(task_id)
    assert [0] == [execution.exit_code for execution in cloud.executions(task_id)]
    assert (before, []) == (await cloud.store.record(task_id), receiver.got)
    assert before.webhook is not None
    assert CallbackState.OWED is before.webhook.state

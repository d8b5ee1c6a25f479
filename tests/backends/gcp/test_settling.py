"""Lost workers and cancels on the gcp backend."""

from __future__ import annotations

import asyncio
import datetime as dt
import math
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
from grpc import StatusCode
from helpers.cloud import CLI, Cloud, Receiver, StartCloud
from helpers.service import WAIT_SECONDS, CloudDeployment, StartService
from helpers.settling import leftovers, submit_without_start, webhook_of
from standins import cloudrun, gcs
from standins.execution import EXITED, OUT_OF_MEMORY, TIMED_OUT

from ccrun import config
from ccrun.server import serving
from ccrun.sweep import SweepReport
from ccrun.task import CallbackState, Reason, Status, TaskId

# --- ways to lose a worker -------------------------------------------------------------------------------------------


async def kill(cloud: Cloud, task_id: str, fault: str = EXITED) -> None:
    """Kill the container of a task. Cloud Run then reports `fault`."""
    [execution] = cloud.executions(task_id)
    cloud.deployment.cloud_run.kill(execution.short_name, fault=fault)
    await execution.finished.wait()


async def run_out_of_memory(cloud: Cloud, task_id: str) -> None:
    """Make the container exceed its memory limit."""
    await kill(cloud, task_id, OUT_OF_MEMORY)


async def time_out(cloud: Cloud, task_id: str) -> None:
    """Make the execution reach the timeout of the job."""
    await kill(cloud, task_id, TIMED_OUT)


async def cancel_in_console(cloud: Cloud, task_id: str) -> None:
    """Cancel the execution as an operator does in the console, without a grace period."""
    [execution] = cloud.executions(task_id)
    cloud.deployment.cloud_run.cancel(execution.short_name)
    await execution.finished.wait()


async def kill_and_prune(cloud: Cloud, task_id: str) -> None:
    """Kill the container, and remove the execution from Cloud Run."""
    [execution] = cloud.executions(task_id)
    await kill(cloud, task_id)
    cloud.deployment.cloud_run.prune(execution.short_name)


#: By name: what loses the worker, and the reason and exit code with which the task is settled.
LOSSES: dict[str, tuple[Callable[[Cloud, str], Coroutine[None, None, None]], Reason, int]] = {
    "killed": (kill, Reason.WORKER_LOST, 1),
    "out-of-memory": (run_out_of_memory, Reason.OUT_OF_MEMORY, 137),
    "timed-out": (time_out, Reason.TIMEOUT, 124),
    "cancelled": (cancel_in_console, Reason.KILLED, 137),
    "pruned": (kill_and_prune, Reason.WORKER_LOST, 1),
}


async def lose_worker(cloud: Cloud, loss: str, receiver: Receiver) -> tuple[TaskId, Reason, int]:
    """Run a task until its worker is lost. Return its ID, and the reason and exit code with which it must be settled."""
    lose, reason, exit_code = LOSSES[loss]
    cloud.deployment.cloud_run.term_grace_seconds = 0.0
    task_id = await cloud.submit(taskId=f"task-{loss}", callbackUrl=receiver.url)
    await cloud.until_payload_opened(task_id)
    async with asyncio.timeout(WAIT_SECONDS):
        await lose(cloud, task_id)
    return task_id, reason, exit_code


# --- settling --------------------------------------------------------------------------------------------------------


async def test_sweep_settles_each_lost_worker_once(cloud: Cloud, receiver: Receiver) -> None:
    """Each task gets its final status, its payload is deleted, its callback is delivered. A second sweep does nothing."""
    lost = [await lose_worker(cloud, loss, receiver) for loss in LOSSES]
    lost.append((await submit_without_start(cloud, receiver), Reason.LAUNCH_FAILED, 1))
    assert SweepReport(settled=len(lost), delivered=len(lost)) == await cloud.sweep()
    for task_id, reason, exit_code in lost:
        record = await cloud.store.record(task_id)
        assert (Status.FAILED, reason, exit_code) == (record.status, record.reason, record.exit_code)
        assert set() == await leftovers(cloud, task_id)
    delivered = {task["taskId"]: (task["status"], task["exitCode"]) for task in receiver.received}
    assert {task_id: ("failed", exit_code) for task_id, _, exit_code in lost} == delivered
    assert SweepReport() == await cloud.sweep()
    assert len(lost) == len(receiver.received)


@pytest.mark.parametrize("loss", LOSSES)
async def test_get_settles_a_task(cloud: Cloud, receiver: Receiver, loss: str) -> None:
    """`GET /tasks/{taskId}` settles the task without decrypting or delivering. The sweep then delivers the callback once."""
    task_id, reason, exit_code = await lose_worker(cloud, loss, receiver)
    cloud.deployment.kms.calls.clear()
    record = await cloud.get(task_id)
    assert ("failed", reason, exit_code) == (record["status"], record["reason"], record["exitCode"])
    assert record == await cloud.get(task_id)
    assert (0, []) == (cloud.deployment.kms.calls["decrypt"], receiver.received)
    assert "encrypted-payload.bin" not in await cloud.names(task_id)
    assert SweepReport(delivered=1) == await cloud.sweep()
    assert SweepReport() == await cloud.sweep()
    assert ["failed"] == [callback["status"] for callback in receiver.received]


async def test_get_settles_a_task_that_never_started(cloud: Cloud, receiver: Receiver) -> None:
    """After the start timeout the task fails with `launch_failed`, and the sweep delivers the callback."""
    task_id = await submit_without_start(cloud, receiver)
    record = await cloud.get(task_id)
    assert ("failed", Reason.LAUNCH_FAILED, {"active"}) == (
        record["status"],
        record["reason"],
        await leftovers(cloud, task_id),
    )
    await cloud.sweep()
    assert (1, set()) == (len(receiver.received), await leftovers(cloud, task_id))


async def test_task_within_its_start_timeout_is_not_settled(cloud: Cloud, receiver: Receiver) -> None:
    """Before the start timeout, neither a reader nor a sweep settles the task."""
    cloud.deployment.cloud_run.launch_seconds = math.inf
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.sweep()
    assert "pending" == (await cloud.get(task_id))["status"]


async def test_sweep_launches_what_a_killed_api_has_not(cloud: Cloud) -> None:
    """A task whose API was killed between the record and the launch runs to its end after the next sweep."""
    cloud.jobs.launch_time = dt.timedelta(0)
    cloud.deployment.cloud_run.fail("RunJob", cloudrun.HANG)
    submitting = asyncio.create_task(cloud.submit(taskId="task-unlaunched", prompt="Print 3."))
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while not cloud.deployment.cloud_run.calls["RunJob"]:
                await asyncio.sleep(0.01)
        assert SweepReport(started=1) == await cloud.sweep()
        assert Status.COMPLETED is (await cloud.until_final("task-unlaunched")).status
        assert 1 == len(cloud.executions("task-unlaunched"))
    finally:
        submitting.cancel()
        await asyncio.gather(submitting, return_exceptions=True)


async def test_sweep_settles_a_task_whose_worker_exited_before_it(cloud: Cloud, receiver: Receiver) -> None:
    """A task whose container was killed before it started the task fails in the next sweep, not after the start timeout."""
    cloud.jobs.launch_time = dt.timedelta(0)
    cloud.deployment.cloud_run.launch_seconds = math.inf
    cloud.deployment.cloud_run.term_grace_seconds = 0.0
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cancel_in_console(cloud, task_id)
    assert SweepReport(settled=1, delivered=1) == await cloud.sweep()
    assert Reason.LAUNCH_FAILED is (await cloud.store.record(TaskId(task_id))).reason
    assert ["failed"] == [callback["status"] for callback in receiver.received]


async def test_open_stream_settles_its_task(cloud: Cloud, receiver: Receiver) -> None:
    """A silent stream checks the execution and finishes with the error. The API neither decrypts nor delivers the callback."""
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.until_payload_opened(task_id)
    cloud.deployment.kms.calls.clear()
    reading = asyncio.create_task(cloud.events(task_id))
    await kill(cloud, task_id)
    *_, error, done = await reading
    assert ("error", "done", "failed") == (error.name, done.name, done.data["status"])
    assert Reason.WORKER_LOST is (await cloud.store.record(task_id)).reason
    assert (0, []) == (cloud.deployment.kms.calls["decrypt"], receiver.received)


async def test_unreachable_cloud_run_settles_nothing(cloud: Cloud, receiver: Receiver) -> None:
    """If the state of the execution is unknown, the task stays running, and readers get a response."""
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.until_running(task_id)
    cloud.deployment.cloud_run.stop_listening()
    assert SweepReport() == await cloud.sweep()
    assert "running" == (await cloud.get(task_id))["status"]


async def test_undeleted_payload_is_deleted_by_a_later_sweep(cloud: Cloud, receiver: Receiver) -> None:
    """A payload that a sweep could not delete is deleted by the next one, even while the receiver fails."""
    receiver.status = 500
    task_id = await submit_without_start(cloud, receiver)
    cloud.deployment.gcs.fail_object("storage.objects.delete", "encrypted-payload", gcs.Fault(status=403))
    assert SweepReport(settled=1, failed=1) == await cloud.sweep()
    assert {"active", "encrypted-payload.bin"} == await leftovers(cloud, task_id)
    assert SweepReport(undelivered=1) == await cloud.sweep()
    assert {"active"} == await leftovers(cloud, task_id)


# --- cancels ---------------------------------------------------------------------------------------------------------


async def cancel(cloud: Cloud, task_id: str) -> int:
    """Cancel a task, and return the HTTP status."""
    return (await cloud.call("POST", f"/cancel/{task_id}")).status


async def until_delivered(cloud: Cloud, task_id: TaskId) -> None:
    """Wait until the executions of a task have finished, and run sweeps until its callback is delivered."""
    async with asyncio.timeout(WAIT_SECONDS):
        await cloud.until_executions_finished(task_id)
        while (await webhook_of(cloud, task_id)).state is not CallbackState.DELIVERED:
            await cloud.sweep()


async def test_another_instance_cancels_a_running_task(
    cloud: Cloud, make_cloud: StartCloud, receiver: Receiver
) -> None:
    """Any instance of the API can cancel an execution, since the record contains its name. One callback is delivered."""
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.until_running(task_id)
    async with make_cloud(cloud.deployment) as other:
        assert 200 == await cancel(other, task_id)
        assert 1 == cloud.deployment.cloud_run.calls["CancelExecution"]
        await until_delivered(cloud, task_id)
        for instance in (cloud, other):
            assert ("cancelled", 130) == (
                (await instance.get(task_id))["status"],
                (await instance.get(task_id))["exitCode"],
            )
    assert ["cancelled"] == [callback["status"] for callback in receiver.received]


async def test_another_service_cancels_and_the_sweep_command_delivers(
    start_service: StartService, fake_cli: Callable[[str], Path], receiver: Receiver
) -> None:
    """Two services and a sweep, as `ccrun serve` and `ccrun sweep` run them, share only the cloud."""
    async with start_service(CLAUDE_CLI=str(fake_cli(CLI)), CCRUN_SANDBOX="off") as service:
        assert isinstance(service.deployment, CloudDeployment)
        settings = await asyncio.to_thread(config.load, {**service.deployment.sweep_environment, "PORT": "0"})
        async with serving(settings, {}) as other:
            service.deployment.cloud_run.term_grace_seconds = 0.0
            task_id = (await service.submit(prompt="Hang.", callbackUrl=receiver.url))["taskId"]
            await service.until(task_id, lambda record: record.status is Status.RUNNING)
            async with service.http.post(f"{other}/cancel/{task_id}") as response:
                assert 200 == response.status
            [execution] = service.deployment.cloud_run.executions.values()
            await execution.finished.wait()
            await service.deployment.sweep()
            assert "cancelled" == (await service.get(f"/tasks/{task_id}"))["status"]
    assert ["cancelled"] == [callback["status"] for callback in receiver.received]


async def test_task_is_cancelled_during_its_launch(cloud: Cloud, receiver: Receiver) -> None:
    """If a task is cancelled before Cloud Run responds to the launch, the worker that starts finds it cancelled."""
    cloud.deployment.cloud_run.fail("RunJob", cloudrun.Fault(delay_seconds=0.5))
    posting = asyncio.create_task(cloud.post_task(taskId="task-a", callbackUrl=receiver.url))
    async with asyncio.timeout(WAIT_SECONDS):
        while cloud.deployment.cloud_run.calls["RunJob"] == 0:
            await asyncio.sleep(0.01)
    assert 200 == await cancel(cloud, "task-a")
    assert 202 == (await posting).status
    await until_delivered(cloud, TaskId("task-a"))
    assert [0] == [execution.exit_code for execution in cloud.executions("task-a")]
    assert Status.CANCELLED is (await cloud.store.record(TaskId("task-a"))).status
    assert ["cancelled"] == [callback["status"] for callback in receiver.received]
    assert set() == await leftovers(cloud, "task-a")


async def test_pending_task_is_cancelled_immediately(cloud: Cloud, receiver: Receiver) -> None:
    """A task is cancelled before a worker starts. The sweep, not the API, delivers its callback."""
    cloud.deployment.cloud_run.launch_seconds = math.inf
    task_id = await cloud.submit(callbackUrl=receiver.url)
    assert (200, 409) == (await cancel(cloud, task_id), await cancel(cloud, task_id))
    assert (0, []) == (cloud.deployment.kms.calls["decrypt"], receiver.received)
    assert SweepReport(delivered=1) == await cloud.sweep()
    assert (["cancelled"], set()) == (
        [callback["status"] for callback in receiver.received],
        await leftovers(cloud, task_id),
    )


async def test_rejected_cancel_reaches_the_worker_through_the_record(cloud: Cloud, receiver: Receiver) -> None:
    """The response is 200, and the worker finds the cancel request in the record."""
    cloud.deployment.cloud_run.fail("CancelExecution", cloudrun.Fault(code=StatusCode.PERMISSION_DENIED), times=1000)
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.until_running(task_id)
    assert 200 == await cancel(cloud, task_id)
    await until_delivered(cloud, task_id)
    assert Reason.CANCELLED is (await cloud.store.record(task_id)).reason
    assert ["cancelled"] == [callback["status"] for callback in receiver.received]


async def test_cancel_of_a_killed_worker_is_settled_as_cancelled(cloud: Cloud, receiver: Receiver) -> None:
    """If the worker is killed without a grace period, the sweep settles the task as cancelled."""
    cloud.deployment.cloud_run.term_grace_seconds = 0.0
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.until_running(task_id)
    assert 200 == await cancel(cloud, task_id)
    await cloud.until_executions_finished(task_id)
    await cloud.sweep()
    assert Reason.CANCELLED is (await cloud.store.record(task_id)).reason
    assert ["cancelled"] == [callback["status"] for callback in receiver.received]


async def test_worker_that_is_cancelled_in_the_console_finishes_its_task(cloud: Cloud, receiver: Receiver) -> None:
    """After SIGTERM the worker writes the final record and delivers the callback, and the sweep does nothing."""
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.until_running(task_id)
    [execution] = cloud.executions(task_id)
    cloud.deployment.cloud_run.cancel(execution.short_name)
    await cloud.until_executions_finished(task_id)
    assert 0 == execution.exit_code, execution.output
    assert SweepReport() == await cloud.sweep()
    assert (Reason.KILLED, 1) == ((await cloud.store.record(task_id)).reason, len(receiver.received))


async def test_concurrent_cancels_and_sweeps_give_one_final_status(
    cloud: Cloud, make_cloud: StartCloud, receiver: Receiver
) -> None:
    """When two instances cancel a task at different times while sweeps run, it gets one final status and one callback."""
    delays = [0.0, 0.2, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7]

    async def race(number: int, delay: float, other: Cloud) -> tuple[TaskId, list[int]]:
        task_id = await cloud.submit(taskId=f"task-{number}", prompt="Write 3.", callbackUrl=receiver.url)
        await asyncio.sleep(delay)
        statuses = await asyncio.gather(cancel(cloud, task_id), cancel(other, task_id), cloud.sweep(), other.sweep())
        return task_id, [status for status in statuses if isinstance(status, int)]

    async with make_cloud(cloud.deployment) as other:
        finished_tasks = [await race(number, delay, other) for number, delay in enumerate(delays)]
        for task_id, statuses in finished_tasks:
            await until_delivered(cloud, task_id)
            record = await cloud.store.record(task_id)
            assert record.status is (Status.CANCELLED if 200 in statuses else Status.COMPLETED)
            assert [record.status] == [each["status"] for each in receiver.received if each["taskId"] == task_id]
            assert [0] == [execution.exit_code or 0 for execution in cloud.executions(task_id)]
            assert set() == await leftovers(cloud, task_id)
    assert len(delays) == len(receiver.received)

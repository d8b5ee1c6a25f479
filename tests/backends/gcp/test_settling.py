"""Tasks whose execution ended without a final record, callbacks that are owed, and cancels, on the gcp backend."""

from __future__ import annotations

import asyncio
import datetime as dt
import math
from collections.abc import Callable, Coroutine
from pathlib import Path

import attrs
import pytest
from grpc import StatusCode
from helpers.cloud import CLI, Cloud, OpenCloud, Receiver
from helpers.service import PATIENCE, CloudPlace, StartService
from standins import cloudrun, gcs
from standins.cloudrun import EXITED, OUT_OF_MEMORY, TIMED_OUT

from ccrun import config
from ccrun.server import serving
from ccrun.sweep import SweepReport
from ccrun.task import CallbackInfo, CallbackState, Reason, Status, TaskId, TaskRecord

# --- ways to die without a last word ---------------------------------------------------------------------------------------


async def kill(cloud: Cloud, task_id: str, fault: str = EXITED) -> None:
    """Kill the container; `fault` is what the platform says of it."""
    [execution] = cloud.executions(task_id)
    cloud.place.cloud_run.kill(execution.short_name, fault=fault)
    await execution.ended.wait()


async def run_out_of_memory(cloud: Cloud, task_id: str) -> None:
    """Have the platform say that it took too much memory."""
    await kill(cloud, task_id, OUT_OF_MEMORY)


async def run_out_of_time(cloud: Cloud, task_id: str) -> None:
    """Have the platform say that it took too much time."""
    await kill(cloud, task_id, TIMED_OUT)


async def be_cancelled(cloud: Cloud, task_id: str) -> None:
    """Be cancelled at the console, on a platform that gives no time to end well."""
    [execution] = cloud.executions(task_id)
    cloud.place.cloud_run.cancel(execution.short_name)
    await execution.ended.wait()


async def be_pruned(cloud: Cloud, task_id: str) -> None:
    """Die, and be forgotten by the platform."""
    [execution] = cloud.executions(task_id)
    await kill(cloud, task_id)
    cloud.place.cloud_run.prune(execution.short_name)


WAYS: dict[str, tuple[Callable[[Cloud, str], Coroutine[None, None, None]], Reason, int]] = {
    "killed": (kill, Reason.WORKER_LOST, 1),
    "out-of-memory": (run_out_of_memory, Reason.OUT_OF_MEMORY, 137),
    "timed-out": (run_out_of_time, Reason.TIMEOUT, 124),
    "cancelled": (be_cancelled, Reason.KILLED, 137),
    "pruned": (be_pruned, Reason.WORKER_LOST, 1),
}


async def die(cloud: Cloud, way: str, receiver: Receiver) -> tuple[TaskId, Reason, int]:
    """Run a task until its worker is gone that way; return its ID and how it is to be settled."""
    how, reason, exit_code = WAYS[way]
    cloud.place.cloud_run.term_grace_seconds = 0.0
    task_id = await cloud.submit(taskId=f"task-{way}", callbackUrl=receiver.url)
    await cloud.until_at_work(task_id)
    async with asyncio.timeout(PATIENCE):
        await how(cloud, task_id)
    return task_id, reason, exit_code


async def never_begin(cloud: Cloud, receiver: Receiver) -> TaskId:
    """Launch a task for which the platform finds no machine, so that the bound for its begin is over."""
    cloud.place.cloud_run.launch_seconds = math.inf
    cloud.jobs.start_timeout = dt.timedelta(0)
    return await cloud.submit(taskId="task-never", callbackUrl=receiver.url)


async def left(cloud: Cloud, task_id: str) -> set[str]:
    """Return which objects of a task are left that its end should have removed."""
    return await cloud.names(task_id) & {"encrypted-payload.bin", "active"}


# --- settling --------------------------------------------------------------------------------------------------------------


async def test_a_sweep_settles_every_way_to_die_once(cloud: Cloud, receiver: Receiver) -> None:
    """Final state with its reason, no payload, the callback delivered; a second sweep finds nothing to do."""
    dead = [await die(cloud, way, receiver) for way in WAYS]
    dead.append((await never_begin(cloud, receiver), Reason.LAUNCH_FAILED, 1))
    assert SweepReport(settled=len(dead), delivered=len(dead)) == await cloud.sweep()
    for task_id, reason, exit_code in dead:
        record = await cloud.store.record(task_id)
        assert (Status.FAILED, reason, exit_code) == (record.status, record.reason, record.exit_code)
        assert set() == await left(cloud, task_id)
    told = {task["taskId"]: (task["status"], task["exitCode"]) for task in receiver.got}
    assert {task_id: ("failed", exit_code) for task_id, _, exit_code in dead} == told
    assert SweepReport() == await cloud.sweep()
    assert len(dead) == len(receiver.got)


@pytest.mark.parametrize("way", WAYS)
async def test_whoever_asks_for_a_task_settles_it(cloud: Cloud, receiver: Receiver, way: str) -> None:
    """`GET /tasks/{taskId}` tells how it ended, without decrypting or calling; the sweep then delivers the callback once."""
    task_id, reason, exit_code = await die(cloud, way, receiver)
    cloud.place.kms.calls.clear()
    record = await cloud.get(task_id)
    assert ("failed", reason, exit_code) == (record["status"], record["reason"], record["exitCode"])
    assert record == await cloud.get(task_id)
    assert (0, []) == (cloud.place.kms.calls["decrypt"], receiver.got)
    assert "encrypted-payload.bin" not in await cloud.names(task_id)
    assert SweepReport(delivered=1) == await cloud.sweep()
    assert SweepReport() == await cloud.sweep()
    assert ["failed"] == [told["status"] for told in receiver.got]


async def test_whoever_asks_for_a_task_that_never_began_settles_it(cloud: Cloud, receiver: Receiver) -> None:
    """It fails as `launch_failed` when the bound is over; the sweep delivers the callback."""
    task_id = await never_begin(cloud, receiver)
    record = await cloud.get(task_id)
    assert ("failed", Reason.LAUNCH_FAILED, {"active"}) == (
        record["status"],
        record["reason"],
        await left(cloud, task_id),
    )
    await cloud.sweep()
    assert (1, set()) == (len(receiver.got), await left(cloud, task_id))


async def test_a_task_that_is_slow_to_begin_is_left_alone(cloud: Cloud, receiver: Receiver) -> None:
    """Within the bound neither a reader nor a sweep ends it."""
    cloud.place.cloud_run.launch_seconds = math.inf
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.sweep()
    assert "pending" == (await cloud.get(task_id))["status"]


async def test_an_open_stream_settles_its_task(cloud: Cloud, receiver: Receiver) -> None:
    """A stream of which nothing is heard looks for the worker: it ends with the error, and the API decrypts and calls nobody."""
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.until_at_work(task_id)
    cloud.place.kms.calls.clear()
    reading = asyncio.create_task(cloud.events(task_id))
    await kill(cloud, task_id)
    *_, error, done = await reading
    assert ("error", "done", "failed") == (error.name, done.name, done.data["status"])
    assert Reason.WORKER_LOST is (await cloud.store.record(task_id)).reason
    assert (0, []) == (cloud.place.kms.calls["decrypt"], receiver.got)


async def test_a_cloud_run_that_does_not_answer_settles_nothing(cloud: Cloud, receiver: Receiver) -> None:
    """Not to know is no death: the task goes on as running, and its readers get an answer."""
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.until_running(task_id)
    cloud.place.cloud_run.stop_listening()
    assert SweepReport() == await cloud.sweep()
    assert "running" == (await cloud.get(task_id))["status"]


async def test_a_payload_that_could_not_be_removed_goes_with_a_later_sweep(cloud: Cloud, receiver: Receiver) -> None:
    """Not even while the receiver is away is a payload left that the first sweep could not remove."""
    receiver.status = 500
    task_id = await never_begin(cloud, receiver)
    cloud.place.gcs.fail_object("storage.objects.delete", "encrypted-payload", gcs.Fault(status=403))
    assert SweepReport(failed=1) == await cloud.sweep()
    assert {"active", "encrypted-payload.bin"} == await left(cloud, task_id)
    assert SweepReport(undelivered=1) == await cloud.sweep()
    assert {"active"} == await left(cloud, task_id)


# --- callbacks that are owed -------------------------------------------------------------------------------------------------


async def die_unheard(cloud: Cloud, receiver: Receiver) -> TaskId:
    """Return a task that is over and owes its callback."""
    task_id = await never_begin(cloud, receiver)
    await cloud.get(task_id)
    return task_id


@pytest.mark.parametrize("sweeps", [2, 5])
async def test_any_number_of_sweeps_at_once_deliver_once(cloud: Cloud, receiver: Receiver, sweeps: int) -> None:
    """Whoever wins the swap delivers; the others leave the callback alone."""
    await die_unheard(cloud, receiver)
    reports = await asyncio.gather(*(cloud.sweep() for _ in range(sweeps)))
    assert 1 == sum(report.delivered for report in reports)
    assert (0, 0) == (sum(report.undelivered for report in reports), sum(report.failed for report in reports))
    assert 1 == len(receiver.got)


async def test_pauses_between_sweeps_deliveries_grow(cloud: Cloud, receiver: Receiver) -> None:
    """A receiver that refuses is asked again after a minute, then after two, then four; a sweep before that does nothing."""
    receiver.status = 500
    task_id = await die_unheard(cloud, receiver)
    pauses = []
    for tries in (1, 2, 3):
        began = dt.datetime.now(dt.UTC)
        assert SweepReport(undelivered=1) == await cloud.sweep()
        assert SweepReport() == await cloud.sweep()
        webhook = await webhook_of(cloud, task_id)
        assert (CallbackState.OWED, tries, tries) == (webhook.state, webhook.attempts, len(receiver.got))
        assert webhook.next_attempt_at is not None
        pauses.append(round((webhook.next_attempt_at - began).total_seconds() / 60))
        await let_time_pass(cloud, task_id)
    assert [1, 2, 4] == pauses
    receiver.status = 200
    assert SweepReport(delivered=1) == await cloud.sweep()
    assert set() == await left(cloud, task_id)


async def test_a_receiver_out_of_reach_leaves_the_callback_owed(cloud: Cloud, receiver: Receiver) -> None:
    """The task stays marked, so that a later sweep delivers."""
    receiver.url = "http://127.0.0.1:9/"
    task_id = await die_unheard(cloud, receiver)
    assert SweepReport(undelivered=1) == await cloud.sweep()
    assert CallbackState.OWED is (await webhook_of(cloud, task_id)).state
    assert {"active"} == await left(cloud, task_id)


async def test_a_sweep_that_may_not_decrypt_leaves_the_callback_owed(cloud: Cloud, receiver: Receiver) -> None:
    """The record says what kept it, and a later sweep delivers it."""
    task_id = await die_unheard(cloud, receiver)
    cloud.place.kms.denied.add("decrypt")
    assert SweepReport(undelivered=1) == await cloud.sweep()
    assert "useToDecrypt" in str((await webhook_of(cloud, task_id)).last_error)
    cloud.place.kms.denied.clear()
    await let_time_pass(cloud, task_id)
    assert SweepReport(delivered=1) == await cloud.sweep()
    assert 1 == len(receiver.got)


async def webhook_of(cloud: Cloud, task_id: TaskId) -> CallbackInfo:
    """Return what became of a callback so far."""
    webhook = (await cloud.store.record(task_id)).webhook
    assert webhook is not None
    return webhook


async def let_time_pass(cloud: Cloud, task_id: TaskId) -> None:
    """Make a callback due, as time does."""

    def due(record: TaskRecord) -> TaskRecord:
        assert record.webhook is not None
        return attrs.evolve(record, webhook=attrs.evolve(record.webhook, next_attempt_at=dt.datetime.now(dt.UTC)))

    await cloud.store.update(task_id, due)


# --- cancels -------------------------------------------------------------------------------------------------------------------


async def cancel(cloud: Cloud, task_id: str) -> int:
    """Cancel a task; return the status of the answer."""
    return (await cloud.call("POST", f"/cancel/{task_id}")).status


async def until_told(cloud: Cloud, task_id: TaskId) -> None:
    """Wait until a task is over and its callback is delivered, by the worker or by sweeps."""
    async with asyncio.timeout(PATIENCE):
        await cloud.until_ended(task_id)
        while (await webhook_of(cloud, task_id)).state is not CallbackState.DELIVERED:
            await cloud.sweep()


async def test_another_instance_cancels_a_running_task(cloud: Cloud, open_cloud: OpenCloud, receiver: Receiver) -> None:
    """The record has the name of the execution, so any instance can end it: cancelled for all, one callback."""
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.until_running(task_id)
    async with open_cloud(cloud.place) as other:
        assert 200 == await cancel(other, task_id)
        assert 1 == cloud.place.cloud_run.calls["CancelExecution"]
        await until_told(cloud, task_id)
        for instance in (cloud, other):
            assert ("cancelled", 130) == (
                (await instance.get(task_id))["status"],
                (await instance.get(task_id))["exitCode"],
            )
    assert ["cancelled"] == [told["status"] for told in receiver.got]


async def test_a_task_is_cancelled_over_another_service_and_swept_by_the_command(
    start_service: StartService, fake_cli: Callable[[str], Path], receiver: Receiver
) -> None:
    """What `ccrun serve` and `ccrun sweep` are made of does the same: two services and a sweep share nothing but the cloud."""
    async with start_service(CLAUDE_CLI=str(fake_cli(CLI))) as service:
        assert isinstance(service.place, CloudPlace)
        settings = await asyncio.to_thread(config.load, {**service.place.sweep_environment, "PORT": "0"})
        async with serving(settings, {}) as other:
            service.place.cloud_run.term_grace_seconds = 0.0
            task_id = (await service.submit(prompt="Hang.", callbackUrl=receiver.url))["taskId"]
            await service.until(task_id, lambda record: record.status is Status.RUNNING)
            async with service.http.post(f"{other}/cancel/{task_id}") as response:
                assert 200 == response.status
            [execution] = service.place.cloud_run.executions.values()
            await execution.ended.wait()
            await service.place.sweep()
            assert "cancelled" == (await service.get(f"/tasks/{task_id}"))["status"]
    assert ["cancelled"] == [told["status"] for told in receiver.got]


async def test_a_cancel_before_the_launch_is_through_holds(cloud: Cloud, receiver: Receiver) -> None:
    """A task is cancelled while Cloud Run is still to answer: the worker that starts then finds it over."""
    cloud.place.cloud_run.fail("RunJob", cloudrun.Fault(delay_seconds=0.5))
    asking = asyncio.create_task(cloud.ask(taskId="task-a", callbackUrl=receiver.url))
    async with asyncio.timeout(PATIENCE):
        while cloud.place.cloud_run.calls["RunJob"] == 0:
            await asyncio.sleep(0.01)
    assert 200 == await cancel(cloud, "task-a")
    assert 202 == (await asking).status
    await until_told(cloud, TaskId("task-a"))
    assert [0] == [execution.exit_code for execution in cloud.executions("task-a")]
    assert Status.CANCELLED is (await cloud.store.record(TaskId("task-a"))).status
    assert ["cancelled"] == [told["status"] for told in receiver.got]
    assert set() == await left(cloud, "task-a")


async def test_a_pending_task_is_cancelled_at_once(cloud: Cloud, receiver: Receiver) -> None:
    """It is over before a worker is there, and the sweep, not the API, delivers its callback."""
    cloud.place.cloud_run.launch_seconds = math.inf
    task_id = await cloud.submit(callbackUrl=receiver.url)
    assert (200, 409) == (await cancel(cloud, task_id), await cancel(cloud, task_id))
    assert (0, []) == (cloud.place.kms.calls["decrypt"], receiver.got)
    assert SweepReport(delivered=1) == await cloud.sweep()
    assert (["cancelled"], set()) == ([told["status"] for told in receiver.got], await left(cloud, task_id))


async def test_a_cancel_that_cloud_run_refuses_reaches_the_worker_through_the_record(
    cloud: Cloud, receiver: Receiver
) -> None:
    """The caller gets a 200, and the worker sees the cancel by itself."""
    cloud.place.cloud_run.fail("CancelExecution", cloudrun.Fault(code=StatusCode.PERMISSION_DENIED), times=1000)
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.until_running(task_id)
    assert 200 == await cancel(cloud, task_id)
    await until_told(cloud, task_id)
    assert Reason.CANCELLED is (await cloud.store.record(task_id)).reason
    assert ["cancelled"] == [told["status"] for told in receiver.got]


async def test_a_cancel_of_a_worker_that_gets_no_time_is_settled_as_cancelled(cloud: Cloud, receiver: Receiver) -> None:
    """On a platform that kills at once the answered cancel stands, by the sweep."""
    cloud.place.cloud_run.term_grace_seconds = 0.0
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.until_running(task_id)
    assert 200 == await cancel(cloud, task_id)
    await cloud.until_ended(task_id)
    await cloud.sweep()
    assert Reason.CANCELLED is (await cloud.store.record(task_id)).reason
    assert ["cancelled"] == [told["status"] for told in receiver.got]


async def test_a_worker_that_the_console_cancels_has_the_last_word(cloud: Cloud, receiver: Receiver) -> None:
    """SIGTERM gives it the time to record the end and to call back; the sweep finds nothing to do."""
    task_id = await cloud.submit(callbackUrl=receiver.url)
    await cloud.until_running(task_id)
    [execution] = cloud.executions(task_id)
    cloud.place.cloud_run.cancel(execution.short_name)
    await cloud.until_ended(task_id)
    assert 0 == execution.exit_code, execution.output
    assert SweepReport() == await cloud.sweep()
    assert (Reason.KILLED, 1) == ((await cloud.store.record(task_id)).reason, len(receiver.got))


async def test_races_of_cancel_completion_and_sweeps_have_one_end(
    cloud: Cloud, open_cloud: OpenCloud, receiver: Receiver
) -> None:
    """Whatever is cancelled when, from two instances, while sweeps run: one final state that never changes, and one callback."""
    pauses = [0.0, 0.2, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7]

    async def race(number: int, pause: float, other: Cloud) -> tuple[TaskId, list[int]]:
        task_id = await cloud.submit(taskId=f"task-{number}", prompt="Write 3.", callbackUrl=receiver.url)
        await asyncio.sleep(pause)
        answers = await asyncio.gather(cancel(cloud, task_id), cancel(other, task_id), cloud.sweep(), other.sweep())
        return task_id, [answer for answer in answers if isinstance(answer, int)]

    async with open_cloud(cloud.place) as other:
        ended = [await race(number, pause, other) for number, pause in enumerate(pauses)]
        for task_id, answers in ended:
            await until_told(cloud, task_id)
            record = await cloud.store.record(task_id)
            assert record.status is (Status.CANCELLED if 200 in answers else Status.COMPLETED)
            assert [record.status] == [told["status"] for told in receiver.got if told["taskId"] == task_id]
            assert [0] == [execution.exit_code or 0 for execution in cloud.executions(task_id)]
            assert set() == await left(cloud, task_id)
    assert len(pauses) == len(receiver.got)

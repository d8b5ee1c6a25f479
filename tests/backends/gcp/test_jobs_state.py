"""The state of executions on Cloud Run, and their cancellation."""

from __future__ import annotations

import asyncio
import math

import attrs
import pytest
from google.cloud import run_v2
from grpc import StatusCode
from helpers.cloud_run import POLICY, TASK, Containers, containers, launched
from helpers.service import WAIT_SECONDS
from standins.cloudrun import HANG, Fault
from standins.execution import OUT_OF_MEMORY, Execution

from ccrun.backends.gcp.jobs import PAGE_SIZE, CloudRunJobs, execution_state
from ccrun.jobs import ExecutionState
from ccrun.task import TaskId

__all__ = ["containers"]


SHORT_CALLS = attrs.evolve(POLICY, attempt_seconds=0.5, listing_seconds=2.0, total_seconds=2.0)


MANY_SHORT_CALLS = attrs.evolve(POLICY, attempt_seconds=0.5, attempts=100)


async def until_finished(jobs: CloudRunJobs, execution: Execution) -> ExecutionState:
    """Wait until an execution has finished, and return its state."""
    async with asyncio.timeout(WAIT_SECONDS):
        await execution.finished.wait()
    return await jobs.state(TASK, execution.short_name)


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", ["0", "1"])
async def test_exited_container_is_finished(containers: Containers, behaviour: str) -> None:
    """An execution whose container has exited is `FINISHED`, whatever the exit code."""
    async with containers.run(behaviour) as (server, jobs):
        assert ExecutionState.FINISHED == await until_finished(jobs, await launched(server, jobs))


async def test_killed_container_is_finished(containers: Containers) -> None:
    """An execution whose container was killed is `FINISHED`."""
    async with containers.run() as (server, jobs):
        execution = await launched(server, jobs)
        await containers.environment()
        server.kill(execution.short_name)
        assert ExecutionState.FINISHED == await until_finished(jobs, execution)


async def test_out_of_memory_is_recognized(containers: Containers) -> None:
    """An execution that exceeded its memory limit is `OUT_OF_MEMORY`."""
    async with containers.run() as (server, jobs):
        execution = await launched(server, jobs)
        await containers.environment()
        server.kill(execution.short_name, fault=OUT_OF_MEMORY)
        assert ExecutionState.OUT_OF_MEMORY == await until_finished(jobs, execution)


async def test_timeout_is_recognized(containers: Containers) -> None:
    """An execution that reached the job's own timeout is `TIMED_OUT`."""
    async with containers.run(task_timeout_seconds=0.2) as (server, jobs):
        assert ExecutionState.TIMED_OUT == await until_finished(jobs, await launched(server, jobs))


async def test_cancel_in_the_console_is_recognized(containers: Containers) -> None:
    """An execution that an operator cancelled is `CANCELLED`, also if its container never started."""
    for launch_seconds in (0.0, math.inf):
        async with containers.run(launch_seconds=launch_seconds) as (server, jobs):
            execution = await launched(server, jobs)
            server.cancel(execution.short_name)
            assert ExecutionState.CANCELLED == await until_finished(jobs, execution)


async def test_pruned_execution_is_unknown(containers: Containers) -> None:
    """An execution that Cloud Run has removed, that has no name, or that belongs to another job is `UNKNOWN`."""
    async with containers.run("0") as (server, jobs):
        execution = await launched(server, jobs)
        await until_finished(jobs, execution)
        server.prune(execution.short_name)
        for name in (execution.short_name, execution.name, None, "", "other", "../../other/executions/x"):
            assert ExecutionState.UNKNOWN == await jobs.state(TASK, name)


async def test_executions_are_found_by_their_tasks(containers: Containers) -> None:
    """Without names, states are found on all pages of the listing; a task that was not launched is `UNKNOWN`."""
    async with containers.run() as (server, jobs):
        name = await jobs.launch(TASK)
        assert name is not None
        for number in range(PAGE_SIZE):
            server.add_finished(TaskId(f"other-{number}"))
        states = await jobs.launched_states([TASK, TaskId("other-0"), TaskId("never-launched")])
        assert {
            "task-a": ExecutionState.RUNNING,
            "other-0": ExecutionState.FINISHED,
            "never-launched": ExecutionState.UNKNOWN,
        } == states
        assert 2 == server.calls["ListExecutions"]


async def test_running_execution_of_a_task_counts_more(containers: Containers) -> None:
    """If one of two executions of a task has finished, the task may still be started by the other."""
    async with containers.run() as (server, jobs):
        server.add_finished(TASK)
        await jobs.launch(TASK)
        server.add_finished(TASK)
        assert {TASK: ExecutionState.RUNNING} == await jobs.launched_states([TASK])


@pytest.mark.parametrize("fault", [Fault(code=StatusCode.PERMISSION_DENIED), HANG], ids=str)
async def test_failed_listing_makes_all_unreachable(containers: Containers, fault: Fault) -> None:
    """If Cloud Run does not list the executions, no task counts as not launched."""
    async with containers.run(policy=SHORT_CALLS) as (server, jobs):
        server.fail("ListExecutions", fault, times=9)
        assert {TASK: ExecutionState.UNREACHABLE} == await jobs.launched_states([TASK])


async def test_execution_is_found_by_its_full_name(containers: Containers) -> None:
    """`state` accepts the full name of an execution too."""
    async with containers.run() as (server, jobs):
        execution = await launched(server, jobs)
        assert ExecutionState.RUNNING == await jobs.state(TASK, execution.name)


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault(code=code) for code in (StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED, StatusCode.INTERNAL)),
        Fault(reset="before"),
        Fault(reset="after"),
        HANG,
        Fault(delay_seconds=0.05),
    ],
    ids=str,
)
async def test_transient_fault_is_retried(containers: Containers, fault: Fault) -> None:
    """`state` and `cancel` are retried after transient statuses, resets and timeouts."""
    async with containers.run(policy=MANY_SHORT_CALLS if fault == HANG else POLICY) as (server, jobs):
        execution = await launched(server, jobs)
        server.fail("GetExecution", fault)
        server.fail("CancelExecution", fault)
        assert ExecutionState.RUNNING == await jobs.state(TASK, execution.short_name)
        await jobs.cancel(TASK, execution.short_name)
        assert ExecutionState.CANCELLED == await until_finished(jobs, execution)


@pytest.mark.parametrize(
    "fault", [Fault(code=StatusCode.UNAVAILABLE), Fault(code=StatusCode.PERMISSION_DENIED), HANG], ids=str
)
async def test_permanent_fault_is_unreachable(containers: Containers, fault: Fault) -> None:
    """If Cloud Run does not return the execution, the state is `UNREACHABLE` within the total timeout."""
    async with containers.run(policy=SHORT_CALLS) as (server, jobs):
        execution = await launched(server, jobs)
        server.fail("GetExecution", fault, times=9)
        async with asyncio.timeout(WAIT_SECONDS):
            assert ExecutionState.UNREACHABLE == await jobs.state(TASK, execution.short_name)


Condition, State = run_v2.Condition, run_v2.Condition.State


@pytest.mark.parametrize(
    ("execution", "state"),
    [
        (run_v2.Execution(), ExecutionState.RUNNING),
        (run_v2.Execution(completion_time={"seconds": 1}), ExecutionState.FINISHED),
        (
            run_v2.Execution(conditions=[Condition(type_="Completed", state=State.CONDITION_FAILED)]),
            ExecutionState.FINISHED,
        ),
        (
            run_v2.Execution(conditions=[Condition(type_="Started", state=State.CONDITION_SUCCEEDED)]),
            ExecutionState.RUNNING,
        ),
        (run_v2.Execution(completion_time={"seconds": 1}, cancelled_count=1), ExecutionState.CANCELLED),
    ],
)
def test_incomplete_description_is_sufficient(execution: run_v2.Execution, state: ExecutionState) -> None:
    """Google sets the fields of an execution in no fixed order; each of them alone shows the state."""
    assert state == execution_state(execution)


# --- cancel ----------------------------------------------------------------------------------------------------------


async def test_worker_that_ignores_sigterm_is_killed(containers: Containers) -> None:
    """A cancel sends SIGTERM, and SIGKILL after the grace period."""
    async with containers.run("ignore-sigterm", term_grace_seconds=0.2) as (server, jobs):
        execution = await launched(server, jobs)
        await containers.environment()
        await jobs.cancel(TASK, execution.short_name)
        assert ExecutionState.CANCELLED == await until_finished(jobs, execution)
        assert -9 == execution.exit_code


async def test_cancel_can_be_repeated(containers: Containers, capfd: pytest.CaptureFixture[str]) -> None:
    """Cancelling an execution that is being cancelled, has finished or was removed is not an error and logs no warning."""
    async with containers.run() as (server, jobs):
        execution = await launched(server, jobs)
        await jobs.cancel(TASK, execution.short_name)
        await jobs.cancel(TASK, execution.short_name)
        await until_finished(jobs, execution)
        await jobs.cancel(TASK, execution.short_name)
        server.prune(execution.short_name)
        await jobs.cancel(TASK, execution.short_name)
        assert (4, "") == (server.calls["CancelExecution"], capfd.readouterr().out)


async def test_cancel_without_a_name_makes_no_call(containers: Containers) -> None:
    """A task without an execution is cancelled through its record only."""
    async with containers.run() as (server, jobs):
        await jobs.cancel(TASK, None)
        await jobs.clear(TASK)
        assert {} == server.calls


@pytest.mark.parametrize("fault", [Fault(code=StatusCode.PERMISSION_DENIED), HANG], ids=str)
async def test_failed_cancel_is_not_an_error(containers: Containers, fault: Fault) -> None:
    """If Cloud Run rejects the cancel, `cancel` returns within the total timeout, since the worker polls the record."""
    async with containers.run(policy=SHORT_CALLS) as (server, jobs):
        execution = await launched(server, jobs)
        server.fail("CancelExecution", fault, times=9)
        async with asyncio.timeout(WAIT_SECONDS):
            await jobs.cancel(TASK, execution.short_name)

"""Workers as Cloud Run executions. `tests/test_jobs.py` tests what every adapter that runs workers must do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
from google.cloud import run_v2
from grpc import ChannelConnectivity, StatusCode
from helpers.service import WAIT_SECONDS
from standins.cloudrun import HANG, JOB, OUT_OF_MEMORY, PROJECT, REGION, CloudRun, Execution, Fault

from ccrun.backends.gcp.calls import NoCredentials
from ccrun.backends.gcp.jobs import PAGE_SIZE, CloudRunJobs, LaunchPolicy, execution_state, open_cloud_run
from ccrun.errors import Busy, LaunchFailed
from ccrun.jobs import ExecutionState
from ccrun.task import TaskId

TASK = TaskId("task-a")
#: No call of a loaded machine reaches these timeouts.
POLICY = LaunchPolicy(
    connect_seconds=20.0,
    launch_seconds=20.0,
    attempt_seconds=20.0,
    attempts=3,
    total_seconds=60.0,
    first_delay_seconds=0.001,
)
#: For tests whose calls get no response.
SHORT_LAUNCHES = attrs.evolve(POLICY, connect_seconds=0.5, launch_seconds=0.5)
SHORT_CALLS = attrs.evolve(POLICY, attempt_seconds=0.5, listing_seconds=2.0, total_seconds=2.0)
MANY_SHORT_CALLS = attrs.evolve(POLICY, attempt_seconds=0.5, attempts=100)

#: Writes its environment into a file. Then it sleeps, ignores SIGTERM and sleeps, or exits with a code.
WORKER = """
import json, os, pathlib, signal, sys, time
if sys.argv[2] == "ignore-sigterm":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text(json.dumps(dict(os.environ)))
if sys.argv[2].isdigit():
    sys.exit(int(sys.argv[2]))
time.sleep(600)
"""


class Containers:
    """Starts the stand-in with a container that behaves as a test needs it."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "environment"

    @contextlib.asynccontextmanager
    async def run(
        self,
        behaviour: str = "sleep",
        *,
        policy: LaunchPolicy = POLICY,
        launch_seconds: float = 0.0,
        task_timeout_seconds: float = 3600.0,
        term_grace_seconds: float = 10.0,
    ) -> AsyncIterator[tuple[CloudRun, CloudRunJobs]]:
        """Start the stand-in, and connect the adapter to it.

        Args:
            behaviour: What the container does: `sleep`, `ignore-sigterm`, or the number of an exit code.
            policy: The policy of the adapter.
            launch_seconds: See `CloudRun`, as for the other arguments.
            task_timeout_seconds: See `CloudRun`.
            term_grace_seconds: See `CloudRun`.
        """
        async with (
            CloudRun(
                command=(sys.executable, "-c", WORKER, str(self._file), behaviour),
                environment=dict(os.environ),
                launch_seconds=launch_seconds,
                task_timeout_seconds=task_timeout_seconds,
                term_grace_seconds=term_grace_seconds,
            ) as server,
            open_cloud_run(project=PROJECT, region=REGION, job=JOB, emulator=server.host, policy=policy) as jobs,
        ):
            yield server, jobs

    async def environment(self) -> dict[str, str]:
        """Wait until the container runs, and return its environment."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not self._file.exists() or not self._file.read_text():
                await asyncio.sleep(0.01)
        return dict(json.loads(self._file.read_text()))


@pytest.fixture
def containers(tmp_path: Path) -> Containers:
    """Return what starts the stand-in."""
    return Containers(tmp_path)


async def launched(server: CloudRun, jobs: CloudRunJobs) -> Execution:
    """Launch the task, and return its execution."""
    name = await jobs.launch(TASK)
    assert name is not None
    return server.executions[name]


async def until_finished(jobs: CloudRunJobs, execution: Execution) -> ExecutionState:
    """Wait until an execution has finished, and return its state."""
    async with asyncio.timeout(WAIT_SECONDS):
        await execution.finished.wait()
    return await jobs.state(TASK, execution.short_name)


# --- launch ----------------------------------------------------------------------------------------------------------


async def test_launch_overrides_two_variables(containers: Containers) -> None:
    """A launch adds only the task ID and the payload's name to the job's environment; neither is a secret."""
    async with containers.run() as (server, jobs):
        execution = await launched(server, jobs)
        environment = await containers.environment()
        assert {
            "TASK_ID": TASK,
            "ENCRYPTED_PAYLOAD_PATH": f"sessions/{TASK}/encrypted-payload.bin",
        } == execution.overrides
        assert execution.overrides.items() <= environment.items()


async def test_launch_returns_the_short_name_of_the_execution(containers: Containers) -> None:
    """`launch` returns the name that the worker finds in its environment, and that `gcloud` accepts."""
    async with containers.run() as (server, jobs):
        execution = await launched(server, jobs)
        assert execution.short_name == (await containers.environment())["CLOUD_RUN_EXECUTION"]


async def test_launch_does_not_wait_for_the_container(containers: Containers) -> None:
    """A launch is one call, and returns before the container starts."""
    async with containers.run(launch_seconds=math.inf) as (server, jobs):
        execution = await launched(server, jobs)
        assert ExecutionState.RUNNING == await jobs.state(TASK, execution.short_name)
        assert 1 == server.calls["RunJob"]


@pytest.mark.parametrize("code", [StatusCode.RESOURCE_EXHAUSTED, StatusCode.ABORTED])
async def test_rejected_launch_is_retried(containers: Containers, code: StatusCode) -> None:
    """A launch that was temporarily rejected had no effect, so it is retried."""
    async with containers.run() as (server, jobs):
        server.fail("RunJob", Fault(code=code))
        server.fail("RunJob", Fault(code=code, retry_seconds=0.01))
        await launched(server, jobs)
        assert (3, 1) == (server.calls["RunJob"], len(server.executions))


@pytest.mark.parametrize(
    "fault",
    [
        *(
            Fault(code=code)
            for code in (
                StatusCode.UNAVAILABLE,
                StatusCode.DEADLINE_EXCEEDED,
                StatusCode.INTERNAL,
                StatusCode.UNKNOWN,
            )
        ),
        Fault(reset="before"),
        Fault(reset="after"),
        HANG,
    ],
    ids=str,
)
async def test_uncertain_launch_is_not_retried(containers: Containers, fault: Fault) -> None:
    """If the response is lost, the launch fails within its timeout and starts no second execution."""
    async with containers.run(policy=SHORT_LAUNCHES if fault == HANG else POLICY) as (server, jobs):
        server.fail("RunJob", fault)
        async with asyncio.timeout(WAIT_SECONDS):
            with pytest.raises(LaunchFailed, match="Cloud Run did not confirm that it started the job"):
                await jobs.launch(TASK)
        assert (1, int(fault.reset == "after")) == (server.calls["RunJob"], len(server.executions))


@pytest.mark.parametrize(
    ("retry_seconds", "retry_after", "calls"), [(None, 30, POLICY.attempts), (0.01, 1, POLICY.attempts), (41.5, 42, 1)]
)
async def test_exhausted_quota_has_a_retry_delay(
    containers: Containers, retry_seconds: float | None, retry_after: int, calls: int
) -> None:
    """The delay that Google asks for is passed on to the caller. The launch is retried only if the delay is short."""
    async with containers.run() as (server, jobs):
        server.fail("RunJob", Fault(code=StatusCode.RESOURCE_EXHAUSTED, retry_seconds=retry_seconds), times=9)
        with pytest.raises(Busy, match="check the quotas of the project") as caught:
            await jobs.launch(TASK)
        assert (retry_after, calls) == (caught.value.retry_after, server.calls["RunJob"])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (StatusCode.PERMISSION_DENIED, r"has run\.jobs\.run and run\.jobs\.runWithOverrides"),
        (StatusCode.UNAUTHENTICATED, "rejected the credentials: check the service account"),
        (StatusCode.FAILED_PRECONDITION, r"Cloud Run could not start the job .*: Requested by the test\."),
    ],
)
async def test_rejected_launch_says_what_to_check(containers: Containers, code: StatusCode, message: str) -> None:
    """A launch that was permanently rejected is not retried, and the error says what to check."""
    async with containers.run() as (server, jobs):
        server.fail("RunJob", Fault(code=code), times=9)
        with pytest.raises(LaunchFailed, match=message):
            await jobs.launch(TASK)
        assert 1 == server.calls["RunJob"]


async def test_missing_job_is_named(containers: Containers) -> None:
    """The error names the missing job, and the settings that identify it."""
    async with (
        containers.run() as (server, _),
        open_cloud_run(project=PROJECT, region=REGION, job="other", emulator=server.host) as jobs,
    ):
        with pytest.raises(LaunchFailed) as caught:
            await jobs.launch(TASK)
    assert caught.value.message == (
        "The Cloud Run job projects/test-project/locations/us-central1/jobs/other does not exist: "
        "check PROJECT_ID, REGION and CLOUDRUN_JOB_NAME."
    )


async def test_unreachable_service_is_busy(containers: Containers) -> None:
    """Without a connection the launch certainly had no effect, so the caller is asked to retry."""
    async with containers.run(policy=SHORT_LAUNCHES) as (server, jobs):
        await server.__aexit__()
        with pytest.raises(Busy, match="Cloud Run cannot be reached"):
            await jobs.launch(TASK)


async def test_idle_connection_is_reopened(containers: Containers) -> None:
    """A connection that was reset between two launches is opened again."""
    async with containers.run() as (server, jobs):
        await launched(server, jobs)
        server.reset_connections()
        async with asyncio.timeout(WAIT_SECONDS):
            await jobs._channel.wait_for_state_change(ChannelConnectivity.READY)
        await launched(server, jobs)
        assert 2 == server.calls["RunJob"] == len(server.executions)


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


# --- credentials and imports -----------------------------------------------------------------------------------------


async def test_missing_credentials_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials the connection fails, and the error says what to check."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file")
    with pytest.raises(NoCredentials, match="check the service account"):
        async with open_cloud_run(project=PROJECT, region=REGION, job=JOB):
            pass


def test_worker_modules_do_not_import_grpc() -> None:
    """The modules that a worker imports do not import gRPC, which takes a second to load."""
    script = "import sys; import ccrun.backends.gcp.blobs, ccrun.backends.gcp.key; sys.exit('grpc' in sys.modules)"
    assert 0 == subprocess.run([sys.executable, "-c", script], check=False).returncode

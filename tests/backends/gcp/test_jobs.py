"""Cloud Run Jobs as the place that runs workers. What every such place owes is in `tests/backends/local/test_jobs.py`."""

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

import pytest
from google.cloud import run_v2
from grpc import ChannelConnectivity, StatusCode
from helpers.service import PATIENCE
from standins.cloudrun import HANG, JOB, OUT_OF_MEMORY, PROJECT, REGION, CloudRun, Execution, Fault

from ccrun.backends.gcp.calls import NoCredentials
from ccrun.backends.gcp.jobs import CloudRunJobs, LaunchPolicy, execution_state, open_cloud_run
from ccrun.errors import Busy, LaunchFailed
from ccrun.jobs import ExecutionState
from ccrun.task import TaskId

TASK = TaskId("task-a")
HASTY = LaunchPolicy(
    connect_seconds=0.5,
    launch_seconds=0.5,
    attempt_seconds=0.3,
    attempts=3,
    total_seconds=2.0,
    first_delay_seconds=0.001,
)

#: Writes down its environment, and sleeps until it is told to end, if it listens.
WORKER = """
import json, os, pathlib, signal, sys, time
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text(json.dumps(dict(os.environ)))
if sys.argv[2].isdigit():
    sys.exit(int(sys.argv[2]))
time.sleep(600)
"""


class Stage:
    """A Cloud Run whose container does as the test says, and what it wrote."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "environment"

    @contextlib.asynccontextmanager
    async def set(
        self,
        behaviour: str = "sleep",
        *,
        launch_seconds: float = 0.0,
        task_timeout_seconds: float = 3600.0,
        term_grace_seconds: float = 10.0,
    ) -> AsyncIterator[tuple[CloudRun, CloudRunJobs]]:
        """Run it: the container sleeps, is deaf to SIGTERM, or ends at once with an exit code."""
        async with (
            CloudRun(
                command=(sys.executable, "-c", WORKER, str(self._file), behaviour),
                environment=dict(os.environ),
                launch_seconds=launch_seconds,
                task_timeout_seconds=task_timeout_seconds,
                term_grace_seconds=term_grace_seconds,
            ) as server,
            open_cloud_run(project=PROJECT, region=REGION, job=JOB, emulator=server.host, policy=HASTY) as jobs,
        ):
            yield server, jobs

    async def written(self) -> dict[str, str]:
        """Wait until the container lives, and return its environment."""
        async with asyncio.timeout(PATIENCE):
            while not self._file.exists() or not self._file.read_text():
                await asyncio.sleep(0.01)
        return dict(json.loads(self._file.read_text()))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """Return where a test sets up Cloud Run."""
    return Stage(tmp_path)


async def launched(server: CloudRun, jobs: CloudRunJobs) -> Execution:
    """Launch the task; return its execution."""
    name = await jobs.launch(TASK)
    assert name is not None
    return server.executions[name]


async def end_of(jobs: CloudRunJobs, execution: Execution) -> ExecutionState:
    """Wait for the end of an execution; return what is then told of it."""
    async with asyncio.timeout(PATIENCE):
        await execution.ended.wait()
    return await jobs.state(TASK, execution.short_name)


# --- launch --------------------------------------------------------------------------------------------------------------


async def test_a_worker_gets_its_task_and_where_the_payload_is_alone(stage: Stage) -> None:
    """The job's own environment is overridden by two variables, neither of them a secret."""
    async with stage.set() as (server, jobs):
        execution = await launched(server, jobs)
        environment = await stage.written()
        assert {
            "TASK_ID": TASK,
            "ENCRYPTED_PAYLOAD_PATH": f"sessions/{TASK}/encrypted-payload.bin",
        } == execution.overrides
        assert execution.overrides.items() <= environment.items()


async def test_the_execution_is_named_as_its_worker_knows_it(stage: Stage) -> None:
    """What a launch returns is what the worker finds in its environment, and what `gcloud` takes."""
    async with stage.set() as (server, jobs):
        execution = await launched(server, jobs)
        assert execution.short_name == (await stage.written())["CLOUD_RUN_EXECUTION"]


async def test_a_launch_waits_for_no_container(stage: Stage) -> None:
    """A launch is one call, and returns while the platform still looks for a machine."""
    async with stage.set(launch_seconds=math.inf) as (server, jobs):
        execution = await launched(server, jobs)
        assert ExecutionState.RUNNING == await jobs.state(TASK, execution.short_name)
        assert 1 == server.calls["RunJob"]


@pytest.mark.parametrize("code", [StatusCode.RESOURCE_EXHAUSTED, StatusCode.ABORTED])
async def test_a_refused_launch_is_made_again(stage: Stage, code: StatusCode) -> None:
    """What Google refuses for the moment had no effect, so it is sent again."""
    async with stage.set() as (server, jobs):
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
async def test_a_launch_that_may_have_had_its_effect_is_not_made_again(stage: Stage, fault: Fault) -> None:
    """When the answer is lost the launch counts as failed, within a bound, and no second execution is paid for."""
    async with stage.set() as (server, jobs):
        server.fail("RunJob", fault)
        async with asyncio.timeout(HASTY.launch_seconds + 2):
            with pytest.raises(LaunchFailed, match="Cloud Run did not confirm that it started the job"):
                await jobs.launch(TASK)
        assert (1, int(fault.reset == "after")) == (server.calls["RunJob"], len(server.executions))


@pytest.mark.parametrize(
    ("retry_seconds", "retry_after", "calls"), [(None, 30, HASTY.attempts), (0.01, 1, HASTY.attempts), (41.5, 42, 1)]
)
async def test_an_exhausted_quota_says_when_to_come_back(
    stage: Stage, retry_seconds: float | None, retry_after: int, calls: int
) -> None:
    """Google's own wish is passed on to the caller, and not waited for when it is long."""
    async with stage.set() as (server, jobs):
        server.fail("RunJob", Fault(code=StatusCode.RESOURCE_EXHAUSTED, retry_seconds=retry_seconds), times=9)
        with pytest.raises(Busy, match="check the quotas of the project") as caught:
            await jobs.launch(TASK)
        assert (retry_after, calls) == (caught.value.retry_after, server.calls["RunJob"])


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (StatusCode.PERMISSION_DENIED, r"has run\.jobs\.run and run\.jobs\.runWithOverrides"),
        (StatusCode.UNAUTHENTICATED, "rejected the credentials: check the service account"),
        (StatusCode.FAILED_PRECONDITION, r"Cloud Run could not start the job .*: The test wants it so\."),
    ],
)
async def test_a_refusal_says_what_to_check(stage: Stage, code: StatusCode, sentence: str) -> None:
    """What will be refused again is asked once, and the error says what to do about it."""
    async with stage.set() as (server, jobs):
        server.fail("RunJob", Fault(code=code), times=9)
        with pytest.raises(LaunchFailed, match=sentence):
            await jobs.launch(TASK)
        assert 1 == server.calls["RunJob"]


async def test_a_missing_job_is_named(stage: Stage) -> None:
    """The error names the job that does not exist, and the settings that name it."""
    async with (
        stage.set() as (server, _),
        open_cloud_run(project=PROJECT, region=REGION, job="other", emulator=server.host) as jobs,
    ):
        with pytest.raises(LaunchFailed) as caught:
            await jobs.launch(TASK)
    assert caught.value.message == (
        "The Cloud Run job projects/test-project/locations/us-central1/jobs/other does not exist: "
        "check PROJECT_ID, REGION and CLOUDRUN_JOB_NAME."
    )


async def test_where_nobody_is_nothing_is_sent(stage: Stage) -> None:
    """When there is no connection the launch certainly had no effect: the caller is asked to come back."""
    async with stage.set() as (server, jobs):
        await server.__aexit__()
        with pytest.raises(Busy, match="Cloud Run cannot be reached"):
            await jobs.launch(TASK)


async def test_a_reset_between_two_launches_is_not_noticed(stage: Stage) -> None:
    """A connection that broke while nothing was under way is opened anew."""
    async with stage.set() as (server, jobs):
        await launched(server, jobs)
        server.reset_connections()
        async with asyncio.timeout(PATIENCE):
            await jobs._channel.wait_for_state_change(ChannelConnectivity.READY)
        await launched(server, jobs)
        assert 2 == server.calls["RunJob"] == len(server.executions)


# --- state ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", ["0", "1"])
async def test_the_end_of_a_container_is_seen(stage: Stage, behaviour: str) -> None:
    """Whatever its exit code, an execution whose container has ended is over."""
    async with stage.set(behaviour) as (server, jobs):
        assert ExecutionState.FINISHED == await end_of(jobs, await launched(server, jobs))


async def test_a_container_that_was_killed_has_ended(stage: Stage) -> None:
    """An execution whose container was killed is over."""
    async with stage.set() as (server, jobs):
        execution = await launched(server, jobs)
        await stage.written()
        server.kill(execution.short_name)
        assert ExecutionState.FINISHED == await end_of(jobs, execution)


async def test_lack_of_memory_is_told(stage: Stage) -> None:
    """An execution whose container took more memory than it may is told apart."""
    async with stage.set() as (server, jobs):
        execution = await launched(server, jobs)
        await stage.written()
        server.kill(execution.short_name, fault=OUT_OF_MEMORY)
        assert ExecutionState.OUT_OF_MEMORY == await end_of(jobs, execution)


async def test_the_platforms_time_limit_is_told(stage: Stage) -> None:
    """An execution that the platform ended after the job's own time limit is told apart."""
    async with stage.set(task_timeout_seconds=0.2) as (server, jobs):
        assert ExecutionState.TIMED_OUT == await end_of(jobs, await launched(server, jobs))


async def test_a_cancel_at_the_console_is_told(stage: Stage) -> None:
    """An execution that somebody cancelled elsewhere is told apart, also when its container never began."""
    for launch_seconds in (0.0, math.inf):
        async with stage.set(launch_seconds=launch_seconds) as (server, jobs):
            execution = await launched(server, jobs)
            server.cancel(execution.short_name)
            assert ExecutionState.CANCELLED == await end_of(jobs, execution)


async def test_a_pruned_execution_is_unknown(stage: Stage) -> None:
    """The platform forgets executions; so is one that has no name yet, and one of another name."""
    async with stage.set("0") as (server, jobs):
        execution = await launched(server, jobs)
        await end_of(jobs, execution)
        server.prune(execution.short_name)
        for name in (execution.short_name, execution.name, None, "", "other", "../../other/executions/x"):
            assert ExecutionState.UNKNOWN == await jobs.state(TASK, name)


async def test_an_execution_is_found_by_its_whole_name_too(stage: Stage) -> None:
    """The name with the job's in front means the same execution."""
    async with stage.set() as (server, jobs):
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
async def test_a_passing_fault_is_not_noticed(stage: Stage, fault: Fault) -> None:
    """Looking and cancelling are made again after what passes by itself."""
    async with stage.set() as (server, jobs):
        execution = await launched(server, jobs)
        server.fail("GetExecution", fault)
        server.fail("CancelExecution", fault)
        assert ExecutionState.RUNNING == await jobs.state(TASK, execution.short_name)
        await jobs.cancel(TASK, execution.short_name)
        assert ExecutionState.CANCELLED == await end_of(jobs, execution)


@pytest.mark.parametrize(
    "fault", [Fault(code=StatusCode.UNAVAILABLE), Fault(code=StatusCode.PERMISSION_DENIED), HANG], ids=str
)
async def test_a_lasting_fault_is_no_end(stage: Stage, fault: Fault) -> None:
    """When Cloud Run does not tell, within a bound nothing is known; no living task may be given up for that."""
    async with stage.set() as (server, jobs):
        execution = await launched(server, jobs)
        server.fail("GetExecution", fault, times=9)
        async with asyncio.timeout(HASTY.total_seconds + 1):
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
def test_a_scant_description_is_enough(execution: run_v2.Execution, state: ExecutionState) -> None:
    """Google sets the parts of a description in no fixed order: each is enough to see the end."""
    assert state == execution_state(execution)


# --- cancel --------------------------------------------------------------------------------------------------------------


async def test_a_worker_that_does_not_listen_is_killed(stage: Stage) -> None:
    """A cancel is SIGTERM, and SIGKILL after the grace."""
    async with stage.set("deaf", term_grace_seconds=0.2) as (server, jobs):
        execution = await launched(server, jobs)
        await stage.written()
        await jobs.cancel(TASK, execution.short_name)
        assert ExecutionState.CANCELLED == await end_of(jobs, execution)
        assert -9 == execution.exit_code


async def test_cancelling_once_more_is_no_error(stage: Stage, capfd: pytest.CaptureFixture[str]) -> None:
    """One that is being cancelled, is over or is forgotten can be cancelled without an error, and without a warning."""
    async with stage.set() as (server, jobs):
        execution = await launched(server, jobs)
        await jobs.cancel(TASK, execution.short_name)
        await jobs.cancel(TASK, execution.short_name)
        await end_of(jobs, execution)
        await jobs.cancel(TASK, execution.short_name)
        server.prune(execution.short_name)
        await jobs.cancel(TASK, execution.short_name)
        assert (4, "") == (server.calls["CancelExecution"], capfd.readouterr().out)


async def test_without_a_name_nothing_is_called(stage: Stage) -> None:
    """A task that has not begun is cancelled by its record alone."""
    async with stage.set() as (server, jobs):
        await jobs.cancel(TASK, None)
        await jobs.clear(TASK)
        assert {} == server.calls


@pytest.mark.parametrize("fault", [Fault(code=StatusCode.PERMISSION_DENIED), HANG], ids=str)
async def test_a_cancel_that_cloud_run_does_not_take_is_no_error(stage: Stage, fault: Fault) -> None:
    """The cancel stands in the record, which the worker watches, so it is answered within a bound."""
    async with stage.set() as (server, jobs):
        execution = await launched(server, jobs)
        server.fail("CancelExecution", fault, times=9)
        async with asyncio.timeout(HASTY.total_seconds + 1):
            await jobs.cancel(TASK, execution.short_name)


# --- credentials, imports --------------------------------------------------------------------------------------------------


async def test_missing_credentials_are_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no credentials the service does not start, and says what to check."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file")
    with pytest.raises(NoCredentials, match="check the service account"):
        async with open_cloud_run(project=PROJECT, region=REGION, job=JOB):
            pass


def test_what_a_worker_loads_of_google_has_no_grpc() -> None:
    """Storage and keys load without gRPC, which takes a second."""
    script = "import sys; import ccrun.backends.gcp.blobs, ccrun.backends.gcp.key; sys.exit('grpc' in sys.modules)"
    assert 0 == subprocess.run([sys.executable, "-c", script], check=False).returncode

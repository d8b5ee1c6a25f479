"""Workers as Cloud Run executions. `tests/test_jobs.py` tests what every adapter that runs workers must do."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys

import attrs
import pytest
from grpc import ChannelConnectivity, StatusCode
from helpers.cloud_run import POLICY, TASK, Containers, containers, launched
from helpers.service import WAIT_SECONDS
from standins.cloudrun import HANG, Fault
from standins.execution import JOB, PROJECT, REGION

from ccrun.backends.gcp.calls import NoCredentials
from ccrun.backends.gcp.jobs import open_cloud_run
from ccrun.errors import Busy, LaunchFailed
from ccrun.jobs import ExecutionState

__all__ = ["containers"]


#: For tests whose calls get no response.
SHORT_LAUNCHES = attrs.evolve(POLICY, connect_seconds=0.5, launch_seconds=0.5)


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

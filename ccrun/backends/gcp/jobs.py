"""Workers as executions of a Cloud Run job.

The only module that imports gRPC, which takes a second, so workers must not import it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any, Final, TypeVar

import attrs
import google.auth
import grpc
import grpc.aio
import stamina
import structlog
from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError
from google.cloud import run_v2
from google.cloud.run_v2.services.executions.transports import ExecutionsGrpcAsyncIOTransport
from google.cloud.run_v2.services.jobs.transports import JobsGrpcAsyncIOTransport
from google.rpc.error_details_pb2 import RetryInfo
from grpc import StatusCode

from ccrun.backends.gcp.calls import NoCredentials
from ccrun.errors import Busy, LaunchFailed
from ccrun.jobs import ExecutionState
from ccrun.names import payload_name
from ccrun.task import TaskId

log = structlog.get_logger()

#: Milliseconds after which an idle connection is closed. Proxies and NATs silently drop idle connections, and a launch on a
#: dropped one is lost.
IDLE_MS: Final = 60_000
#: Seconds after which a client may retry a launch, when Google names no time. Quotas are counted by the minute.
QUOTA_RETRY_SECONDS: Final = 30
#: Seconds. When Google asks for a longer delay, the client gets `Busy`.
MAX_LAUNCH_DELAY_SECONDS: Final = 2.0

#: A container starts within seconds, and within two minutes when its image is new to the region.
START_TIMEOUT: Final = dt.timedelta(minutes=15)

#: The call was rejected without any effect: over the quota, or in conflict with another call.
REFUSED: Final = frozenset({StatusCode.RESOURCE_EXHAUSTED, StatusCode.ABORTED})
#: The call may have had its effect.
UNCERTAIN: Final = frozenset(
    {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.INTERNAL, StatusCode.UNKNOWN}
)

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class LaunchPolicy:
    """How often and for how long calls are retried, in seconds."""

    #: For a connection before a launch.
    connect_seconds: float = 5.0
    #: For one launch. It takes a few seconds, and after a timeout its effect is unknown.
    launch_seconds: float = 30.0
    #: For one other call, which takes some 100 ms.
    attempt_seconds: float = 5.0
    attempts: int = 4
    #: After this time no attempt starts, since a client waits.
    total_seconds: float = 10.0
    first_delay_seconds: float = 0.2


class CloudRunJobs:
    """Workers as executions of a Cloud Run job.

    A launch is retried only when Google has rejected it, so that it had no effect. When its response is lost, it counts as
    failed: a second execution would cost money, although its worker would find the task claimed, and an immediate error is
    better for the client than a task that may or may not start. If the launch has started an execution, its worker finds a
    final record and exits. Before it is sent, a launch waits for a connection.
    """

    #: The platform has the limit.
    max_running: int | None = None
    start_timeout: dt.timedelta | None = START_TIMEOUT

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        project: str,
        region: str,
        job: str,
        policy: LaunchPolicy = LaunchPolicy(),
    ) -> None:
        self._channel = channel
        self._jobs = run_v2.JobsAsyncClient(transport=JobsGrpcAsyncIOTransport(channel=channel))
        self._executions = run_v2.ExecutionsAsyncClient(transport=ExecutionsGrpcAsyncIOTransport(channel=channel))
        self._job = f"projects/{project}/locations/{region}/jobs/{job}"
        self._policy = policy

    def check_capacity(self) -> None:
        """Do nothing: only a launch shows whether there is capacity."""

    async def launch(self, task_id: TaskId) -> str | None:
        variables = {"TASK_ID": task_id, "ENCRYPTED_PAYLOAD_PATH": payload_name(task_id)}
        container = run_v2.RunJobRequest.Overrides.ContainerOverride(
            env=[run_v2.EnvVar(name=name, value=value) for name, value in variables.items()]
        )
        request = run_v2.RunJobRequest(
            name=self._job, overrides=run_v2.RunJobRequest.Overrides(container_overrides=[container])
        )
        await self._connect()
        try:
            operation = await self._call(
                lambda: self._jobs.run_job(request, retry=None, timeout=self._policy.launch_seconds),
                repeated_after=REFUSED,
            )
        except GoogleAPICallError as error:
            raise _launch_error(error, self._job) from error
        return _short_name(operation.metadata.name)

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        if execution_name is None:
            # The worker polls the record of its task.
            return
        request = run_v2.CancelExecutionRequest(name=self._full_name(execution_name))
        try:
            await self._call(
                lambda: self._executions.cancel_execution(request, retry=None, timeout=self._policy.attempt_seconds),
                repeated_after=REFUSED | UNCERTAIN,
            )
        except GoogleAPICallError as error:
            # It has finished.
            if error.grpc_status_code not in (StatusCode.NOT_FOUND, StatusCode.FAILED_PRECONDITION):
                # The task is cancelled anyway: the worker polls its record.
                log.warning(
                    "execution_cancel_failed",
                    message="Cloud Run did not cancel the execution; check the permission run.executions.cancel",
                    taskId=task_id,
                    error=_error_text(error),
                )

    async def state(self, task_id: TaskId, execution_name: str | None) -> ExecutionState:
        if execution_name is None:
            return ExecutionState.UNKNOWN
        request = run_v2.GetExecutionRequest(name=self._full_name(execution_name))
        try:
            execution = await self._call(
                lambda: self._executions.get_execution(request, retry=None, timeout=self._policy.attempt_seconds),
                repeated_after=REFUSED | UNCERTAIN,
            )
        except GoogleAPICallError as error:
            if error.grpc_status_code is StatusCode.NOT_FOUND:
                return ExecutionState.UNKNOWN
            log.warning(
                "execution_state_unavailable",
                message="Cloud Run did not return the execution; check the permission run.executions.get",
                taskId=task_id,
                error=_error_text(error),
            )
            return ExecutionState.UNREACHABLE
        return execution_state(execution)

    async def clear(self, task_id: TaskId) -> None:
        """Do nothing: a container leaves nothing."""

    async def _connect(self) -> None:
        """Wait for a connection, so that a launch is not sent in vain."""
        try:
            async with asyncio.timeout(self._policy.connect_seconds):
                await self._channel.channel_ready()
        except TimeoutError:
            raise Busy("Cloud Run cannot be reached: check the network.") from None

    async def _call(self, attempt: Callable[[], Awaitable[T]], *, repeated_after: Collection[StatusCode]) -> T:
        def pause(error: Exception) -> bool | float:
            if not isinstance(error, GoogleAPICallError) or error.grpc_status_code not in repeated_after:
                return False
            wished = _retry_seconds(error)
            return True if wished is None else wished <= MAX_LAUNCH_DELAY_SECONDS and wished

        retries = stamina.retry_context(
            on=pause,
            attempts=self._policy.attempts,
            timeout=self._policy.total_seconds,
            wait_initial=self._policy.first_delay_seconds,
            wait_jitter=self._policy.first_delay_seconds,
            wait_max=MAX_LAUNCH_DELAY_SECONDS,
        )
        async for retry in retries:
            with retry:
                return await attempt()
        raise AssertionError("stamina ends with a result or an error")

    def _full_name(self, execution_name: str) -> str:
        # Only executions of this job, whatever the record has.
        return f"{self._job}/executions/{_short_name(execution_name)}"


@contextlib.asynccontextmanager
async def open_cloud_run(
    *,
    project: str,
    region: str,
    job: str,
    emulator: str | None = None,
    policy: LaunchPolicy = LaunchPolicy(),
) -> AsyncIterator[CloudRunJobs]:
    """Connect to Cloud Run.

    Args:
        emulator: The host and port of an emulator, which is called without encryption and credentials.

    Raises:
        NoCredentials: There are no credentials.
    """
    options = [("grpc.client_idle_timeout_ms", IDLE_MS)]
    if emulator is not None:
        channel = grpc.aio.insecure_channel(emulator, options)
    else:
        channel = JobsGrpcAsyncIOTransport.create_channel(credentials=await _credentials(), options=options)
    try:
        # In a thread, since Google's clients read files of certificates.
        yield await asyncio.to_thread(CloudRunJobs, channel, project=project, region=region, job=job, policy=policy)
    finally:
        await channel.close()


async def _credentials() -> Any:
    try:
        # In a thread, since it reads files and calls the metadata server.
        found, _ = await asyncio.to_thread(google.auth.default, scopes=JobsGrpcAsyncIOTransport.AUTH_SCOPES)
    except GoogleAuthError as error:
        raise NoCredentials from error
    return found


def execution_state(execution: run_v2.Execution) -> ExecutionState:
    """Return the state of an execution.

    Google gives the reason of a failure only as a sentence for people. An unknown one counts as `FINISHED`.
    """
    undescribed = run_v2.Condition()
    completed = next((each for each in execution.conditions if each.type_ == "Completed"), undescribed)
    states = run_v2.Condition.State
    is_over = "completion_time" in execution or completed.state in (states.CONDITION_FAILED, states.CONDITION_SUCCEEDED)
    if not is_over:
        return ExecutionState.RUNNING
    if completed.execution_reason == run_v2.Condition.ExecutionReason.CANCELLED or execution.cancelled_count:
        return ExecutionState.CANCELLED
    # https://cloud.google.com/run/docs/troubleshooting, "The configured memory limit was reached" and similar ones.
    if "memory limit was reached" in completed.message:
        return ExecutionState.OUT_OF_MEMORY
    if "timeout was reached" in completed.message:
        return ExecutionState.TIMED_OUT
    return ExecutionState.FINISHED


def _launch_error(error: GoogleAPICallError, job: str) -> Busy | LaunchFailed:
    code = error.grpc_status_code
    match code:
        case StatusCode.NOT_FOUND:
            sentence = f"The Cloud Run job {job} does not exist: check PROJECT_ID, REGION and CLOUDRUN_JOB_NAME."
        case StatusCode.PERMISSION_DENIED:
            sentence = (
                f"Cloud Run refuses to run the job {job}: check that the service account has run.jobs.run and "
                "run.jobs.runWithOverrides on it."
            )
        case StatusCode.UNAUTHENTICATED:
            sentence = "Cloud Run does not accept the credentials: check the service account."
        case StatusCode.RESOURCE_EXHAUSTED | StatusCode.ABORTED:
            wished = _retry_seconds(error)
            return Busy(
                "Cloud Run takes no more executions for now: check the quotas of the project.",
                retry_after=QUOTA_RETRY_SECONDS if wished is None else max(1, math.ceil(wished)),
            )
        case _ if code in UNCERTAIN:
            sentence = f"Cloud Run did not confirm that it runs the job {job}: submit the task again."
        case _:
            sentence = f"Cloud Run cannot run the job {job}: {_error_text(error)}"
    return LaunchFailed(sentence)


def _retry_seconds(error: GoogleAPICallError) -> float | None:
    """Return the seconds after which Google wants a retry, if the error has them."""
    infos = (each for each in error.details if isinstance(each, RetryInfo))
    return next((each.retry_delay.ToTimedelta().total_seconds() for each in infos), None)


def _error_text(error: GoogleAPICallError) -> str:
    return f"{error.message} ({error.grpc_status_code.name if error.grpc_status_code else 'no status'})"


def _short_name(name: str) -> str:
    return name.rpartition("/")[2]

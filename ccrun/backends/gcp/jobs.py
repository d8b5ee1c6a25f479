"""Runs workers as executions of a Cloud Run job, one for each task.

No other module imports gRPC, which takes a second to load. Workers must not load this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
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

#: Milliseconds. Proxies and NAT gateways drop idle connections silently, and a launch on such a connection is lost. After
#: this time gRPC closes an idle connection, and opens a new one for the next call.
IDLE_MS: Final = 60_000
#: Seconds after which a client should retry when a quota is exceeded and Google names no time. Quotas are per minute.
QUOTA_RETRY_SECONDS: Final = 30
#: Seconds. When Google asks for a longer delay before a retry, the call fails.
MAX_RETRY_DELAY_SECONDS: Final = 2.0

#: Containers start within seconds, or within two minutes when the image is new in a region.
START_TIMEOUT: Final = dt.timedelta(minutes=15)
#: A launch takes a few seconds. If it takes longer than this, a sweep may launch a second execution, which is harmless.
LAUNCH_TIME: Final = dt.timedelta(seconds=30)
#: Executions in one page of a listing. Each takes a few kilobytes.
PAGE_SIZE: Final = 100

#: The call had no effect: a quota was exceeded, or it conflicted with another call.
REJECTED: Final = frozenset({StatusCode.RESOURCE_EXHAUSTED, StatusCode.ABORTED})
#: It is unknown whether the call took effect.
UNCERTAIN: Final = frozenset(
    {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.INTERNAL, StatusCode.UNKNOWN}
)

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class LaunchPolicy:
    """Timeouts and retries of calls."""

    #: For the connection that a launch needs.
    connect_seconds: float = 5.0
    #: For a launch. It takes a few seconds; after a timeout its effect is unknown.
    launch_seconds: float = 30.0
    #: For any other call. It takes about 100 ms.
    attempt_seconds: float = 5.0
    #: For all pages of a listing. Cloud Run keeps about a thousand executions that have finished.
    listing_seconds: float = 60.0
    attempts: int = 4
    #: No attempt starts after this. A client of the API waits meanwhile.
    total_seconds: float = 10.0
    first_delay_seconds: float = 0.2


class CloudRunJobs:
    """Runs workers as executions of a Cloud Run job.

    A launch is retried only if it certainly had no effect. If its response is lost, it counts as failed: a second execution
    would be harmless, since its worker finds that the task was taken, but it would cost money, and the client is better served
    by an immediate error. If the execution does start, its worker finds that the task has failed, and exits.
    """

    #: None: Cloud Run sets the limit.
    max_running: int | None = None
    start_timeout: dt.timedelta | None = START_TIMEOUT
    launch_time: dt.timedelta = LAUNCH_TIME

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

    def queue_position(self, task_id: TaskId) -> int | None:
        """Return None: Cloud Run does not tell."""
        return None

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
                retry_on=REJECTED,
            )
        except GoogleAPICallError as error:
            raise _launch_error(error, self._job) from error
        return _short_name(operation.metadata.name)

    async def cancel(self, task_id: TaskId, execution_name: str | None) -> None:
        if execution_name is None:
            # The worker polls its task's record and finds the cancel request there.
            return
        request = run_v2.CancelExecutionRequest(name=self._full_name(execution_name))
        try:
            await self._call(
                lambda: self._executions.cancel_execution(request, retry=None, timeout=self._policy.attempt_seconds),
                retry_on=REJECTED | UNCERTAIN,
            )
        except GoogleAPICallError as error:
            # Both mean that the execution has finished.
            if error.grpc_status_code not in (StatusCode.NOT_FOUND, StatusCode.FAILED_PRECONDITION):
                # Not an error: the worker also polls its task's record.
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
                retry_on=REJECTED | UNCERTAIN,
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

    async def launched_states(self, task_ids: Collection[TaskId]) -> Mapping[TaskId, ExecutionState]:
        """Find executions by their variable `TASK_ID`, which is stored nowhere else before a worker has started the task.

        The variables of a launch become part of the execution:
        https://cloud.google.com/run/docs/reference/rest/v2/projects.locations.jobs/run
        """
        states = dict.fromkeys(task_ids, ExecutionState.UNKNOWN)
        try:
            async with asyncio.timeout(self._policy.listing_seconds):
                async for execution in self._all_executions():
                    task_id = _task_id(execution)
                    # A task may have two executions. One that has not finished may still start it.
                    if task_id in states and states[task_id] is not ExecutionState.RUNNING:
                        states[task_id] = execution_state(execution)
        except (GoogleAPICallError, TimeoutError) as error:
            log.warning(
                "executions_unavailable",
                message="Cloud Run did not list the executions; check the permission run.executions.list",
                error=_error_text(error) if isinstance(error, GoogleAPICallError) else "The listing took too long.",
            )
            return dict.fromkeys(task_ids, ExecutionState.UNREACHABLE)
        return states

    async def _all_executions(self) -> AsyncIterator[run_v2.Execution]:
        request = run_v2.ListExecutionsRequest(parent=self._job, page_size=PAGE_SIZE)
        while True:
            page = await self._call(
                lambda: self._executions.list_executions(request, retry=None, timeout=self._policy.attempt_seconds),
                retry_on=REJECTED | UNCERTAIN,
            )
            for execution in page.executions:
                yield execution
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def clear(self, task_id: TaskId) -> None:
        """Do nothing: Cloud Run removes a container with its files and processes."""

    async def leftovers(self) -> list[TaskId]:
        return []

    async def _connect(self) -> None:
        """Wait for a connection. A launch that cannot be sent has certainly had no effect."""
        try:
            async with asyncio.timeout(self._policy.connect_seconds):
                await self._channel.channel_ready()
        except TimeoutError:
            raise Busy("Cloud Run cannot be reached: check the network.") from None

    async def _call(self, attempt: Callable[[], Awaitable[T]], *, retry_on: Collection[StatusCode]) -> T:
        def should_retry(error: Exception) -> bool | float:
            if not isinstance(error, GoogleAPICallError) or error.grpc_status_code not in retry_on:
                return False
            requested = _retry_seconds(error)
            return True if requested is None else requested <= MAX_RETRY_DELAY_SECONDS and requested

        retries = stamina.retry_context(
            on=should_retry,
            attempts=self._policy.attempts,
            timeout=self._policy.total_seconds,
            wait_initial=self._policy.first_delay_seconds,
            wait_jitter=self._policy.first_delay_seconds,
            wait_max=MAX_RETRY_DELAY_SECONDS,
        )
        async for retry in retries:
            with retry:
                return await attempt()
        raise AssertionError("stamina returns or raises")

    def _full_name(self, execution_name: str) -> str:
        # Only executions of this job, even if the record names another job.
        return f"{self._job}/executions/{_short_name(execution_name)}"


@contextlib.asynccontextmanager
async def open_cloud_run(
    *,
    project: str,
    region: str,
    job: str,
    emulator: str | None = None,
    policy: LaunchPolicy = LaunchPolicy(),
    ca_bundle: bytes | None = None,
) -> AsyncIterator[CloudRunJobs]:
    """Connect to Cloud Run, and close the connection on exit.

    Args:
        project: The ID of the Google Cloud project.
        region: The region of the job.
        job: The name of the job.
        emulator: The host and port of an emulator, which is called instead of Google, in plain text and without credentials.
        policy: Timeouts and retries.
        ca_bundle: The trusted certificates in PEM form; None for those of gRPC.

    Raises:
        NoCredentials: There are no credentials.
    """
    options = [("grpc.client_idle_timeout_ms", IDLE_MS)]
    if emulator is not None:
        channel = grpc.aio.insecure_channel(emulator, options)
    else:
        channel = JobsGrpcAsyncIOTransport.create_channel(
            credentials=await _credentials(),
            options=options,
            ssl_credentials=grpc.ssl_channel_credentials(ca_bundle) if ca_bundle else None,
        )
    try:
        # Google's clients read certificate files, so they are created in a thread.
        yield await asyncio.to_thread(CloudRunJobs, channel, project=project, region=region, job=job, policy=policy)
    finally:
        await channel.close()


async def _credentials() -> Any:
    try:
        # Reads files and calls the metadata server, so it runs in a thread.
        found, _ = await asyncio.to_thread(google.auth.default, scopes=JobsGrpcAsyncIOTransport.AUTH_SCOPES)
    except GoogleAuthError as error:
        raise NoCredentials from error
    return found


def execution_state(execution: run_v2.Execution) -> ExecutionState:
    """Return the state of an execution.

    Cloud Run gives the reason for a failure only as a message for humans. An unknown message counts as `FINISHED`.
    """
    no_condition = run_v2.Condition()
    completed = next((each for each in execution.conditions if each.type_ == "Completed"), no_condition)
    states = run_v2.Condition.State
    is_finished = "completion_time" in execution or completed.state in (
        states.CONDITION_FAILED,
        states.CONDITION_SUCCEEDED,
    )
    if not is_finished:
        return ExecutionState.RUNNING
    if completed.execution_reason == run_v2.Condition.ExecutionReason.CANCELLED or execution.cancelled_count:
        return ExecutionState.CANCELLED
    # https://cloud.google.com/run/docs/troubleshooting, "The configured memory limit was reached" and similar messages.
    if "memory limit was reached" in completed.message:
        return ExecutionState.OUT_OF_MEMORY
    if "timeout was reached" in completed.message:
        return ExecutionState.TIMED_OUT
    return ExecutionState.FINISHED


def _launch_error(error: GoogleAPICallError, job: str) -> Busy | LaunchFailed:
    code = error.grpc_status_code
    match code:
        case StatusCode.NOT_FOUND:
            message = f"The Cloud Run job {job} does not exist: check PROJECT_ID, REGION and CLOUDRUN_JOB_NAME."
        case StatusCode.PERMISSION_DENIED:
            message = (
                f"Cloud Run denied access to the job {job}: check that the service account has run.jobs.run and "
                "run.jobs.runWithOverrides."
            )
        case StatusCode.UNAUTHENTICATED:
            message = "Cloud Run rejected the credentials: check the service account."
        case StatusCode.RESOURCE_EXHAUSTED | StatusCode.ABORTED:
            requested = _retry_seconds(error)
            return Busy(
                "Cloud Run accepts no more executions now: check the quotas of the project.",
                retry_after=QUOTA_RETRY_SECONDS if requested is None else max(1, math.ceil(requested)),
            )
        case _ if code in UNCERTAIN:
            message = f"Cloud Run did not confirm that it started the job {job}: submit the task again."
        case _:
            message = f"Cloud Run could not start the job {job}: {_error_text(error)}"
    return LaunchFailed(message)


def _retry_seconds(error: GoogleAPICallError) -> float | None:
    """Return the delay in seconds that Google asks for before a retry, if any."""
    infos = (each for each in error.details if isinstance(each, RetryInfo))
    return next((each.retry_delay.ToTimedelta().total_seconds() for each in infos), None)


def _error_text(error: GoogleAPICallError) -> str:
    return f"{error.message} ({error.grpc_status_code.name if error.grpc_status_code else 'no status'})"


def _task_id(execution: run_v2.Execution) -> TaskId | None:
    variables = (variable for container in execution.template.containers for variable in container.env)
    return next((TaskId(variable.value) for variable in variables if variable.name == "TASK_ID"), None)


def _short_name(name: str) -> str:
    return name.rpartition("/")[2]

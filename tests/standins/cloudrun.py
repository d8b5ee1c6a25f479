"""A stand-in for the Cloud Run Admin API v2 on a loopback socket: runs a job as a local process, with injected faults.

https://cloud.google.com/run/docs/reference/rpc/google.cloud.run.v2
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import os
import secrets
import shutil
import signal
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import IO, Any, Final, NoReturn, Self

import attrs
import grpc
import grpc.aio
import psutil
from google.cloud import run_v2
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

PROJECT: Final = "test-project"
REGION: Final = "us-central1"
JOB: Final = "claude-code-job"

#: What the message of the condition `Completed` contains, depending on why an execution failed.
EXITED: Final = "The container exited with an error."
OUT_OF_MEMORY: Final = "The configured memory limit was reached."
TIMED_OUT: Final = "The configured timeout was reached."

#: Executions in one page of a listing, unless the request asks for fewer.
MAX_PAGE_SIZE: Final = 100

# Without this, gRPC stops a thread and waits for it when its last object is collected, which may be during another test.
grpc.aio.init_grpc_aio()

State = run_v2.Condition.State
ExecutionReason = run_v2.Condition.ExecutionReason


@attrs.frozen(kw_only=True)
class Fault:
    """A fault of one call.

    Args:
        code: The status of the response.
        retry_seconds: The delay before a retry that the status asks for.
        reset: When the connection is reset: `before` the call takes effect, or `after` it.
        delay_seconds: The delay before the call takes effect.
        response_delay_seconds: The delay between the effect and the response.
    """

    code: grpc.StatusCode | None = None
    retry_seconds: float | None = None
    reset: str | None = None
    delay_seconds: float = 0.0
    response_delay_seconds: float = 0.0


#: Longer than any test takes.
HANG: Final = Fault(delay_seconds=3600.0)


class Execution:
    """An execution of the job, which has one container. Here this is a process."""

    def __init__(self, name: str, overrides: Mapping[str, str]) -> None:
        self.name = name
        #: The variables that the request added to the job's environment.
        self.overrides = dict(overrides)
        #: Set to cancel the execution.
        self.cancelled = asyncio.Event()
        self.finished = asyncio.Event()
        #: None if the container never ran.
        self.exit_code: int | None = None
        #: What the message of the condition says about a failure.
        self.fault = EXITED
        self._process: asyncio.subprocess.Process | None = None
        self._created_at = dt.datetime.now(dt.UTC)
        self._started_at: dt.datetime | None = None
        self._finished_at: dt.datetime | None = None
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - Lives as long as the execution.

    @property
    def short_name(self) -> str:
        """The name without that of the job. It is also in the container's environment, as `CLOUD_RUN_EXECUTION`."""
        return self.name.rpartition("/")[2]

    @property
    def output(self) -> str:
        """The output of the container so far."""
        return os.pread(self._output.fileno(), 1 << 20, 0).decode(errors="replace")

    async def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        launch_seconds: float,
        task_timeout_seconds: float,
        term_grace_seconds: float,
    ) -> None:
        """Run the container, and stop it when it is cancelled or times out."""
        cancelled = asyncio.create_task(self.cancelled.wait())
        # The files of a container are removed with it.
        disk = await asyncio.to_thread(tempfile.mkdtemp)
        try:
            await asyncio.wait({cancelled}, timeout=launch_seconds)
            if not cancelled.done():
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    env={**environment, "TMPDIR": disk},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=self._output,
                )
                self._started_at = dt.datetime.now(dt.UTC)
                exited = asyncio.create_task(self._process.wait())
                await asyncio.wait(
                    {exited, cancelled}, timeout=task_timeout_seconds, return_when=asyncio.FIRST_COMPLETED
                )
                if not exited.done():
                    self.fault = TIMED_OUT
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self._process.pid, signal.SIGTERM)
                    await asyncio.wait({exited}, timeout=term_grace_seconds)
                    self.kill()
                self.exit_code = await exited
        finally:
            cancelled.cancel()
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, disk, ignore_errors=True))
            self._finished_at = dt.datetime.now(dt.UTC)
            self.finished.set()

    def kill(self) -> None:
        """Kill all processes of the container."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            container = psutil.Process(self._process.pid)
            for process in (container, *container.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def close(self) -> None:
        """Discard the output."""
        self._output.close()

    def message(self) -> run_v2.Execution:
        """Return the API's description of this execution."""
        is_finished = self.finished.is_set()
        has_failed = is_finished and self.exit_code != 0
        variables = [run_v2.EnvVar(name=name, value=value) for name, value in self.overrides.items()]
        return run_v2.Execution(
            name=self.name,
            job=self.name.partition("/executions/")[0].rpartition("/")[2],
            create_time=self._created_at,
            start_time=self._started_at,
            completion_time=self._finished_at,
            template=run_v2.TaskTemplate(containers=[run_v2.Container(env=variables)]),
            task_count=1,
            parallelism=1,
            running_count=int(self._started_at is not None and not is_finished),
            succeeded_count=int(is_finished and not has_failed),
            failed_count=int(has_failed and not self.cancelled.is_set()),
            cancelled_count=int(has_failed and self.cancelled.is_set()),
            conditions=[self._completed(is_finished=is_finished, has_failed=has_failed)],
        )

    def _completed(self, *, is_finished: bool, has_failed: bool) -> run_v2.Condition:
        if not is_finished:
            return run_v2.Condition(type_="Completed", state=State.CONDITION_RECONCILING)
        if not has_failed:
            text = "Execution completed successfully."
            return run_v2.Condition(type_="Completed", state=State.CONDITION_SUCCEEDED, message=text)
        if self.cancelled.is_set():
            reason, text = ExecutionReason.CANCELLED, "The execution was cancelled."
        else:
            reason = ExecutionReason.NON_ZERO_EXIT_CODE
            text = f"Task {self.short_name}-task0 failed with message: {self.fault}"
        return run_v2.Condition(type_="Completed", state=State.CONDITION_FAILED, execution_reason=reason, message=text)


class CloudRun:
    """A server with one job."""

    def __init__(
        self,
        *,
        command: Sequence[str],
        environment: Mapping[str, str],
        launch_seconds: float = 0.0,
        task_timeout_seconds: float = 3600.0,
        term_grace_seconds: float = 10.0,
    ) -> None:
        """Create the server.

        Args:
            command: The command of the container.
            environment: The environment of the container.
            launch_seconds: The time between the call and the start of the container; infinite if it must never start.
            task_timeout_seconds: The timeout of the job.
            term_grace_seconds: The time between SIGTERM and SIGKILL.
        """
        self.job = f"projects/{PROJECT}/locations/{REGION}/jobs/{JOB}"
        self.executions: dict[str, Execution] = {}
        #: How many calls the server received.
        self.calls: Counter[str] = Counter()
        self.launch_seconds = launch_seconds
        self.task_timeout_seconds = task_timeout_seconds
        self.term_grace_seconds = term_grace_seconds
        self.host = ""
        self._command = tuple(command)
        self._environment = dict(environment)
        self._faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        #: Including pruned executions.
        self._all: list[Execution] = []
        self._runs: list[asyncio.Task[None]] = []
        self._connections: set[asyncio.StreamWriter] = set()

    def fail(self, method: str, fault: Fault, *, times: int = 1) -> None:
        """Inject a fault into the next calls of a method (`RunJob`, `GetExecution`, `ListExecutions`, `CancelExecution`)."""
        self._faults[method].extend(itertools.repeat(fault, times))

    def cancel(self, name: str) -> None:
        """Cancel an execution, as an operator does in the console."""
        self.executions[name].cancelled.set()

    def kill(self, name: str, *, fault: str = EXITED) -> None:
        """Kill the container of an execution. The message of its condition then contains `fault`."""
        self.executions[name].fault = fault
        self.executions[name].kill()

    def prune(self, name: str) -> None:
        """Remove an execution, as Cloud Run does with all but the last thousand."""
        del self.executions[name]

    def add_finished(self, task_id: str) -> None:
        """Add an execution for a task that has finished without running its container."""
        execution = Execution(self._new_name(), {"TASK_ID": task_id})
        execution.finished.set()
        self._all.append(execution)
        self.executions[execution.short_name] = execution

    def _new_name(self) -> str:
        return f"{self.job}/executions/{JOB}-{secrets.token_hex(3)}"

    # --- the server --------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        jobs = {"RunJob": self._handler("RunJob", run_v2.RunJobRequest, self._run_job)}
        executions = {
            "GetExecution": self._handler("GetExecution", run_v2.GetExecutionRequest, self._get_execution),
            "ListExecutions": self._handler("ListExecutions", run_v2.ListExecutionsRequest, self._list_executions),
            "CancelExecution": self._handler("CancelExecution", run_v2.CancelExecutionRequest, self._cancel_execution),
        }
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("google.cloud.run.v2.Jobs", jobs),
                grpc.method_handlers_generic_handler("google.cloud.run.v2.Executions", executions),
            )
        )
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        # gRPC cannot reset a connection, so clients connect to a relay, which can.
        self._relay = await asyncio.start_server(self._relay_connection, "127.0.0.1", 0)
        self.host = f"127.0.0.1:{self._relay.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._relay.close()
        self.reset_connections()
        await self._server.stop(None)
        await self._server.wait_for_termination()
        for execution in self._all:
            execution.cancelled.set()
            execution.kill()
        await asyncio.gather(*self._runs)
        for execution in self._all:
            execution.close()

    def stop_listening(self) -> None:
        """Make the server unreachable."""
        self._relay.close()
        self.reset_connections()

    def reset_connections(self) -> None:
        """Reset all connections."""
        for writer in self._connections:
            writer.transport.abort()

    async def _relay_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backend_reader, backend_writer = await asyncio.open_connection("127.0.0.1", self._port)
        pair = {writer, backend_writer}
        self._connections |= pair

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
            target.transport.abort()

        await asyncio.gather(pump(reader, backend_writer), pump(backend_reader, writer))
        self._connections -= pair

    def _handler(
        self, name: str, request_type: Any, apply: Callable[[Any], Awaitable[Any]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            self.calls[name] += 1
            faults = self._faults[name]
            fault = faults.popleft() if faults else Fault()
            await asyncio.sleep(fault.delay_seconds)
            if fault.code is not None:
                await _abort(context, fault.code, "Requested by the test.", retry_seconds=fault.retry_seconds)
            if fault.reset == "before":
                self.reset_connections()
                await asyncio.Future()
            try:
                response = await apply(request)
            except _Rejected as rejected:
                await _abort(context, rejected.code, rejected.message)
            await asyncio.sleep(fault.response_delay_seconds)
            if fault.reset == "after":
                self.reset_connections()
                await asyncio.Future()
            return response

        return grpc.unary_unary_rpc_method_handler(
            handle, request_deserializer=request_type.deserialize, response_serializer=_serialize
        )

    # --- the methods -------------------------------------------------------------------------------------------------

    async def _run_job(self, request: run_v2.RunJobRequest) -> operations_pb2.Operation:
        if request.name != self.job:
            raise _Rejected(grpc.StatusCode.NOT_FOUND, f"Resource '{request.name}' of kind 'JOB' does not exist.")
        container = request.overrides.container_overrides[0] if request.overrides.container_overrides else None
        overrides = {variable.name: variable.value for variable in container.env} if container else {}
        execution = Execution(self._new_name(), overrides)
        self.executions[execution.short_name] = execution
        environment = {
            **self._environment,
            **overrides,
            # https://cloud.google.com/run/docs/container-contract#jobs-env-vars
            "CLOUD_RUN_JOB": JOB,
            "CLOUD_RUN_EXECUTION": execution.short_name,
            "CLOUD_RUN_TASK_INDEX": "0",
            "CLOUD_RUN_TASK_ATTEMPT": "0",
            "CLOUD_RUN_TASK_COUNT": "1",
        }
        run = asyncio.create_task(
            execution.run(
                self._command,
                environment,
                launch_seconds=self.launch_seconds,
                task_timeout_seconds=self.task_timeout_seconds,
                term_grace_seconds=self.term_grace_seconds,
            )
        )
        self._all.append(execution)
        self._runs.append(run)
        return _operation(execution)

    async def _get_execution(self, request: run_v2.GetExecutionRequest) -> run_v2.Execution:
        return self._find(request.name).message()

    async def _list_executions(self, request: run_v2.ListExecutionsRequest) -> run_v2.ListExecutionsResponse:
        if request.parent != self.job:
            raise _Rejected(grpc.StatusCode.NOT_FOUND, f"Resource '{request.parent}' of kind 'JOB' does not exist.")
        newest_first = list(reversed(self.executions.values()))
        first = int(request.page_token or 0)
        last = first + (request.page_size or MAX_PAGE_SIZE)
        return run_v2.ListExecutionsResponse(
            executions=[execution.message() for execution in newest_first[first:last]],
            next_page_token=str(last) if last < len(newest_first) else "",
        )

    async def _cancel_execution(self, request: run_v2.CancelExecutionRequest) -> operations_pb2.Operation:
        execution = self._find(request.name)
        if execution.finished.is_set():
            raise _Rejected(grpc.StatusCode.FAILED_PRECONDITION, f"Execution '{request.name}' is already completed.")
        execution.cancelled.set()
        return _operation(execution)

    def _find(self, name: str) -> Execution:
        execution = self.executions.get(name.rpartition("/")[2])
        if execution is None or execution.name != name:
            raise _Rejected(grpc.StatusCode.NOT_FOUND, f"Resource '{name}' of kind 'EXECUTION' does not exist.")
        return execution


class _Rejected(Exception):
    """The response to a call is an error."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(message)


def _serialize(message: Any) -> bytes:
    is_wrapped = isinstance(message, run_v2.Execution | run_v2.ListExecutionsResponse)
    return bytes(type(message).serialize(message) if is_wrapped else message.SerializeToString())


def _operation(execution: Execution) -> operations_pb2.Operation:
    metadata = any_pb2.Any()
    metadata.Pack(run_v2.Execution.pb(execution.message()))
    parent = execution.name.partition("/jobs/")[0]
    return operations_pb2.Operation(name=f"{parent}/operations/{secrets.token_hex(8)}", metadata=metadata)


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any],
    code: grpc.StatusCode,
    message: str,
    *,
    retry_seconds: float | None = None,
) -> NoReturn:
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=message)
    if retry_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromTimedelta(dt.timedelta(seconds=retry_seconds))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    await context.abort(code, message, (("grpc-status-details-bin", status.SerializeToString()),))
    raise AssertionError

"""Cloud Run Admin v2 on a loopback socket: runs a job as a local process, with the faults that a test asks for.

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

#: What the platform says of how an execution ended, in the condition `Completed`.
EXITED: Final = "The container exited with an error."
OUT_OF_MEMORY: Final = "The configured memory limit was reached."
TIMED_OUT: Final = "The configured timeout was reached."

# gRPC ends a thread, and waits for that, when the last of its objects is collected, be it in the middle of another test.
grpc.aio.init_grpc_aio()

State = run_v2.Condition.State
ExecutionReason = run_v2.Condition.ExecutionReason


@attrs.frozen(kw_only=True)
class Fault:
    """What goes wrong with one call.

    Args:
        code: The status of the answer.
        retry_seconds: What the status says about when to try again.
        reset: Whether the connection is reset, `before` the effect or `after` it.
        delay_seconds: How late the call has its effect.
        silence_seconds: How late the answer to it comes.
    """

    code: grpc.StatusCode | None = None
    retry_seconds: float | None = None
    reset: str | None = None
    delay_seconds: float = 0.0
    silence_seconds: float = 0.0


#: Longer than any test waits.
HANG: Final = Fault(delay_seconds=3600.0)


class Execution:
    """An execution of the job: one task, one container, here one process."""

    def __init__(self, name: str, overrides: Mapping[str, str]) -> None:
        self.name = name
        #: The environment that the request put over the job's own.
        self.overrides = dict(overrides)
        #: Set by whoever cancels.
        self.cancelled = asyncio.Event()
        self.ended = asyncio.Event()
        #: None when the container never ran.
        self.exit_code: int | None = None
        #: What the platform says of a failure.
        self.fault = EXITED
        self._process: asyncio.subprocess.Process | None = None
        self._created_at = dt.datetime.now(dt.UTC)
        self._started_at: dt.datetime | None = None
        self._ended_at: dt.datetime | None = None
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - Lives as long as the execution.

    @property
    def short_name(self) -> str:
        """The name without the job's; what the container finds in `CLOUD_RUN_EXECUTION`."""
        return self.name.rpartition("/")[2]

    @property
    def output(self) -> str:
        """What the container printed so far."""
        return os.pread(self._output.fileno(), 1 << 20, 0).decode(errors="replace")

    async def live(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        launch_seconds: float,
        task_timeout_seconds: float,
        term_grace_seconds: float,
    ) -> None:
        """Run the container to its end, and end it by force when it must."""
        cancelled = asyncio.create_task(self.cancelled.wait())
        # A container's files go with it, however it ends.
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
            self._ended_at = dt.datetime.now(dt.UTC)
            self.ended.set()

    def kill(self) -> None:
        """Kill everything in the container, as its kernel would."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            container = psutil.Process(self._process.pid)
            for process in (container, *container.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def close(self) -> None:
        """Let go of what the container printed."""
        self._output.close()

    def message(self) -> run_v2.Execution:
        """Return what the API tells of this execution."""
        is_over = self.ended.is_set()
        has_failed = is_over and self.exit_code != 0
        return run_v2.Execution(
            name=self.name,
            job=self.name.partition("/executions/")[0].rpartition("/")[2],
            create_time=self._created_at,
            start_time=self._started_at,
            completion_time=self._ended_at,
            task_count=1,
            parallelism=1,
            running_count=int(self._started_at is not None and not is_over),
            succeeded_count=int(is_over and not has_failed),
            failed_count=int(has_failed and not self.cancelled.is_set()),
            cancelled_count=int(has_failed and self.cancelled.is_set()),
            conditions=[self._completed(is_over=is_over, has_failed=has_failed)],
        )

    def _completed(self, *, is_over: bool, has_failed: bool) -> run_v2.Condition:
        if not is_over:
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
    """A region with one job; `calls` counts what came in, by method."""

    def __init__(
        self,
        *,
        command: Sequence[str],
        environment: Mapping[str, str],
        launch_seconds: float = 0.0,
        task_timeout_seconds: float = 3600.0,
        term_grace_seconds: float = 10.0,
    ) -> None:
        """Make the region.

        Args:
            command: What the job's container runs.
            environment: The job's own.
            launch_seconds: Between the call and the start of the container; infinite for never.
            task_timeout_seconds: What the job allows a task.
            term_grace_seconds: Between SIGTERM and SIGKILL.
        """
        self.job = f"projects/{PROJECT}/locations/{REGION}/jobs/{JOB}"
        self.executions: dict[str, Execution] = {}
        self.calls: Counter[str] = Counter()
        self.launch_seconds = launch_seconds
        self.task_timeout_seconds = task_timeout_seconds
        self.term_grace_seconds = term_grace_seconds
        self.host = ""
        self._command = tuple(command)
        self._environment = dict(environment)
        self._errors: defaultdict[str, deque[Fault]] = defaultdict(deque)
        #: Those that are pruned too.
        self._all: list[Execution] = []
        self._lives: list[asyncio.Task[None]] = []
        self._connections: set[asyncio.StreamWriter] = set()

    def fail(self, method: str, fault: Fault, *, times: int = 1) -> None:
        """Let the next calls of a method (`RunJob`, `GetExecution`, `CancelExecution`) go wrong."""
        self._errors[method].extend(itertools.repeat(fault, times))

    def cancel(self, name: str) -> None:
        """Cancel an execution, as somebody at the console would."""
        self.executions[name].cancelled.set()

    def kill(self, name: str, *, fault: str = EXITED) -> None:
        """Kill the container of an execution; `fault` is what the platform says of it."""
        self.executions[name].fault = fault
        self.executions[name].kill()

    def prune(self, name: str) -> None:
        """Forget an execution, as the platform does with all but the last thousand."""
        del self.executions[name]

    # --- the server ----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        jobs = {"RunJob": self._handler("RunJob", run_v2.RunJobRequest, self._run_job)}
        executions = {
            "GetExecution": self._handler("GetExecution", run_v2.GetExecutionRequest, self._get_execution),
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
        # gRPC has no way to reset a connection, so clients connect to a relay that has.
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
        await asyncio.gather(*self._lives)
        for execution in self._all:
            execution.close()

    def stop_listening(self) -> None:
        """Be out of reach from now on."""
        self._relay.close()
        self.reset_connections()

    def reset_connections(self) -> None:
        """Reset every connection, as maintenance does."""
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
        self, name: str, request_type: Any, answer: Callable[[Any], Awaitable[Any]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            self.calls[name] += 1
            errors = self._errors[name]
            fault = errors.popleft() if errors else Fault()
            await asyncio.sleep(fault.delay_seconds)
            if fault.code is not None:
                await _abort(context, fault.code, "The test wants it so.", retry_seconds=fault.retry_seconds)
            if fault.reset == "before":
                self.reset_connections()
                await asyncio.Future()
            try:
                response = await answer(request)
            except _Refused as refused:
                await _abort(context, refused.code, refused.message)
            await asyncio.sleep(fault.silence_seconds)
            if fault.reset == "after":
                self.reset_connections()
                await asyncio.Future()
            return response

        return grpc.unary_unary_rpc_method_handler(
            handle, request_deserializer=request_type.deserialize, response_serializer=_serialize
        )

    # --- the methods ---------------------------------------------------------------------------------------------------

    async def _run_job(self, request: run_v2.RunJobRequest) -> operations_pb2.Operation:
        if request.name != self.job:
            raise _Refused(grpc.StatusCode.NOT_FOUND, f"Resource '{request.name}' of kind 'JOB' does not exist.")
        container = request.overrides.container_overrides[0] if request.overrides.container_overrides else None
        overrides = {variable.name: variable.value for variable in container.env} if container else {}
        execution = Execution(f"{self.job}/executions/{JOB}-{secrets.token_hex(3)}", overrides)
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
        life = asyncio.create_task(
            execution.live(
                self._command,
                environment,
                launch_seconds=self.launch_seconds,
                task_timeout_seconds=self.task_timeout_seconds,
                term_grace_seconds=self.term_grace_seconds,
            )
        )
        self._all.append(execution)
        self._lives.append(life)
        return _operation(execution)

    async def _get_execution(self, request: run_v2.GetExecutionRequest) -> run_v2.Execution:
        return self._find(request.name).message()

    async def _cancel_execution(self, request: run_v2.CancelExecutionRequest) -> operations_pb2.Operation:
        execution = self._find(request.name)
        if execution.ended.is_set():
            raise _Refused(grpc.StatusCode.FAILED_PRECONDITION, f"Execution '{request.name}' is already completed.")
        execution.cancelled.set()
        return _operation(execution)

    def _find(self, name: str) -> Execution:
        execution = self.executions.get(name.rpartition("/")[2])
        if execution is None or execution.name != name:
            raise _Refused(grpc.StatusCode.NOT_FOUND, f"Resource '{name}' of kind 'EXECUTION' does not exist.")
        return execution


class _Refused(Exception):
    """The answer to a call is an error."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(message)


def _serialize(message: Any) -> bytes:
    raw = run_v2.Execution.serialize(message) if isinstance(message, run_v2.Execution) else message.SerializeToString()
    return bytes(raw)


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

"""A stand-in for the Cloud Run Admin API v2 on a loopback socket: runs a job as a local process, with injected faults.

https://cloud.google.com/run/docs/reference/rpc/google.cloud.run.v2
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import secrets
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NoReturn, Self

import attrs
import grpc
import grpc.aio
from google.cloud import run_v2
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from standins.execution import EXITED, JOB, PROJECT, REGION, Execution

#: Executions in one page of a listing, unless the request asks for fewer.
MAX_PAGE_SIZE: Final = 100

# Without this, gRPC stops a thread and waits for it when its last object is collected, which may be during another test.
grpc.aio.init_grpc_aio()


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

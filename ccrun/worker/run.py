"""The steps of one task: open the payload, prepare the workspace, run the agent, act on its work, record the outcome.

Owns the order of the steps, the deadline, and what SIGTERM does.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from typing import Any, Final

import attrs
import stamina
import structlog

from ccrun import lifecycle
from ccrun.callbacks.owed import OwedCallbacks
from ccrun.errors import CcrunError, IllegalTransition, StorageError, TaskNotFound
from ccrun.redaction import Redactor
from ccrun.results import Isolation
from ccrun.spec import TaskSpec
from ccrun.task import EXIT_TERMINATED, Outcome, Reason, Status, TaskId, TaskRecord
from ccrun.worker import claude, limits
from ccrun.worker.agent import AgentSession, run_agent
from ccrun.worker.commands import command_files, run_commands
from ccrun.worker.credential import choose_upstream
from ccrun.worker.dependencies import WorkerDependencies, WorkerTimeouts
from ccrun.worker.egress_proxy import HostPolicy
from ccrun.worker.git.checkout import Checkout, check_out
from ccrun.worker.isolation import agent_servers
from ccrun.worker.log_writer import LogIncomplete, LogWriter
from ccrun.worker.payload import Payload
from ccrun.worker.post_run import PostRun
from ccrun.worker.preparation import check_settings, prepare_dotenv
from ccrun.worker.proxy import CredentialProxy
from ccrun.worker.stop import StopCause, StopRequest, StopRequested, alongside, stopped_outcome, with_stop
from ccrun.worker.workspace import CA_FILE, Workspace, chown_to_agent, open_workspace, write_inputs

log = structlog.get_logger()

#: Seconds before the outcome must be recorded at which a rescue is stopped during a shutdown.
RESCUE_MARGIN_SECONDS: Final = 0.5
#: Seconds for which the final record is retried while the storage fails.
RECORD_SECONDS: Final = 60.0


async def run_task(deps: WorkerDependencies, task_id: TaskId, *, shutdown: asyncio.Event) -> None:
    """Run a task until its outcome is recorded and one delivery of its callback was attempted.

    Does nothing when another worker has started the task.

    Args:
        shutdown: Set when this process must exit. The task then has `WorkerTimeouts.shutdown` seconds left.

    Raises:
        CcrunError: The outcome could not be recorded.
    """
    started = asyncio.get_running_loop().time()
    try:
        await deps.store.update(
            task_id,
            lambda record: lifecycle.start(record, at=dt.datetime.now(dt.UTC), execution_name=deps.execution_name),
        )
    except (IllegalTransition, TaskNotFound) as error:
        log.info("task_not_claimed", message="Task not claimed; nothing to do", error=error.message)
        return
    log.info("task_started", message="Task started")
    stop = StopRequest()
    spec: TaskSpec | None = None
    payload = Payload(deps.store, deps.wrapper, task_id)
    async with _watching(deps, task_id, stop, shutdown), AsyncExitStack() as stack:
        try:
            spec = await payload.open()
            confinement, isolation = await deps.isolation.confinement()
            stop.set_deadline(started + spec.timeout_minutes * 60)
            isolation, policy = deps.isolation.network_of(spec, isolation)
            workspace = await stack.enter_async_context(open_workspace(task_id, confinement))
            await stack.enter_async_context(limits.watch(deps.limits, workspace.root, stop))
            performing = _perform(deps, spec, workspace, stop, isolation, policy)
            outcome = await _until_shutdown(performing, stop, deps.timeouts)
        except StorageError as error:
            outcome = lifecycle.failed_outcome(
                Reason.KILLED, f"The storage failed, so the task was stopped: {error.message}"
            )
        except CcrunError as error:
            outcome = lifecycle.failed_outcome(Reason.PREPARE_FAILED, error.message)
        try:
            record = await _record_outcome(deps, task_id, outcome, delete_payload=not payload.is_deleted)
        except IllegalTransition as error:
            log.warning("task_already_final", message="The task was finished by another process", error=error.message)
            return
        _log_finished(record)
    # The workspace is removed: a worker that is killed during the delivery leaves no files.
    if not record.owes_callback or deps.callbacks is None:
        return
    if payload.is_deleted:
        await _deliver_callback(deps.callbacks, record, spec, shutdown, deps.timeouts)
    else:
        # A sweep deletes the payload before it delivers, so that no payload outlives its task.
        await deps.callbacks.release(task_id)


def _log_finished(record: TaskRecord) -> None:
    write = log.warning if record.status is Status.FAILED else log.info
    write(
        "task_finished", message="Task finished", status=record.status, reason=record.reason, exitCode=record.exit_code
    )


# --- stop requests -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _watching(
    deps: WorkerDependencies, task_id: TaskId, stop: StopRequest, shutdown: asyncio.Event
) -> AsyncIterator[None]:
    """Request a stop when the task is cancelled or this process must exit."""

    async def watch_record() -> None:
        while True:
            await asyncio.sleep(deps.timeouts.cancel_poll)
            # The signal of a cancellation may be lost; the record is not.
            with contextlib.suppress(CcrunError):
                record = await deps.store.record(task_id)
                # The record is final when this worker was considered lost.
                if record.is_cancelling or record.status.is_final:
                    stop.request(StopCause.CANCEL)

    async def watch_shutdown() -> None:
        await shutdown.wait()
        stop.request(StopCause.SHUTDOWN)

    async with alongside(watch_record(), watch_shutdown()):
        yield


async def _until_shutdown(work: Coroutine[Any, Any, Outcome], stop: StopRequest, timeouts: WorkerTimeouts) -> Outcome:
    """Return the outcome of the work. After a shutdown request, cancel it in time to record an outcome."""
    performing, shutdown = asyncio.create_task(work), asyncio.create_task(stop.wait_for_shutdown())
    try:
        await asyncio.wait({performing, shutdown}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({performing}, timeout=timeouts.shutdown_work)
    finally:
        shutdown.cancel()
        performing.cancel()
    try:
        return await performing
    except (asyncio.CancelledError, LogIncomplete) as stopped:
        error = "The worker was shut down, and the task could not be stopped in order in the time that was left."
        if isinstance(stopped, LogIncomplete):
            if stop.shutdown_at is None:
                raise
            error = f"{error} {stopped.message}"
        return lifecycle.failed_outcome(Reason.KILLED, error, exit_code=EXIT_TERMINATED)


# --- the steps ---------------------------------------------------------------------------------------------------------


async def _perform(
    deps: WorkerDependencies,
    spec: TaskSpec,
    workspace: Workspace,
    stop: StopRequest,
    isolation: Isolation,
    policy: HostPolicy,
) -> Outcome:
    """Do what the request asks for. Afterwards the log is complete and no process of the agent runs."""
    upstream = choose_upstream(deps, spec)
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(CredentialProxy(upstream, egress=deps.egress))
        redactor = Redactor((*spec.secrets, *deps.secrets, *upstream.secrets, *deps.egress.secrets, proxy.run_token))
        writer = await stack.enter_async_context(LogWriter(deps.store, spec.task_id, deps.flush_policy, redactor.lines))
        ca_file = workspace.inputs / CA_FILE if deps.egress.ca_bundle else None
        servers = agent_servers(workspace.confinement, isolation, policy, deps.egress, proxy, ca_file)
        environment = claude.environment(
            spec,
            inherited=deps.inherited,
            network=servers.variables,
            home=workspace.home,
            config=workspace.config,
            temporary=workspace.temporary,
            model_api=upstream.variables(proxy.url, proxy.run_token),
            is_root=workspace.confinement.user is None and os.geteuid() == 0,
            marker=deps.marker,
        )
        session = AgentSession(
            writer=writer,
            redactor=redactor,
            proxy=proxy,
            environment=environment,
            max_line_bytes=deps.max_line_bytes,
        )
        checkout: Checkout | None = None
        try:
            checkout = await stop.run(check_out(deps, spec, workspace, stack=stack, log_line=writer.write))
            await stop.run(prepare_dotenv(spec.environment_secrets, workspace, checkout, log_line=writer.write))
            option_files = await write_inputs(
                workspace,
                config_files=claude.config_files(spec),
                option_files=claude.option_files(spec, environment),
                other_files={
                    **command_files(spec.pre_execution_commands),
                    **({CA_FILE: deps.egress.ca_bundle} if deps.egress.ca_bundle else {}),
                },
            )
            await chown_to_agent(workspace)
            served = attrs.evolve(workspace, confinement=servers.confinement)
            await stop.run(check_settings(spec, workspace, cli=deps.cli, environment=environment))
            variables = await stop.run(
                run_commands(
                    spec.pre_execution_commands,
                    served,
                    environment=environment,
                    log_line=writer.write,
                    seconds=deps.timeouts.command,
                    max_line_bytes=deps.max_line_bytes,
                )
            )
            session = attrs.evolve(session, environment=variables)
            outcome = await run_agent(deps, spec, served, session, option_files, stop)
        except StopRequested:
            outcome = stopped_outcome(stop, spec.timeout_minutes)
        except StorageError:
            raise
        except CcrunError as error:
            outcome = lifecycle.failed_outcome(Reason.PREPARE_FAILED, error.message)
        post_run = PostRun(
            store=deps.store,
            spec=spec,
            workspace=workspace,
            checkout=checkout,
            redactor=redactor,
            log_line=writer.write,
            limits=deps.timeouts.actions,
        )
        outcome = await _finish_work(post_run, outcome, stop, deps.timeouts)
    if servers.proxy is not None:
        isolation = attrs.evolve(isolation, refused_hosts=redactor.value(tuple(servers.proxy.refused)))
    outcome = attrs.evolve(outcome, isolation=isolation)
    redacted = ("error", "result", "usage", "session_id", "api_error", "background_tasks", "mcp_servers")
    return attrs.evolve(outcome, **{name: redactor.value(getattr(outcome, name)) for name in redacted})


async def _finish_work(post_run: PostRun, outcome: Outcome, stop: StopRequest, timeouts: WorkerTimeouts) -> Outcome:
    """Run the actions of a task that has succeeded; store changes that are not pushed as patches."""
    if outcome.status is Status.COMPLETED:
        stop.cancel_deadline()
        try:
            await stop.run(post_run.run())
        except StopRequested:
            if stop.cause is StopCause.CANCEL:
                outcome = lifecycle.cancelled_outcome(outcome)
            elif stop.exceeded is not None:
                outcome = with_stop(outcome, stop.exceeded)
            else:
                post_run.result.fail("worker", "The worker was shut down before all actions were done.")
    is_pushed = outcome.status is Status.COMPLETED and not post_run.result.is_unpushed
    if not is_pushed or post_run.pushes:
        await _rescue(post_run, stop, timeouts, is_pushed=is_pushed)
    return post_run.result.apply_to(outcome, post_run.redactor)


async def _rescue(post_run: PostRun, stop: StopRequest, timeouts: WorkerTimeouts, *, is_pushed: bool) -> None:
    """Store the changes as patches within its timeout, which a shutdown shortens."""
    loop = asyncio.get_running_loop()

    async def shorten(timeout: asyncio.Timeout) -> None:
        await stop.wait_for_shutdown()
        at = (stop.shutdown_at or 0.0) + timeouts.shutdown_work - RESCUE_MARGIN_SECONDS
        timeout.reschedule(min(at, timeout.when() or at))

    try:
        async with asyncio.timeout_at(loop.time() + timeouts.rescue) as timeout:
            shortening = asyncio.create_task(shorten(timeout))
            try:
                await post_run.rescue(is_pushed=is_pushed)
            finally:
                shortening.cancel()
    except TimeoutError:
        post_run.result.fail("rescue", "There was no time to store the changes.")


# --- the outcome -------------------------------------------------------------------------------------------------------


async def _record_outcome(
    deps: WorkerDependencies, task_id: TaskId, outcome: Outcome, *, delete_payload: bool
) -> TaskRecord:
    """Write the final record, which includes the state of the callback.

    Raises:
        StorageError: It could not be written within `RECORD_SECONDS`.
        IllegalTransition: Another process has finished the task.
    """

    def finish(record: TaskRecord) -> TaskRecord:
        now = dt.datetime.now(dt.UTC)
        lease = now + deps.callbacks.lease if deps.callbacks is not None else None
        return lifecycle.finish(record, outcome, at=now, lease_until=lease)

    @stamina.retry(on=StorageError, attempts=None, timeout=RECORD_SECONDS)
    async def write() -> TaskRecord:
        return await deps.store.update(task_id, finish, delete_payload=delete_payload)

    return await write()


async def _deliver_callback(
    callbacks: OwedCallbacks,
    record: TaskRecord,
    spec: TaskSpec | None,
    shutdown: asyncio.Event,
    timeouts: WorkerTimeouts,
) -> None:
    """Deliver the callback. At a shutdown, leave to a sweep what cannot be delivered in time."""
    url = spec.callback_url if spec is not None else None
    delivering = asyncio.create_task(callbacks.deliver(record, url=url))
    shutting_down = asyncio.create_task(shutdown.wait())
    try:
        await asyncio.wait({delivering, shutting_down}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({delivering}, timeout=timeouts.shutdown_callback)
    finally:
        shutting_down.cancel()
        delivering.cancel()
    try:
        await delivering
    except asyncio.CancelledError:
        await callbacks.release(record.task_id)
    except CcrunError as error:
        log.warning(
            "callback_record_failed", message="Result of the callback could not be recorded", error=error.message
        )

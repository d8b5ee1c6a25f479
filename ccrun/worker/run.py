"""One task from its payload to its final record: the order of the steps, the deadline, what SIGTERM does."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import attrs
import stamina
import structlog

from ccrun import codec, lifecycle
from ccrun.callbacks.owed import CALLBACK_LEASE, OwedCallbacks
from ccrun.errors import BlobNotFound, CcrunError, IllegalTransition, SealError, StorageError, TaskNotFound
from ccrun.process.user import User
from ccrun.seal import KeyWrapper, Purpose
from ccrun.store import Store
from ccrun.task import (
    EXIT_TERMINATED,
    Outcome,
    Reason,
    Secret,
    Status,
    TaskId,
    TaskRecord,
    TaskSpec,
)
from ccrun.unseal import unseal
from ccrun.worker import claude
from ccrun.worker.agent import AgentSession, run_agent
from ccrun.worker.dependencies import WorkerDependencies, WorkerTimeouts
from ccrun.worker.git import run
from ccrun.worker.git.checkout import Checkout
from ccrun.worker.git.clone import PackSnapshot, clone
from ccrun.worker.git.remote import Access, remote_of
from ccrun.worker.lines import worker_line
from ccrun.worker.log_writer import LogWriter
from ccrun.worker.post_run import PostRun, PostRunResult
from ccrun.worker.preparation import command_files, run_commands, write_dotenv
from ccrun.worker.proxy import CredentialKind, CredentialProxy
from ccrun.worker.redaction import Redactor
from ccrun.worker.stop import StopCause, StopRequest, StopRequested, stopped_outcome
from ccrun.worker.workspace import Workspace, chown_to_agent, open_workspace, private_directory, write_inputs

log = structlog.get_logger()

#: Of the time that is left after a SIGTERM, what the end of a rescue that is broken off takes.
RESCUE_MARGIN_SECONDS: Final = 0.5
#: Seconds for which the final record is offered to a storage that does not take it.
RECORD_SECONDS: Final = 60.0


async def run_task(deps: WorkerDependencies, task_id: TaskId, *, shutdown: asyncio.Event) -> None:
    """Run one task, until its outcome is recorded and its callback was tried; do nothing when another worker has it.

    Args:
        shutdown: Set when this process was told to end; the task then has `Times.shutdown` seconds to be wound up.

    Raises:
        CcrunError: The outcome could not be recorded.
    """
    began = asyncio.get_running_loop().time()
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
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_watching(deps, task_id, stop, shutdown))
        spec: TaskSpec | None = None
        payload = _Payload(deps.store, deps.wrapper, task_id)
        try:
            spec = await payload.open()
            stop.limit(began + spec.timeout_minutes * 60)
            workspace = await stack.enter_async_context(open_workspace(task_id, deps.agent_user))
            outcome = await _until_shutdown(_perform(deps, spec, workspace, stop), stop, deps.timeouts)
        except StorageError as error:
            outcome = lifecycle.failed_outcome(
                Reason.KILLED, f"The storage failed, so the task was ended: {error.message}"
            )
        except CcrunError as error:
            outcome = lifecycle.failed_outcome(Reason.PREPARE_FAILED, error.message)
        try:
            record = await _record_outcome(deps, task_id, outcome, delete_payload=not payload.is_deleted)
        except IllegalTransition as error:
            log.warning("task_already_final", message="The task was finished by another process", error=error.message)
            return
        _log_finished(record)
        if not record.owes_callback or deps.callbacks is None:
            return
        if payload.is_deleted:
            await _call_back(deps.callbacks, record, spec, shutdown, deps.timeouts)
        else:
            # A sweep deletes the payload before it delivers, so that no payload outlives its task.
            await deps.callbacks.release(task_id)


def _log_finished(record: TaskRecord) -> None:
    write = log.warning if record.status is Status.FAILED else log.info
    write(
        "task_finished", message="Task finished", status=record.status, reason=record.reason, exitCode=record.exit_code
    )


# --- what goes on beside -----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _watching(
    deps: WorkerDependencies, task_id: TaskId, stop: StopRequest, shutdown: asyncio.Event
) -> AsyncIterator[None]:
    """Look out for a cancel and for the end of this process."""

    async def for_cancel() -> None:
        while True:
            await asyncio.sleep(deps.timeouts.cancel_poll)
            # A signal may be lost, the record is not.
            with contextlib.suppress(CcrunError):
                record = await deps.store.record(task_id)
                # Over, when the worker was taken for dead; then, too, the agent has nothing left to do.
                if record.is_cancelling or record.status.is_final:
                    stop.request(StopCause.CANCEL)

    async def for_shutdown() -> None:
        await shutdown.wait()
        stop.request(StopCause.SHUTDOWN)

    watchers = [asyncio.create_task(for_cancel()), asyncio.create_task(for_shutdown())]
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)


async def _until_shutdown(work: Coroutine[Any, Any, Outcome], stop: StopRequest, timeouts: WorkerTimeouts) -> Outcome:
    """Return the outcome of the work; after a SIGTERM, give it up while there is still time to record that."""
    performing, hurry = asyncio.create_task(work), asyncio.create_task(stop.wait_for_shutdown())
    try:
        await asyncio.wait({performing, hurry}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({performing}, timeout=timeouts.winding_up)
    finally:
        hurry.cancel()
        performing.cancel()
    try:
        return await performing
    except asyncio.CancelledError:
        error = "The worker was told to end, and the task could not be wound up in time."
        return lifecycle.failed_outcome(Reason.KILLED, error, exit_code=EXIT_TERMINATED)


# --- the steps ---------------------------------------------------------------------------------------------------------


@attrs.define
class _Payload:
    """The sealed request, which is read once and deleted in any case."""

    store: Store
    wrapper: KeyWrapper
    task_id: TaskId
    is_deleted: bool = attrs.field(default=False, init=False)

    async def open(self) -> TaskSpec:
        """Return the task that was sealed.

        Raises:
            SealError: There is no payload, or it cannot be opened.
            KeyServiceError: The key service failed.
            StorageError: The payload could not be read or deleted.
        """
        try:
            sealed = await self.store.payload(self.task_id)
        except BlobNotFound:
            self.is_deleted = True
            raise SealError("The sealed payload is gone.") from None
        try:
            content = await unseal(self.wrapper, sealed, task_id=self.task_id, purpose=Purpose.PAYLOAD)
        finally:
            await self.store.delete_payload(self.task_id)
            self.is_deleted = True
        return codec.spec_from_bytes(content)


async def _perform(deps: WorkerDependencies, spec: TaskSpec, workspace: Workspace, stop: StopRequest) -> Outcome:
    """Do what the request asks for; when this returns, the log is complete and nothing of the agent runs."""
    credential, kind = _credential(deps, spec)
    async with AsyncExitStack() as stack:
        writer = await stack.enter_async_context(LogWriter(deps.store, spec.task_id, deps.pace))
        proxy = await stack.enter_async_context(CredentialProxy(credential, kind, upstream=deps.upstream))
        environment = claude.environment(
            spec,
            inherited=deps.inherited,
            home=workspace.home,
            config=workspace.config,
            temporary=workspace.temporary,
            base_url=proxy.url,
            run_token=proxy.run_token,
            is_oauth=kind is CredentialKind.OAUTH,
            is_root=workspace.agent is None and os.geteuid() == 0,
            marker=deps.marker,
        )
        redactor = Redactor((*spec.secrets, credential, proxy.run_token))

        async def say(line: bytes | bytearray) -> None:
            await writer.write(redactor.line(line))

        agent = AgentSession(writer=writer, say=say, redactor=redactor, proxy=proxy, environment=environment)
        checkout: Checkout | None = None
        try:
            inputs = {**claude.inputs(spec, environment), **command_files(spec.pre_execution_commands)}
            checkout = await stop.before(_check_out(deps, spec, workspace, stack, say))
            files = await write_inputs(workspace, commands=spec.slash_commands, inputs=inputs)
            await chown_to_agent(workspace)
            commands = run_commands(
                spec.pre_execution_commands, workspace, environment=environment, say=say, seconds=deps.timeouts.command
            )
            await stop.before(commands)
            outcome = await run_agent(deps, spec, workspace, agent, files, stop)
        except StopRequested:
            outcome = stopped_outcome(stop.cause, spec.timeout_minutes)
        except StorageError:
            raise
        except CcrunError as error:
            outcome = lifecycle.failed_outcome(Reason.PREPARE_FAILED, error.message)
        actor = PostRun(
            store=deps.store,
            spec=spec,
            workspace=workspace,
            checkout=checkout,
            result=PostRunResult(),
            redactor=redactor,
            say=say,
            limits=deps.timeouts.actions,
        )
        outcome = await _finish_work(actor, outcome, stop, deps.timeouts)
    return attrs.evolve(outcome, error=redactor.value(outcome.error), result=redactor.value(outcome.result))


async def _check_out(
    deps: WorkerDependencies,
    spec: TaskSpec,
    workspace: Workspace,
    stack: AsyncExitStack,
    say: Callable[[bytes], Awaitable[None]],
) -> Checkout | None:
    """Clone, and lay out what the agent finds beside the code; None where git has nothing to do."""
    action = spec.post_execution_actions.git
    checkout: Checkout | None = None
    here: run.Git | None = None
    if spec.git_repo is not None or (action is not None and (action.commit or action.push)):
        program = await asyncio.to_thread(run.find_git, run.SYSTEM_PATH)

        def git_at(home: Path, user: User | None, protocols: str = "") -> run.Git:
            environment = run.environment(
                program=program, inherited=deps.inherited, home=home, marker=deps.marker, protocols=protocols
            )
            return run.Git(program=program, environment=environment, cwd=home, user=user)

        checkout = Checkout(
            workspace=workspace,
            agent_git=git_at(workspace.root, workspace.agent),
            worker_git=lambda home: git_at(home, None, deps.git_protocols),
            excludes_dotenv=bool(spec.environment_secrets),
        )
        if spec.git_repo is not None:
            checkout = await _clone(deps, spec, checkout, stack, say)
            here = git_at(workspace.root, None).at(workspace.repository)
    if spec.environment_secrets:
        left_out = await write_dotenv(workspace, spec.environment_secrets, here)
        if left_out:
            names = ", ".join(left_out)
            await say(worker_line("dotenv", content=f"Not in .env, which could not tell them rightly: {names}."))
    return checkout


async def _clone(
    deps: WorkerDependencies,
    spec: TaskSpec,
    checkout: Checkout,
    stack: AsyncExitStack,
    say: Callable[[bytes], Awaitable[None]],
) -> Checkout:
    assert spec.git_repo is not None  # noqa: S101 - the caller has looked
    remote = remote_of(spec.git_repo, prefers_ssh=spec.ssh_key is not None)
    access = Access(remote=remote, ssh_key=spec.ssh_key, git_token=spec.git_token)
    repository = checkout.workspace.repository
    async with private_directory(spec.task_id) as room:
        cloned = await clone(
            checkout.worker_git(room),
            access,
            repository,
            revision=spec.git_branch,
            depth=spec.git_depth,
            submodules=spec.git_submodules,
            seconds=deps.timeouts.clone,
        )
    await say(worker_line("clone", host=remote.host or None, revision=spec.git_branch, commit=cloned.base))
    snapshot = None
    action = spec.post_execution_actions.git
    if action is not None and action.push:
        snapshot = await PackSnapshot.of(repository)
        stack.callback(snapshot.close)
    return attrs.evolve(checkout, access=access, clone=cloned, snapshot=snapshot)


async def _finish_work(actor: PostRun, outcome: Outcome, stop: StopRequest, timeouts: WorkerTimeouts) -> Outcome:
    """Do the actions of a task that has succeeded, and keep the changes of one that has not."""
    if outcome.status is Status.COMPLETED:
        stop.cancel_deadline()
        try:
            await stop.before(actor.run())
        except StopRequested:
            if stop.cause is StopCause.CANCEL:
                outcome = lifecycle.cancelled_outcome(outcome)
            else:
                actor.result.fail("worker", "The worker was told to end before all actions were done.")
    if outcome.status is not Status.COMPLETED or actor.result.is_unpushed:
        await _rescue(actor, stop, timeouts)
    return actor.result.apply_to(outcome, actor.redactor)


async def _rescue(actor: PostRun, stop: StopRequest, timeouts: WorkerTimeouts) -> None:
    """Keep the changes as a patch, in the time that there is."""
    loop = asyncio.get_running_loop()

    async def hasten(bound: asyncio.Timeout) -> None:
        await stop.wait_for_shutdown()
        at = (stop.shutdown_at or 0.0) + timeouts.winding_up - RESCUE_MARGIN_SECONDS
        bound.reschedule(min(at, bound.when() or at))

    try:
        async with asyncio.timeout_at(loop.time() + timeouts.rescue) as bound:
            hastening = asyncio.create_task(hasten(bound))
            try:
                await actor.rescue()
            finally:
                hastening.cancel()
    except TimeoutError:
        actor.result.fail("rescue", "There was no time to keep the changes.")


def _credential(deps: WorkerDependencies, spec: TaskSpec) -> tuple[Secret, CredentialKind]:
    """Return the request's credential, or the operator's when it brings none; a key before a token, as the CLI does."""
    for secret, kind in (
        (spec.anthropic_api_key, CredentialKind.API_KEY),
        (spec.anthropic_oauth_token, CredentialKind.OAUTH),
        (deps.api_key, CredentialKind.API_KEY),
        (deps.oauth_token, CredentialKind.OAUTH),
    ):
        if secret is not None:
            return secret, kind
    raise CcrunError("There is no credential for the model API: the request brings none, and the worker has none.")


# --- the end -----------------------------------------------------------------------------------------------------------


async def _record_outcome(
    deps: WorkerDependencies, task_id: TaskId, outcome: Outcome, *, delete_payload: bool
) -> TaskRecord:
    """Write the final record; the state and the debt of the callback are one write.

    Raises:
        StorageError: It could not be written within `RECORD_SECONDS`.
        IllegalTransition: Somebody else has ended the task.
    """

    def end(record: TaskRecord) -> TaskRecord:
        now = dt.datetime.now(dt.UTC)
        lease = now + CALLBACK_LEASE if deps.callbacks is not None else None
        return lifecycle.finish(record, outcome, at=now, lease_until=lease)

    @stamina.retry(on=StorageError, attempts=None, timeout=RECORD_SECONDS)
    async def write() -> TaskRecord:
        return await deps.store.update(task_id, end, delete_payload=delete_payload)

    return await write()


async def _call_back(
    callbacks: OwedCallbacks,
    record: TaskRecord,
    spec: TaskSpec | None,
    shutdown: asyncio.Event,
    timeouts: WorkerTimeouts,
) -> None:
    """Deliver the callback; at shutdown, leave what is not delivered at once to a sweep."""
    url = spec.callback_url if spec is not None else None
    delivering = asyncio.create_task(callbacks.deliver(record, url=url))
    told = asyncio.create_task(shutdown.wait())
    try:
        await asyncio.wait({delivering, told}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({delivering}, timeout=timeouts.shutdown_callback)
    finally:
        told.cancel()
        delivering.cancel()
    try:
        await delivering
    except asyncio.CancelledError:
        await callbacks.release(record.task_id)
    except CcrunError as error:
        log.warning(
            "callback_record_failed", message="Result of the callback could not be recorded", error=error.message
        )

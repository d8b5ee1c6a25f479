"""One task from its payload to its exit code: the order of things, the deadline, what SIGTERM does."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import enum
import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import attrs
import stamina
import structlog

from ccrun import task, wire
from ccrun.courier import LEASE, Courier
from ccrun.errors import BlobNotFound, CcrunError, IllegalTransition, SealError, StorageError, TaskNotFound
from ccrun.process import Child, spawn
from ccrun.seal import KeyWrapper, Purpose, unseal
from ccrun.store import LogWriter, Pace, Store
from ccrun.task import (
    EXIT_FAILED,
    EXIT_TERMINATED,
    EXIT_TIMEOUT,
    Outcome,
    Reason,
    Secret,
    Status,
    TaskId,
    TaskRecord,
    TaskSpec,
)
from ccrun.worker import claude
from ccrun.worker.proxy import CredentialKind, CredentialProxy
from ccrun.worker.redaction import Redactor
from ccrun.worker.workspace import Workspace, furnish, workspace

log = structlog.get_logger()

#: Seconds for which the final record is offered to a storage that does not take it.
RECORD_SECONDS: Final = 60.0


@attrs.frozen(kw_only=True)
class Times:
    """How long the worker waits, in seconds."""

    #: Between SIGTERM and SIGKILL for the agent.
    term_grace: float = 5.0
    #: The CLI prints its first line within a second; MCP servers that it starts first may take a while.
    first_line: float = 120.0
    #: A CLI that has printed its result has nothing left to do, but may not know.
    after_result: float = 60.0
    #: Between two looks whether somebody cancelled the task.
    cancel_poll: float = 2.0
    #: For all that follows a SIGTERM to the worker: the platform kills it after ten.
    shutdown: float = 9.0
    #: Of those, what the agent has.
    shutdown_term_grace: float = 3.0
    #: Of those, what the callback has.
    shutdown_callback: float = 3.0


@attrs.frozen(kw_only=True)
class Parts:
    """What a worker is made of.

    Args:
        cli: The Claude CLI.
        upstream: The base URL of the model API.
        api_key: The operator's own credential, for requests that bring none.
        oauth_token: The same in its other form; the key is taken when both are there.
        inherited: The worker's environment, of which the agent gets PATH, locale and time zone.
        marker: By which the processes of this task, and of no other on this machine, are found.
        execution_name: What the platform calls this execution.
    """

    store: Store
    wrapper: KeyWrapper
    courier: Courier | None
    cli: Callable[[], Path]
    upstream: str
    api_key: Secret | None = None
    oauth_token: Secret | None = None
    inherited: Mapping[str, str]
    marker: str
    pace: Pace = attrs.field(factory=Pace)
    times: Times = attrs.field(factory=Times)
    execution_name: str | None = None


class Cause(enum.Enum):
    """Why a task is ended from outside."""

    TIMEOUT = enum.auto()
    CANCEL = enum.auto()
    SHUTDOWN = enum.auto()


class Ending:
    """The first wish to end the task; later ones change nothing."""

    def __init__(self) -> None:
        self.cause: Cause | None = None
        self._wished = asyncio.Event()

    def wish(self, cause: Cause) -> None:
        """Ask for the end of the task."""
        if self.cause is None:
            self.cause = cause
            self._wished.set()

    async def wait(self) -> None:
        """Wait for the first wish."""
        await self._wished.wait()


async def run(parts: Parts, task_id: TaskId, *, shutdown: asyncio.Event) -> None:
    """Run one task, until its outcome is recorded and its callback was tried; do nothing when another worker has it.

    Args:
        shutdown: Set when this process was told to end; the task then has `Times.shutdown` seconds to be wound up.

    Raises:
        CcrunError: The outcome could not be recorded.
    """
    began = asyncio.get_running_loop().time()
    try:
        await parts.store.update(
            task_id,
            lambda record: task.start(record, at=dt.datetime.now(dt.UTC), execution_name=parts.execution_name),
        )
    except (IllegalTransition, TaskNotFound) as error:
        log.info("There is nothing to do", fault=error.message)
        return
    log.info("A task began")
    ending = Ending()
    async with AsyncExitStack() as story:
        await story.enter_async_context(_watching(parts, task_id, ending, shutdown))
        spec: TaskSpec | None = None
        try:
            spec = await _open_payload(parts, task_id)
            asyncio.get_running_loop().call_at(began + spec.timeout_minutes * 60, ending.wish, Cause.TIMEOUT)
            rooms = await story.enter_async_context(workspace(task_id))
            outcome = await _hurried(_perform(parts, spec, rooms, ending), ending, parts.times)
        except StorageError as error:
            outcome = task.failed(Reason.KILLED, f"The storage failed, so the task was ended: {error.message}")
        except CcrunError as error:
            outcome = task.failed(Reason.PREPARE_FAILED, error.message)
        try:
            record = await _record_outcome(parts, task_id, outcome)
        except IllegalTransition as error:
            log.warning("Somebody else has ended the task", fault=error.message)
            return
        log.info("A task ended", status=record.status, reason=record.reason)
        if record.owes_callback and parts.courier is not None:
            await _call_back(parts.courier, record, spec, shutdown, parts.times)


# --- what goes on beside -----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _watching(parts: Parts, task_id: TaskId, ending: Ending, shutdown: asyncio.Event) -> AsyncIterator[None]:
    """Look out for a cancel and for the end of this process."""

    async def for_cancel() -> None:
        while True:
            await asyncio.sleep(parts.times.cancel_poll)
            # A signal may be lost, the record is not.
            with contextlib.suppress(CcrunError):
                record = await parts.store.record(task_id)
                # Over, when the worker was taken for dead; then, too, the agent has nothing left to do.
                if record.is_cancelling or record.status.is_final:
                    ending.wish(Cause.CANCEL)

    async def for_shutdown() -> None:
        await shutdown.wait()
        ending.wish(Cause.SHUTDOWN)

    watchers = [asyncio.create_task(for_cancel()), asyncio.create_task(for_shutdown())]
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)


async def _hurried(work: Coroutine[Any, Any, Outcome], ending: Ending, times: Times) -> Outcome:
    """Return the outcome of the work; after a SIGTERM, give it up while there is still time to record that."""
    performing, wished = asyncio.create_task(work), asyncio.create_task(ending.wait())
    try:
        await asyncio.wait({performing, wished}, return_when=asyncio.FIRST_COMPLETED)
        bound = times.shutdown - times.shutdown_callback - 1 if ending.cause is Cause.SHUTDOWN else None
        await asyncio.wait({performing}, timeout=bound)
    finally:
        wished.cancel()
        performing.cancel()
    try:
        return await performing
    except asyncio.CancelledError:
        error = "The worker was told to end, and the task could not be wound up in time."
        return task.failed(Reason.KILLED, error, exit_code=EXIT_TERMINATED)


# --- the steps ---------------------------------------------------------------------------------------------------------


async def _open_payload(parts: Parts, task_id: TaskId) -> TaskSpec:
    try:
        sealed = await parts.store.payload(task_id)
    except BlobNotFound:
        raise SealError("The sealed payload is gone.") from None
    content = await unseal(parts.wrapper, sealed, task_id=task_id, purpose=Purpose.PAYLOAD)
    await parts.store.delete_payload(task_id)
    return wire.spec_from_bytes(content)


async def _perform(parts: Parts, spec: TaskSpec, rooms: Workspace, ending: Ending) -> Outcome:
    """Do what the request asks for; when this returns, the log is complete and nothing of the agent runs."""
    credential, kind = _credential(parts, spec)
    async with AsyncExitStack() as story:
        writer = await story.enter_async_context(LogWriter(parts.store, spec.task_id, parts.pace))
        proxy = await story.enter_async_context(CredentialProxy(credential, kind, upstream=parts.upstream))
        environment = claude.environment(
            spec,
            inherited=parts.inherited,
            home=rooms.home,
            config=rooms.config,
            temporary=rooms.temporary,
            base_url=proxy.url,
            run_token=proxy.run_token,
            is_oauth=kind is CredentialKind.OAUTH,
            is_root=os.geteuid() == 0,
            marker=parts.marker,
        )
        files = await furnish(rooms, commands=spec.slash_commands, inputs=claude.inputs(spec, environment))
        cli, start_folder = await asyncio.to_thread(lambda: (parts.cli(), rooms.start_folder(spec.cwd_relative)))
        child = await story.enter_async_context(
            spawn(
                claude.argv(spec, cli=cli, files=files),
                env=environment,
                cwd=start_folder,
                stdin=spec.prompt.encode(),
                term_grace_seconds=parts.times.term_grace,
            )
        )
        log.info("The agent began")
        redactor = Redactor((*spec.secrets, credential, proxy.run_token))
        agent = Agent(child=child, writer=writer, redactor=redactor, proxy=proxy)
        outcome = await _follow(agent, ending, parts.times, timeout_minutes=spec.timeout_minutes)
    return attrs.evolve(outcome, error=redactor.value(outcome.error), result=redactor.value(outcome.result))


@attrs.frozen(kw_only=True)
class Agent:
    """The CLI at work, and what stands between it and the outside."""

    child: Child
    writer: LogWriter
    redactor: Redactor
    proxy: CredentialProxy


async def _follow(agent: Agent, ending: Ending, times: Times, *, timeout_minutes: float) -> Outcome:
    """Write down what the CLI prints until it ends, or is ended; say how that counts."""
    transcript = claude.Transcript()
    printing = asyncio.create_task(_keep_lines(agent, transcript, times))
    wished = asyncio.create_task(ending.wait())
    given_up = asyncio.create_task(agent.writer.until_given_up())
    try:
        await asyncio.wait({printing, wished, given_up}, return_when=asyncio.FIRST_COMPLETED)
        cause = None if printing.done() else ending.cause
        if not printing.done():
            # What the CLI still prints on its way out is kept.
            agent.child.terminate()
        if cause is Cause.SHUTDOWN:
            asyncio.get_running_loop().call_later(times.shutdown_term_grace, agent.child.kill)
        must_end = await printing
    finally:
        for waiting in (printing, wished, given_up):
            waiting.cancel()
    if must_end:
        agent.child.terminate()
    ended = await agent.child.wait()
    if agent.child.stderr_tail:
        complaint = agent.redactor.text(agent.child.stderr_tail.decode(errors="replace"))
        await agent.writer.write(json.dumps({"type": "stderr", "content": complaint}).encode())
    was_ended = must_end or cause is not None
    outcome = claude.judge(transcript, ended, stopped_by_us=was_ended, rejected=agent.proxy.rejected)
    if outcome.status is Status.COMPLETED or not was_ended:
        return outcome
    match cause:
        case Cause.TIMEOUT:
            code, reason = EXIT_TIMEOUT, Reason.TIMEOUT
            error = f"The task was not done within {timeout_minutes:g} minutes."
        case Cause.CANCEL:
            return task.cancelled(outcome)
        case Cause.SHUTDOWN:
            code, reason, error = EXIT_TERMINATED, Reason.KILLED, "The worker was told to end before the task was done."
        case None if transcript.has_lines:
            return outcome
        case None:
            code, reason = EXIT_FAILED, Reason.STALLED
            error = f"The Claude CLI printed nothing within {times.first_line:g} s."
    return attrs.evolve(outcome, status=Status.FAILED, reason=reason, exit_code=code, error=error)


async def _keep_lines(agent: Agent, transcript: claude.Transcript, times: Times) -> bool:
    """Write down each line; return whether the CLI has to be ended: it fell silent when it should have spoken or ended."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(times.first_line) as silence:
            async for line in agent.child.lines():
                # A storage that is slow is no silence of the CLI.
                silence.reschedule(None)
                transcript.feed(line)
                if kept := claude.line_for_log(line):
                    await agent.writer.write(agent.redactor.line(kept))
                # A line can have many megabytes; none may live on here while the next one comes.
                del line, kept
                if transcript.result is None and transcript.is_refused:
                    # It goes on asking with a credential that was refused, for minutes.
                    return True
                if transcript.result is not None:
                    silence.reschedule(loop.time() + times.after_result)
    except TimeoutError:
        return True
    return False


def _credential(parts: Parts, spec: TaskSpec) -> tuple[Secret, CredentialKind]:
    """Return the request's credential, or the operator's when it brings none; a key before a token, as the CLI does."""
    for secret, kind in (
        (spec.anthropic_api_key, CredentialKind.API_KEY),
        (spec.anthropic_oauth_token, CredentialKind.OAUTH),
        (parts.api_key, CredentialKind.API_KEY),
        (parts.oauth_token, CredentialKind.OAUTH),
    ):
        if secret is not None:
            return secret, kind
    raise CcrunError("There is no credential for the model API: the request brings none, and the worker has none.")


# --- the end -----------------------------------------------------------------------------------------------------------


async def _record_outcome(parts: Parts, task_id: TaskId, outcome: Outcome) -> TaskRecord:
    """Write the final record; the state and the debt of the callback are one write.

    Raises:
        StorageError: It could not be written within `RECORD_SECONDS`.
        IllegalTransition: Somebody else has ended the task.
    """

    def end(record: TaskRecord) -> TaskRecord:
        now = dt.datetime.now(dt.UTC)
        lease = now + LEASE if parts.courier is not None else None
        return task.finish(record, outcome, at=now, lease_until=lease)

    @stamina.retry(on=StorageError, attempts=None, timeout=RECORD_SECONDS)
    async def write() -> TaskRecord:
        return await parts.store.update(task_id, end)

    return await write()


async def _call_back(
    courier: Courier, record: TaskRecord, spec: TaskSpec | None, shutdown: asyncio.Event, times: Times
) -> None:
    """Deliver the callback; at shutdown, leave what is not delivered at once to a sweep."""
    url = spec.callback_url if spec is not None else None
    delivering = asyncio.create_task(courier.deliver(record, url=url))
    told = asyncio.create_task(shutdown.wait())
    try:
        await asyncio.wait({delivering, told}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({delivering}, timeout=times.shutdown_callback)
    finally:
        told.cancel()
        delivering.cancel()
    try:
        await delivering
    except asyncio.CancelledError:
        await courier.hand_over(record.task_id)
    except CcrunError as error:
        log.warning("What became of the callback could not be recorded", fault=error.message)

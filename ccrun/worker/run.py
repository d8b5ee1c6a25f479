"""One task from its payload to its exit code: the order of things, the deadline, what SIGTERM does."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import enum
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import stamina
import structlog

from ccrun import task, wire
from ccrun.courier import LEASE, Courier
from ccrun.errors import BlobNotFound, CcrunError, IllegalTransition, SealError, StorageError, TaskNotFound
from ccrun.process import Child, User, spawn
from ccrun.seal import KeyWrapper, Purpose, unseal
from ccrun.store import LogWriter, Pace, Store
from ccrun.task import (
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
from ccrun.worker import claude, git
from ccrun.worker.actions import Actor, Bounds, Checkout, Deeds
from ccrun.worker.clone import Keepsake, clone
from ccrun.worker.lines import text_line, worker_line
from ccrun.worker.preparation import command_files, run_commands, write_dotenv
from ccrun.worker.proxy import CredentialKind, CredentialProxy
from ccrun.worker.redaction import Redactor
from ccrun.worker.remote import Access, remote_of
from ccrun.worker.workspace import Workspace, furnish, hand_over, private_room, workspace

log = structlog.get_logger()

T = TypeVar("T")

#: Of the time that is left after a SIGTERM, what the end of a rescue that is broken off takes.
RESCUE_MARGIN_SECONDS: Final = 0.5
#: Seconds for which the final record is offered to a storage that does not take it.
RECORD_SECONDS: Final = 60.0


@attrs.frozen(kw_only=True)
class Times:
    """How long the worker waits, in seconds."""

    #: For the clone.
    clone: float = 300.0
    #: For each of the commands before the agent.
    command: float = 300.0
    #: For each kind of action after the agent.
    actions: Bounds = attrs.field(factory=Bounds)
    #: For the patch that keeps what would be lost.
    rescue: float = 60.0
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

    @property
    def winding_up(self) -> float:
        """Of those, what there is until the outcome has to be recorded, which takes less than one."""
        return self.shutdown - self.shutdown_callback - 1.0


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
        agent_user: Whom the agent runs as, None where that is the worker's own user.
        git_protocols: Those that a repository may come by, as git lists them.
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
    agent_user: User | None = None
    git_protocols: str = "https:ssh"


class Cause(enum.Enum):
    """Why a task is ended from outside."""

    TIMEOUT = enum.auto()
    CANCEL = enum.auto()
    SHUTDOWN = enum.auto()


class Ended(Exception):
    """The task is to be ended before this is done."""


class Ending:
    """The first wish to end the task. Later ones change nothing, but for the one to hurry."""

    def __init__(self) -> None:
        self.cause: Cause | None = None
        #: When this process was told to end, on the loop's clock.
        self.hurried_at: float | None = None
        self._wished = asyncio.Event()
        self._hurry = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None

    def wish(self, cause: Cause) -> None:
        """Ask for the end of the task."""
        if cause is Cause.SHUTDOWN and self.hurried_at is None:
            self.hurried_at = asyncio.get_running_loop().time()
            self._hurry.set()
        if self.cause is None:
            self.cause = cause
            self._wished.set()

    def limit(self, at: float) -> None:
        """End the task at this time."""
        self._deadline = asyncio.get_running_loop().call_at(at, self.wish, Cause.TIMEOUT)

    def lift_limit(self) -> None:
        """Let what follows take its time: the agent has done its work, and what keeps it has bounds of its own."""
        if self._deadline is not None:
            self._deadline.cancel()
        if self.cause is Cause.TIMEOUT:
            self.cause = None
            self._wished.clear()

    async def wait(self) -> None:
        """Wait for the first wish."""
        await self._wished.wait()

    async def wait_for_hurry(self) -> None:
        """Wait until this process is told to end."""
        await self._hurry.wait()

    async def before(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what the work returns; break it off when the task is to be ended first.

        Raises:
            Ended: It was broken off.
        """
        doing, wished = asyncio.create_task(work), asyncio.create_task(self.wait())
        try:
            await asyncio.wait({doing, wished}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise Ended
            return doing.result()
        finally:
            for waiting in (doing, wished):
                waiting.cancel()
            await asyncio.gather(doing, wished, return_exceptions=True)


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
        log.info("task_not_claimed", message="Task not claimed; nothing to do", error=error.message)
        return
    log.info("task_started", message="Task started")
    ending = Ending()
    async with AsyncExitStack() as story:
        await story.enter_async_context(_watching(parts, task_id, ending, shutdown))
        spec: TaskSpec | None = None
        try:
            spec = await _open_payload(parts, task_id)
            ending.limit(began + spec.timeout_minutes * 60)
            rooms = await story.enter_async_context(workspace(task_id, parts.agent_user))
            outcome = await _hurried(_perform(parts, spec, rooms, ending), ending, parts.times)
        except StorageError as error:
            outcome = task.failed(Reason.KILLED, f"The storage failed, so the task was ended: {error.message}")
        except CcrunError as error:
            outcome = task.failed(Reason.PREPARE_FAILED, error.message)
        try:
            record = await _record_outcome(parts, task_id, outcome)
        except IllegalTransition as error:
            log.warning("task_already_final", message="The task was finished by another process", error=error.message)
            return
        _log_finished(record)
        if record.owes_callback and parts.courier is not None:
            await _call_back(parts.courier, record, spec, shutdown, parts.times)


def _log_finished(record: TaskRecord) -> None:
    write = log.warning if record.status is Status.FAILED else log.info
    write(
        "task_finished", message="Task finished", status=record.status, reason=record.reason, exitCode=record.exit_code
    )


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
    performing, hurry = asyncio.create_task(work), asyncio.create_task(ending.wait_for_hurry())
    try:
        await asyncio.wait({performing, hurry}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({performing}, timeout=times.winding_up)
    finally:
        hurry.cancel()
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
            is_root=rooms.agent is None and os.geteuid() == 0,
            marker=parts.marker,
        )
        redactor = Redactor((*spec.secrets, credential, proxy.run_token))

        async def say(line: bytes | bytearray) -> None:
            await writer.write(redactor.line(line))

        agent = Agent(writer=writer, say=say, redactor=redactor, proxy=proxy, environment=environment)
        checkout: Checkout | None = None
        try:
            inputs = {**claude.inputs(spec, environment), **command_files(spec.pre_execution_commands)}
            checkout = await ending.before(_check_out(parts, spec, rooms, story, say))
            files = await furnish(rooms, commands=spec.slash_commands, inputs=inputs)
            await hand_over(rooms)
            commands = run_commands(
                spec.pre_execution_commands, rooms, environment=environment, say=say, seconds=parts.times.command
            )
            await ending.before(commands)
            outcome = await _run_agent(parts, spec, rooms, agent, files, ending)
        except Ended:
            outcome = _ended(ending.cause, spec.timeout_minutes)
        except StorageError:
            raise
        except CcrunError as error:
            outcome = task.failed(Reason.PREPARE_FAILED, error.message)
        actor = Actor(
            store=parts.store,
            spec=spec,
            rooms=rooms,
            checkout=checkout,
            deeds=Deeds(),
            redactor=redactor,
            say=say,
            bounds=parts.times.actions,
        )
        outcome = await _keep_work(actor, outcome, ending, parts.times)
    return attrs.evolve(outcome, error=redactor.value(outcome.error), result=redactor.value(outcome.result))


async def _check_out(
    parts: Parts, spec: TaskSpec, rooms: Workspace, story: AsyncExitStack, say: Callable[[bytes], Awaitable[None]]
) -> Checkout | None:
    """Clone, and lay out what the agent finds beside the code; None where git has nothing to do."""
    action = spec.post_execution_actions.git
    checkout: Checkout | None = None
    here: git.Git | None = None
    if spec.git_repo is not None or (action is not None and (action.commit or action.push)):
        program = await asyncio.to_thread(git.find_git, git.SYSTEM_PATH)

        def git_at(home: Path, user: User | None, protocols: str = "") -> git.Git:
            environment = git.environment(
                program=program, inherited=parts.inherited, home=home, marker=parts.marker, protocols=protocols
            )
            return git.Git(program=program, environment=environment, cwd=home, user=user)

        checkout = Checkout(
            rooms=rooms,
            agent_git=git_at(rooms.root, rooms.agent),
            worker_git=lambda home: git_at(home, None, parts.git_protocols),
            hides_dotenv=bool(spec.environment_secrets),
        )
        if spec.git_repo is not None:
            checkout = await _clone(parts, spec, checkout, story, say)
            here = git_at(rooms.root, None).at(rooms.repository)
    if spec.environment_secrets:
        left_out = await write_dotenv(rooms, spec.environment_secrets, here)
        if left_out:
            names = ", ".join(left_out)
            await say(worker_line("dotenv", content=f"Not in .env, which could not tell them rightly: {names}."))
    return checkout


async def _clone(
    parts: Parts, spec: TaskSpec, checkout: Checkout, story: AsyncExitStack, say: Callable[[bytes], Awaitable[None]]
) -> Checkout:
    assert spec.git_repo is not None  # noqa: S101 - the caller has looked
    remote = remote_of(spec.git_repo, prefers_ssh=spec.ssh_key is not None)
    access = Access(remote=remote, ssh_key=spec.ssh_key, git_token=spec.git_token)
    repository = checkout.rooms.repository
    async with private_room(spec.task_id) as room:
        cloned = await clone(
            checkout.worker_git(room),
            access,
            repository,
            revision=spec.git_branch,
            depth=spec.git_depth,
            submodules=spec.git_submodules,
            seconds=parts.times.clone,
        )
    await say(worker_line("clone", host=remote.host or None, revision=spec.git_branch, commit=cloned.base))
    keepsake = None
    action = spec.post_execution_actions.git
    if action is not None and action.push:
        keepsake = await Keepsake.of(repository)
        story.callback(keepsake.close)
    return attrs.evolve(checkout, access=access, clone=cloned, keepsake=keepsake)


async def _run_agent(
    parts: Parts, spec: TaskSpec, rooms: Workspace, agent: Agent, files: Mapping[str, Path], ending: Ending
) -> Outcome:
    """Run the CLI until it ends, or is ended; nothing of it runs afterwards."""
    cli, start_folder = await asyncio.to_thread(lambda: (parts.cli(), rooms.start_folder(spec.cwd_relative)))
    options = {option: path for option, path in files.items() if not option.startswith("command-")}
    async with spawn(
        claude.argv(spec, cli=cli, files=options),
        env=agent.environment,
        cwd=start_folder,
        stdin=spec.prompt.encode(),
        term_grace_seconds=parts.times.term_grace,
        user=rooms.agent,
    ) as child:
        log.info("agent_started", message="Agent started")
        return await _follow(child, agent, ending, parts.times, timeout_minutes=spec.timeout_minutes)


async def _keep_work(actor: Actor, outcome: Outcome, ending: Ending, times: Times) -> Outcome:
    """Do the actions of a task that has succeeded, and keep the changes of one that has not."""
    if outcome.status is Status.COMPLETED:
        ending.lift_limit()
        try:
            await ending.before(actor.act())
        except Ended:
            if ending.cause is Cause.CANCEL:
                outcome = task.cancelled(outcome)
            else:
                actor.deeds.fail("worker", "The worker was told to end before all actions were done.")
    if outcome.status is not Status.COMPLETED or actor.deeds.is_unpushed:
        await _rescue(actor, ending, times)
    return actor.deeds.told_by(outcome, actor.redactor)


async def _rescue(actor: Actor, ending: Ending, times: Times) -> None:
    """Keep the changes as a patch, in the time that there is."""
    loop = asyncio.get_running_loop()

    async def hasten(bound: asyncio.Timeout) -> None:
        await ending.wait_for_hurry()
        at = (ending.hurried_at or 0.0) + times.winding_up - RESCUE_MARGIN_SECONDS
        bound.reschedule(min(at, bound.when() or at))

    try:
        async with asyncio.timeout_at(loop.time() + times.rescue) as bound:
            hastening = asyncio.create_task(hasten(bound))
            try:
                await actor.rescue()
            finally:
                hastening.cancel()
    except TimeoutError:
        actor.deeds.fail("rescue", "There was no time to keep the changes.")


def _ended(cause: Cause | None, timeout_minutes: float) -> Outcome:
    """Return what a task ends in that was ended from outside."""
    match cause:
        case Cause.TIMEOUT:
            error = f"The task was not done within {timeout_minutes:g} minutes."
            return task.failed(Reason.TIMEOUT, error, exit_code=EXIT_TIMEOUT)
        case Cause.CANCEL:
            return task.cancelled()
        case Cause.SHUTDOWN | None:
            error = "The worker was told to end before the task was done."
            return task.failed(Reason.KILLED, error, exit_code=EXIT_TERMINATED)


@attrs.frozen(kw_only=True)
class Agent:
    """What stands between the agent and the outside."""

    writer: LogWriter
    #: Takes a line for the log, and masks what is secret in it.
    say: Callable[[bytes | bytearray], Awaitable[None]]
    redactor: Redactor
    proxy: CredentialProxy
    environment: Mapping[str, str] = attrs.field(repr=False)


async def _follow(child: Child, agent: Agent, ending: Ending, times: Times, *, timeout_minutes: float) -> Outcome:
    """Write down what the CLI prints until it ends, or is ended; say how that counts."""
    transcript = claude.Transcript()
    printing = asyncio.create_task(_keep_lines(child, agent, transcript, times))
    wished = asyncio.create_task(ending.wait())
    given_up = asyncio.create_task(agent.writer.until_given_up())
    try:
        await asyncio.wait({printing, wished, given_up}, return_when=asyncio.FIRST_COMPLETED)
        cause = None if printing.done() else ending.cause
        if not printing.done():
            # What the CLI still prints on its way out is kept.
            child.terminate()
        if cause is Cause.SHUTDOWN:
            asyncio.get_running_loop().call_later(times.shutdown_term_grace, child.kill)
        must_end = await printing
    finally:
        for waiting in (printing, wished, given_up):
            waiting.cancel()
    if must_end:
        child.terminate()
    ended = await child.wait()
    if child.stderr_tail:
        await agent.say(text_line(child.stderr_tail, type="stderr"))
    was_ended = must_end or cause is not None
    outcome = claude.judge(transcript, ended, stopped_by_us=was_ended, rejected=agent.proxy.rejected)
    if outcome.status is Status.COMPLETED or not was_ended:
        return outcome
    if cause is Cause.CANCEL:
        return task.cancelled(outcome)
    if cause is not None:
        ending_of = _ended(cause, timeout_minutes)
    elif transcript.has_lines:
        return outcome
    else:
        ending_of = task.failed(Reason.STALLED, f"The Claude CLI printed nothing within {times.first_line:g} s.")
    return attrs.evolve(
        outcome,
        status=ending_of.status,
        reason=ending_of.reason,
        exit_code=ending_of.exit_code,
        error=ending_of.error,
    )


async def _keep_lines(child: Child, agent: Agent, transcript: claude.Transcript, times: Times) -> bool:
    """Write down each line; return whether the CLI has to be ended: it fell silent when it should have spoken or ended."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(times.first_line) as silence:
            async for line in child.lines():
                # A storage that is slow is no silence of the CLI.
                silence.reschedule(None)
                transcript.feed(line)
                if kept := claude.line_for_log(line):
                    await agent.say(kept)
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
        log.warning(
            "callback_record_failed", message="Result of the callback could not be recorded", error=error.message
        )

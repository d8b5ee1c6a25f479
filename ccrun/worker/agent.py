"""One run of the Claude CLI: its output goes to the log; a stop request, its silence or its exit ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import attrs
import structlog

from ccrun import lifecycle
from ccrun.process.child import Child, spawn
from ccrun.task import Outcome, Reason, Status, TaskSpec
from ccrun.worker import claude
from ccrun.worker.dependencies import WorkerDependencies, WorkerTimeouts
from ccrun.worker.lines import text_line
from ccrun.worker.log_writer import LogWriter
from ccrun.worker.proxy import CredentialProxy
from ccrun.worker.redaction import Redactor
from ccrun.worker.stop import StopCause, StopRequest, stopped_outcome
from ccrun.worker.transcript import Transcript, line_for_log, outcome_of_run
from ccrun.worker.workspace import Workspace

log = structlog.get_logger()


@attrs.frozen(kw_only=True)
class AgentSession:
    """What the agent's output and requests pass through.

    Args:
        log_line: Redacts a line and adds it to the log of the task.
        environment: All environment variables of the agent.
    """

    writer: LogWriter
    log_line: Callable[[bytes | bytearray], Awaitable[None]]
    redactor: Redactor
    proxy: CredentialProxy
    environment: Mapping[str, str] = attrs.field(repr=False)


async def run_agent(
    deps: WorkerDependencies,
    spec: TaskSpec,
    workspace: Workspace,
    session: AgentSession,
    option_files: Mapping[str, Path],
    stop: StopRequest,
) -> Outcome:
    """Run the CLI until it exits or is stopped, and return the outcome. No process of the agent is left.

    Args:
        option_files: The files for options of the CLI, by option.
    """
    cli, directory = await asyncio.to_thread(lambda: (deps.cli(), workspace.start_directory(spec.cwd_relative)))
    async with spawn(
        claude.argv(spec, cli=cli, files=option_files),
        env=session.environment,
        cwd=directory,
        stdin=spec.prompt.encode(),
        term_grace_seconds=deps.timeouts.term_grace,
        user=workspace.agent,
    ) as child:
        log.info("agent_started", message="Agent started")
        return await _follow(child, session, stop, deps.timeouts, timeout_minutes=spec.timeout_minutes)


async def _follow(
    child: Child, session: AgentSession, stop: StopRequest, timeouts: WorkerTimeouts, *, timeout_minutes: float
) -> Outcome:
    """Log what the CLI prints until it exits or is stopped, and return the outcome."""
    transcript = Transcript()
    logging = asyncio.create_task(_log_output(child, session, transcript, timeouts))
    stop_requested = asyncio.create_task(stop.wait())
    log_given_up = asyncio.create_task(session.writer.until_given_up())
    try:
        await asyncio.wait({logging, stop_requested, log_given_up}, return_when=asyncio.FIRST_COMPLETED)
        cause = None if logging.done() else stop.cause
        if not logging.done():
            # What the CLI prints until it exits is still logged.
            child.terminate()
        if cause is StopCause.SHUTDOWN:
            asyncio.get_running_loop().call_later(timeouts.shutdown_term_grace, child.kill)
        is_hung = await logging
    finally:
        for task in (logging, stop_requested, log_given_up):
            task.cancel()
    if is_hung:
        child.terminate()
    exit_status = await child.wait()
    if child.stderr_tail:
        await session.log_line(text_line(child.stderr_tail, type="stderr"))
    was_stopped = is_hung or cause is not None
    outcome = outcome_of_run(transcript, exit_status, stopped_by_us=was_stopped, rejected=session.proxy.rejected)
    if outcome.status is Status.COMPLETED or not was_stopped:
        return outcome
    if cause is StopCause.CANCEL:
        return lifecycle.cancelled_outcome(outcome)
    if cause is not None:
        stopped = stopped_outcome(cause, timeout_minutes)
    elif transcript.has_lines:
        return outcome
    else:
        message = f"The Claude CLI printed nothing within {timeouts.first_line:g} s."
        stopped = lifecycle.failed_outcome(Reason.STALLED, message)
    # The figures are those of the run, the status and its reason are those of the stop.
    return attrs.evolve(
        outcome, status=stopped.status, reason=stopped.reason, exit_code=stopped.exit_code, error=stopped.error
    )


async def _log_output(child: Child, session: AgentSession, transcript: Transcript, timeouts: WorkerTimeouts) -> bool:
    """Log each line. Return True when the CLI must be stopped: it is silent, or retries with a rejected credential."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeouts.first_line) as silence:
            async for line in child.lines():
                # The time that a slow storage takes does not count as silence of the CLI.
                silence.reschedule(None)
                transcript.feed(line)
                if logged := line_for_log(line):
                    await session.log_line(logged)
                # A line can have many megabytes, so it is released before the next one is read.
                del line, logged
                if transcript.result is None and transcript.is_refused:
                    # The CLI would retry with a rejected credential for minutes.
                    return True
                if transcript.result is not None:
                    silence.reschedule(loop.time() + timeouts.after_result)
    except TimeoutError:
        return True
    return False

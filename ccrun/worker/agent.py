"""One run of the Claude CLI: its output goes to the log; a stop request, its silence or its exit ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import attrs
import structlog

from ccrun import lifecycle
from ccrun.process.child import Child, spawn
from ccrun.redaction import Redactor
from ccrun.spec import TaskSpec
from ccrun.task import Outcome, Reason, Status
from ccrun.worker import claude
from ccrun.worker.api_errors import api_error_sentence
from ccrun.worker.dependencies import WorkerDependencies, WorkerTimeouts
from ccrun.worker.lines import text_line
from ccrun.worker.log_writer import LogWriter
from ccrun.worker.proxy import CredentialProxy
from ccrun.worker.stop import StopCause, StopRequest, stopped_outcome, with_stop
from ccrun.worker.transcript import Transcript, line_for_log, outcome_of_run, unfinished_work
from ccrun.worker.workspace import Workspace

log = structlog.get_logger()


@attrs.frozen(kw_only=True)
class AgentSession:
    """What the agent's output and requests pass through.

    Args:
        environment: All environment variables of the agent.
        max_line_bytes: The bytes of a line that are logged.
    """

    writer: LogWriter
    redactor: Redactor
    proxy: CredentialProxy
    environment: Mapping[str, str] = attrs.field(repr=False)
    max_line_bytes: int


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
        claude.argv(spec, cli=cli, files=option_files, config=workspace.config),
        env=session.environment,
        cwd=directory,
        stdin=spec.prompt.encode(),
        term_grace_seconds=deps.timeouts.term_grace,
        confinement=workspace.confinement,
    ) as child:
        log.info("agent_started", message="Agent started")
        return await _follow(child, session, stop, deps.timeouts, spec)


async def _follow(
    child: Child, session: AgentSession, stop: StopRequest, timeouts: WorkerTimeouts, spec: TaskSpec
) -> Outcome:
    """Log what the CLI prints until it exits or is stopped, and return the outcome."""
    transcript = Transcript(session.redactor.text)
    logging = asyncio.create_task(_log_output(child, session, transcript, timeouts, require_mcp=spec.require_mcp))
    stop_requested = asyncio.create_task(stop.wait())
    log_given_up = asyncio.create_task(session.writer.until_given_up())
    try:
        await asyncio.wait({logging, stop_requested, log_given_up}, return_when=asyncio.FIRST_COMPLETED)
        cause = None if logging.done() else stop.cause
        if not logging.done():
            # What the CLI prints until it exits is still logged.
            child.terminate()
        if cause is StopCause.LIMIT:
            child.kill()
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
        # Masked here, since the log does not look for a part of a secret at a cut.
        text = session.redactor.text(child.stderr_tail.decode(errors="replace"))
        await session.writer.write(text_line(text.encode(), type="stderr"))
    was_stopped = is_hung or cause is not None
    outcome = outcome_of_run(
        transcript,
        exit_status,
        stopped_by_us=was_stopped,
        rejected=session.proxy.rejected,
        api_errors=session.proxy.api_errors,
    )
    if outcome.status is Status.COMPLETED or not was_stopped:
        return outcome
    if cause is StopCause.CANCEL:
        return lifecycle.cancelled_outcome(outcome)
    stopped = _stopped_outcome(stop, cause, outcome, transcript, timeouts, spec)
    if stopped is None:
        return outcome
    return with_stop(outcome, stopped)


def _stopped_outcome(
    stop: StopRequest,
    cause: StopCause | None,
    outcome: Outcome,
    transcript: Transcript,
    timeouts: WorkerTimeouts,
    spec: TaskSpec,
) -> Outcome | None:
    """Return the outcome of a stop; None when the CLI's own output says better why the run has failed."""
    if cause is None:
        if spec.require_mcp and (missing := _not_connected(transcript)):
            error = f"requireMcp is set, and these MCP servers are not connected: {', '.join(missing)}."
            return lifecycle.failed_outcome(Reason.PREPARE_FAILED, error)
        if transcript.has_lines:
            return None
        message = f"The Claude CLI printed nothing within {timeouts.first_line:g} s."
        return lifecycle.failed_outcome(Reason.STALLED, message)
    stopped = stopped_outcome(stop, spec.timeout_minutes)
    if transcript.retry is not None and outcome.api_error is not None and cause is StopCause.TIMEOUT:
        error = f"{api_error_sentence(outcome.api_error)} The CLI was still retrying when the time was over."
        return lifecycle.failed_outcome(Reason.API_ERROR, error)
    if transcript.result is not None and transcript.has_open_work:
        return attrs.evolve(stopped, error=f"{stopped.error} {unfinished_work(transcript)}")
    return stopped


def _not_connected(transcript: Transcript) -> list[str]:
    return [
        f"{server.name} ({server.status})" for server in transcript.mcp_servers or () if server.status != "connected"
    ]


async def _log_output(
    child: Child, session: AgentSession, transcript: Transcript, timeouts: WorkerTimeouts, *, require_mcp: bool
) -> bool:
    """Log each line. Return True when the CLI must be stopped: it hangs, the API rejects it, or an MCP server is missing."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeouts.first_line) as silence:
            async for line in child.lines(session.max_line_bytes):
                # The time that a slow storage takes does not count as silence of the CLI.
                silence.reschedule(None)
                transcript.feed(line)
                if logged := line_for_log(line):
                    await session.writer.write(logged)
                # A line can have many megabytes, so it is released before the next one is read.
                del line, logged
                if transcript.result is None and transcript.is_refused:
                    # The CLI would retry with a rejected credential for minutes.
                    return True
                if require_mcp and _not_connected(transcript):
                    return True
                # With open work, silence is no hang: the deadline of the task is the limit.
                if transcript.result is not None and not transcript.has_open_work:
                    silence.reschedule(loop.time() + timeouts.after_result)
    except TimeoutError:
        return True
    return False

"""One run of the Claude CLI: its output into the log, its silence and its exit watched."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import attrs
import structlog

from ccrun import lifecycle
from ccrun.process.child import Child, spawn
from ccrun.task import (
    Outcome,
    Reason,
    Status,
    TaskSpec,
)
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


async def run_agent(
    deps: WorkerDependencies,
    spec: TaskSpec,
    workspace: Workspace,
    agent: AgentSession,
    files: Mapping[str, Path],
    stop: StopRequest,
) -> Outcome:
    """Run the CLI until it ends, or is ended; nothing of it runs afterwards."""
    cli, start_folder = await asyncio.to_thread(lambda: (deps.cli(), workspace.start_folder(spec.cwd_relative)))
    options = {option: path for option, path in files.items() if not option.startswith("command-")}
    async with spawn(
        claude.argv(spec, cli=cli, files=options),
        env=agent.environment,
        cwd=start_folder,
        stdin=spec.prompt.encode(),
        term_grace_seconds=deps.timeouts.term_grace,
        user=workspace.agent,
    ) as child:
        log.info("agent_started", message="Agent started")
        return await _follow(child, agent, stop, deps.timeouts, timeout_minutes=spec.timeout_minutes)


@attrs.frozen(kw_only=True)
class AgentSession:
    """What stands between the agent and the outside."""

    writer: LogWriter
    #: Takes a line for the log, and masks what is secret in it.
    say: Callable[[bytes | bytearray], Awaitable[None]]
    redactor: Redactor
    proxy: CredentialProxy
    environment: Mapping[str, str] = attrs.field(repr=False)


async def _follow(
    child: Child, agent: AgentSession, stop: StopRequest, timeouts: WorkerTimeouts, *, timeout_minutes: float
) -> Outcome:
    """Write down what the CLI prints until it ends, or is ended; say how that counts."""
    transcript = Transcript()
    printing = asyncio.create_task(_log_lines(child, agent, transcript, timeouts))
    wished = asyncio.create_task(stop.wait())
    given_up = asyncio.create_task(agent.writer.until_given_up())
    try:
        await asyncio.wait({printing, wished, given_up}, return_when=asyncio.FIRST_COMPLETED)
        cause = None if printing.done() else stop.cause
        if not printing.done():
            # What the CLI still prints on its way out is kept.
            child.terminate()
        if cause is StopCause.SHUTDOWN:
            asyncio.get_running_loop().call_later(timeouts.shutdown_term_grace, child.kill)
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
    outcome = outcome_of_run(transcript, ended, stopped_by_us=was_ended, rejected=agent.proxy.rejected)
    if outcome.status is Status.COMPLETED or not was_ended:
        return outcome
    if cause is StopCause.CANCEL:
        return lifecycle.cancelled_outcome(outcome)
    if cause is not None:
        ending_of = stopped_outcome(cause, timeout_minutes)
    elif transcript.has_lines:
        return outcome
    else:
        ending_of = lifecycle.failed_outcome(
            Reason.STALLED, f"The Claude CLI printed nothing within {timeouts.first_line:g} s."
        )
    return attrs.evolve(
        outcome,
        status=ending_of.status,
        reason=ending_of.reason,
        exit_code=ending_of.exit_code,
        error=ending_of.error,
    )


async def _log_lines(child: Child, agent: AgentSession, transcript: Transcript, timeouts: WorkerTimeouts) -> bool:
    """Write down each line; return whether the CLI has to be ended: it fell silent when it should have spoken or ended."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeouts.first_line) as silence:
            async for line in child.lines():
                # A storage that is slow is no silence of the CLI.
                silence.reschedule(None)
                transcript.feed(line)
                if kept := line_for_log(line):
                    await agent.say(kept)
                # A line can have many megabytes; none may live on here while the next one comes.
                del line, kept
                if transcript.result is None and transcript.is_refused:
                    # It goes on asking with a credential that was refused, for minutes.
                    return True
                if transcript.result is not None:
                    silence.reschedule(loop.time() + timeouts.after_result)
    except TimeoutError:
        return True
    return False

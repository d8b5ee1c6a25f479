"""The worker process: one task, from its ID in the environment to an exit status. The composition root of the worker wing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import structlog

from ccrun import config, liveness, log, process
from ccrun.backend import marker, open_backend, sign_of_life
from ccrun.config import Config
from ccrun.errors import CcrunError, ConfigError, exit_status
from ccrun.liveness import AlreadyHeld
from ccrun.process import User
from ccrun.store import Pace, payload_name
from ccrun.task import TaskId
from ccrun.worker import claude
from ccrun.worker.git import SYSTEM_PATH
from ccrun.worker.run import Parts, run

logger = structlog.get_logger()


def main() -> int:
    """Run the task; return 0 whenever its outcome was recorded."""
    # First of all, before the agent or anything else of this user can look.
    process.harden()
    process.become_subreaper()
    try:
        settings = config.load()
        log.configure(settings.log_format, settings.log_level)
        if settings.task_id is None:
            raise ConfigError("TASK_ID must be set: a worker is started by ccrun, with the task it is for.")
        if settings.encrypted_payload_path not in (None, payload_name(settings.task_id)):
            raise ConfigError("ENCRYPTED_PAYLOAD_PATH must name the payload of the task that TASK_ID names.")
        agent_user = process.find_user(settings.agent_user, SYSTEM_PATH) if settings.agent_user else None
        with log.bound(task_id=settings.task_id), _sign_of_life(settings, settings.task_id):
            asyncio.run(_work(settings, settings.task_id, agent_user))
    except AlreadyHeld:
        return 0
    except CcrunError as error:
        logger.warning("worker_failed", message="Worker failed", error=error.message)
        return exit_status(error)
    return 0


@contextlib.contextmanager
def _sign_of_life(settings: Config, task_id: TaskId) -> Iterator[None]:
    if settings.is_local:
        with liveness.held(sign_of_life(settings.data_dir, task_id)):
            yield
    else:
        yield


async def _work(settings: Config, task_id: TaskId, agent_user: User | None) -> None:
    shutdown = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, shutdown.set)
    inherited = {"PATH": os.defpath, **config.environment()}
    async with open_backend(settings) as backend:
        parts = Parts(
            store=backend.store,
            wrapper=backend.wrapper,
            # Where places are few, a receiver that is not there may not hold one.
            courier=backend.courier(hands_over=settings.is_local),
            cli=lambda: claude.find_cli(str(settings.claude_cli) if settings.claude_cli else None, inherited["PATH"]),
            upstream=settings.anthropic_base_url,
            api_key=settings.anthropic_api_key,
            oauth_token=settings.claude_code_oauth_token,
            inherited=inherited,
            marker=marker(settings.data_dir, task_id),
            pace=Pace(flush_lines=settings.flush_lines, flush_seconds=settings.flush_seconds),
            execution_name=settings.cloud_run_execution,
            agent_user=agent_user,
            git_protocols="https:ssh:http:file" if settings.is_local else "https:ssh",
        )
        await run(parts, task_id, shutdown=shutdown)


if __name__ == "__main__":
    sys.exit(main())

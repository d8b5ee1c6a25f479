"""The worker process: runs the task whose ID is in the environment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Final

import structlog

from ccrun import config, log
from ccrun.agent_sandbox import agent_sandbox
from ccrun.backends.local import pidfile
from ccrun.backends.local.layout import agent_users, pid_files, process_marker
from ccrun.backends.local.pidfile import AlreadyHeld
from ccrun.backends.open import load_modules, open_backend
from ccrun.claude_cli import find_cli
from ccrun.config import Config, SandboxMode
from ccrun.egress import Egress
from ccrun.errors import CcrunError, ConfigError, exit_status
from ccrun.names import payload_name
from ccrun.process import cgroup, linux, user
from ccrun.process.guardian import run_guarded
from ccrun.process.user import User
from ccrun.task import TaskId
from ccrun.worker.clouds import open_cloud
from ccrun.worker.dependencies import PostRunLimits, WorkerDependencies, WorkerTimeouts
from ccrun.worker.git.run import SYSTEM_PATH
from ccrun.worker.isolation import IsolationPolicy
from ccrun.worker.limits import TaskLimits
from ccrun.worker.log_writer import STORAGE_RETRY_SECONDS, FlushPolicy
from ccrun.worker.run import run_task
from ccrun.worker.upstream import ModelApi

logger = structlog.get_logger()

#: Seconds in which a user becomes free. Workers of an earlier service may still have some.
USER_SECONDS: Final = 60.0
USER_POLL_SECONDS: Final = 0.2


def main() -> int:
    """Run the task. Return the exit status, which is 0 when the outcome was recorded."""
    # First, before another process of this user can read the memory of this one.
    linux.harden()
    linux.become_subreaper()
    try:
        settings = config.load()
        # On Cloud Run, a container ends with all of its processes.
        return run_guarded(lambda: _run(settings)) if settings.is_local else _run(settings)
    except AlreadyHeld:
        return 0
    except CcrunError as error:
        logger.warning("worker_failed", message="Worker failed", error=error.message)
        return exit_status(error)


def _run(settings: Config) -> int:
    log.configure(settings.log_format, settings.log_level)
    if settings.task_id is None:
        raise ConfigError("TASK_ID must be set: ccrun starts workers with the ID of their task.")
    if settings.encrypted_payload_path not in (None, payload_name(settings.task_id)):
        raise ConfigError("ENCRYPTED_PAYLOAD_PATH must name the payload of the task that TASK_ID names.")
    with (
        log.bound(task_id=settings.task_id),
        _local_worker(settings, settings.task_id),
        _agent_user(settings) as agent_user,
    ):
        asyncio.run(_work(settings, settings.task_id, agent_user))
    return 0


@contextlib.contextmanager
def _agent_user(settings: Config) -> Iterator[User | None]:
    """Yield the user of the agent: with `CCRUN_AGENT_USERS`, one that no other task has meanwhile.

    Raises:
        ConfigError: This process may not start others as that user, or all of them are in use.
    """
    if settings.agent_users is None:
        yield user.find_user(settings.agent_user, SYSTEM_PATH) if settings.agent_user else None
        return
    until = time.monotonic() + USER_SECONDS
    while True:
        for number in settings.agent_users:
            file = agent_users(settings.data_dir) / str(number)
            if pidfile.holder_pid(file) is None:
                with contextlib.suppress(AlreadyHeld), pidfile.hold(file):
                    agent_user = user.find_user(str(number), SYSTEM_PATH)
                    # A worker that was killed may have left some.
                    agent_user.kill_all()
                    try:
                        yield agent_user
                    finally:
                        agent_user.kill_all()
                    return
        if time.monotonic() > until:
            raise ConfigError("All users of CCRUN_AGENT_USERS are in use: it needs one for each concurrent task.")
        time.sleep(USER_POLL_SECONDS)


@contextlib.contextmanager
def _local_worker(settings: Config, task_id: TaskId) -> Iterator[None]:
    """Hold what tells a service on this machine that the worker runs, and what lets it find the processes of a lost worker."""
    if settings.is_local:
        with (
            pidfile.hold(pid_files(settings.data_dir) / task_id),
            cgroup.joined(process_marker(settings.data_dir, task_id)),
        ):
            yield
    else:
        yield


async def _work(settings: Config, task_id: TaskId, agent_user: User | None) -> None:
    shutdown = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, shutdown.set)
    inherited = {"PATH": os.defpath, **config.environment()}
    async with (
        contextlib.AsyncExitStack() as stack,
        open_backend(settings, retry_seconds=STORAGE_RETRY_SECONDS) as backend,
    ):
        deps = WorkerDependencies(
            store=backend.store,
            wrapper=backend.wrapper,
            # On the local backend, a receiver that does not answer must not block a worker for long.
            callbacks=backend.callbacks(single_attempt=settings.is_local),
            cli=lambda: find_cli(str(settings.claude_cli) if settings.claude_cli else None, inherited["PATH"]),
            upstream=settings.anthropic_base_url,
            api_key=settings.anthropic_api_key,
            oauth_token=settings.claude_code_oauth_token,
            cloud=await _cloud(settings, inherited, backend.egress, stack),
            auth_token=settings.anthropic_auth_token,
            custom_headers=settings.anthropic_custom_headers,
            egress=backend.egress,
            inherited=inherited,
            marker=process_marker(settings.data_dir, task_id),
            flush_policy=FlushPolicy(flush_lines=settings.flush_lines, flush_seconds=settings.flush_seconds),
            max_line_bytes=settings.max_line_bytes,
            limits=TaskLimits(
                memory_bytes=settings.task_memory, processes=settings.task_pids, disk_bytes=settings.task_disk
            ),
            timeouts=WorkerTimeouts(actions=PostRunLimits(upload_bytes=settings.max_upload_bytes)),
            execution_name=settings.cloud_run_execution,
            isolation=IsolationPolicy(
                user=agent_user,
                is_required=settings.sandbox is SandboxMode.REQUIRED,
                find_sandbox=lambda: agent_sandbox(settings, inherited, agent_user),
                network=settings.agent_network,
                allowed_hosts=frozenset(settings.agent_allowed_hosts),
                private_hosts=frozenset(settings.agent_private_hosts),
            ),
            git_protocols="https:ssh:http:file" if settings.is_local else "https:ssh",
        )
        await run_task(deps, task_id, shutdown=shutdown)


async def _cloud(
    settings: Config, inherited: Mapping[str, str], egress: Egress, stack: contextlib.AsyncExitStack
) -> ModelApi | None:
    """Return the operator's cloud, if there is one."""
    get_token = None
    if settings.use_vertex:
        await load_modules("ccrun.backends.gcp.calls")
        from ccrun.backends.gcp.calls import credentials, open_session

        session = await stack.enter_async_context(open_session(egress.tls, emulated=False))
        get_token = (await credentials(session, emulated=False)).get
    return open_cloud(settings, inherited, get_token)


if __name__ == "__main__":
    sys.exit(main())

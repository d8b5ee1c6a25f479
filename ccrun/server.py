"""`ccrun serve` and `ccrun sweep`: builds the API, its workers and, on the local backend, a sweep in the same process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

import attrs
import structlog
from aiohttp import web

from ccrun import __version__
from ccrun.agent_sandbox import isolation_here
from ccrun.api.app import RUNNER_OPTIONS, make_app
from ccrun.api.dependencies import ApiDependencies, ApiTimeouts
from ccrun.api.dispatch import Dispatcher
from ccrun.api.feed import Feed
from ccrun.api.listen import Listener
from ccrun.api.poller import PollPolicy
from ccrun.api.request import Defaults
from ccrun.api.server_log import server_logger
from ccrun.backends.local.jobs import SubprocessJobs
from ccrun.backends.local.layout import callback_secret_file, pid_files, process_marker, services
from ccrun.backends.open import OpenBackend, load_modules, missing_setting, open_backend
from ccrun.config import Config, environment
from ccrun.egress import Egress, open_egress
from ccrun.errors import ConfigError
from ccrun.jobs import Jobs
from ccrun.process import linux
from ccrun.process.limits import open_files_limit, raise_open_files_limit
from ccrun.results import Isolation, IsolationLevel
from ccrun.settle import settle
from ccrun.sweep import Sweeper
from ccrun.worker.clouds import check_cloud

log = structlog.get_logger()

#: Seconds between two sweeps. When a worker of this service exits, a sweep runs immediately.
SWEEP_SECONDS: Final = 5.0
#: Seconds that responses have to finish at shutdown, after the streams are closed.
SHUTDOWN_SECONDS: Final = 1.0
#: Seconds between two polls of a local directory while a task is active. `POLL_SECONDS` is the maximum while it is idle.
LEAST_LOCAL_POLL_SECONDS: Final = 0.05
#: Seconds between two polls in the cloud, where a worker writes one chunk a second and each poll is billed.
LEAST_CLOUD_POLL_SECONDS: Final = 0.5
#: The error of requests with a callback when there is no secret to sign it.
UNSIGNED_CALLBACKS: Final = "Callbacks are not configured (missing CLOUDRUN_CALLBACK_SECRET)"
#: Seconds after which a connection without a complete request is closed, as nginx does by default.
IDLE_SECONDS: Final = 75.0
#: Open files that are not connections: the storage, the start of workers, the log.
RESERVED_FILES: Final = 64
#: Connections that are not streams.
RESERVED_CONNECTIONS: Final = 32


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        CcrunError: The service cannot start.
    """
    _check_access(config)
    # Agents of the local backend run as the same user; they must not read the operator's key in this process.
    linux.harden()
    if config.is_local:
        # Processes of killed workers become children of the service, which kills them.
        linux.become_subreaper()
        # Workers have the same settings, and would fail one after the other.
        check_cloud(config, environment())
        _check_agent_users(config)
    raise_open_files_limit()
    stop = _stop_on_signals()
    async with serving(config, environment()) as address:
        log.info("service_listening", message="Listening", url=address, version=__version__, backend=config.backend)
        await _log_proxies(config)
        if config.is_local and config.callback_secret is None:
            log.info(
                "callback_secret_generated",
                message="Callbacks are signed with a generated secret",
                file=str(callback_secret_file(config.data_dir)),
            )
        if _is_unprotected(config):
            log.warning(
                "api_unprotected", message="Anyone who can reach this address can run tasks; set CCRUN_API_TOKENS"
            )
        if not config.operator_has_credential:
            log.info(
                "model_credential_missing",
                message="Each request must have a credential for the model API, because the service has none",
            )
        await stop.wait()
        log.info("service_stopping", message="Shutting down")


def _check_access(config: Config) -> None:
    if _is_unprotected(config) and not config.allow_anybody:
        raise ConfigError(
            f"HOST is {config.host}, where other machines can run tasks without a token: set CCRUN_API_TOKENS, or "
            "CCRUN_ALLOW_ANYBODY=1 if something else controls access."
        )


def _check_agent_users(config: Config) -> None:
    if config.agent_users is not None and len(config.agent_users) < config.max_concurrent_tasks:
        raise ConfigError(
            f"CCRUN_AGENT_USERS has {len(config.agent_users)} users, fewer than MAX_CONCURRENT_TASKS "
            f"({config.max_concurrent_tasks}): each concurrent task needs one."
        )


def _is_unprotected(config: Config) -> bool:
    """Whether other machines can call the API without a token. On Cloud Run, the platform controls access."""
    return config.k_service is None and not config.api_tokens and not _is_loopback(config.host)


async def _log_proxies(config: Config) -> None:
    egress = await asyncio.to_thread(open_egress, config)
    if egress.shown:
        log.info("proxy_used", message="Other servers are reached through a proxy", **egress.shown)
    if config.agent_proxy is None and not egress.agent_gets_proxies:
        log.warning(
            "agent_proxy_missing",
            message="Agents use no proxy, because its URL has a password: set AGENT_PROXY to a URL without one, or to none",
        )


@contextlib.asynccontextmanager
async def serving(
    config: Config, worker_environment: Mapping[str, str], *, idle_seconds: float = IDLE_SECONDS
) -> AsyncIterator[str]:
    """Serve while the context is open. Yield the base URL.

    Args:
        config: The config.
        worker_environment: The environment variables of the workers, from which `config` was loaded.
        idle_seconds: See `IDLE_SECONDS`.

    Raises:
        CcrunError: The service cannot start.
    """
    # Set when a sweep should run immediately.
    sweep_needed = asyncio.Event()
    isolation = await _isolation(config, worker_environment) if config.is_local else None
    async with (
        open_backend(config) as backend,
        _open_jobs(config, backend.egress, worker_environment, sweep_needed.set) as jobs,
    ):
        app = make_app(attrs.evolve(_deps(config, backend, jobs, sweep_needed), isolation=isolation))
        listener = Listener(app, max_connections=_max_connections())
        runner = web.AppRunner(
            app,
            access_log=None,
            logger=server_logger(),
            **RUNNER_OPTIONS,
            keepalive_timeout=idle_seconds,
            shutdown_timeout=SHUTDOWN_SECONDS,
        )
        await runner.setup()
        try:
            assert runner.server is not None  # noqa: S101 - `setup` has created it
            async with listener.listening(runner.server, config.host, config.port) as port:
                host = f"[{config.host}]" if ":" in config.host else config.host
                yield f"http://{host}:{port}"
        finally:
            await runner.cleanup()


async def _isolation(config: Config, worker_environment: Mapping[str, str]) -> Isolation:
    """Return how the agents on this machine are isolated, and log it."""
    isolation = await asyncio.to_thread(isolation_here, config, worker_environment)
    shown = {"level": isolation.level, "network": isolation.network}
    if isolation.level is IsolationLevel.SANDBOX:
        log.info("agents_isolated", message="Agents run in a sandbox", **shown)
    else:
        reach = "" if config.api_tokens else "; agents can call this API unless CCRUN_API_TOKENS is set"
        log.warning(
            "agents_not_isolated",
            message=f"Agents run outside of a sandbox{reach}",
            **shown,
            error=" ".join(isolation.reasons),
        )
    return isolation


def _max_connections() -> int:
    return max(open_files_limit() - RESERVED_FILES, RESERVED_CONNECTIONS)


@contextlib.asynccontextmanager
async def _open_jobs(
    config: Config, egress: Egress, worker_environment: Mapping[str, str], on_worker_exit: Callable[[], None]
) -> AsyncIterator[Jobs]:
    if not config.is_local:
        await load_modules("ccrun.backends.gcp.jobs")
        from ccrun.backends.gcp.jobs import open_cloud_run

        async with open_cloud_run(
            project=config.project_id or "",
            region=config.region,
            job=config.cloudrun_job_name,
            emulator=config.cloud_run_emulator_host,
            ca_bundle=egress.ca_bundle,
        ) as executions:
            yield executions
        return
    subprocesses = SubprocessJobs(
        # -P: modules in the current directory are not imported.
        command=(sys.executable, "-P", "-m", "ccrun.worker"),
        environment={**worker_environment, "CCRUN_BACKEND": config.backend, "CCRUN_DATA_DIR": str(config.data_dir)},
        pid_files=pid_files(config.data_dir),
        services=services(config.data_dir),
        marker=functools.partial(process_marker, config.data_dir),
        max_running=config.max_concurrent_tasks,
        on_worker_exit=on_worker_exit,
    )
    async with subprocesses:
        yield subprocesses


async def sweep_once(config: Config) -> None:
    """Settle lost tasks and deliver owed callbacks, once.

    Raises:
        CcrunError: The storage cannot be reached.
    """
    async with open_backend(config) as backend, _open_jobs(config, backend.egress, environment(), lambda: None) as jobs:
        # Here, no local worker is started: without the service, nothing limits their number.
        report = await _sweeper(backend, jobs, launches_pending=not config.is_local).sweep_completely()
    log.info("sweep_finished", message="Sweep finished", **attrs.asdict(report))


def _sweeper(backend: OpenBackend, jobs: Jobs, *, launches_pending: bool) -> Sweeper:
    callbacks = backend.callbacks()
    if callbacks is None:
        raise ConfigError("CLOUDRUN_CALLBACK_SECRET must be set: a sweep signs callbacks.")
    return Sweeper(store=backend.store, jobs=jobs, callbacks=callbacks, launches_pending=launches_pending)


def _deps(config: Config, backend: OpenBackend, jobs: Jobs, sweep_needed: asyncio.Event) -> ApiDependencies:
    @contextlib.asynccontextmanager
    async def sweeping() -> AsyncIterator[None]:
        sweeper = _sweeper(backend, jobs, launches_pending=True)
        sweep = asyncio.create_task(sweeper.run_forever(every_seconds=SWEEP_SECONDS, sooner=sweep_needed))
        try:
            yield
        finally:
            sweep.cancel()
            await asyncio.gather(sweep, return_exceptions=True)

    least_poll = LEAST_LOCAL_POLL_SECONDS if config.is_local else LEAST_CLOUD_POLL_SECONDS
    return ApiDependencies(
        store=backend.store,
        jobs=jobs,
        wrapper=backend.wrapper,
        dispatcher=Dispatcher(store=backend.store, jobs=jobs, wrapper=backend.wrapper, callback_owed=sweep_needed.set),
        feed=Feed(
            backend.store,
            PollPolicy(min_seconds=min(least_poll, config.poll_seconds), max_seconds=config.poll_seconds),
            settle=functools.partial(settle, backend.store, jobs),
            queue_position=jobs.queue_position,
        ),
        defaults=Defaults(
            operator_has_credential=config.operator_has_credential,
            allowed_base_urls=config.allowed_base_urls,
            agent_network=config.agent_network,
            allowed_tools=config.allowed_tools,
            permission_mode=config.permission_mode,
            max_timeout_minutes=config.max_timeout_minutes,
            backend_is_local=config.is_local,
        ),
        timeouts=ApiTimeouts(heartbeat=config.heartbeat_seconds),
        tokens=config.api_tokens,
        loopback_only=_is_loopback(config.host) and not config.api_tokens,
        max_request_bytes=config.max_request_bytes,
        project_id=config.project_id,
        backend=config.backend,
        # In the cloud the API neither decrypts nor calls receivers; the sweep runs with the identity of the worker.
        companions=[sweeping] if config.is_local else [],
        unavailable=missing_setting(config),
        max_streams=max(_max_connections() - RESERVED_CONNECTIONS, 1),
        callbacks_unavailable=None if config.signs_callbacks else UNSIGNED_CALLBACKS,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _stop_on_signals() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop

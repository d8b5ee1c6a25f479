"""What a worker is made of, and how long it waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import attrs

from ccrun.callbacks.owed import OwedCallbacks
from ccrun.egress import Egress
from ccrun.seal import KeyWrapper
from ccrun.store import Store
from ccrun.task import Secret
from ccrun.worker.isolation import IsolationPolicy
from ccrun.worker.limits import TaskLimits
from ccrun.worker.log_writer import FlushPolicy
from ccrun.worker.upstream import ModelApi

#: Bytes of a line of the log. It is in memory, in the worker and in each service that reads it.
MAX_LINE_BYTES: Final = 64 * 1024**2
#: Bytes of all uploads of a task. A sparse file of a terabyte takes no time to make, and an hour to upload.
MAX_UPLOAD_BYTES: Final = 10 * 1024**3
#: Bytes of a patch. It is in memory while secrets are redacted in it.
MAX_RESCUE_BYTES: Final = 32 * 1024 * 1024


@attrs.frozen(kw_only=True)
class PostRunLimits:
    """How long an action after the agent may take, in seconds, and how large patches and uploads may be, in bytes.

    With a minute each for a patch, the record and the callback, all of them fit into the 15 minutes that the Cloud Run job has
    in addition to the agent's time (`scripts/deploy-job.sh`).
    """

    push: float = 300.0
    uploads: float = 420.0
    #: Of a larger patch, only the files that fit are stored.
    rescue_bytes: int = MAX_RESCUE_BYTES
    #: Of all uploads together.
    upload_bytes: int = MAX_UPLOAD_BYTES


@attrs.frozen(kw_only=True)
class WorkerTimeouts:
    """How long the worker waits, in seconds."""

    #: For each command before the agent.
    command: float = 300.0
    #: For each kind of action after the agent.
    actions: PostRunLimits = attrs.field(factory=PostRunLimits)
    #: For the patch of changes that would be lost.
    rescue: float = 60.0
    #: Between SIGTERM and SIGKILL for the agent.
    term_grace: float = 5.0
    #: For the first line of the CLI. It usually takes a second, but MCP servers that it starts first may take longer.
    first_line: float = 120.0
    #: For the CLI to exit, or to print more, after it has printed a result.
    after_result: float = 60.0
    #: Between two polls of the record for a cancellation.
    cancel_poll: float = 2.0
    #: For everything after a SIGTERM to the worker; the platform sends SIGKILL after ten.
    shutdown: float = 9.0
    #: Of those, for the agent to exit.
    shutdown_term_grace: float = 3.0
    #: Of those, for the callback.
    shutdown_callback: float = 2.5

    @property
    def shutdown_work(self) -> float:
        """Of those, for the work; abandoning the log and recording the outcome take less than 1.5."""
        return self.shutdown - self.shutdown_callback - 1.5


@attrs.frozen(kw_only=True)
class WorkerDependencies:
    """What a worker is made of.

    Args:
        callbacks: None when callbacks are not configured.
        cli: Returns the path of the Claude CLI, or raises `CcrunError`.
        upstream: The base URL of the model API.
        api_key: The operator's API key, for requests without a credential.
        oauth_token: The operator's OAuth token, used when there is no API key.
        cloud: The operator's cloud, used before any other credential of the operator.
        auth_token: The operator's bearer token, used before an API key.
        custom_headers: The operator's additional headers for the model API.
        egress: How the worker reaches other servers.
        inherited: The worker's environment, of which the agent gets PATH, locale and time zone.
        marker: An environment variable's value by which the processes of this task are found.
        max_line_bytes: The bytes of a line that are logged.
        limits: What a task may use of the machine.
        execution_name: The name of this execution at the platform.
        isolation: How agents are isolated.
        git_protocols: The protocols that git may use, separated by colons (git(1), GIT_ALLOW_PROTOCOL).
    """

    store: Store
    wrapper: KeyWrapper
    callbacks: OwedCallbacks | None
    cli: Callable[[], Path]
    upstream: str
    api_key: Secret | None = None
    oauth_token: Secret | None = None
    cloud: ModelApi | None = None
    auth_token: Secret | None = None
    custom_headers: tuple[tuple[str, Secret], ...] = attrs.field(default=(), repr=False)
    egress: Egress = attrs.field(factory=Egress)
    inherited: Mapping[str, str]
    marker: str
    max_line_bytes: int = MAX_LINE_BYTES
    limits: TaskLimits = attrs.field(factory=TaskLimits)
    flush_policy: FlushPolicy = attrs.field(factory=FlushPolicy)
    timeouts: WorkerTimeouts = attrs.field(factory=WorkerTimeouts)
    execution_name: str | None = None
    isolation: IsolationPolicy = attrs.field(factory=IsolationPolicy)
    git_protocols: str = "https:ssh"

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """The operator's credentials, whether or not a task uses them."""
        return tuple(secret for secret in (self.auth_token, self.api_key, self.oauth_token) if secret is not None)

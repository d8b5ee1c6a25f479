"""What a worker is made of, and how long it waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from ccrun.callbacks.owed import OwedCallbacks
from ccrun.process.user import User
from ccrun.seal import KeyWrapper
from ccrun.store import Store
from ccrun.task import Secret
from ccrun.worker.log_writer import FlushPolicy
from ccrun.worker.post_run import PostRunLimits


@attrs.frozen(kw_only=True)
class WorkerTimeouts:
    """How long the worker waits, in seconds."""

    #: For the clone.
    clone: float = 300.0
    #: For each of the commands before the agent.
    command: float = 300.0
    #: For each kind of action after the agent.
    actions: PostRunLimits = attrs.field(factory=PostRunLimits)
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
class WorkerDependencies:
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
    callbacks: OwedCallbacks | None
    cli: Callable[[], Path]
    upstream: str
    api_key: Secret | None = None
    oauth_token: Secret | None = None
    inherited: Mapping[str, str]
    marker: str
    pace: FlushPolicy = attrs.field(factory=FlushPolicy)
    timeouts: WorkerTimeouts = attrs.field(factory=WorkerTimeouts)
    execution_name: str | None = None
    agent_user: User | None = None
    git_protocols: str = "https:ssh"

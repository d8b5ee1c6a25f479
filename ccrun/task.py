"""Facts about a task: its ID, its status, its record and its outcome.

Values only: no code here reads the clock, the environment or the disk, or depends on JSON. `ccrun.spec` has what the request
asks for, `ccrun.lifecycle` the rules for how a record may change.
"""

from __future__ import annotations

import datetime as dt
import enum
import re
from collections.abc import Mapping
from typing import Any, Final, NewType

import attrs

from ccrun.results import ActionError, ApiError, BackgroundTask, GitCommit, Isolation, McpServer, UploadedFile

#: A task ID becomes part of object names (at most 1024 bytes in Cloud Storage) and file names (at most 255).
MAX_TASK_ID_CHARS: Final = 128
TASK_ID_PATTERN: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_TASK_ID_CHARS}}}")

#: One to 128 characters of `[A-Za-z0-9_-]`: see `TASK_ID_PATTERN`.
TaskId = NewType("TaskId", str)

#: Exit codes that ccrun assigns. 124 is that of timeout(1); the last three are those of a shell for SIGINT, SIGKILL and
#: SIGTERM.
EXIT_FAILED: Final = 1
EXIT_TIMEOUT: Final = 124
EXIT_CANCELLED: Final = 130
EXIT_KILLED: Final = 137
EXIT_TERMINATED: Final = 143


class Secret:
    """A string whose value `repr`, `str` and tracebacks do not show."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the string. There is no other way to get it, so that a search finds every use."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return self._value == other._value if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._value)


class Status(enum.StrEnum):
    """The status of a task."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether the status can no longer change."""
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


class TaskType(enum.StrEnum):
    """Whether the client follows the task or gets a callback."""

    SYNC = "sync"
    ASYNC = "async"


class Reason(enum.StrEnum):
    """Why a task finished with its status, as a value that programs can compare."""

    COMPLETED = "completed"
    AGENT_ERROR = "agent_error"
    MAX_TURNS = "max_turns"
    API_ERROR = "api_error"
    CREDENTIAL_REJECTED = "credential_rejected"
    PREPARE_FAILED = "prepare_failed"
    TIMEOUT = "timeout"
    STALLED = "stalled"
    CANCELLED = "cancelled"
    KILLED = "killed"
    OUT_OF_MEMORY = "out_of_memory"
    LIMIT_EXCEEDED = "limit_exceeded"
    LAUNCH_FAILED = "launch_failed"
    WORKER_LOST = "worker_lost"


class CallbackState(enum.StrEnum):
    """The state of a callback."""

    #: The task is not final yet.
    WAITING = "waiting"
    #: A process is delivering it. When its lease expires, the callback is owed again.
    DELIVERING = "delivering"
    #: Not delivered; due again at `next_attempt_at`.
    OWED = "owed"
    DELIVERED = "delivered"
    #: No longer retried.
    ABANDONED = "abandoned"


# --- the state of a task -----------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Summary:
    """The figures of a task that has finished. All but the duration and the times are what the CLI reported."""

    duration_ms: int
    turns: int
    errors: int
    started_at: dt.datetime | None
    completed_at: dt.datetime
    cost_usd: float | None = None
    usage: Mapping[str, Any] | None = None
    session_id: str | None = None
    result: str | None = None
    background_tasks: tuple[BackgroundTask, ...] = ()
    api_error: ApiError | None = None
    mcp_servers: tuple[McpServer, ...] = ()


@attrs.frozen(kw_only=True)
class CallbackInfo:
    """The state of a task's callback."""

    state: CallbackState = CallbackState.WAITING
    attempts: int = 0
    #: Failed deliveries, each of one or more attempts. The delay before the next one grows with this number.
    rounds: int = 0
    last_error: str | None = None
    #: When the callback is due, or when the lease of the process that delivers it expires.
    next_attempt_at: dt.datetime | None = None


@attrs.frozen(kw_only=True)
class TaskRecord:
    """The stored state of a task. Clients never see the last four fields."""

    task_id: TaskId
    type: TaskType
    status: Status
    created_at: dt.datetime
    logs_path: str
    started_at: dt.datetime | None = None
    completed_at: dt.datetime | None = None
    cancelled_at: dt.datetime | None = None
    execution_name: str | None = None
    callback_url: str | None = None
    exit_code: int | None = None
    error: str | None = None
    reason: Reason | None = None
    summary: Summary | None = None
    uploaded_files: tuple[UploadedFile, ...] | None = None
    git_commit: GitCommit | None = None
    action_errors: tuple[ActionError, ...] = ()
    isolation: Isolation | None = None
    webhook: CallbackInfo | None = None
    metadata: Mapping[str, Any] | None = None
    #: The complete callback URL, sealed under the task's data key.
    sealed_callback_url: bytes | None = attrs.field(default=None, repr=False)
    #: Distinguishes a retry of the request from another request with the same Idempotency-Key.
    idempotency_digest: str | None = attrs.field(default=None, repr=False)
    #: Whether the launch failed, so that the request was rejected. A retry with the same Idempotency-Key launches the task again.
    launch_rejected: bool = attrs.field(default=False, repr=False)
    #: A random ID of the write that stored this record, by which the writer recognizes it. It does not describe the task.
    write_id: str | None = attrs.field(default=None, repr=False, eq=False)

    @property
    def is_cancelling(self) -> bool:
        """Whether the task was cancelled and its worker has not stopped yet."""
        return self.cancelled_at is not None and not self.status.is_final

    @property
    def owes_callback(self) -> bool:
        """Whether the task is final and its callback is neither delivered nor abandoned."""
        return (
            self.status.is_final
            and self.webhook is not None
            and self.webhook.state not in (CallbackState.DELIVERED, CallbackState.ABANDONED)
        )


@attrs.frozen(kw_only=True)
class Outcome:
    """The result of a task, before it is recorded."""

    status: Status
    reason: Reason
    exit_code: int
    error: str | None = None
    turns: int = 0
    errors: int = 0
    cost_usd: float | None = None
    usage: Mapping[str, Any] | None = None
    session_id: str | None = None
    result: str | None = None
    background_tasks: tuple[BackgroundTask, ...] = ()
    api_error: ApiError | None = None
    mcp_servers: tuple[McpServer, ...] = ()
    uploaded_files: tuple[UploadedFile, ...] | None = None
    git_commit: GitCommit | None = None
    action_errors: tuple[ActionError, ...] = ()
    isolation: Isolation | None = None

"""Facts about a task: what a request asks for, and what is known about the task.

Values only. Nothing here reads the clock, the environment or the disk, and nothing knows JSON. `ccrun.lifecycle` has the rules
for how a record may change.
"""

from __future__ import annotations

import datetime as dt
import enum
import re
from collections.abc import Mapping
from typing import Any, Final, NewType

import attrs

# --- limits ----------------------------------------------------------------------------------------------------------

#: A prompt of this many UTF-8 bytes still fits the context of every current model several times over.
MAX_PROMPT_BYTES: Final = 1024 * 1024
#: The metadata is kept in the record, which is read on every poll, so it stays small.
MAX_METADATA_BYTES: Final = 64 * 1024
#: A task ID becomes part of object names (at most 1024 bytes in Cloud Storage) and file names (at most 255).
MAX_TASK_ID_CHARS: Final = 128
#: Beyond this an agent has lost its way; the CLI itself sets no bound.
MAX_TURNS: Final = 1000
DEFAULT_TURNS: Final = 6
#: One Cloud Run request lives 60 minutes at most; 55 leaves room for what comes after the agent.
DEFAULT_TIMEOUT_MINUTES: Final = 55.0
DEFAULT_GIT_DEPTH: Final = 1
DEFAULT_GIT_BRANCH: Final = "main"

#: `claude --help` of version 2.1; `default` is its older name for `manual` and still accepted.
PERMISSION_MODES: Final = ("acceptEdits", "auto", "bypassPermissions", "default", "dontAsk", "manual", "plan")

TASK_ID_PATTERN: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_TASK_ID_CHARS}}}")

#: One to 128 characters of `[A-Za-z0-9_-]`: see `TASK_ID_PATTERN`.
TaskId = NewType("TaskId", str)

#: Exit codes that ccrun itself gives a task: 124 is what timeout(1) uses, the last three are a shell's for SIGINT, SIGKILL
#: and SIGTERM.
EXIT_FAILED: Final = 1
EXIT_TIMEOUT: Final = 124
EXIT_CANCELLED: Final = 130
EXIT_KILLED: Final = 137
EXIT_TERMINATED: Final = 143


class Secret:
    """A string that never shows itself: not in `repr`, not in `str`, not in a traceback's locals."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the string itself. The one way to it, so that a search finds every use."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return self._value == other._value if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._value)


def is_reserved_variable(name: str) -> bool:
    """Whether ccrun itself decides an environment variable of the agent, so that a request may not set it.

    These say where the CLI sends its requests and with which credential, where it keeps its files, and how a task's processes
    are found. All other variables are the caller's own affair: the agent runs whatever code the caller wants anyway.
    """
    return name.startswith(_RESERVED_PREFIXES) or name in _RESERVED_VARIABLES


_RESERVED_PREFIXES: Final = ("ANTHROPIC_", "CLAUDE_", "CCRUN_")
_RESERVED_VARIABLES: Final = frozenset(
    {"CLAUDECODE", "DISABLE_AUTOUPDATER", "HOME", "IS_SANDBOX", "TERM", "TMPDIR", "XDG_RUNTIME_DIR"}
)


class Status(enum.StrEnum):
    """Where a task is in its life."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing can follow."""
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


class TaskType(enum.StrEnum):
    """How the task was asked for."""

    SYNC = "sync"
    ASYNC = "async"


class Reason(enum.StrEnum):
    """Why a task ended as it did: one word for a program."""

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
    LAUNCH_FAILED = "launch_failed"
    WORKER_LOST = "worker_lost"


class CallbackState(enum.StrEnum):
    """What became of a callback."""

    #: The task is not over yet.
    WAITING = "waiting"
    #: Somebody is delivering it; when that takes longer than its lease, it counts as owed.
    DELIVERING = "delivering"
    #: Not delivered; due again at `next_attempt_at`.
    OWED = "owed"
    DELIVERED = "delivered"
    #: Given up for good.
    ABANDONED = "abandoned"


# --- what a task is asked to do --------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class ConfigFile:
    """A slash command or a subagent: front matter and body of one Markdown file."""

    frontmatter: Mapping[str, Any] = attrs.field(factory=dict)
    content: str


@attrs.frozen(kw_only=True)
class GitAction:
    """What to commit and push after success."""

    commit: bool = False
    commit_message: str | None = None
    push: bool = False
    branch: str = DEFAULT_GIT_BRANCH
    files: tuple[str, ...] = ()
    conflict_strategy: str = "auto"


@attrs.frozen(kw_only=True)
class UploadAction:
    """Which files to keep after success."""

    glob_patterns: tuple[str, ...]
    gcs_prefix: str = ""


@attrs.frozen(kw_only=True)
class PostRunActions:
    """What happens after the agent has succeeded."""

    git: GitAction | None = None
    upload_files: UploadAction | None = None


@attrs.frozen(kw_only=True)
class TaskSpec:
    """One request, checked, with every default spelled out. This is what is sealed for the worker."""

    task_id: TaskId
    type: TaskType
    prompt: str = attrs.field(repr=False)
    timeout_minutes: float
    anthropic_api_key: Secret | None = None
    anthropic_oauth_token: Secret | None = None
    callback_url: Secret | None = None
    system_prompt: str | None = attrs.field(default=None, repr=False)
    append_system_prompt: str | None = attrs.field(default=None, repr=False)
    model: str | None = None
    fallback_model: str | None = None
    allowed_tools: tuple[str, ...] = ()
    disallowed_tools: tuple[str, ...] = ()
    permission_mode: str | None = None
    max_turns: int = DEFAULT_TURNS
    git_repo: str | None = None
    git_branch: str | None = None
    git_depth: int = DEFAULT_GIT_DEPTH
    git_submodules: bool = False
    ssh_key: Secret | None = None
    git_token: Secret | None = None
    environment_secrets: Mapping[str, Secret] = attrs.field(factory=dict)
    pre_execution_commands: tuple[str, ...] = attrs.field(default=(), repr=False)
    mcp_config: Mapping[str, Any] | None = attrs.field(default=None, repr=False)
    slash_commands: Mapping[str, ConfigFile] = attrs.field(factory=dict, repr=False)
    subagents: Mapping[str, ConfigFile] = attrs.field(factory=dict, repr=False)
    cwd_relative: str = "."
    metadata: Mapping[str, Any] | None = attrs.field(default=None, repr=False)
    post_execution_actions: PostRunActions = attrs.field(factory=PostRunActions)

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """Every value that may not appear in a log, a record or a callback."""
        named = [self.anthropic_api_key, self.anthropic_oauth_token, self.ssh_key, self.git_token]
        if self.git_token is not None and ":" in self.git_token.reveal():
            # With the name of its user in front.
            named.append(Secret(self.git_token.reveal().rpartition(":")[2]))
        return (*(secret for secret in named if secret is not None), *self.environment_secrets.values())


# --- what is known of a task -----------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Summary:
    """The figures of a task that has ended. From `turns` and `cost_usd` on they are the CLI's own, but for the times."""

    duration_ms: int
    turns: int
    errors: int
    started_at: dt.datetime | None
    completed_at: dt.datetime
    cost_usd: float | None = None
    usage: Mapping[str, Any] | None = None
    session_id: str | None = None
    result: str | None = None


@attrs.frozen(kw_only=True)
class UploadedFile:
    """A file of the workspace that was kept."""

    original_path: str
    gcs_path: str
    size_bytes: int


@attrs.frozen(kw_only=True)
class CallbackInfo:
    """What became of a task's callback. `next_attempt_at`: when it is due, or until when a delivery has its lease."""

    state: CallbackState = CallbackState.WAITING
    attempts: int = 0
    #: Deliveries (each of some attempts) that failed; the pauses between them grow with it.
    rounds: int = 0
    last_error: str | None = None
    next_attempt_at: dt.datetime | None = None


@attrs.frozen(kw_only=True)
class TaskRecord:
    """All that is kept of a task. The last three fields are ccrun's own and never shown to a caller."""

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
    git_commit: Mapping[str, Any] | None = None
    action_errors: tuple[Mapping[str, str], ...] = ()
    webhook: CallbackInfo | None = None
    metadata: Mapping[str, Any] | None = None
    #: The whole callback URL, sealed under the task's data key.
    sealed_callback_url: bytes | None = attrs.field(default=None, repr=False)
    #: Tells a repeat of the request apart from another request under the same Idempotency-Key.
    idempotency_digest: str | None = attrs.field(default=None, repr=False)
    #: Names the write that made this state, so that its writer knows it again; no part of what is known of the task.
    write_id: str | None = attrs.field(default=None, repr=False, eq=False)

    @property
    def is_cancelling(self) -> bool:
        """Whether a cancel was asked for and the worker has not ended the task yet."""
        return self.cancelled_at is not None and not self.status.is_final

    @property
    def owes_callback(self) -> bool:
        """Whether the task is over and its callback neither delivered nor given up."""
        return (
            self.status.is_final
            and self.webhook is not None
            and self.webhook.state not in (CallbackState.DELIVERED, CallbackState.ABANDONED)
        )


@attrs.frozen(kw_only=True)
class Outcome:
    """How a task ended, before it is written down."""

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
    uploaded_files: tuple[UploadedFile, ...] | None = None
    git_commit: Mapping[str, Any] | None = None
    action_errors: tuple[Mapping[str, str], ...] = ()

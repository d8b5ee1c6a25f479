"""Facts about a request: what it asks for, and its limits.

Values only, as in `ccrun.task`: nothing here reads the clock, the environment or the disk, and nothing knows JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Self

import attrs

from ccrun.task import Secret, TaskId, TaskType
from ccrun.urls import GitUrl

#: Bytes of UTF-8. Larger than the context of current models.
MAX_PROMPT_BYTES: Final = 1024 * 1024
#: Bytes. The metadata is part of the record, which every poll may read.
MAX_METADATA_BYTES: Final = 64 * 1024
#: An agent that needs more turns does not make progress. The CLI itself has no limit.
MAX_TURNS: Final = 1000
DEFAULT_TURNS: Final = 6
#: Minutes. A Cloud Run request has at most 60; this leaves 5 for the actions after the agent.
DEFAULT_TIMEOUT_MINUTES: Final = 55.0
DEFAULT_GIT_DEPTH: Final = 1
DEFAULT_GIT_BRANCH: Final = "main"

#: From `claude --help` of version 2.1; `default` is its older name for `manual`.
PERMISSION_MODES: Final = ("acceptEdits", "auto", "bypassPermissions", "default", "dontAsk", "manual", "plan")


def is_reserved_variable(name: str) -> bool:
    """Return whether ccrun sets this environment variable of the agent, so that a request may not.

    These variables decide where the CLI sends its requests and with which credential, where it stores its files, and how the
    processes of a task are found. A request may set all others: it can make the agent run any code anyway.
    """
    return name.startswith(_RESERVED_PREFIXES) or name in _RESERVED_VARIABLES


_RESERVED_PREFIXES: Final = ("ANTHROPIC_", "CLAUDE_", "CCRUN_")
_RESERVED_VARIABLES: Final = frozenset(
    {"CLAUDECODE", "DISABLE_AUTOUPDATER", "HOME", "IS_SANDBOX", "TERM", "TMPDIR", "XDG_RUNTIME_DIR"}
)


@attrs.frozen(kw_only=True)
class ConfigFile:
    """A slash command or a subagent: front matter and body of one Markdown file."""

    frontmatter: Mapping[str, Any] = attrs.field(factory=dict)
    content: str


@attrs.frozen(kw_only=True)
class GitToken:
    """A token for git over HTTP, with the user name that belongs to it, if the request names one."""

    user: str | None
    token: Secret

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the token that `token` or `user:token` stands for."""
        user, colon, token = text.rpartition(":")
        return cls(user=user if colon else None, token=Secret(token))

    @property
    def text(self) -> Secret:
        """The form that `parse` takes."""
        return self.token if self.user is None else Secret(f"{self.user}:{self.token.reveal()}")


@attrs.frozen(kw_only=True)
class GitAction:
    """What to commit and push when the agent has succeeded."""

    commit: bool = False
    commit_message: str | None = None
    push: bool = False
    branch: str = DEFAULT_GIT_BRANCH
    files: tuple[str, ...] = ()
    conflict_strategy: str = "auto"


@attrs.frozen(kw_only=True)
class UploadAction:
    """Which files to upload when the agent has succeeded."""

    glob_patterns: tuple[str, ...]
    gcs_prefix: str = ""


@attrs.frozen(kw_only=True)
class PostRunActions:
    """What to do when the agent has succeeded."""

    git: GitAction | None = None
    upload_files: UploadAction | None = None


@attrs.frozen(kw_only=True)
class TaskSpec:
    """A valid request with all defaults filled in. This is what is sealed for the worker."""

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
    git_repo: GitUrl | None = None
    git_branch: str | None = None
    #: A branch that is fetched beside the other, with their common history.
    git_base: str | None = None
    git_depth: int = DEFAULT_GIT_DEPTH
    git_submodules: bool = False
    ssh_key: Secret | None = None
    git_token: GitToken | None = None
    environment_secrets: Mapping[str, Secret] = attrs.field(factory=dict)
    pre_execution_commands: tuple[str, ...] = attrs.field(default=(), repr=False)
    mcp_config: Mapping[str, Any] | None = attrs.field(default=None, repr=False)
    #: Whether the MCP servers of the repository are ignored.
    strict_mcp_config: bool = False
    #: Whether the task fails unless all of its MCP servers are connected.
    require_mcp: bool = False
    slash_commands: Mapping[str, ConfigFile] = attrs.field(factory=dict, repr=False)
    subagents: Mapping[str, ConfigFile] = attrs.field(factory=dict, repr=False)
    cwd_relative: str = "."
    metadata: Mapping[str, Any] | None = attrs.field(default=None, repr=False)
    post_execution_actions: PostRunActions = attrs.field(factory=PostRunActions)

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """All values that must not appear in a log, a record or a callback."""
        named = [self.anthropic_api_key, self.anthropic_oauth_token, self.ssh_key]
        if self.git_token is not None:
            named += [self.git_token.token, self.git_token.text]
        return (*(secret for secret in named if secret is not None), *self.environment_secrets.values())

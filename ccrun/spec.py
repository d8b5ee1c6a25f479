"""Facts about a request: what it asks for, and its limits.

Values only, as in `ccrun.task`: nothing here reads the clock, the environment or the disk, and nothing knows JSON.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Self

import attrs

from ccrun.results import AgentNetwork
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
#: Minutes. Most repositories take seconds; a server that hangs should not take the time of the agent.
DEFAULT_CLONE_TIMEOUT_MINUTES: Final = 5.0
DEFAULT_GIT_BRANCH: Final = "main"

#: Linux accepts no single argument or environment entry of 128 KiB or more (MAX_ARG_STRLEN of execve(2)).
MAX_ARGUMENT_BYTES: Final = 128 * 1024 - 1
#: All variables together. Arguments and environment share 2 MiB under the usual stack limit of 8 MiB (execve(2)).
MAX_ENVIRONMENT_BYTES: Final = 512 * 1024
MAX_ENVIRONMENT_VARIABLES: Final = 256
#: A regular expression for the name of an environment variable.
VARIABLE_NAME: Final = "[A-Za-z_][A-Za-z0-9_]*"

#: Tokens. No model has a larger output, and the CLI lowers a value above the maximum of the model.
MAX_OUTPUT_TOKENS: Final = 1_000_000
#: The smallest thinking budget that the model API accepts.
MIN_THINKING_TOKENS: Final = 1024

#: From `claude --help` of version 2.1.
EFFORT_LEVELS: Final = ("low", "medium", "high", "xhigh", "max")
#: From `claude --help` of version 2.1; `default` is its older name for `manual`.
PERMISSION_MODES: Final = ("acceptEdits", "auto", "bypassPermissions", "default", "dontAsk", "manual", "plan")


def is_reserved_variable(name: str) -> bool:
    """Return whether ccrun sets this environment variable of the agent, so that a request may not.

    These variables decide where the CLI sends its requests and with which credential, where it stores its files, and how the
    processes of a task are found. A request may set all others, such as `CLAUDE_CODE_MAX_OUTPUT_TOKENS`: it can make the agent
    run any code anyway.
    """
    return (
        name.startswith(("ANTHROPIC_", "CCRUN_")) or name in _RESERVED_VARIABLES or bool(_CLI_ROUTING.fullmatch(name))
    )


def is_merged_variable(name: str) -> bool:
    """Return whether ccrun merges this variable of `environmentSecrets` with its own value. No other source may set it."""
    return name in ("NO_PROXY", "no_proxy")


_RESERVED_VARIABLES: Final = frozenset(
    {
        "CLAUDECODE",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
        "CLAUDE_CONFIG_DIR",
        "DISABLE_AUTOUPDATER",
        "HOME",
        "IS_SANDBOX",
        "TERM",
        "TMPDIR",
        "XDG_RUNTIME_DIR",
    }
)
#: The CLI has more than a thousand variables. Those that have one of these words in their names choose a server, a credential or
#: a socket, or are set by a program that has started the CLI.
_CLI_ROUTING: Final = re.compile(
    r"CLAUDE_CODE_USE_\w+|CLAUDE_(?:\w+_)?(?:API|AUTH|BASE|BG|BRIDGE|CCR|CLIENT|CREDENTIALS?|DESCRIPTOR|ENTRYPOINT|FD|GATEWAY|HOST|"
    r"KEY|OAUTH|PROVIDER|PROXY|REMOTE|RUNNER|SECRET|SOCK|SOCKET|TMPDIR|TOKEN|URL|WORKER)(?:_\w+)?"
)


@attrs.frozen(kw_only=True)
class ConfigFile:
    """A text file for the CLI, such as a slash command. Only a Markdown file has front matter."""

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
    anthropic_auth_token: Secret | None = None
    anthropic_base_url: str | None = None
    callback_url: Secret | None = None
    system_prompt: str | None = attrs.field(default=None, repr=False)
    append_system_prompt: str | None = attrs.field(default=None, repr=False)
    model: str | None = None
    fallback_model: str | None = None
    #: The model for small tasks of the CLI, which is also its alias `haiku`.
    small_model: str | None = None
    effort: str | None = None
    #: 0 for none.
    max_thinking_tokens: int | None = None
    max_output_tokens: int | None = None
    #: Settings of the CLI, in the form of its `settings.json`.
    settings: Mapping[str, Any] | None = attrs.field(default=None, repr=False)
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
    #: The directories whose files are checked out; if empty, all files are.
    sparse_checkout: tuple[str, ...] = ()
    clone_timeout_minutes: float = DEFAULT_CLONE_TIMEOUT_MINUTES
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
    #: By path, whose first part is the name of the skill.
    skills: Mapping[str, ConfigFile] = attrs.field(factory=dict, repr=False)
    #: By path, whose first part is the name of the plugin.
    plugins: Mapping[str, ConfigFile] = attrs.field(factory=dict, repr=False)
    subagents: Mapping[str, ConfigFile] = attrs.field(factory=dict, repr=False)
    #: What the agent reaches besides the model API; None for the operator's default.
    network: AgentNetwork | None = None
    #: Host names, or `*.example.com` for all below one. Only for `AgentNetwork.ALLOWLIST`.
    allowed_hosts: tuple[str, ...] = ()
    cwd_relative: str = "."
    metadata: Mapping[str, Any] | None = attrs.field(default=None, repr=False)
    post_execution_actions: PostRunActions = attrs.field(factory=PostRunActions)

    @property
    def option_variables(self) -> dict[str, str]:
        """The variables by which the CLI gets those options that its arguments do not have, or do not have reliably."""
        options = {
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": self.small_model,
            "CLAUDE_CODE_EFFORT_LEVEL": self.effort,
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": self.max_output_tokens,
            "MAX_THINKING_TOKENS": self.max_thinking_tokens,
        }
        return {name: str(value) for name, value in options.items() if value is not None}

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """All values that must not appear in a log, a record or a callback."""
        named = [self.anthropic_api_key, self.anthropic_oauth_token, self.anthropic_auth_token, self.ssh_key]
        if self.git_token is not None:
            named += [self.git_token.token, self.git_token.text]
        return (*(secret for secret in named if secret is not None), *self.environment_secrets.values())

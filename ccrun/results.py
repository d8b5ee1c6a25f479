"""What a run of the agent and the actions after it have produced. Pure."""

from __future__ import annotations

import datetime as dt
import enum
from typing import Final

import attrs


class IsolationLevel(enum.StrEnum):
    """What kept the processes of an agent apart from the rest of the machine."""

    #: Namespaces of their own: of the machine, they saw only the programs of the system and the directory of the task.
    SANDBOX = "sandbox"
    #: A user of their own.
    USER = "user"
    #: Nothing but the limits of a process.
    PROCESS = "process"


class AgentNetwork(enum.StrEnum):
    """What the processes of an agent could reach besides the model API. In order, from the narrowest to the widest."""

    NONE = "none"
    #: The hosts that were allowed.
    ALLOWLIST = "allowlist"
    #: All public addresses.
    PUBLIC = "public"
    #: All that the machine can reach, since the agent was in no sandbox.
    HOST = "host"


#: The networks that a request and the operator can choose, the narrowest first.
AGENT_NETWORKS: Final = (AgentNetwork.NONE, AgentNetwork.ALLOWLIST, AgentNetwork.PUBLIC)


@attrs.frozen(kw_only=True)
class Isolation:
    """How an agent was kept apart from the rest of the machine.

    Args:
        reasons: Why the level is not higher, in sentences.
        refused_hosts: Hosts, with their ports, to which connections were refused.
    """

    level: IsolationLevel
    network: AgentNetwork
    reasons: tuple[str, ...] = ()
    refused_hosts: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class BackgroundTask:
    """Work that the agent had started in the background and that was stopped before it had finished.

    Args:
        type: The CLI's name for the kind of work, for example `local_bash` or `local_agent`.
        description: The agent's own description.
    """

    type: str
    description: str


@attrs.frozen(kw_only=True)
class ApiError:
    """The error of the model API because of which a run failed or was still being retried.

    Args:
        status: The HTTP status; None if the model API could not be reached.
        type: The API's name for the error (https://docs.anthropic.com/en/api/errors), else the CLI's.
        message: The API's message.
        retryable: Whether the same request may succeed later.
        resets_at: When a limit of requests or tokens resets, if the API said so.
    """

    status: int | None = None
    type: str | None = None
    message: str | None = None
    retryable: bool
    resets_at: dt.datetime | None = None


@attrs.frozen(kw_only=True)
class McpServer:
    """An MCP server of the run, and its status when the agent started: `connected`, `failed`, `pending`, `needs-auth`."""

    name: str
    status: str


@attrs.frozen(kw_only=True)
class UploadedFile:
    """A file of the workspace that was uploaded."""

    original_path: str
    gcs_path: str
    size_bytes: int


@attrs.frozen(kw_only=True)
class Recovery:
    """What was done about a branch to which others had pushed.

    Args:
        method: `rebase`; `merge` if the agent's commits were too many to be rebased; `force-with-lease` if such a merge had
            conflicts, so that the branch was replaced.
        remote_sha: The commit that the branch was at.
        conflict_files: Paths that both sides had changed, in which the agent's side has won.
    """

    method: str
    remote_sha: str
    conflict_files: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class GitCommit:
    """The commit that a task made or pushed.

    Args:
        sha: None in an empty repository without changes.
        committed: False when there was nothing to commit, else None.
        recovery: None when the push needed none.
    """

    sha: str | None
    message: str
    pushed: bool
    branch: str
    committed: bool | None = None
    recovery: Recovery | None = None


@attrs.frozen(kw_only=True)
class ActionError:
    """Why an action after the agent has failed."""

    action: str
    error: str

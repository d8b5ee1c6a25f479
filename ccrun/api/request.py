"""Parses the body of `POST /run` and `/run-async` into a `TaskSpec`, or reports all of its errors.

Validates only the form of values. Resolves no host name, opens no file and calls no service.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Mapping
from typing import Any, Final

import attrs

from ccrun import ijson
from ccrun.api import checks, git_checks, options
from ccrun.api.checks import (
    MAX_FIELD_ERRORS,
    MAX_LIST_ITEMS,
    Check,
    InvalidValue,
    Location,
    run_check,
)
from ccrun.codec import spec_from_values
from ccrun.errors import FieldError, InvalidRequest
from ccrun.redaction import Redactor
from ccrun.results import AGENT_NETWORKS, AgentNetwork
from ccrun.spec import (
    DEFAULT_TIMEOUT_MINUTES,
    EFFORT_LEVELS,
    MAX_ARGUMENT_BYTES,
    MAX_OUTPUT_TOKENS,
    MAX_PROMPT_BYTES,
    MAX_TURNS,
    PERMISSION_MODES,
    TaskSpec,
)
from ccrun.task import Secret, TaskId, TaskType

#: An RSA key of 16384 bits has 12.5 KB in PEM form.
MAX_SSH_KEY_BYTES: Final = 32 * 1024
MAX_COMMANDS: Final = 64
MAX_MCP_CONFIG_BYTES: Final = 256 * 1024
MAX_COMMIT_MESSAGE_BYTES: Final = 64 * 1024
#: The depth that git treats as unlimited (git-clone(1), `--depth`).
MAX_GIT_DEPTH: Final = 2**31 - 1
#: The credentials for the model API, in the order of the CLI: the first that is given is used.
_CREDENTIALS: Final = ("anthropicAuthToken", "anthropicApiKey", "anthropicOAuthToken")
#: All fields with a secret, but for `environmentSecrets`.
_SECRETS: Final = (*_CREDENTIALS, "sshKey", "gitToken")
#: Fields that make no sense without a repository, each with the reason.
_NEEDS_REPOSITORY: Final = {
    "gitBase": "it is a branch of that repository",
    "sparseCheckout": "its items are directories of that repository",
    "cloneTimeoutMinutes": "it limits the time for cloning that repository",
}
#: Another spelling of `globPatterns`, which one of the documents of existing clients has.
_SPACED_GLOB_PATTERNS: Final = "glob Patterns"


@attrs.frozen(kw_only=True)
class Defaults:
    """Settings of the service that apply to requests.

    Args:
        operator_has_credential: The service has a model API credential for requests without one.
        allowed_tools: For requests without `allowedTools`.
        permission_mode: For requests without `permissionMode`.
        max_timeout_minutes: The limit of `timeoutMinutes`.
        allowed_base_urls: What `anthropicBaseUrl` may be.
        agent_network: The widest network that `network` may name.
        backend_is_local: Repositories may have `http` and `file` URLs.
    """

    operator_has_credential: bool = False
    allowed_tools: tuple[str, ...] = ()
    permission_mode: str | None = None
    max_timeout_minutes: float = 60.0
    allowed_base_urls: tuple[str, ...] = ()
    agent_network: AgentNetwork = AgentNetwork.PUBLIC
    backend_is_local: bool = False


def parse_request(body: bytes, *, task_type: TaskType, task_id: TaskId, defaults: Defaults) -> TaskSpec:
    """Return the task that a request body describes, with all defaults filled in.

    A field that is null or a blank string counts as absent. If several model API credentials are given, one is used, in the
    order of the CLI. Errors are in the order of `request_fields`, because clients match the text of the first one.

    Args:
        body: The bytes of the body.
        task_type: `ASYNC` for `/run-async`, which requires a callback URL.
        task_id: The ID of the task if the body has none.
        defaults: Settings of the service.

    Raises:
        InvalidRequest: The body is not valid. Has all errors, at most `MAX_FIELD_ERRORS`.
    """
    try:
        value = ijson.parse(body)
    except ijson.NotIJson as error:
        raise InvalidRequest(error.errors[:MAX_FIELD_ERRORS]) from error

    errors: list[FieldError] = []
    fields = request_fields(defaults)
    check_body = checks.object_of(fields, required=_required(value, task_type, defaults))
    location = Location("", errors)
    given = run_check(check_body, value, location)
    if not errors and _has_push(given) and "gitRepo" not in given:
        location.field("gitRepo").add_error("gitRepo is required for postExecutionActions.git.push")
    if not errors and "gitRepo" not in given:
        for name in given.keys() & _NEEDS_REPOSITORY.keys():
            location.field(name).add_error(f"{name} needs gitRepo: {_NEEDS_REPOSITORY[name]}")
    if not errors and given.get("maxThinkingTokens", 0) >= given.get("maxOutputTokens", MAX_OUTPUT_TOKENS + 1):
        location.field("maxThinkingTokens").add_error(
            "maxThinkingTokens must be less than maxOutputTokens, which includes it"
        )
    if not errors:
        _check_hosts(given, defaults, location)
    if not errors and given.get("requireMcp") and not _may_have_mcp_servers(given):
        location.field("requireMcp").add_error(
            "requireMcp needs MCP servers: give mcpConfig, or gitRepo without strictMcpConfig"
        )
    if errors:
        raise InvalidRequest(_masked(errors, value, fields))

    given.pop("useNamedPipe", None)
    spec = spec_from_values(
        {
            "taskId": task_id,
            "timeoutMinutes": min(DEFAULT_TIMEOUT_MINUTES, defaults.max_timeout_minutes),
            "allowedTools": defaults.allowed_tools,
            "permissionMode": defaults.permission_mode,
            **given,
            "type": task_type,
        }
    )
    _check_option_variables(spec, location)
    if errors:
        raise InvalidRequest(_masked(errors, value, fields))
    return spec


def _masked(errors: list[FieldError], body: object, known: Container[str]) -> list[FieldError]:
    """Return errors without the secrets of the body that are also names in it, by mistake.

    Args:
        known: The names that are none.
    """
    given = body if isinstance(body, dict) else {}
    variables = given.get("environmentSecrets")
    values = [*map(given.get, _SECRETS), *(variables.values() if isinstance(variables, dict) else ())]
    names = "\n".join(name for name in _names(body) if name not in known)
    # No others: they may be words of a message.
    redactor = Redactor(Secret(value) for value in values if isinstance(value, str) and value in names)
    return [redactor.value(error) for error in errors]


def _names(value: object) -> Iterator[str]:
    """Yield the names of all fields in a JSON value, whose depth `ijson` limits."""
    if isinstance(value, dict):
        yield from value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _names(item)


def request_fields(defaults: Defaults) -> Mapping[str, Check]:
    """Return the check of each field of the body."""
    return {
        "prompt": checks.text(MAX_PROMPT_BYTES),
        "callbackUrl": checks.callback_url,
        "anthropicApiKey": checks.credential,
        "anthropicOAuthToken": checks.credential,
        "anthropicAuthToken": checks.credential,
        "anthropicBaseUrl": functools.partial(checks.base_url, allowed=defaults.allowed_base_urls),
        "taskId": checks.task_id,
        "systemPrompt": checks.text(MAX_PROMPT_BYTES),
        "appendSystemPrompt": checks.text(MAX_PROMPT_BYTES),
        "model": checks.model,
        "fallbackModel": checks.model,
        "smallModel": checks.model,
        "effort": checks.one_of(EFFORT_LEVELS),
        "maxThinkingTokens": options.thinking_tokens,
        "maxOutputTokens": checks.integer(1, MAX_OUTPUT_TOKENS),
        "settings": options.settings,
        "allowedTools": checks.string_list(checks.tool, max_bytes=MAX_ARGUMENT_BYTES),
        "disallowedTools": checks.string_list(checks.tool, max_bytes=MAX_ARGUMENT_BYTES),
        "permissionMode": checks.one_of(PERMISSION_MODES),
        "maxTurns": checks.integer(1, MAX_TURNS),
        "timeoutMinutes": checks.positive_number(defaults.max_timeout_minutes),
        "gitRepo": functools.partial(git_checks.git_repo, local=defaults.backend_is_local),
        "gitBranch": git_checks.revision,
        "gitBase": git_checks.branch,
        "gitDepth": checks.integer(1, MAX_GIT_DEPTH),
        "gitSubmodules": checks.boolean,
        "sparseCheckout": checks.string_list(git_checks.directory),
        "cloneTimeoutMinutes": checks.positive_number(defaults.max_timeout_minutes),
        "sshKey": checks.text(MAX_SSH_KEY_BYTES),
        "gitToken": checks.credential,
        "environmentSecrets": options.variables,
        "preExecutionCommands": checks.string_list(checks.text(MAX_ARGUMENT_BYTES), max_items=MAX_COMMANDS),
        "mcpConfig": _mcp_config,
        "strictMcpConfig": checks.boolean,
        "requireMcp": checks.boolean,
        "slashCommands": options.slash_commands,
        "subagents": options.subagents,
        "skills": options.skills,
        "plugins": options.plugins,
        "network": checks.one_of(AGENT_NETWORKS[: AGENT_NETWORKS.index(defaults.agent_network) + 1]),
        "allowedHosts": checks.string_list(checks.host),
        "cwdRelative": checks.relative_path,
        "useNamedPipe": checks.boolean,
        "metadata": checks.metadata,
        "postExecutionActions": checks.object_of({"git": _GIT_ACTION, "uploadFiles": _upload_action}),
    }


def _required(value: object, task_type: TaskType, defaults: Defaults) -> dict[str, str]:
    """Return the required fields, each with its error message."""
    required = {"prompt": "prompt is required"}
    if task_type is TaskType.ASYNC:
        required["callbackUrl"] = "callbackUrl is required for async tasks"
    has_token = any(_has(value, name) for name in ("anthropicOAuthToken", "anthropicAuthToken"))
    if not has_token and _has(value, "anthropicBaseUrl"):
        required["anthropicApiKey"] = (
            "anthropicBaseUrl needs anthropicAuthToken, anthropicApiKey or anthropicOAuthToken: "
            "the service sends its own credential to no other server"
        )
    elif not (has_token or defaults.operator_has_credential):
        required["anthropicApiKey"] = "Either anthropicApiKey or anthropicOAuthToken is required"
    return required


def _has(value: object, name: str) -> bool:
    return isinstance(value, dict) and not checks.is_absent(value.get(name))


def _has_push(given: Mapping[str, Any]) -> bool:
    return bool(given.get("postExecutionActions", {}).get("git", {}).get("push"))


def _check_hosts(given: Mapping[str, Any], defaults: Defaults, location: Location) -> None:
    """Add an error if the network and its hosts do not go together."""
    is_list = given.get("network", defaults.agent_network) == AgentNetwork.ALLOWLIST
    if "allowedHosts" in given and not is_list:
        location.field("allowedHosts").add_error("allowedHosts needs network: allowlist")
    if is_list and not given.get("allowedHosts") and defaults.agent_network is not AgentNetwork.ALLOWLIST:
        location.field("allowedHosts").add_error("allowedHosts is required for network: allowlist")


def _may_have_mcp_servers(given: Mapping[str, Any]) -> bool:
    """Return whether a task can have MCP servers: its own, or those of the repository's `.mcp.json`."""
    own = given.get("mcpConfig", {}).get("mcpServers")
    return bool(own) or ("gitRepo" in given and not given.get("strictMcpConfig"))


def _check_option_variables(spec: TaskSpec, location: Location) -> None:
    """Add an error for each variable that a field of the request sets and that the request sets itself as well."""
    for field, variables in (
        (location.field("environmentSecrets"), spec.environment_secrets),
        (location.field("settings").field("env"), (spec.settings or {}).get("env", {})),
    ):
        for name in sorted(spec.option_variables.keys() & variables.keys()):
            variable = field.field(name)
            variable.add_error(f"{variable.path} and a field of the request set the same option: give only one of them")


# --- objects inside the body -----------------------------------------------------------------------------------------


def _mcp_config(value: Any, location: Location) -> dict[str, Any]:
    """Check the MCP servers. A plain map of servers is wrapped as the CLI expects it, `{"mcpServers": {…}}`."""
    config: dict[str, Any] = checks.any_object(MAX_MCP_CONFIG_BYTES)(value, location)
    if "mcpServers" not in config:
        _mcp_servers(config, location)
        return {"mcpServers": config}
    run_check(_mcp_servers, config["mcpServers"], location.field("mcpServers"))
    for name in config.keys() - {"mcpServers"}:
        location.field(name).add_error(
            f"{location.field(name).path} is not part of an MCP configuration: put all servers into mcpServers"
        )
    return config


def _mcp_servers(value: Any, location: Location) -> None:
    for name, server in checks.as_object(value, max_entries=MAX_LIST_ITEMS).items():
        run_check(_mcp_server, server, location.field(name))


def _mcp_server(value: Any, location: Location) -> dict[str, Any]:
    server = checks.as_object(value)
    if not any(isinstance(server.get(key), str) and server[key].strip() for key in ("command", "url")):
        raise InvalidValue("must have `command` (a program to start) or `url` (a server to connect to)")
    return server


def _upload_action(value: Any, location: Location) -> dict[str, Any]:
    """Check the uploads, and rename the second spelling of the patterns."""
    given: dict[str, Any] = _UPLOAD_ACTION(value, location)
    spaced = given.pop(_SPACED_GLOB_PATTERNS, None)
    if spaced is not None and given.setdefault("globPatterns", spaced) != spaced:
        location.field(_SPACED_GLOB_PATTERNS).add_error(
            f"{_SPACED_GLOB_PATTERNS} and globPatterns differ: give only one of them"
        )
    location.require("globPatterns", given)
    return given


_GIT_ACTION: Final = checks.object_of(
    {
        "commit": checks.boolean,
        "commitMessage": checks.text(MAX_COMMIT_MESSAGE_BYTES),
        "push": checks.boolean,
        "branch": git_checks.push_target,
        "files": checks.glob_patterns,
        "conflictStrategy": checks.one_of(("auto", "fail")),
    }
)
_UPLOAD_ACTION: Final = checks.object_of(
    {
        "globPatterns": checks.glob_patterns,
        _SPACED_GLOB_PATTERNS: checks.glob_patterns,
        "gcsPrefix": checks.object_prefix,
    }
)

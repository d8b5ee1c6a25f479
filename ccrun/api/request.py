"""Parsing the body of `POST /run` and `/run-async` into a `TaskSpec`, or all of its errors.

Validates the form of values only: it resolves no name, opens no file and calls no service.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Final

import attrs

from ccrun import ijson, task
from ccrun.api.checks import (
    MAX_ARGUMENT_BYTES,
    MAX_FIELD_ERRORS,
    MAX_LIST_ITEMS,
    MAX_NAME_CHARS,
    Check,
    InvalidValue,
    Location,
    boolean,
    branch,
    callback_url,
    credential,
    fields,
    git_repo,
    glob_patterns,
    integer,
    is_absent,
    json_object,
    json_size,
    model,
    object_prefix,
    one_of,
    positive_number,
    relative_path,
    run_check,
    string,
    string_list,
    task_id,
    text,
    tool,
)
from ccrun.codec import spec_from_values
from ccrun.errors import FieldError, InvalidRequest
from ccrun.task import PERMISSION_MODES, TaskId, TaskSpec, TaskType

#: All variables. Arguments and environment share 2 MiB with the usual stack limit of 8 MiB (execve(2)).
MAX_ENVIRONMENT_BYTES: Final = 512 * 1024
MAX_ENVIRONMENT_SECRETS: Final = 256
#: An RSA key of 16384 bits in PEM form has 12.5 KB.
MAX_SSH_KEY_BYTES: Final = 32 * 1024
MAX_COMMANDS: Final = 64
#: Slash commands, and subagents.
MAX_CONFIG_FILES: Final = 128
MAX_CONFIG_FILE_BYTES: Final = 256 * 1024
MAX_MCP_CONFIG_BYTES: Final = 256 * 1024
MAX_COMMIT_MESSAGE_BYTES: Final = 64 * 1024
#: The depth that git treats as infinite (git-clone(1), `--depth`).
MAX_GIT_DEPTH: Final = 2**31 - 1


@attrs.frozen(kw_only=True)
class Defaults:
    """Values for what a request leaves out, and what the service allows.

    Args:
        operator_has_credential: Whether requests need no credential for the model API.
        backend_is_local: Whether `gitRepo` may be an http or file URL.
    """

    operator_has_credential: bool = False
    allowed_tools: tuple[str, ...] = ()
    permission_mode: str | None = None
    max_timeout_minutes: float = 60.0
    backend_is_local: bool = False


def parse_request(body: bytes, *, type: TaskType, task_id: TaskId, defaults: Defaults) -> TaskSpec:  # noqa: A002
    """Return the task that a body describes, with all defaults filled in.

    A field that is null or a blank string counts as not given. Of two model credentials the API key is used, as the CLI does.
    Errors are in the order of `request_fields`, so that the first message is the one that clients match by its text.

    Args:
        task_id: The ID of the task when the body has none.

    Raises:
        InvalidRequest: The body is invalid. The exception has all errors, at most `MAX_FIELD_ERRORS`.
    """
    try:
        value = ijson.parse(body)
    except ijson.NotIJson as error:
        raise InvalidRequest(error.errors[:MAX_FIELD_ERRORS]) from error

    errors: list[FieldError] = []
    request = fields(request_fields(defaults), required=_required(value, type, defaults))
    location = Location("", errors)
    given = run_check(request, value, location)
    if not errors and _wants_push(given) and "gitRepo" not in given:
        location.field("gitRepo").add_error("gitRepo is required for postExecutionActions.git.push")
    if errors:
        raise InvalidRequest(errors)

    if "anthropicApiKey" in given:
        given.pop("anthropicOAuthToken", None)
    given.pop("useNamedPipe", None)
    return spec_from_values(
        {
            "taskId": task_id,
            "timeoutMinutes": min(task.DEFAULT_TIMEOUT_MINUTES, defaults.max_timeout_minutes),
            "allowedTools": defaults.allowed_tools,
            "permissionMode": defaults.permission_mode,
            **given,
            "type": type,
        }
    )


def request_fields(defaults: Defaults) -> Mapping[str, Check]:
    """Return the check of each field of a request, by JSON name."""
    return {
        "prompt": text(task.MAX_PROMPT_BYTES),
        "callbackUrl": callback_url,
        "anthropicApiKey": credential,
        "anthropicOAuthToken": credential,
        "taskId": task_id,
        "systemPrompt": text(task.MAX_PROMPT_BYTES),
        "appendSystemPrompt": text(task.MAX_PROMPT_BYTES),
        "model": model,
        "fallbackModel": model,
        "allowedTools": string_list(tool, max_bytes=MAX_ARGUMENT_BYTES),
        "disallowedTools": string_list(tool, max_bytes=MAX_ARGUMENT_BYTES),
        "permissionMode": one_of(PERMISSION_MODES),
        "maxTurns": integer(1, task.MAX_TURNS),
        "timeoutMinutes": positive_number(defaults.max_timeout_minutes),
        "gitRepo": functools.partial(git_repo, local=defaults.backend_is_local),
        "gitBranch": branch,
        "gitDepth": integer(1, MAX_GIT_DEPTH),
        "gitSubmodules": boolean,
        "sshKey": text(MAX_SSH_KEY_BYTES),
        "gitToken": credential,
        "environmentSecrets": _environment,
        "preExecutionCommands": string_list(text(MAX_ARGUMENT_BYTES), max_items=MAX_COMMANDS),
        "mcpConfig": _mcp_config,
        "slashCommands": _config_files,
        "subagents": _config_files,
        "cwdRelative": relative_path,
        "useNamedPipe": boolean,
        "metadata": json_size(task.MAX_METADATA_BYTES),
        "postExecutionActions": fields({"git": _GIT_ACTION, "uploadFiles": _upload_action}),
    }


def _required(value: object, type: TaskType, defaults: Defaults) -> dict[str, str]:  # noqa: A002
    """Return the fields that this request needs, with the error for each when it is missing."""
    required = {"prompt": "prompt is required"}
    if type is TaskType.ASYNC:
        required["callbackUrl"] = "callbackUrl is required for async tasks"
    brings_token = isinstance(value, dict) and not is_absent(value.get("anthropicOAuthToken"))
    if not (brings_token or defaults.operator_has_credential):
        required["anthropicApiKey"] = "Either anthropicApiKey or anthropicOAuthToken is required"
    return required


def _wants_push(given: Mapping[str, Any]) -> bool:
    return bool(given.get("postExecutionActions", {}).get("git", {}).get("push"))


def _environment(value: Any, location: Location) -> dict[str, Any]:
    secrets = json_object(value, max_entries=MAX_ENVIRONMENT_SECRETS)
    read = {
        name: run_check(functools.partial(_variable, name), text, location.field(name))
        for name, text in secrets.items()
    }
    size = sum(len(name) + len(text.encode()) + 2 for name, text in read.items() if text is not None)
    if size > MAX_ENVIRONMENT_BYTES:
        raise InvalidValue(f"must have at most {MAX_ENVIRONMENT_BYTES} bytes in all")
    return read


def _variable(name: str, value: Any, location: Location) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
        raise InvalidValue("is no name for an environment variable: letters, digits and underscores, no digit first")
    if task.is_reserved_variable(name):
        raise InvalidValue("is reserved: the service itself sets this variable")
    return string(value, max_bytes=MAX_ARGUMENT_BYTES - len(name) - 1)


def _mcp_config(value: Any, location: Location) -> dict[str, Any]:
    """Check the MCP servers. An object of servers becomes what the CLI reads, `{"mcpServers": {…}}`."""
    config: dict[str, Any] = json_size(MAX_MCP_CONFIG_BYTES)(value, location)
    if "mcpServers" in config:
        servers, at = config["mcpServers"], location.field("mcpServers")
    else:
        servers, at = config, location
    run_check(_mcp_servers, servers, at)
    return config if servers is not config else {"mcpServers": servers}


def _mcp_servers(value: Any, location: Location) -> None:
    for name, server in json_object(value, max_entries=MAX_LIST_ITEMS).items():
        run_check(lambda described, _: json_object(described), server, location.field(name))


def _config_files(value: Any, location: Location) -> dict[str, Any]:
    files = json_object(value, max_entries=MAX_CONFIG_FILES)
    return {
        name: run_check(functools.partial(_config_file, name), file, location.field(name))
        for name, file in files.items()
    }


def _config_file(name: str, value: Any, location: Location) -> Any:
    if re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{MAX_NAME_CHARS - 1}}}", name) is None:
        raise InvalidValue(
            f"is no file name: at most {MAX_NAME_CHARS} letters, digits, `_`, `.` and `-`, a letter or digit first"
        )
    given = _CONFIG_FILE(value, location)
    location.require("content", given)
    return given


def _upload_action(value: Any, location: Location) -> dict[str, Any]:
    """Check the uploads. `globPatterns` and its alternative spelling become one field."""
    given: dict[str, Any] = _UPLOAD_ACTION(value, location)
    spaced = given.pop(_SPACED_PATTERNS, None)
    if spaced is not None and given.setdefault("globPatterns", spaced) != spaced:
        location.field(_SPACED_PATTERNS).add_error(f"{_SPACED_PATTERNS} and globPatterns differ: give one of the two")
    location.require("globPatterns", given)
    return given


# --- the objects inside the request ---

_CONFIG_FILE: Final = fields({"frontmatter": json_size(MAX_CONFIG_FILE_BYTES), "content": text(MAX_CONFIG_FILE_BYTES)})
_GIT_ACTION: Final = fields(
    {
        "commit": boolean,
        "commitMessage": text(MAX_COMMIT_MESSAGE_BYTES),
        "push": boolean,
        "branch": branch,
        "files": glob_patterns,
        "conflictStrategy": one_of(("auto", "fail")),
    }
)
#: The spelling of `globPatterns` in an older document.
_SPACED_PATTERNS: Final = "glob Patterns"
_UPLOAD_ACTION: Final = fields(
    {"globPatterns": glob_patterns, _SPACED_PATTERNS: glob_patterns, "gcsPrefix": object_prefix}
)

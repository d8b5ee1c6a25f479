"""JSON to facts and back: camelCase names, strict types, every fault of a request at once.

Owns the shape of the request body, of the sealed task, of the stored record and of the callback. The only importer of cattrs.
It checks the form of values alone: it resolves no name, opens no file and asks no service.
"""

from __future__ import annotations

import base64
import datetime as dt
import difflib
import enum
import functools
import ipaddress
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from ccrun import globs, ijson, task
from ccrun.errors import Fault, InvalidRequest, SealError, StorageError
from ccrun.globs import BadPattern
from ccrun.task import PERMISSION_MODES, Secret, TaskId, TaskRecord, TaskSpec, TaskType

# --- limits ----------------------------------------------------------------------------------------------------------

#: Who sends a body this wrong reads no further; naming a million unknown fields would cost minutes.
MAX_FAULTS: Final = 100
#: Linux takes no single argument or environment entry of 128 KiB or more (MAX_ARG_STRLEN of execve(2)).
MAX_ARGUMENT_BYTES: Final = 128 * 1024 - 1
#: All secrets together; arguments and environment share 2 MiB under the usual stack limit of 8 MiB (execve(2)).
MAX_ENVIRONMENT_BYTES: Final = 512 * 1024
MAX_ENVIRONMENT_SECRETS: Final = 256
#: Browsers, proxies and receivers commonly stop at this length.
MAX_URL_CHARS: Final = 2048
#: API keys and tokens are a few hundred characters long; JWTs may reach some thousand.
MAX_CREDENTIAL_BYTES: Final = 8 * 1024
#: An RSA key of 16384 bits in PEM form has 12.5 KB.
MAX_SSH_KEY_BYTES: Final = 32 * 1024
#: The longest name of a file or a directory on Linux is 255 bytes, the longest path 4096; a name leaves room for `.md`.
MAX_NAME_CHARS: Final = 64
MAX_PATH_BYTES: Final = 1024
MAX_BRANCH_BYTES: Final = 240
MAX_LIST_ITEMS: Final = 256
MAX_COMMANDS: Final = 64
#: Slash commands, and subagents.
MAX_CONFIG_FILES: Final = 128
MAX_CONFIG_FILE_BYTES: Final = 256 * 1024
MAX_MCP_CONFIG_BYTES: Final = 256 * 1024
MAX_COMMIT_MESSAGE_BYTES: Final = 64 * 1024
#: What git takes for "all of it" (git-clone(1), `--depth`).
MAX_GIT_DEPTH: Final = 2**31 - 1


@attrs.frozen(kw_only=True)
class Defaults:
    """What the service knows and a request may leave out.

    Args:
        operator_has_credential: A request without one runs with the operator's own.
        backend_is_local: Only there, repositories may come from `http` and `file` URLs.
    """

    operator_has_credential: bool = False
    allowed_tools: tuple[str, ...] = ()
    permission_mode: str | None = None
    max_timeout_minutes: float = 60.0
    backend_is_local: bool = False


def parse_request(body: bytes, *, type: TaskType, task_id: TaskId, defaults: Defaults) -> TaskSpec:  # noqa: A002
    """Return the task that a body of `POST /run` or `/run-async` asks for, every default spelled out.

    A field that is null or a blank string counts as not given. Of two model credentials the API key is taken, as the CLI
    does. The faults stand in the order of `_request_fields`, so that the first, whose message becomes the error's, is the
    one that callers of the predecessor match by its text.

    Args:
        task_id: The ID of the task when the body names none.

    Raises:
        InvalidRequest: With every fault of the body, `MAX_FAULTS` at most.
    """
    try:
        value = ijson.parse(body)
    except ijson.NotIJson as error:
        raise InvalidRequest(error.faults[:MAX_FAULTS]) from error

    faults: list[Fault] = []
    request = _fields(_request_fields(defaults), required=_required(value, type, defaults))
    place = _Place("", faults)
    given = _read(request, value, place)
    if not faults and _pushes(given) and "gitRepo" not in given:
        place.field("gitRepo").say("gitRepo is required for postExecutionActions.git.push")
    if faults:
        raise InvalidRequest(faults)

    if "anthropicApiKey" in given:
        given.pop("anthropicOAuthToken", None)
    given.pop("useNamedPipe", None)
    return _converter().structure(
        {
            "taskId": task_id,
            "timeoutMinutes": min(task.DEFAULT_TIMEOUT_MINUTES, defaults.max_timeout_minutes),
            "allowedTools": defaults.allowed_tools,
            "permissionMode": defaults.permission_mode,
            **given,
            "type": type,
        },
        TaskSpec,
    )


# --- the request -----------------------------------------------------------------------------------------------------
#
# cattrs cannot do this part: it converts where it should refuse, and it names attributes where a caller needs the names of
# the wire. So a table of checks reads the body; what they return is plain JSON under the names of the wire, of which the
# converter that also opens sealed tasks makes facts.


class _Broken(Exception):
    """A rule that a value breaks: a sentence without its subject, which is the path of the value."""


@attrs.frozen
class _Place:
    """A place in the body, and where its faults go."""

    path: str
    faults: list[Fault]

    def say(self, message: str) -> None:
        """Note a fault in these very words."""
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(Fault(self.path, message))

    def field(self, name: str) -> _Place:
        """Return the place of a field of the object here."""
        if re.fullmatch(r"\w{1,64}", name, re.ASCII) is None:
            return _Place(f"{self.path}[{json.dumps(_shown(name), ensure_ascii=False)}]", self.faults)
        return _Place(f"{self.path}.{name}" if self.path else name, self.faults)

    def item(self, index: int) -> _Place:
        """Return the place of an item of the array here."""
        return _Place(f"{self.path}[{index}]", self.faults)

    def require(self, name: str, given: Mapping[str, Any]) -> None:
        """Note that a field of the object here is missing, if it is."""
        if name not in given:
            place = self.field(name)
            place.say(f"{place.path} is required")


#: Returns the value as the converter takes it, or raises `_Broken`. A check of an object or array reads what is inside by
#: `_read`, which notes the faults there, so that one does not hide the others.
_Check = Callable[[Any, _Place], Any]


def _read(check: _Check, value: Any, place: _Place) -> Any:
    """Return what `check` makes of a value; note at its place the rule that it breaks."""
    try:
        return check(value, place)
    except _Broken as broken:
        place.say(f"{place.path or 'The body'} {broken}")


def _request_fields(defaults: Defaults) -> Mapping[str, _Check]:
    return {
        "prompt": _text(task.MAX_PROMPT_BYTES),
        "callbackUrl": _callback_url,
        "anthropicApiKey": _credential,
        "anthropicOAuthToken": _credential,
        "taskId": _task_id,
        "systemPrompt": _text(task.MAX_PROMPT_BYTES),
        "appendSystemPrompt": _text(task.MAX_PROMPT_BYTES),
        "model": _model,
        "fallbackModel": _model,
        "allowedTools": _list(_tool, max_bytes=MAX_ARGUMENT_BYTES),
        "disallowedTools": _list(_tool, max_bytes=MAX_ARGUMENT_BYTES),
        "permissionMode": _one_of(PERMISSION_MODES),
        "maxTurns": _whole(1, task.MAX_TURNS),
        "timeoutMinutes": _minutes(defaults.max_timeout_minutes),
        "gitRepo": functools.partial(_git_repo, local=defaults.backend_is_local),
        "gitBranch": _branch,
        "gitDepth": _whole(1, MAX_GIT_DEPTH),
        "gitSubmodules": _flag,
        "sshKey": _text(MAX_SSH_KEY_BYTES),
        "gitToken": _credential,
        "environmentSecrets": _environment,
        "preExecutionCommands": _list(_text(MAX_ARGUMENT_BYTES), max_items=MAX_COMMANDS),
        "mcpConfig": _mcp_config,
        "slashCommands": _config_files,
        "subagents": _config_files,
        "cwdRelative": _path,
        "useNamedPipe": _flag,
        "metadata": _printed(task.MAX_METADATA_BYTES),
        "postExecutionActions": _fields({"git": _GIT_ACTION, "uploadFiles": _upload_action}),
    }


def _required(value: object, type: TaskType, defaults: Defaults) -> dict[str, str]:  # noqa: A002
    """Return what to say of each field that this request lacks, if it does."""
    required = {"prompt": "prompt is required"}
    if type is TaskType.ASYNC:
        required["callbackUrl"] = "callbackUrl is required for async tasks"
    brings_token = isinstance(value, dict) and not _is_absent(value.get("anthropicOAuthToken"))
    if not (brings_token or defaults.operator_has_credential):
        required["anthropicApiKey"] = "Either anthropicApiKey or anthropicOAuthToken is required"
    return required


def _pushes(given: Mapping[str, Any]) -> bool:
    return bool(given.get("postExecutionActions", {}).get("git", {}).get("push"))


def _is_absent(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def _shown(name: str) -> str:
    """Return a caller's own word, fit for one line of a message."""
    plain = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name[:MAX_NAME_CHARS])
    return plain + "…" * (len(name) > MAX_NAME_CHARS)


# --- objects and arrays ---


def _object(value: Any, *, max_entries: int | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Broken(f"must be a JSON object, not {_kind(value)}")
    if max_entries is not None and len(value) > max_entries:
        raise _Broken(f"may have at most {max_entries} entries, not {len(value)}")
    return value


def _fields(checks: Mapping[str, _Check], *, required: Mapping[str, str] | None = None) -> _Check:
    """Check an object of known fields, in the order of `checks`; then name each unknown one with the nearest known."""

    def check(value: Any, place: _Place) -> dict[str, Any]:
        fields = _object(value)
        given = {}
        for name, check_field in checks.items():
            if not _is_absent(fields.get(name)):
                given[name] = _read(check_field, fields[name], place.field(name))
            elif required and name in required:
                place.field(name).say(required[name])
        unknown = (name for name in fields if name not in checks)
        for name in itertools.islice(unknown, MAX_FAULTS):
            place.field(name).say(_unknown(name, checks))
        return given

    return check


def _unknown(name: str, known: Iterable[str]) -> str:
    by_lower_case = {field.lower(): field for field in known}
    near = difflib.get_close_matches(_shown(name).lower(), by_lower_case, n=1)
    hint = f"; did you mean `{by_lower_case[near[0]]}`?" if near else ""
    return f"Unknown field `{_shown(name)}`{hint}"


def _list(check_item: _Check, *, max_items: int = MAX_LIST_ITEMS, max_bytes: int | None = None) -> _Check:
    """Check an array of strings; within `max_bytes` it fits one argument, joined by commas."""

    def check_one(value: Any, place: _Place) -> Any:
        if isinstance(value, str) and not value.strip():
            raise _Broken("may not be blank")
        return check_item(value, place)

    def check(value: Any, place: _Place) -> list[Any]:
        if not isinstance(value, list):
            raise _Broken(f"must be an array of strings, not {_kind(value)}")
        if len(value) > max_items:
            raise _Broken(f"may have at most {max_items} items, not {len(value)}")
        items = [_read(check_one, item, place.item(index)) for index, item in enumerate(value)]
        if max_bytes is not None and sum(len(item.encode()) + 1 for item in items if item is not None) > max_bytes:
            raise _Broken(f"must have at most {max_bytes} bytes in all")
        return items

    return check


def _printed(max_bytes: int) -> _Check:
    """Check an object of any shape by the bytes that it has as JSON."""

    def check(value: Any, place: _Place) -> dict[str, Any]:
        fields = _object(value)
        # The exact form takes seconds for megabytes. Python's is at most four times as long ("-0.0" for "0") and quick.
        rough = len(json.dumps(fields, ensure_ascii=False, separators=(",", ":")))
        if rough > 4 * max_bytes or len(ijson.dumps(fields)) > max_bytes:
            raise _Broken(f"must have at most {max_bytes} bytes as JSON")
        return fields

    return check


def _environment(value: Any, place: _Place) -> dict[str, Any]:
    secrets = _object(value, max_entries=MAX_ENVIRONMENT_SECRETS)
    read = {name: _read(functools.partial(_variable, name), text, place.field(name)) for name, text in secrets.items()}
    size = sum(len(name) + len(text.encode()) + 2 for name, text in read.items() if text is not None)
    if size > MAX_ENVIRONMENT_BYTES:
        raise _Broken(f"must have at most {MAX_ENVIRONMENT_BYTES} bytes in all")
    return read


def _variable(name: str, value: Any, place: _Place) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
        raise _Broken("is no name for an environment variable: letters, digits and underscores, no digit first")
    if task.is_reserved_variable(name):
        raise _Broken("is reserved: the service itself sets this variable")
    return _string(value, max_bytes=MAX_ARGUMENT_BYTES - len(name) - 1)


def _mcp_config(value: Any, place: _Place) -> dict[str, Any]:
    """Check the MCP servers; a bare map of servers becomes what the CLI reads, `{"mcpServers": {…}}`."""
    config: dict[str, Any] = _printed(MAX_MCP_CONFIG_BYTES)(value, place)
    if "mcpServers" in config:
        servers, at = config["mcpServers"], place.field("mcpServers")
    else:
        servers, at = config, place
    _read(_mcp_servers, servers, at)
    return config if servers is not config else {"mcpServers": servers}


def _mcp_servers(value: Any, place: _Place) -> None:
    for name, server in _object(value, max_entries=MAX_LIST_ITEMS).items():
        _read(lambda described, _: _object(described), server, place.field(name))


def _config_files(value: Any, place: _Place) -> dict[str, Any]:
    files = _object(value, max_entries=MAX_CONFIG_FILES)
    return {name: _read(functools.partial(_config_file, name), file, place.field(name)) for name, file in files.items()}


def _config_file(name: str, value: Any, place: _Place) -> Any:
    if re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{MAX_NAME_CHARS - 1}}}", name) is None:
        raise _Broken(
            f"is no file name: at most {MAX_NAME_CHARS} letters, digits, `_`, `.` and `-`, a letter or digit first"
        )
    given = _CONFIG_FILE(value, place)
    place.require("content", given)
    return given


def _globs(value: Any, place: _Place) -> list[Any]:
    """Check patterns and what their braces stand for: better now than when the agent has done its work."""
    patterns: list[Any] = _list(_path)(value, place)
    expanded: list[str] = []
    for index, pattern in enumerate(patterns):
        if pattern is not None:
            expanded += _read(_expanded, pattern, place.item(index)) or ()
    try:
        globs.check_amount(expanded)
    except BadPattern as error:
        raise _Broken(error.message) from None
    return patterns


def _expanded(pattern: str, place: _Place) -> list[str]:
    try:
        return globs.expand(pattern)
    except BadPattern as error:
        raise _Broken(error.message) from None


def _upload_action(value: Any, place: _Place) -> dict[str, Any]:
    """Check the uploads, and keep one spelling of the patterns."""
    given: dict[str, Any] = _UPLOAD_ACTION(value, place)
    spaced = given.pop(_SPACED_PATTERNS, None)
    if spaced is not None and given.setdefault("globPatterns", spaced) != spaced:
        place.field(_SPACED_PATTERNS).say(f"{_SPACED_PATTERNS} and globPatterns differ: give one of the two")
    place.require("globPatterns", given)
    return given


# --- numbers, flags and strings ---


def _flag(value: Any, place: _Place) -> bool:
    if not isinstance(value, bool):
        raise _Broken(f"must be true or false, not {_kind(value)}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(low: int, high: int) -> _Check:
    """Check a whole number. `6.0` is one: JSON knows a single kind of number, and some serializers print it so."""

    def check(value: Any, place: _Place) -> int:
        if not (_is_number(value) and low <= value <= high and value == int(value)):
            raise _Broken(f"must be a whole number from {low} to {high}")
        return int(value)

    return check


def _minutes(high: float) -> _Check:
    def check(value: Any, place: _Place) -> float:
        if not (_is_number(value) and 0 < value <= high):
            raise _Broken(f"must be a number above 0 and at most {high:g}")
        return float(value)

    return check


def _string(value: Any, *, max_bytes: int) -> str:
    """Return a string that may become an argument, a variable or a file: NUL would end it half-way."""
    if not isinstance(value, str):
        raise _Broken(f"must be a string, not {_kind(value)}")
    if "\0" in value:
        raise _Broken("may not hold a NUL character")
    if (size := len(value.encode())) > max_bytes:
        raise _Broken(f"must have at most {max_bytes} bytes in UTF-8, not {size}")
    return value


def _text(max_bytes: int) -> _Check:
    return lambda value, place: _string(value, max_bytes=max_bytes)


def _matching(pattern: str, rule: str, *, max_bytes: int) -> _Check:
    compiled = re.compile(pattern)

    def check(value: Any, place: _Place) -> str:
        if compiled.fullmatch(_string(value, max_bytes=max_bytes)) is None:
            raise _Broken(rule)
        return str(value)

    return check


#: A leading dash would make an option of an argument.
_model: Final = _matching(
    r"(?!-)[\x21-\x7e]+", "must be printable ASCII without blanks and may not start with a dash", max_bytes=256
)
_tool: Final = _matching(
    r"(?!-)[^\x00-\x1f\x7f-\x9f]+", "may not hold control characters or start with a dash", max_bytes=4096
)


def _one_of(allowed: tuple[str, ...]) -> _Check:
    def check(value: Any, place: _Place) -> str:
        if value not in allowed:
            raise _Broken(f"must be one of {', '.join(allowed)}")
        return str(value)

    return check


def _credential(value: Any, place: _Place) -> str:
    """Check a key or token. It becomes part of an HTTP header, where a line break would begin another one."""
    stripped = _string(value, max_bytes=MAX_CREDENTIAL_BYTES).strip()
    if re.fullmatch(r"[\x21-\x7e]+", stripped) is None:
        raise _Broken("may hold printable ASCII characters only, and no blanks")
    return stripped


def _task_id(value: Any, place: _Place) -> str:
    text = _string(value, max_bytes=task.MAX_TASK_ID_CHARS)
    if task.TASK_ID_PATTERN.fullmatch(text) is None:
        raise _Broken("must be URL-safe (alphanumeric, underscore, hyphen only)")
    return text


def _path(value: Any, place: _Place) -> str:
    """Check a path or glob pattern inside the workspace; braces may not hide a climb either."""
    path = _string(value, max_bytes=MAX_PATH_BYTES)
    if path.startswith(("/", "-", "~")) or re.search(r"(^|[/{,])\.\.($|[/},])|[\x00-\x1f\x7f]", path):
        raise _Broken("must be a relative path inside the workspace, without `..`")
    return path


def _object_prefix(value: Any, place: _Place) -> str:
    prefix = _path(value, place)
    if "\\" in prefix:
        raise _Broken("may not hold a backslash: folders are told apart by slashes")
    return prefix


#: What git-check-ref-format(1) refuses in any place of a name, and what it refuses at the ends.
_NEVER_IN_A_BRANCH: Final = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(/|$)|^[-./]|[./]$|^(@|HEAD)$")


def _branch(value: Any, place: _Place) -> str:
    branch = _string(value, max_bytes=MAX_BRANCH_BYTES)
    if _NEVER_IN_A_BRANCH.search(branch):
        raise _Broken("is not a valid branch name")
    return branch


# --- URLs ---

#: urlsplit drops line breaks and tabs without a word, and readers of URLs disagree about backslashes.
_NEVER_IN_A_URL: Final = re.compile(r"[\s\x00-\x1f\x7f-\x9f\\]")
#: `git@host:path`; neither user nor host nor path may look like an option to ssh or git.
_SCP_LIKE: Final = re.compile(r"\w[\w.-]*@[a-z0-9][a-z0-9.-]*:(?![-:])\S+", re.ASCII | re.IGNORECASE)


def _callback_url(value: Any, place: _Place) -> str:
    if not isinstance(value, str) or len(value) > MAX_URL_CHARS or not is_http_url(value):
        raise _Broken("is not a valid URL")
    return value


def is_http_url(url: str) -> bool:
    """Tell whether this is an `http` or `https` URL with a host that can be looked up, in Unicode or ASCII."""
    if _NEVER_IN_A_URL.search(url):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and parts.port != 0 and _is_host(parts.hostname or "")
    except ValueError:
        return False


def _is_host(host: str) -> bool:
    try:
        if ":" in host:
            return ipaddress.IPv6Address(host).scope_id is None
        in_ascii = host.encode("idna")
        in_ascii.decode("idna")
    except ValueError:
        return False
    return re.fullmatch(rb"[A-Za-z0-9_][A-Za-z0-9._-]*", in_ascii) is not None


def _git_repo(value: Any, place: _Place, *, local: bool) -> str:
    """Check the URL of a repository. Its rules never repeat it: it may hold a token."""
    url = _string(value, max_bytes=MAX_URL_CHARS)
    other = _Broken("must be an https or SSH URL or git@host:path" + (", or an http or file URL" if local else ""))
    if _SCP_LIKE.fullmatch(url) and "://" not in url:
        return url
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise other from None
    if _NEVER_IN_A_URL.search(url) or not re.match(r"/[^-]", parts.path):
        raise other
    # Git decodes %2d in a user or host of SSH to a dash again: plain names only.
    host_is_plain = port != 0 and _is_host(host)
    match parts.scheme:
        case "https" | "http" if "@" in parts.netloc:
            raise _Broken("may not hold a user name, password or token: put the token into gitToken")
        case "ssh" if parts.password is not None:
            raise _Broken("may not hold a password: put the key into sshKey")
        case "ssh" if re.fullmatch(r"(\w[\w.-]*)?", parts.username or "", re.ASCII) and host_is_plain:
            return url
        case "https" if host_is_plain:
            return url
        case "http" if local and host_is_plain:
            return url
        case "file" if local and not parts.netloc:
            return url
        case _:
            raise other


# --- the objects inside the request ---

_CONFIG_FILE: Final = _fields({"frontmatter": _printed(MAX_CONFIG_FILE_BYTES), "content": _text(MAX_CONFIG_FILE_BYTES)})
_GIT_ACTION: Final = _fields(
    {
        "commit": _flag,
        "commitMessage": _text(MAX_COMMIT_MESSAGE_BYTES),
        "push": _flag,
        "branch": _branch,
        "files": _globs,
        "conflictStrategy": _one_of(("auto", "fail")),
    }
)
#: One of the documents that callers have spells the field so.
_SPACED_PATTERNS: Final = "glob Patterns"
_UPLOAD_ACTION: Final = _fields({"globPatterns": _globs, _SPACED_PATTERNS: _globs, "gcsPrefix": _object_prefix})


# --- facts to JSON and back ------------------------------------------------------------------------------------------

#: Names that are not the attribute in camelCase.
_WIRE_NAMES: Final = {"anthropic_oauth_token": "anthropicOAuthToken"}
#: Fields of a stored record that no caller sees; the webhook's `rounds` is another.
_INTERNAL: Final = frozenset({"sealedCallbackUrl", "idempotencyDigest", "swap"})
#: Fields of a record that are left out where there is nothing to tell; all others are there with null.
_OPTIONAL: Final = ("uploadedFiles", "gitCommit")
#: The fields of a callback that are always there, in the order in which they are told.
_CALLBACK: Final = ("taskId", "status", "exitCode", "logsPath", "summary", "error", "metadata")


def spec_to_bytes(spec: TaskSpec) -> bytes:
    """Return the task as it is sealed: every default spelled out, every secret plain."""
    return ijson.dumps(_converter().unstructure(spec))


def spec_from_bytes(content: bytes) -> TaskSpec:
    """Return the task that was sealed. Fields that a newer version added are ignored.

    Raises:
        SealError: These bytes are no task.
    """
    try:
        return _converter().structure(_load(content), TaskSpec)
    except _UNREADABLE as error:
        # The cause would show the plain text of the task.
        raise SealError(
            f"The sealed payload holds no task that this version can read ({type(error).__name__})."
        ) from None


def record_to_bytes(record: TaskRecord) -> bytes:
    """Return the record as it is stored. Times keep their milliseconds."""
    return ijson.dumps(_converter().unstructure(record))


def record_from_bytes(content: bytes) -> TaskRecord:
    """Return the record that was stored. Fields that a newer version added are ignored.

    Raises:
        StorageError: These bytes are no record.
    """
    try:
        return _converter().structure(_load(content), TaskRecord)
    except _UNREADABLE as error:
        raise StorageError("A stored task record cannot be read.") from error


def record_to_public(record: TaskRecord) -> dict[str, Any]:
    """Return the record as callers see it, as JSON values.

    Its shape is stable: what is not known is null; `uploadedFiles` and `gitCommit` alone are absent when there are none.
    """
    public = _converter().unstructure(record)
    if public["webhook"] is not None:
        del public["webhook"]["rounds"]
    return {
        name: value
        for name, value in public.items()
        if name not in _INTERNAL and not (name in _OPTIONAL and value is None)
    }


def callback_body(record: TaskRecord) -> bytes:
    """Return the body of the callback, which is also the data of the stream's `done`. The same record gives the same bytes."""
    public = record_to_public(record)
    body = {name: public[name] for name in _CALLBACK}
    body |= {name: public[name] for name in (*_OPTIONAL, "actionErrors") if public.get(name)}
    return ijson.dumps(body)


#: What structuring a value of another shape raises, and what reading bytes that are no JSON does.
_UNREADABLE: Final = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def _load(content: bytes) -> Any:
    """Return the JSON value that `ijson.dumps` printed.

    Not by `ijson.parse`: JavaScript spells 1e20 as a whole number, which that refuses, since a caller may mean its digits.
    """
    return json.loads(content, parse_int=_integer_or_double)


def _integer_or_double(digits: str) -> float:
    value = int(digits)
    return value if abs(value) <= ijson.MAX_INTEGER else float(value)


@functools.cache
def _converter() -> cattrs.Converter:
    """Return the one converter; made when it is first needed, since that takes some milliseconds of every start."""
    converter = cattrs.Converter(detailed_validation=False)
    for kind in (str, int, float, bool):
        converter.register_structure_hook(kind, _exactly)
    # Enumerations are strings too, and would fall under that.
    converter.register_structure_hook(enum.StrEnum, lambda value, kind: kind(value))
    converter.register_unstructure_hook(enum.StrEnum, lambda member: member.value)
    converter.register_structure_hook(Secret, lambda value, _: Secret(_exactly(value, str)))
    converter.register_unstructure_hook(Secret, Secret.reveal)
    converter.register_structure_hook(dt.datetime, lambda value, _: dt.datetime.fromisoformat(_exactly(value, str)))
    converter.register_unstructure_hook(dt.datetime, _time)
    converter.register_structure_hook(bytes, lambda value, _: base64.b64decode(_exactly(value, str), validate=True))
    converter.register_unstructure_hook(bytes, lambda value: base64.b64encode(value).decode())
    # JSON of any shape goes through as it is, however deeply it is nested.
    converter.register_structure_hook_func(
        lambda kind: kind == Mapping[str, Any], lambda value, _: _exactly(value, dict)
    )
    converter.register_unstructure_hook_func(lambda kind: kind == Mapping[str, Any], lambda value: value)
    converter.register_structure_hook_factory(
        attrs.has, lambda fact: make_dict_structure_fn(fact, converter, **_renamed(fact))
    )
    converter.register_unstructure_hook_factory(
        attrs.has, lambda fact: make_dict_unstructure_fn(fact, converter, **_renamed(fact))
    )
    return converter


def _exactly(value: Any, kind: type) -> Any:
    """Return a value of just this type, where cattrs would convert; a double may have been printed as a whole number."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{_kind(value)} stands where {kind.__name__} should")
    return value


def _time(moment: dt.datetime) -> str:
    return moment.astimezone(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _renamed(fact: type) -> dict[str, Any]:
    return {field.name: override(rename=_wire_name(field.name)) for field in attrs.fields(fact)}


def _wire_name(attribute: str) -> str:
    first, *others = attribute.split("_")
    return _WIRE_NAMES.get(attribute) or first + "".join(word.capitalize() for word in others)

"""Checks of single JSON values, from which the table of request fields is built.

cattrs cannot do this: it converts values that must be rejected, and its errors name Python attributes instead of JSON names. A
check returns the value for the codec, or raises `InvalidValue`.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs

from ccrun import globs, javascript_json, task
from ccrun.errors import FieldError
from ccrun.globs import BadPattern
from ccrun.urls import GitUrl, InvalidGitUrl, is_http_url, parse_git_url

# --- limits ----------------------------------------------------------------------------------------------------------

#: Errors of one body. A hostile body could have a million.
MAX_FIELD_ERRORS: Final = 100
#: Linux rejects an argument or environment entry of 128 KiB or more (MAX_ARG_STRLEN of execve(2)).
MAX_ARGUMENT_BYTES: Final = 128 * 1024 - 1
#: A common limit of browsers, proxies and receivers.
MAX_URL_CHARS: Final = 2048
#: API keys and tokens have a few hundred characters, JWTs some thousand.
MAX_CREDENTIAL_BYTES: Final = 8 * 1024
#: The longest name of a file or a directory on Linux is 255 bytes, the longest path 4096; a name leaves room for `.md`.
MAX_NAME_CHARS: Final = 64
MAX_PATH_BYTES: Final = 1024
MAX_BRANCH_BYTES: Final = 240
MAX_LIST_ITEMS: Final = 256


# --- results and locations -----------------------------------------------------------------------------------------------


class InvalidValue(Exception):
    """A value violates a rule. The message is a sentence without its subject, which is the path of the value."""


@attrs.frozen
class Location:
    """A location in the body, and the list for its errors."""

    path: str
    errors: list[FieldError]

    def add_error(self, message: str) -> None:
        """Add an error with this message."""
        if len(self.errors) < MAX_FIELD_ERRORS:
            self.errors.append(FieldError(self.path, message))

    def field(self, name: str) -> Location:
        """Return the location of a field of this object."""
        if re.fullmatch(r"\w{1,64}", name, re.ASCII) is None:
            return Location(f"{self.path}[{json.dumps(printable(name), ensure_ascii=False)}]", self.errors)
        return Location(f"{self.path}.{name}" if self.path else name, self.errors)

    def item(self, index: int) -> Location:
        """Return the location of an item of this array."""
        return Location(f"{self.path}[{index}]", self.errors)

    def require(self, name: str, given: Mapping[str, Any]) -> None:
        """Add an error if a field of this object is missing."""
        if name not in given:
            location = self.field(name)
            location.add_error(f"{location.path} is required")


#: Returns the value for the codec, or raises `InvalidValue`. The check of an object or array checks its members with `run_check`,
#: which adds their errors, so that all errors are reported.
Check = Callable[[Any, Location], Any]


def run_check(check: Check, value: Any, location: Location) -> Any:
    """Return the result of a check. Add an error at the location when the value is invalid, and return None."""
    try:
        return check(value, location)
    except InvalidValue as broken:
        location.add_error(f"{location.path or 'The body'} {broken}")


def is_absent(value: object) -> bool:
    """Return whether a field counts as not given: null or a blank string."""
    return value is None or (isinstance(value, str) and not value.strip())


def json_type(value: object) -> str:
    """Return the JSON type of a value, with its article."""
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


def printable(name: str) -> str:
    """Return a name from a request, shortened and without control characters, for an error message."""
    plain = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name[:MAX_NAME_CHARS])
    return plain + "…" * (len(name) > MAX_NAME_CHARS)


# --- objects and arrays ---


def json_object(value: Any, *, max_entries: int | None = None) -> dict[str, Any]:
    """Check that a value is an object."""
    if not isinstance(value, dict):
        raise InvalidValue(f"must be a JSON object, not {json_type(value)}")
    if max_entries is not None and len(value) > max_entries:
        raise InvalidValue(f"may have at most {max_entries} entries, not {len(value)}")
    return value


def fields(checks: Mapping[str, Check], *, required: Mapping[str, str] | None = None) -> Check:
    """Return a check of an object with known fields, in the order of `checks`.

    The error of an unknown field names the nearest known one.
    """

    def check(value: Any, location: Location) -> dict[str, Any]:
        fields = json_object(value)
        given = {}
        for name, check_field in checks.items():
            if not is_absent(fields.get(name)):
                given[name] = run_check(check_field, fields[name], location.field(name))
            elif required and name in required:
                location.field(name).add_error(required[name])
        unknown = (name for name in fields if name not in checks)
        for name in itertools.islice(unknown, MAX_FIELD_ERRORS):
            location.field(name).add_error(_unknown_field(name, checks))
        return given

    return check


def _unknown_field(name: str, known: Iterable[str]) -> str:
    by_lower_case = {field.lower(): field for field in known}
    near = difflib.get_close_matches(printable(name).lower(), by_lower_case, n=1)
    hint = f"; did you mean `{by_lower_case[near[0]]}`?" if near else ""
    return f"Unknown field `{printable(name)}`{hint}"


def string_list(check_item: Check, *, max_items: int = MAX_LIST_ITEMS, max_bytes: int | None = None) -> Check:
    """Return a check of an array of strings.

    Args:
        max_bytes: The maximum size of all strings, joined by commas, in UTF-8.
    """

    def check_one(value: Any, location: Location) -> Any:
        if isinstance(value, str) and not value.strip():
            raise InvalidValue("may not be blank")
        return check_item(value, location)

    def check(value: Any, location: Location) -> list[Any]:
        if not isinstance(value, list):
            raise InvalidValue(f"must be an array of strings, not {json_type(value)}")
        if len(value) > max_items:
            raise InvalidValue(f"may have at most {max_items} items, not {len(value)}")
        items = [run_check(check_one, item, location.item(index)) for index, item in enumerate(value)]
        if max_bytes is not None and sum(len(item.encode()) + 1 for item in items if item is not None) > max_bytes:
            raise InvalidValue(f"must have at most {max_bytes} bytes in all")
        return items

    return check


def json_size(max_bytes: int) -> Check:
    """Return a check of the size of any object as JSON, as it is printed in a callback."""

    def check(value: Any, location: Location) -> dict[str, Any]:
        fields = json_object(value)
        # The exact form takes seconds for megabytes. json.dumps is fast, and its result is at most four times as long
        # ("-0.0" for "0").
        rough = len(json.dumps(fields, ensure_ascii=False, separators=(",", ":")))
        if rough > 4 * max_bytes or len(javascript_json.dumps(fields)) > max_bytes:
            raise InvalidValue(f"must have at most {max_bytes} bytes as JSON")
        return fields

    return check


def glob_patterns(value: Any, location: Location) -> list[Any]:
    """Check glob patterns and the patterns that their braces expand to, before the agent has done its work."""
    patterns: list[Any] = string_list(relative_path)(value, location)
    expanded: list[str] = []
    for index, pattern in enumerate(patterns):
        if pattern is not None:
            expanded += run_check(_expand, pattern, location.item(index)) or ()
    try:
        globs.check_amount(expanded)
    except BadPattern as error:
        raise InvalidValue(error.message) from None
    return patterns


def _expand(pattern: str, location: Location) -> list[str]:
    try:
        return globs.expand(pattern)
    except BadPattern as error:
        raise InvalidValue(error.message) from None


# --- numbers, flags and strings ---


def boolean(value: Any, location: Location) -> bool:
    """Check a boolean."""
    if not isinstance(value, bool):
        raise InvalidValue(f"must be true or false, not {json_type(value)}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def integer(low: int, high: int) -> Check:
    """Return a check of a whole number. `6.0` is accepted: JSON has one type of number, and some serializers print it so."""

    def check(value: Any, location: Location) -> int:
        if not (_is_number(value) and low <= value <= high and value == int(value)):
            raise InvalidValue(f"must be a whole number from {low} to {high}")
        return int(value)

    return check


def positive_number(high: float) -> Check:
    """Return a check of a number above 0 and at most `high`."""

    def check(value: Any, location: Location) -> float:
        if not (_is_number(value) and 0 < value <= high):
            raise InvalidValue(f"must be a number above 0 and at most {high:g}")
        return float(value)

    return check


def string(value: Any, *, max_bytes: int) -> str:
    """Check a string that may become an argument, a variable or a file, where a NUL would end it."""
    if not isinstance(value, str):
        raise InvalidValue(f"must be a string, not {json_type(value)}")
    if "\0" in value:
        raise InvalidValue("may not hold a NUL character")
    if (size := len(value.encode())) > max_bytes:
        raise InvalidValue(f"must have at most {max_bytes} bytes in UTF-8, not {size}")
    return value


def text(max_bytes: int) -> Check:
    """Return a check of a string with at most this many bytes in UTF-8."""
    return lambda value, location: string(value, max_bytes=max_bytes)


def matching(pattern: str, rule: str, *, max_bytes: int) -> Check:
    """Return a check of a string against a regular expression; `rule` is the error message."""
    compiled = re.compile(pattern)

    def check(value: Any, location: Location) -> str:
        if compiled.fullmatch(string(value, max_bytes=max_bytes)) is None:
            raise InvalidValue(rule)
        return str(value)

    return check


#: A leading hyphen would turn an argument into an option.
model: Final = matching(
    r"(?!-)[\x21-\x7e]+", "must be printable ASCII without blanks and may not start with a dash", max_bytes=256
)
tool: Final = matching(
    r"(?!-)[^\x00-\x1f\x7f-\x9f]+", "may not hold control characters or start with a dash", max_bytes=4096
)


def one_of(allowed: tuple[str, ...]) -> Check:
    """Return a check of a string against a list of values."""

    def check(value: Any, location: Location) -> str:
        if value not in allowed:
            raise InvalidValue(f"must be one of {', '.join(allowed)}")
        return str(value)

    return check


def credential(value: Any, location: Location) -> str:
    """Check a key or token. It becomes part of an HTTP header, where a line break would start another header."""
    stripped = string(value, max_bytes=MAX_CREDENTIAL_BYTES).strip()
    if re.fullmatch(r"[\x21-\x7e]+", stripped) is None:
        raise InvalidValue("may hold printable ASCII characters only, and no blanks")
    return stripped


def task_id(value: Any, location: Location) -> str:
    """Check a task ID."""
    text = string(value, max_bytes=task.MAX_TASK_ID_CHARS)
    if task.TASK_ID_PATTERN.fullmatch(text) is None:
        raise InvalidValue("must be URL-safe (alphanumeric, underscore, hyphen only)")
    return text


def relative_path(value: Any, location: Location) -> str:
    """Check a path or glob pattern inside the workspace. No alternative in braces may have a `..` either."""
    path = string(value, max_bytes=MAX_PATH_BYTES)
    if path.startswith(("/", "-", "~")) or re.search(r"(^|[/{,])\.\.($|[/},])|[\x00-\x1f\x7f]", path):
        raise InvalidValue("must be a relative path inside the workspace, without `..`")
    return path


def object_prefix(value: Any, location: Location) -> str:
    """Check the prefix of object names."""
    prefix = relative_path(value, location)
    if "\\" in prefix:
        raise InvalidValue("may not hold a backslash: folders are told apart by slashes")
    return prefix


#: What git-check-ref-format(1) rejects anywhere in a name, and what it rejects at its ends.
INVALID_IN_BRANCH: Final = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(/|$)|^[-./]|[./]$|^(@|HEAD)$")


def branch(value: Any, location: Location) -> str:
    """Check the name of a branch."""
    branch = string(value, max_bytes=MAX_BRANCH_BYTES)
    if INVALID_IN_BRANCH.search(branch):
        raise InvalidValue("is not a valid branch name")
    return branch


# --- URLs and credentials of git ---


def callback_url(value: Any, location: Location) -> str:
    """Check the URL of a callback."""
    if not isinstance(value, str) or len(value) > MAX_URL_CHARS or not is_http_url(value):
        raise InvalidValue("is not a valid URL")
    return value


def git_repo(value: Any, location: Location, *, local: bool) -> GitUrl:
    """Check the URL of a repository. No error repeats it, since it may hold a token.

    Args:
        local: Whether http and file URLs are allowed.
    """
    allowed = "must be an https or SSH URL or git@host:path" + (", or an http or file URL" if local else "")
    try:
        url = parse_git_url(string(value, max_bytes=MAX_URL_CHARS))
    except InvalidGitUrl as error:
        message = str(error)
        raise InvalidValue(message if message.startswith("may not") else allowed) from None
    if not local and url.scheme in ("http", "file"):
        raise InvalidValue(allowed)
    return url

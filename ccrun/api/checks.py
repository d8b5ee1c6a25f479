"""Checks of single JSON values, from which the table of request fields is built.

cattrs cannot do this part: it converts where a request must be refused, and it names Python attributes where a caller needs JSON
names. A check returns the value as the codec takes it, or raises `InvalidValue`.
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

#: Who sends a body this wrong reads no further; naming a million unknown fields would cost minutes.
MAX_FIELD_ERRORS: Final = 100
#: Linux takes no single argument or environment entry of 128 KiB or more (MAX_ARG_STRLEN of execve(2)).
MAX_ARGUMENT_BYTES: Final = 128 * 1024 - 1
#: Browsers, proxies and receivers commonly stop at this length.
MAX_URL_CHARS: Final = 2048
#: API keys and tokens are a few hundred characters long; JWTs may reach some thousand.
MAX_CREDENTIAL_BYTES: Final = 8 * 1024
#: The longest name of a file or a directory on Linux is 255 bytes, the longest path 4096; a name leaves room for `.md`.
MAX_NAME_CHARS: Final = 64
MAX_PATH_BYTES: Final = 1024
MAX_BRANCH_BYTES: Final = 240
MAX_LIST_ITEMS: Final = 256


# --- the request -----------------------------------------------------------------------------------------------------
#
# cattrs cannot do this part: it converts where it should refuse, and it names attributes where a caller needs the names of
# the wire. So a table of checks reads the body; what they return is plain JSON under the names of the wire, of which the
# converter that also opens sealed tasks makes facts.


class InvalidValue(Exception):
    """A rule that a value breaks: a sentence without its subject, which is the path of the value."""


@attrs.frozen
class Location:
    """A place in the body, and where its faults go."""

    path: str
    errors: list[FieldError]

    def say(self, message: str) -> None:
        """Note a fault in these very words."""
        if len(self.errors) < MAX_FIELD_ERRORS:
            self.errors.append(FieldError(self.path, message))

    def field(self, name: str) -> Location:
        """Return the place of a field of the object here."""
        if re.fullmatch(r"\w{1,64}", name, re.ASCII) is None:
            return Location(f"{self.path}[{json.dumps(printable(name), ensure_ascii=False)}]", self.errors)
        return Location(f"{self.path}.{name}" if self.path else name, self.errors)

    def item(self, index: int) -> Location:
        """Return the place of an item of the array here."""
        return Location(f"{self.path}[{index}]", self.errors)

    def require(self, name: str, given: Mapping[str, Any]) -> None:
        """Note that a field of the object here is missing, if it is."""
        if name not in given:
            place = self.field(name)
            place.say(f"{place.path} is required")


#: Returns the value as the converter takes it, or raises `InvalidValue`. A check of an object or array reads what is inside by
#: `run_check`, which notes the faults there, so that one does not hide the others.
Check = Callable[[Any, Location], Any]


def run_check(check: Check, value: Any, place: Location) -> Any:
    """Return what `check` makes of a value; note at its place the rule that it breaks."""
    try:
        return check(value, place)
    except InvalidValue as broken:
        place.say(f"{place.path or 'The body'} {broken}")


def is_absent(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def json_type(value: object) -> str:
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
    """Return a caller's own word, fit for one line of a message."""
    plain = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name[:MAX_NAME_CHARS])
    return plain + "…" * (len(name) > MAX_NAME_CHARS)


# --- objects and arrays ---


def json_object(value: Any, *, max_entries: int | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidValue(f"must be a JSON object, not {json_type(value)}")
    if max_entries is not None and len(value) > max_entries:
        raise InvalidValue(f"may have at most {max_entries} entries, not {len(value)}")
    return value


def fields(checks: Mapping[str, Check], *, required: Mapping[str, str] | None = None) -> Check:
    """Check an object of known fields, in the order of `checks`; then name each unknown one with the nearest known."""

    def check(value: Any, place: Location) -> dict[str, Any]:
        fields = json_object(value)
        given = {}
        for name, check_field in checks.items():
            if not is_absent(fields.get(name)):
                given[name] = run_check(check_field, fields[name], place.field(name))
            elif required and name in required:
                place.field(name).say(required[name])
        unknown = (name for name in fields if name not in checks)
        for name in itertools.islice(unknown, MAX_FIELD_ERRORS):
            place.field(name).say(_unknown_field(name, checks))
        return given

    return check


def _unknown_field(name: str, known: Iterable[str]) -> str:
    by_lower_case = {field.lower(): field for field in known}
    near = difflib.get_close_matches(printable(name).lower(), by_lower_case, n=1)
    hint = f"; did you mean `{by_lower_case[near[0]]}`?" if near else ""
    return f"Unknown field `{printable(name)}`{hint}"


def string_list(check_item: Check, *, max_items: int = MAX_LIST_ITEMS, max_bytes: int | None = None) -> Check:
    """Check an array of strings; within `max_bytes` it fits one argument, joined by commas."""

    def check_one(value: Any, place: Location) -> Any:
        if isinstance(value, str) and not value.strip():
            raise InvalidValue("may not be blank")
        return check_item(value, place)

    def check(value: Any, place: Location) -> list[Any]:
        if not isinstance(value, list):
            raise InvalidValue(f"must be an array of strings, not {json_type(value)}")
        if len(value) > max_items:
            raise InvalidValue(f"may have at most {max_items} items, not {len(value)}")
        items = [run_check(check_one, item, place.item(index)) for index, item in enumerate(value)]
        if max_bytes is not None and sum(len(item.encode()) + 1 for item in items if item is not None) > max_bytes:
            raise InvalidValue(f"must have at most {max_bytes} bytes in all")
        return items

    return check


def json_size(max_bytes: int) -> Check:
    """Check an object of any shape by the bytes that it has as JSON."""

    def check(value: Any, place: Location) -> dict[str, Any]:
        fields = json_object(value)
        # The exact form takes seconds for megabytes. Python's is at most four times as long ("-0.0" for "0") and quick.
        rough = len(json.dumps(fields, ensure_ascii=False, separators=(",", ":")))
        if rough > 4 * max_bytes or len(javascript_json.dumps(fields)) > max_bytes:
            raise InvalidValue(f"must have at most {max_bytes} bytes as JSON")
        return fields

    return check


def glob_patterns(value: Any, place: Location) -> list[Any]:
    """Check patterns and what their braces stand for: better now than when the agent has done its work."""
    patterns: list[Any] = string_list(relative_path)(value, place)
    expanded: list[str] = []
    for index, pattern in enumerate(patterns):
        if pattern is not None:
            expanded += run_check(_expand, pattern, place.item(index)) or ()
    try:
        globs.check_amount(expanded)
    except BadPattern as error:
        raise InvalidValue(error.message) from None
    return patterns


def _expand(pattern: str, place: Location) -> list[str]:
    try:
        return globs.expand(pattern)
    except BadPattern as error:
        raise InvalidValue(error.message) from None


# --- numbers, flags and strings ---


def boolean(value: Any, place: Location) -> bool:
    if not isinstance(value, bool):
        raise InvalidValue(f"must be true or false, not {json_type(value)}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def integer(low: int, high: int) -> Check:
    """Check a whole number. `6.0` is one: JSON knows a single kind of number, and some serializers print it so."""

    def check(value: Any, place: Location) -> int:
        if not (_is_number(value) and low <= value <= high and value == int(value)):
            raise InvalidValue(f"must be a whole number from {low} to {high}")
        return int(value)

    return check


def positive_number(high: float) -> Check:
    def check(value: Any, place: Location) -> float:
        if not (_is_number(value) and 0 < value <= high):
            raise InvalidValue(f"must be a number above 0 and at most {high:g}")
        return float(value)

    return check


def string(value: Any, *, max_bytes: int) -> str:
    """Return a string that may become an argument, a variable or a file: NUL would end it half-way."""
    if not isinstance(value, str):
        raise InvalidValue(f"must be a string, not {json_type(value)}")
    if "\0" in value:
        raise InvalidValue("may not hold a NUL character")
    if (size := len(value.encode())) > max_bytes:
        raise InvalidValue(f"must have at most {max_bytes} bytes in UTF-8, not {size}")
    return value


def text(max_bytes: int) -> Check:
    return lambda value, place: string(value, max_bytes=max_bytes)


def matching(pattern: str, rule: str, *, max_bytes: int) -> Check:
    compiled = re.compile(pattern)

    def check(value: Any, place: Location) -> str:
        if compiled.fullmatch(string(value, max_bytes=max_bytes)) is None:
            raise InvalidValue(rule)
        return str(value)

    return check


#: A leading dash would make an option of an argument.
model: Final = matching(
    r"(?!-)[\x21-\x7e]+", "must be printable ASCII without blanks and may not start with a dash", max_bytes=256
)
tool: Final = matching(
    r"(?!-)[^\x00-\x1f\x7f-\x9f]+", "may not hold control characters or start with a dash", max_bytes=4096
)


def one_of(allowed: tuple[str, ...]) -> Check:
    def check(value: Any, place: Location) -> str:
        if value not in allowed:
            raise InvalidValue(f"must be one of {', '.join(allowed)}")
        return str(value)

    return check


def credential(value: Any, place: Location) -> str:
    """Check a key or token. It becomes part of an HTTP header, where a line break would begin another one."""
    stripped = string(value, max_bytes=MAX_CREDENTIAL_BYTES).strip()
    if re.fullmatch(r"[\x21-\x7e]+", stripped) is None:
        raise InvalidValue("may hold printable ASCII characters only, and no blanks")
    return stripped


def task_id(value: Any, place: Location) -> str:
    text = string(value, max_bytes=task.MAX_TASK_ID_CHARS)
    if task.TASK_ID_PATTERN.fullmatch(text) is None:
        raise InvalidValue("must be URL-safe (alphanumeric, underscore, hyphen only)")
    return text


def relative_path(value: Any, place: Location) -> str:
    """Check a path or glob pattern inside the workspace; braces may not hide a climb either."""
    path = string(value, max_bytes=MAX_PATH_BYTES)
    if path.startswith(("/", "-", "~")) or re.search(r"(^|[/{,])\.\.($|[/},])|[\x00-\x1f\x7f]", path):
        raise InvalidValue("must be a relative path inside the workspace, without `..`")
    return path


def object_prefix(value: Any, place: Location) -> str:
    prefix = relative_path(value, place)
    if "\\" in prefix:
        raise InvalidValue("may not hold a backslash: folders are told apart by slashes")
    return prefix


#: What git-check-ref-format(1) refuses in any place of a name, and what it refuses at the ends.
INVALID_IN_BRANCH: Final = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(/|$)|^[-./]|[./]$|^(@|HEAD)$")


def branch(value: Any, place: Location) -> str:
    branch = string(value, max_bytes=MAX_BRANCH_BYTES)
    if INVALID_IN_BRANCH.search(branch):
        raise InvalidValue("is not a valid branch name")
    return branch


# --- URLs and credentials of git ---


def callback_url(value: Any, place: Location) -> str:
    """Check the URL of a callback."""
    if not isinstance(value, str) or len(value) > MAX_URL_CHARS or not is_http_url(value):
        raise InvalidValue("is not a valid URL")
    return value


def git_repo(value: Any, place: Location, *, local: bool) -> GitUrl:
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

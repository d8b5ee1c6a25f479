"""Checks of single JSON values, from which `ccrun.api.request` builds the check of a request.

cattrs cannot do this: it converts values where a request must be rejected, and its errors name Python attributes where a client
needs JSON names.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs

from ccrun import codec, globs, javascript_json
from ccrun.errors import FieldError
from ccrun.globs import BadPattern
from ccrun.redaction import MASK
from ccrun.spec import MAX_METADATA_BYTES
from ccrun.task import MAX_TASK_ID_CHARS, TASK_ID_PATTERN
from ccrun.urls import is_http_url

# --- limits ----------------------------------------------------------------------------------------------------------

#: Errors in one response. Finding similar names for a million unknown fields would take minutes.
MAX_FIELD_ERRORS: Final = 100
#: The least ratio of `difflib` for a suggestion. Below it are names of other things: `tags` is no `taskId`.
MIN_SIMILARITY: Final = 0.7
#: A common limit of browsers, proxies and servers.
MAX_URL_CHARS: Final = 2048
#: API keys and tokens have a few hundred characters, JWTs up to a few thousand.
MAX_CREDENTIAL_BYTES: Final = 8 * 1024
#: Linux limits a file name to 255 bytes and a path to 4096. A file name also needs bytes for `.md`.
MAX_NAME_CHARS: Final = 64
MAX_PATH_BYTES: Final = 1024
MAX_LIST_ITEMS: Final = 256

#: What keys and tokens look like, which are long and have digits, and names of fields do not.
_LIKE_TOKEN: Final = re.compile(r"(?=.*[a-z])(?=.*[0-9])[!-~]{16,}", re.DOTALL)

# --- errors and their locations --------------------------------------------------------------------------------------


class InvalidValue(Exception):
    """A value breaks a rule. The message is a sentence whose subject, the path of the value, is missing."""


@attrs.frozen
class Location:
    """The path of a value in the body, and the list that collects all errors of the body."""

    path: str
    errors: list[FieldError]

    def add_error(self, message: str) -> None:
        """Add an error here, unless there are `MAX_FIELD_ERRORS` already."""
        if len(self.errors) < MAX_FIELD_ERRORS:
            self.errors.append(FieldError(self.path, message))

    def field(self, name: str) -> Location:
        """Return the location of a field of the object here."""
        if re.fullmatch(r"\w{1,64}", name, re.ASCII) is None or printable(name) != name:
            return Location(f"{self.path}[{json.dumps(printable(name), ensure_ascii=False)}]", self.errors)
        return Location(f"{self.path}.{name}" if self.path else name, self.errors)

    def item(self, index: int) -> Location:
        """Return the location of an item of the array here."""
        return Location(f"{self.path}[{index}]", self.errors)

    def require(self, name: str, values: Mapping[str, Any]) -> None:
        """Add an error if a required field of the object here is missing."""
        if name not in values:
            missing = self.field(name)
            missing.add_error(f"{missing.path} is required")


#: Returns the value as the codec accepts it, or raises `InvalidValue`. The check of an object or array passes what is inside to
#: `run_check`, so that all errors are found.
Check = Callable[[Any, Location], Any]


def run_check(check: Check, value: Any, location: Location) -> Any:
    """Return the result of a check. If the value is invalid, add the error to the location and return None."""
    try:
        return check(value, location)
    except InvalidValue as error:
        location.add_error(f"{location.path or 'The body'} {error}")


def is_absent(value: object) -> bool:
    """Return whether a value counts as not given: null or a blank string."""
    return value is None or (isinstance(value, str) and not value.strip())


def json_type(value: object) -> str:
    """Return the JSON type of a value, with its article, for a message."""
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
    """Return a name from the body, made safe and short for a message of one line. One that looks like a token is masked."""
    if _LIKE_TOKEN.fullmatch(name):
        return MASK
    plain = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name[:MAX_NAME_CHARS])
    return plain + "…" * (len(name) > MAX_NAME_CHARS)


# --- objects and arrays ----------------------------------------------------------------------------------------------


def as_object(value: Any, *, max_entries: int | None = None) -> dict[str, Any]:
    """Return the value if it is an object.

    Raises:
        InvalidValue: It is not an object, or has too many entries.
    """
    if not isinstance(value, dict):
        raise InvalidValue(f"must be a JSON object, not {json_type(value)}")
    if max_entries is not None and len(value) > max_entries:
        raise InvalidValue(f"may have at most {max_entries} entries, not {len(value)}")
    return value


def object_of(checks: Mapping[str, Check], *, required: Mapping[str, str] | None = None) -> Check:
    """Return a check of an object with known fields. Its result has only the fields that are given.

    Errors are in the order of `checks`; those of unknown fields come last and name the most similar known field.

    Args:
        checks: The check of each known field.
        required: The error message for each required field that is absent.
    """

    def check(value: Any, location: Location) -> dict[str, Any]:
        values = as_object(value)
        given = {}
        for name, check_field in checks.items():
            if not is_absent(values.get(name)):
                given[name] = run_check(check_field, values[name], location.field(name))
            elif required and name in required:
                location.field(name).add_error(required[name])
        unknown = (name for name in values if name not in checks)
        for name in itertools.islice(unknown, MAX_FIELD_ERRORS):
            location.field(name).add_error(unknown_name("field", name, checks))
        return given

    return check


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the error for an unknown name, with the known one that it may be a misspelling of.

    Args:
        kind: What it names.
    """
    by_lower_case = {field.lower(): field for field in known}
    similar = difflib.get_close_matches(printable(name).lower(), by_lower_case, n=1, cutoff=MIN_SIMILARITY)
    hint = f"; did you mean `{by_lower_case[similar[0]]}`?" if similar else ""
    return f"Unknown {kind} `{printable(name)}`{hint}"


def string_list(check_item: Check, *, max_items: int = MAX_LIST_ITEMS, max_bytes: int | None = None) -> Check:
    """Return a check of an array of strings.

    Args:
        check_item: The check of each item. Blank items are rejected before.
        max_bytes: The limit of the items joined by commas, for an array that becomes one argument.
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
            raise InvalidValue(f"must have at most {max_bytes} bytes in total")
        return items

    return check


def any_object(max_bytes: int) -> Check:
    """Return a check of an object with any content.

    Args:
        max_bytes: The limit of the object as `codec.to_json` prints it.
    """

    def check(value: Any, location: Location) -> dict[str, Any]:
        values = as_object(value)
        if len(codec.to_json(values)) > max_bytes:
            raise InvalidValue(f"must have at most {max_bytes} bytes as JSON")
        return values

    return check


def metadata(value: Any, location: Location) -> dict[str, Any]:
    """Check an object with any content by its bytes in the callback, which are what a receiver limits."""
    values = as_object(value)
    # `javascript_json` takes seconds for megabytes. `to_json` is fast and at most four times as long ("-0.0" for "0").
    is_far_too_large = len(codec.to_json(values)) > 4 * MAX_METADATA_BYTES
    if is_far_too_large or len(javascript_json.dumps(values)) > MAX_METADATA_BYTES:
        raise InvalidValue(f"must have at most {MAX_METADATA_BYTES} bytes as JSON")
    return values


def glob_patterns(value: Any, location: Location) -> list[Any]:
    """Check glob patterns and their brace expansions, so that an invalid pattern fails before the agent runs."""
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


# --- booleans, numbers and strings -----------------------------------------------------------------------------------


def boolean(value: Any, location: Location) -> bool:
    """Check a boolean."""
    if not isinstance(value, bool):
        raise InvalidValue(f"must be true or false, not {json_type(value)}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def integer(minimum: int, maximum: int) -> Check:
    """Return a check of a whole number. `6.0` is one: JSON has one kind of number, and some serializers print it so."""

    def check(value: Any, location: Location) -> int:
        if not (_is_number(value) and minimum <= value <= maximum and value == int(value)):
            raise InvalidValue(f"must be a whole number from {minimum} to {maximum}")
        return int(value)

    return check


def positive_number(maximum: float) -> Check:
    """Return a check of a number above 0."""

    def check(value: Any, location: Location) -> float:
        if not (_is_number(value) and 0 < value <= maximum):
            raise InvalidValue(f"must be a number above 0 and at most {maximum:g}")
        return float(value)

    return check


def as_string(value: Any, *, max_bytes: int) -> str:
    """Return the value if it is a string that can become an argument, an environment variable or a file.

    Raises:
        InvalidValue: It is not a string, is too long in UTF-8, or contains a NUL, which would truncate it.
    """
    if not isinstance(value, str):
        raise InvalidValue(f"must be a string, not {json_type(value)}")
    if "\0" in value:
        raise InvalidValue("may not contain a NUL character")
    if (size := len(value.encode())) > max_bytes:
        raise InvalidValue(f"must have at most {max_bytes} bytes in UTF-8, not {size}")
    return value


def text(max_bytes: int) -> Check:
    """Return a check of a string with any content but NUL."""
    return lambda value, location: as_string(value, max_bytes=max_bytes)


def _matching(pattern: str, rule: str, *, max_bytes: int) -> Check:
    compiled = re.compile(pattern)

    def check(value: Any, location: Location) -> str:
        if compiled.fullmatch(as_string(value, max_bytes=max_bytes)) is None:
            raise InvalidValue(rule)
        return str(value)

    return check


#: Checks of arguments of the CLI. One that starts with a hyphen would be read as an option.
model: Final = _matching(
    r"(?!-)[\x21-\x7e]+", "must be printable ASCII without spaces and may not start with a hyphen", max_bytes=256
)
tool: Final = _matching(
    r"(?!-)[^\x00-\x1f\x7f-\x9f]+", "may not contain control characters or start with a hyphen", max_bytes=4096
)
host: Final = _matching(
    r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*",
    "must be a host name or an address, or `*.` and a name for all hosts below it, without scheme, port or path",
    max_bytes=255,
)


def one_of(allowed: tuple[str, ...]) -> Check:
    """Return a check of an enumeration."""

    def check(value: Any, location: Location) -> str:
        if value not in allowed:
            raise InvalidValue(f"must be one of {', '.join(allowed)}")
        return str(value)

    return check


def credential(value: Any, location: Location) -> str:
    """Check a key or token, and strip it. It becomes part of an HTTP header, which a line break would split."""
    stripped = as_string(value, max_bytes=MAX_CREDENTIAL_BYTES).strip()
    if re.fullmatch(r"[\x21-\x7e]+", stripped) is None:
        raise InvalidValue("may contain only printable ASCII characters and no spaces")
    return stripped


def task_id(value: Any, location: Location) -> str:
    """Check a task ID."""
    given = as_string(value, max_bytes=MAX_TASK_ID_CHARS)
    if TASK_ID_PATTERN.fullmatch(given) is None:
        raise InvalidValue("must be URL-safe (alphanumeric, underscore, hyphen only)")
    return given


def relative_path(value: Any, location: Location) -> str:
    """Check a path or glob pattern inside the workspace. `..` is rejected inside braces too."""
    path = as_string(value, max_bytes=MAX_PATH_BYTES)
    if path.startswith(("/", "-", "~")) or re.search(r"(^|[/{,])\.\.($|[/},])|[\x00-\x1f\x7f]", path):
        raise InvalidValue("must be a relative path inside the workspace, without `..`")
    return path


def object_prefix(value: Any, location: Location) -> str:
    """Check a prefix of object names."""
    prefix = relative_path(value, location)
    if "\\" in prefix:
        raise InvalidValue("may not contain a backslash: separate directories by slashes")
    return prefix


def base_url(value: Any, location: Location, *, allowed: tuple[str, ...]) -> str:
    """Check the base URL of the model API, and return it without a slash at its end."""
    url = as_string(value, max_bytes=MAX_URL_CHARS).rstrip("/")
    if not allowed:
        raise InvalidValue("is not allowed: the service has no ALLOWED_BASE_URLS")
    if url not in allowed:
        raise InvalidValue(f"must be one of the URLs that the service allows: {', '.join(allowed)}")
    return url


def callback_url(value: Any, location: Location) -> str:
    """Check the URL of a callback."""
    if not isinstance(value, str) or len(value) > MAX_URL_CHARS or not is_http_url(value):
        raise InvalidValue("is not a valid URL")
    return value

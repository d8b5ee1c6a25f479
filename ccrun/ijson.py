"""A strict parser of I-JSON (RFC 7493), so that every receiver reads the same value.

Pure. Knows nothing of the fields of a request.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import attrs

from ccrun.errors import CcrunError, FieldError

#: Levels of nested objects and arrays. Python's json fails shortly before 1000 minus the frames of its caller (some 60 under
#: Flask), and Node's JSON.stringify at a few thousand.
MAX_DEPTH: Final = 256
#: The largest integer up to which a double represents every integer (RFC 7493, section 2.2).
MAX_INTEGER: Final = 2**53 - 1
#: Errors in one response. A hostile text of some megabytes could have a million.
MAX_JSON_ERRORS: Final = 100
#: Characters of a path in an error. In a hostile text, a path could be as long as the text.
MAX_PATH_CHARS: Final = 256

_MAX_INTEGER_DIGITS: Final = len(str(MAX_INTEGER))
#: A key that needs no quotes in a path. All others are quoted, so that a path is unambiguous.
_PLAIN_KEY: Final = re.compile(r"[\w$@/-]([\w$@/ -]*[\w$@/-])?")

#: Names and indices that lead from the whole text, which is the empty first step, to a value.
_Path = list[str | int]


class NotIJson(CcrunError):
    """The text is not I-JSON.

    Args:
        errors: From one to `MAX_JSON_ERRORS` errors. The path of the whole text is empty.
    """

    def __init__(self, errors: list[FieldError]) -> None:
        self.errors = errors
        super().__init__(errors[0].message)


@attrs.frozen
class _InvalidNumber:
    """Replaces, in a parsed value, a number that I-JSON does not allow."""

    rule: str


@attrs.frozen
class _DuplicateKeys:
    """Replaces, in a parsed value, an object with two members of one name."""

    members: list[tuple[str, Any]]


def parse(text: bytes) -> Any:
    """Return the value of an I-JSON text.

    Time and memory are linear in the size of the text: some seconds for 10 MiB of hostile input.

    Raises:
        NotIJson: The text is not I-JSON. If it is JSON, the exception holds all errors, else only the first.
    """
    try:
        # A parser may ignore a byte order mark (RFC 8259, section 8.1); tools on Windows write one.
        source = text.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise NotIJson([FieldError("", "The text is not valid UTF-8.")]) from None
    if not source.strip(" \t\r\n"):
        raise NotIJson([FieldError("", "The text is empty.")])
    try:
        value = _DECODER.decode(source)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise NotIJson([FieldError("", f"The text is not valid JSON: see {place}.")]) from None
    except RecursionError:
        raise NotIJson([FieldError("", f"The text {_TOO_DEEP}.")]) from None
    if errors := list(itertools.islice(_find_errors(value), MAX_JSON_ERRORS)):
        raise NotIJson(errors)
    return value


# --- reading ---------------------------------------------------------------------------------------------------------

_TOO_DEEP: Final = f"is nested more than {MAX_DEPTH} levels deep"


def _object(members: list[tuple[str, Any]]) -> dict[str, Any] | _DuplicateKeys:
    value = dict(members)
    return value if len(value) == len(members) else _DuplicateKeys(members)


def _integer(literal: str) -> int | _InvalidNumber:
    # The digits are counted first: int() is slow for long literals, and raises ValueError above 4300 digits.
    if len(literal) <= _MAX_INTEGER_DIGITS + 1 and abs(value := int(literal)) <= MAX_INTEGER:
        return value
    return _InvalidNumber("is an integer beyond ±(2^53 - 1), which JavaScript cannot hold; send it as a string")


def _float(literal: str) -> float | _InvalidNumber:
    value = float(literal)
    return (
        value
        if math.isfinite(value)
        else _InvalidNumber("is a number beyond the range of a double; send it as a string")
    )


def _constant(literal: str) -> _InvalidNumber:
    return _InvalidNumber(f"is {literal}, which JSON does not have")


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
)


def _find_errors(root: Any) -> Iterator[FieldError]:
    """Yield the violations of I-JSON in a parsed value; those of an object's names come before those of its values."""
    path: _Path = [""]
    levels: list[Iterator[tuple[str | int, Any]]] = [iter([("", root)])]
    while levels:
        for path[-1], value in levels[-1]:
            match value:
                case str() if _has_lone_surrogate(value):
                    yield _field_error(path, "has a lone surrogate, which is no character")
                case _InvalidNumber():
                    yield _field_error(path, value.rule)
                case dict() | list() | _DuplicateKeys() if len(levels) > MAX_DEPTH:
                    yield _field_error(path, _TOO_DEEP)
                case dict() | list() | _DuplicateKeys():
                    if not isinstance(value, list):
                        yield from (_field_error([*path, name], rule) for name, rule in _invalid_names(value))
                    levels.append(_children(value))
                    path.append("")
                    break
        else:
            levels.pop()
            path.pop()


def _children(value: dict[str, Any] | list[Any] | _DuplicateKeys) -> Iterator[tuple[str | int, Any]]:
    match value:
        case dict():
            return iter(value.items())
        case list():
            return enumerate(value)
        case _DuplicateKeys():
            return iter(value.members)


def _invalid_names(value: dict[str, Any] | _DuplicateKeys) -> Iterator[tuple[str, str]]:
    names = Counter(name for name, _ in value.members) if isinstance(value, _DuplicateKeys) else dict.fromkeys(value, 1)
    for name, times in names.items():
        if times > 1:
            yield name, "is given more than once"
        if _has_lone_surrogate(name):
            yield name, "has a lone surrogate in its name"


def _has_lone_surrogate(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _field_error(path: _Path, rule: str) -> FieldError:
    spelled = ""
    for step in path[1:]:
        if isinstance(step, int):
            spelled += f"[{step}]"
        elif _PLAIN_KEY.fullmatch(name := step[:MAX_PATH_CHARS]):
            spelled += f".{name}" if spelled else name
        else:
            spelled += f"[{json.dumps(name)}]"
        if len(spelled) > MAX_PATH_CHARS:
            spelled = f"{spelled[:MAX_PATH_CHARS]}…"
            break
    return FieldError(spelled, f"{spelled or 'The text'} {rule}")

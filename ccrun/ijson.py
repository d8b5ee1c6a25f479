"""I-JSON (RFC 7493): read strictly, printed as JavaScript prints it.

What `parse` accepts means the same to every receiver, and `dumps` gives the bytes that `JSON.stringify(JSON.parse(text))`
gives, so that a receiver which parses a body and prints it again arrives at the bytes that were signed. Pure: text to values
and back. Which fields a request has is not known here.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any, Final

import attrs

from ccrun.errors import CcrunError, Fault

#: Objects and arrays inside each other, the outermost included. Python's json gives up shortly before 1000, less the frames
#: of its caller (some 60 under Flask), and Node's JSON.stringify at a few thousand; both keep ample room beside 256.
MAX_DEPTH: Final = 256
#: Beyond this, doubles skip integers (RFC 7493, section 2.2).
MAX_INTEGER: Final = 2**53 - 1
#: Who has this many things to correct has seen enough; a hostile text of megabytes could hold a million.
MAX_FAULTS: Final = 100
#: Enough to find the place; a path in a hostile text could be as long as the text.
MAX_PATH_CHARS: Final = 256

_MAX_INTEGER_DIGITS: Final = len(str(MAX_INTEGER))
#: What ECMAScript calls an array index, in its one spelling (its bound is checked apart).
_ARRAY_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,9}")
_MAX_ARRAY_INDEX: Final = 2**32 - 2
#: A key that stands in a path as it is; any other is quoted, so that a path has one reading.
_PLAIN_KEY: Final = re.compile(r"[\w$@/-]([\w$@/ -]*[\w$@/-])?")

#: From the whole text (always an empty step) through names and indices.
_Path = list[str | int]


class NotIJson(CcrunError):
    """The text is not I-JSON.

    Args:
        faults: What is wrong and where: at least one, at most `MAX_FAULTS`. The path of the whole text is empty.
    """

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__(faults[0].message)


@attrs.frozen
class _Unfit:
    """Stands in a parsed value for a number that I-JSON does not have."""

    rule: str


@attrs.frozen
class _Doubled:
    """Stands in a parsed value for an object that names a member twice."""

    members: list[tuple[str, Any]]


def parse(text: bytes) -> Any:
    """Return the value of an I-JSON text.

    Takes time and memory in proportion to the text, whatever it holds: some seconds for 10 MiB made to hurt.

    Raises:
        NotIJson: With every fault at once if the text is JSON at all, else with the first.
    """
    try:
        source = text.decode()
    except UnicodeDecodeError:
        raise NotIJson([Fault("", "The text is not valid UTF-8.")]) from None
    if source.startswith("\ufeff"):
        raise NotIJson([Fault("", "The text begins with a byte order mark, which JSON does not allow.")])
    if not source.strip(" \t\r\n"):
        raise NotIJson([Fault("", "The text is empty.")])
    try:
        value = _DECODER.decode(source)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise NotIJson([Fault("", f"The text is not valid JSON: see {place}.")]) from None
    except RecursionError:
        raise NotIJson([Fault("", f"The text {_TOO_DEEP}.")]) from None
    if faults := list(itertools.islice(_faults(value), MAX_FAULTS)):
        raise NotIJson(faults)
    return value


def dumps(value: Any) -> bytes:
    r"""Return a value as JavaScript prints it: `JSON.stringify`, in UTF-8.

    Members whose names are array indices come first, in ascending order, the others in their own order; numbers are doubles,
    printed by ECMAScript's Number::toString (a NaN or an infinity as `null`); a lone surrogate is printed as `\udxxx`.
    A text printed here is for `json.loads` to read again: `parse` would refuse 1e16 once it is spelled as an integer.

    By hand, since no library that we keep prints this form: rfc8785 sorts all members, and json prints Python's numbers.

    Args:
        value: What `parse` returns; tuples, mappings and subclasses of `str` will do too.

    Raises:
        TypeError: The value holds something that JSON does not have.
    """
    pieces: list[str] = []
    # A stack of our own, since values that did not pass `parse` may be nested deeper than Python calls functions.
    levels: list[tuple[Iterator[tuple[str, Any]], str]] = [(iter([("", value)]), "")]
    while levels:
        members, closing = levels[-1]
        for before, member in members:
            pieces.append(before)
            if isinstance(member, Mapping):
                pieces.append("{")
                levels.append((_named(member), "}"))
                break
            if isinstance(member, list | tuple):
                pieces.append("[")
                levels.append((_listed(member), "]"))
                break
            pieces.append(_scalar(member))
        else:
            pieces.append(closing)
            levels.pop()
    # backslashreplace meets nothing but lone surrogates here.
    return "".join(pieces).encode("utf-8", "backslashreplace")


# --- reading ---------------------------------------------------------------------------------------------------------

_TOO_DEEP: Final = f"is nested more than {MAX_DEPTH} levels deep"


def _object(members: list[tuple[str, Any]]) -> dict[str, Any] | _Doubled:
    value = dict(members)
    return value if len(value) == len(members) else _Doubled(members)


def _integer(literal: str) -> int | _Unfit:
    # The digits are counted first: int() refuses literals of more than 4300 digits and is slow long before.
    if len(literal) <= _MAX_INTEGER_DIGITS + 1 and abs(value := int(literal)) <= MAX_INTEGER:
        return value
    return _Unfit("is an integer beyond ±(2^53 - 1), which JavaScript cannot hold; send it as a string")


def _float(literal: str) -> float | _Unfit:
    value = float(literal)
    return value if math.isfinite(value) else _Unfit("is a number beyond the range of a double; send it as a string")


def _constant(literal: str) -> _Unfit:
    return _Unfit(f"is {literal}, which JSON does not have")


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
)


def _faults(root: Any) -> Iterator[Fault]:
    """Yield where a parsed value breaks a rule of I-JSON; the names of an object before what they name."""
    path: _Path = [""]
    levels: list[Iterator[tuple[str | int, Any]]] = [iter([("", root)])]
    while levels:
        for path[-1], value in levels[-1]:
            match value:
                case str() if _has_lone_surrogate(value):
                    yield _fault(path, "has a lone surrogate, which is no character")
                case _Unfit():
                    yield _fault(path, value.rule)
                case dict() | list() | _Doubled() if len(levels) > MAX_DEPTH:
                    yield _fault(path, _TOO_DEEP)
                case dict() | list() | _Doubled():
                    if not isinstance(value, list):
                        yield from (_fault([*path, name], rule) for name, rule in _bad_names(value))
                    levels.append(_children(value))
                    path.append("")
                    break
        else:
            levels.pop()
            path.pop()


def _children(value: dict[str, Any] | list[Any] | _Doubled) -> Iterator[tuple[str | int, Any]]:
    match value:
        case dict():
            return iter(value.items())
        case list():
            return enumerate(value)
        case _Doubled():
            return iter(value.members)


def _bad_names(value: dict[str, Any] | _Doubled) -> Iterator[tuple[str, str]]:
    names = Counter(name for name, _ in value.members) if isinstance(value, _Doubled) else dict.fromkeys(value, 1)
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


def _fault(path: _Path, rule: str) -> Fault:
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
    return Fault(spelled, f"{spelled or 'The text'} {rule}")


# --- printing --------------------------------------------------------------------------------------------------------


def _rank(key: str) -> int:
    """Return where JavaScript puts a member: an array index at its number, any other after them all."""
    if _ARRAY_INDEX.fullmatch(key) and (index := int(key)) <= _MAX_ARRAY_INDEX:
        return index
    return _MAX_ARRAY_INDEX + 1


def _named(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    comma = ""
    for name in sorted(value, key=_rank):
        yield f"{comma}{_string(name)}:", value[name]
        comma = ","


def _listed(value: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    comma = ""
    for item in value:
        yield comma, item
        comma = ","


def _string(text: str) -> str:
    # Python escapes the same characters in the same spelling when it may leave the others alone.
    return json.dumps(text, ensure_ascii=False)


def _scalar(value: Any) -> str:
    match value:
        case str():
            return _string(value)
        case None:
            return "null"
        case True:
            return "true"
        case False:
            return "false"
        case int() if abs(value) <= MAX_INTEGER:
            return str(int(value))
        case int() | float():
            return _number(value)
    raise TypeError(f"JSON has no {type(value).__name__}.")


def _number(value: float) -> str:
    """Return a number as ECMAScript's Number::toString spells it; both languages choose the same shortest digits."""
    try:
        digits = repr(float(value))
    except OverflowError:
        digits = "inf"
    magnitude = abs(float(digits))
    if not math.isfinite(magnitude):
        return "null"
    if magnitude == 0:
        return "0"
    if 1e-6 <= magnitude < 1e21:
        return format(Decimal(digits).normalize(), "f")
    # Out here Python too writes an exponent, but of at least two digits.
    mantissa, _, exponent = digits.partition("e")
    return f"{mantissa}e{int(exponent):+d}"

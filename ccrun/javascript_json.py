"""JSON printed exactly as JavaScript prints it: the bytes of `JSON.stringify(JSON.parse(text))`.

Only signed bytes need this form: a receiver that parses a callback and prints it again arrives at the bytes that were signed.
Everything else is printed by `json.dumps`, which is ten times faster.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any, Final

from ccrun.ijson import MAX_INTEGER

#: What ECMAScript calls an array index, in its one spelling (its bound is checked apart).
_ARRAY_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,9}")
_MAX_ARRAY_INDEX: Final = 2**32 - 2


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

"""JSON printed exactly as JavaScript prints it: the bytes of `JSON.stringify(JSON.parse(text))`.

Used for signed bytes only: a receiver may parse a callback, print it again and compare the signature. Everything else is
printed by `ccrun.codec.to_json`, which is about ten times faster.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any, Final

from ccrun.ijson import MAX_INTEGER

#: The canonical form of what ECMAScript calls an array index; its maximum is checked separately.
_ARRAY_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,9}")
_MAX_ARRAY_INDEX: Final = 2**32 - 2


def dumps(value: Any) -> bytes:
    r"""Return the bytes of `JSON.stringify(value)` in UTF-8.

    Members whose names are array indices come first, in ascending order; the others keep their order. Numbers are doubles,
    printed by ECMAScript's Number::toString, and NaN and the infinities as `null`. A lone surrogate is printed as `\udxxx`.

    Implemented here because no maintained library prints this form: rfc8785 sorts all members, and json prints numbers as
    Python does.

    Args:
        value: Made of mappings, lists, tuples, strings, numbers, booleans and None.

    Raises:
        TypeError: The value holds an object of another type.
    """
    pieces: list[str] = []
    # An explicit stack, since values that did not come from `ijson.parse` may be nested deeper than Python's recursion limit.
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
    # Only lone surrogates cannot be encoded.
    return "".join(pieces).encode("utf-8", "backslashreplace")


# --- printing --------------------------------------------------------------------------------------------------------


def _rank(key: str) -> int:
    """Return the sort key of a member: the number of an array index, and a larger one for all other names."""
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
    # With ensure_ascii=False, Python escapes the same characters in the same way as JavaScript.
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
    """Return a number as ECMAScript's Number::toString prints it; both languages choose the same shortest digits."""
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
    # In this range Python prints an exponent too, but with at least two digits.
    mantissa, _, exponent = digits.partition("e")
    return f"{mantissa}e{int(exponent):+d}"

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from helpers.json_values import VALUES
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ccrun import ijson, javascript_json

Restringify = Callable[[str], bytes]


@pytest.fixture(scope="module")
def javascript() -> Iterator[Restringify]:
    """Return a function that runs `JSON.stringify(JSON.parse(text))` in Node, in one process for all tests."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    script = Path(__file__).with_name("receivers") / "restringify.js"
    with subprocess.Popen([node, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def restringify(text: str) -> bytes:
            stdin.write(text.encode() + b"\n")
            stdin.flush()
            return stdout.readline().removesuffix(b"\n")

        yield restringify
        stdin.close()


NUMBER_LITERALS = st.from_regex(
    r"-?(0|[1-9][0-9]{0,14})((\.[0-9]{1,25})?[eE][+-]?[0-9]{1,2}|\.[0-9]{1,25})", fullmatch=True
)


@settings(max_examples=150, deadline=None)
@given(value=VALUES, ascii_only=st.booleans(), spaced=st.booleans())
@example(
    value={"b": 1, "10": 2, "9": 3, "a": 4, "4294967294": 5, "4294967295": 6, "0": 7}, ascii_only=True, spaced=True
)
@example(
    value=[1.0, 1e21, 1e20, -0.0, 0, 1e-6, 1e-7, 1.5e-9, 5e-324, 1.7976931348623157e308], ascii_only=True, spaced=False
)
@example(value='\u2028\u2029\x7f\x00\x1f\b\t\n\f\r"\\/ é 😀', ascii_only=False, spaced=False)
@example(value={"__proto__": {"__proto__": 1}}, ascii_only=True, spaced=True)
def test_value_is_printed_as_in_javascript(javascript: Restringify, value: Any, ascii_only: bool, spaced: bool) -> None:
    """Any I-JSON text is printed exactly as `JSON.stringify(JSON.parse(text))` prints it, however it was formatted."""
    text = json.dumps(value, ensure_ascii=ascii_only, separators=(" , ", " : ") if spaced else (",", ":"))
    assert javascript(text) == javascript_json.dumps(ijson.parse(text.encode()))


@settings(max_examples=150, deadline=None)
@given(literal=NUMBER_LITERALS)
@example(literal="0.000001")
@example(literal="123456789012345678901e0")
@example(literal="999999999999999900000e1")
@example(literal="1e-400")
@example(literal="-0")
def test_number_is_printed_as_in_javascript(javascript: Restringify, literal: str) -> None:
    """Any number literal is printed as JavaScript prints the same double."""
    assert javascript(literal) == javascript_json.dumps(ijson.parse(literal.encode()))


@pytest.mark.parametrize("literal", ["9007199254740993", "-9007199254740993", "18446744073709551616", "1" + "0" * 400])
def test_large_integer_is_printed_as_in_javascript(javascript: Restringify, literal: str) -> None:
    """An integer that `parse` would reject is printed as the nearest double."""
    assert javascript(literal) == javascript_json.dumps(int(literal))


def test_deepest_allowed_value_is_printed(javascript: Restringify) -> None:
    """A value with the maximum depth is parsed and printed."""
    text = '{"a":[' * (ijson.MAX_DEPTH // 2) + "]}" * (ijson.MAX_DEPTH // 2)
    assert javascript(text) == javascript_json.dumps(ijson.parse(text.encode())) == text.encode()


def test_lone_surrogate_is_printed_as_in_javascript(javascript: Restringify) -> None:
    """A lone surrogate, which the output of another program may contain, is printed as an escape."""
    text = r'{"\ud83d":"a\udc00"}'
    assert javascript(text) == javascript_json.dumps(json.loads(text)) == text.encode()


def test_value_deeper_than_the_recursion_limit_is_printed() -> None:
    """A value that `parse` would reject may be nested deeper than the recursion limit of Python."""
    value: Any = 1
    for _ in range(50_000):
        value = [value]
    expected = b"[" * 50_000 + b"1" + b"]" * 50_000
    assert expected == javascript_json.dumps(value)


def test_nan_and_infinity_are_printed_as_null() -> None:
    """NaN and infinities are printed as null, as in JavaScript."""
    expected = b"[null,null,null]"
    assert expected == javascript_json.dumps([float("nan"), float("inf"), float("-inf")])


@given(value=VALUES)
@example(value=1e16)
def test_printed_value_survives_storage(value: Any) -> None:
    """A printed value that another JSON parser reads is printed again as the same bytes."""
    printed = javascript_json.dumps(value)
    assert printed == javascript_json.dumps(json.loads(printed))


def test_tuples_and_mappings_are_printed() -> None:
    """Tuples and read-only mappings are printed as arrays and objects, at any depth."""
    value = MappingProxyType({"a": ({"b": {"c": 1}}, ()), "d": {"e": [True, False, None]}})
    expected = b'{"a":[{"b":{"c":1}},[]],"d":{"e":[true,false,null]}}'
    assert expected == javascript_json.dumps(value)


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, {"a": object()}, {1: "a"}])
def test_other_type_is_not_printed(value: Any) -> None:
    """A value of a type that JSON does not have raises `TypeError`."""
    with pytest.raises(TypeError):
        javascript_json.dumps(value)

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ccrun import ijson, javascript_json
from ccrun.errors import CcrunError

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


def errors_of(text: str | bytes) -> list[tuple[str, str]]:
    """Return the paths and the messages of the errors of an invalid text."""
    with pytest.raises(ijson.NotIJson) as caught:
        ijson.parse(text.encode() if isinstance(text, str) else text)
    assert isinstance(caught.value, CcrunError)
    assert caught.value.message == caught.value.errors[0].message
    return [(error.field, error.message) for error in caught.value.errors]


# --- printing ------------------------------------------------------------------------------------------

INTEGERS = st.integers(-ijson.MAX_INTEGER, ijson.MAX_INTEGER)
DOUBLES = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
#: Includes array indexes of ECMAScript, with both limits, and names that only resemble one.
NAMES = st.one_of(
    TEXTS,
    st.integers(0, 20).map(str),
    st.integers(2**32 - 4, 2**32 + 2).map(str),
    st.integers(2**53 - 2, 2**53 + 2).map(str),
    st.sampled_from(["01", "-1", "-0", "1.0", "+1", "1e3", "٣", "", "__proto__", "constructor", "toJSON", "length"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), INTEGERS, DOUBLES, TEXTS),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(NAMES, inner)),
    max_leaves=25,
)
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


# --- parsing ----------------------------------------------------------------------------------------------------


@given(value=VALUES)
def test_value_is_parsed(value: Any) -> None:
    """An I-JSON text is parsed to its value, with the members in order."""
    read = ijson.parse(json.dumps(value).encode())
    assert json.dumps(value) == json.dumps(read)


def test_all_errors_are_reported() -> None:
    """Each error of a text has its path, so that a client can correct all of them after one response."""
    text = r"""{
        "prompt": NaN,
        "metadata": {
            "a": [0, 1, 2, {"b": 9007199254740992}],
            "twice": 1, "twice": [-1e400, -Infinity],
            "s": ["ok", "\ud800"],
            "\udc00": 1
        }
    }"""
    expected = [
        ("prompt", "prompt is NaN, which JSON does not have"),
        ("metadata.twice", "metadata.twice is given more than once"),
        (r'metadata["\udc00"]', r'metadata["\udc00"] has a lone surrogate in its name'),
        (
            "metadata.a[3].b",
            "metadata.a[3].b is an integer beyond ±(2^53 - 1), which JavaScript cannot hold; send it as a string",
        ),
        (
            "metadata.twice[0]",
            "metadata.twice[0] is a number beyond the range of a double; send it as a string",
        ),
        ("metadata.twice[1]", "metadata.twice[1] is -Infinity, which JSON does not have"),
        ("metadata.s[1]", "metadata.s[1] has a lone surrogate, which is no character"),
    ]
    assert expected == errors_of(text)


@pytest.mark.parametrize("literal", ["9007199254740991", "-9007199254740991", "1e308", "-0", "1E+2", "0.1e-7"])
def test_number_within_the_limits_is_parsed(literal: str) -> None:
    """A number that a double can represent is accepted."""
    assert json.loads(literal) == ijson.parse(literal.encode())


@pytest.mark.parametrize(
    "literal", ["9007199254740992", "-9007199254740992", "1" * 10_000, "1e400", "-1e309", "1" * 400 + ".5"]
)
def test_number_beyond_the_limits_is_rejected(literal: str) -> None:
    """A number that a double cannot represent is rejected, whatever its length."""
    [(field, _)] = errors_of(literal)
    assert not field


def test_escaped_duplicate_name_is_rejected() -> None:
    """Names that differ only in their escapes are duplicates, which are reported once."""
    expected = [("a", "a is given more than once")]
    assert expected == errors_of(r'{"a": 1, "\u0061": 2, "a": 3}')


def test_path_is_unambiguous() -> None:
    """A name that resembles a path, or has unprintable characters, is quoted in the path of an error."""
    text = r'{"a.b": NaN, "c[0]": NaN, "": NaN, "d\n": NaN, "glob Patterns": NaN, "é": {"x-y_1": NaN}}'
    fields = ['["a.b"]', '["c[0]"]', '[""]', r'["d\n"]', "glob Patterns", "é.x-y_1"]
    assert fields == [field for field, _ in errors_of(text)]


def test_paths_and_number_of_errors_are_bounded() -> None:
    """A malicious text cannot cause a large response, neither by a long path nor by many errors."""
    text = ('{"' + "k" * 10_000 + '":') * 200 + "[" + ",".join(["NaN"] * 1000) + "]" + "}" * 200
    errors = errors_of(text)
    expected = [ijson.MAX_PATH_CHARS + len("…")] * ijson.MAX_JSON_ERRORS
    assert expected == [len(field) for field, _ in errors]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "The text is empty."),
        (b" \n", "The text is empty."),
        (b'"\xff"', "The text is not valid UTF-8."),
        (b'"\xed\xa0\x80"', "The text is not valid UTF-8."),
        ('"é"'.encode("utf-16"), "The text is not valid UTF-8."),
        (b'{"secret": "value",\n "b" 1}', "The text is not valid JSON: see line 2, column 6."),
        (b"{} {}", "The text is not valid JSON: see line 1, column 4."),
        (b"[1 2]", "The text is not valid JSON: see line 1, column 4."),
        (b"'a'", "The text is not valid JSON: see line 1, column 1."),
        (b'"a\nb"', "The text is not valid JSON: see line 1, column 3."),
        (b"01", "The text is not valid JSON: see line 1, column 2."),
        ("٣".encode(), "The text is not valid JSON: see line 1, column 1."),
        (b"\x0c1", "The text is not valid JSON: see line 1, column 1."),
    ],
)
def test_text_that_is_not_json_is_rejected(text: bytes, message: str) -> None:
    """The error has the position of the invalid part, and not its content."""
    assert [("", message)] == errors_of(text)


@pytest.mark.parametrize("depth", [ijson.MAX_DEPTH + 1, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_rejected(depth: int, opening: str, closing: str) -> None:
    """Nesting beyond the limit is reported as an error, and does not exhaust the stack."""
    [(_, message)] = errors_of(opening * depth + "0" + closing * depth)
    assert f" is nested more than {ijson.MAX_DEPTH} levels deep" in message


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 500_000,
        b"[" * 250 + b"1," * 250_000 + b"1" + b"]" * 250,
        b"{" + b'"a":1,' * 80_000 + b'"a":1}',
        b"9" * 500_000,
        b"0." + b"9" * 500_000,
        b'"' + b"a" * 500_000,
        b"\n" * 500_000,
        (b'{"' + b"k" * 2_000 + b'":') * 250 + b'{"a":1,"a":2}' + b"}" * 250,
    ],
    ids=[
        "unclosed",
        "wide-and-deep",
        "duplicate-name",
        "integer",
        "fraction",
        "unterminated-string",
        "blank",
        "long-path",
    ],
)
def test_parsing_takes_linear_time(text: bytes) -> None:
    """A malicious text of half a megabyte takes far less time than a quadratic algorithm would need."""
    started = time.thread_time()
    with contextlib.suppress(ijson.NotIJson):
        ijson.parse(text)
    assert time.thread_time() - started < 3


def test_byte_order_mark_is_ignored() -> None:
    """Tools on Windows write one before the text. Inside of the text it is no space."""
    assert {"a": 1} == ijson.parse(b'\xef\xbb\xbf{"a": 1}')
    with pytest.raises(ijson.NotIJson):
        ijson.parse(b'{"a": \xef\xbb\xbf1}')

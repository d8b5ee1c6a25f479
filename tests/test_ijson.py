from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from helpers.json_values import VALUES
from hypothesis import given

from ccrun import ijson
from ccrun.errors import CcrunError


def errors_of(text: str | bytes) -> list[tuple[str, str]]:
    """Return the paths and the messages of the errors of an invalid text."""
    with pytest.raises(ijson.NotIJson) as caught:
        ijson.parse(text.encode() if isinstance(text, str) else text)
    assert isinstance(caught.value, CcrunError)
    assert caught.value.message == caught.value.errors[0].message
    return [(error.field, error.message) for error in caught.value.errors]


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

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
    """JSON.stringify(JSON.parse(line)) by one Node process that lives as long as the module's tests."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: what JavaScript prints cannot be compared")
    script = Path(__file__).with_name("receivers") / "restringify.js"
    with subprocess.Popen([node, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask(text: str) -> bytes:
            stdin.write(text.encode() + b"\n")
            stdin.flush()
            return stdout.readline().removesuffix(b"\n")

        yield ask
        stdin.close()


def faults_of(text: str | bytes) -> list[tuple[str, str]]:
    """Return where and what is wrong with a text that must be refused."""
    with pytest.raises(ijson.NotIJson) as caught:
        ijson.parse(text.encode() if isinstance(text, str) else text)
    assert isinstance(caught.value, CcrunError)
    assert caught.value.message == caught.value.errors[0].message
    return [(fault.field, fault.message) for fault in caught.value.errors]


# --- what JavaScript prints ------------------------------------------------------------------------------------------

INTEGERS = st.integers(-ijson.MAX_INTEGER, ijson.MAX_INTEGER)
DOUBLES = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
#: Around both ends of what ECMAScript calls an array index, and what only looks like one.
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


@settings(max_examples=400, deadline=None)
@given(value=VALUES, ascii_only=st.booleans(), spaced=st.booleans())
@example(
    value={"b": 1, "10": 2, "9": 3, "a": 4, "4294967294": 5, "4294967295": 6, "0": 7}, ascii_only=True, spaced=True
)
@example(
    value=[1.0, 1e21, 1e20, -0.0, 0, 1e-6, 1e-7, 1.5e-9, 5e-324, 1.7976931348623157e308], ascii_only=True, spaced=False
)
@example(value='\u2028\u2029\x7f\x00\x1f\b\t\n\f\r"\\/ é 😀', ascii_only=False, spaced=False)
@example(value={"__proto__": {"__proto__": 1}}, ascii_only=True, spaced=True)
def test_prints_what_javascript_prints(javascript: Restringify, value: Any, ascii_only: bool, spaced: bool) -> None:
    """Any I-JSON text comes out byte for byte as JSON.stringify(JSON.parse(text)) prints it, however it was spelled."""
    text = json.dumps(value, ensure_ascii=ascii_only, separators=(" , ", " : ") if spaced else (",", ":"))
    assert javascript(text) == javascript_json.dumps(ijson.parse(text.encode()))


@settings(max_examples=400, deadline=None)
@given(literal=NUMBER_LITERALS)
@example(literal="0.000001")
@example(literal="123456789012345678901e0")
@example(literal="999999999999999900000e1")
@example(literal="1e-400")
@example(literal="-0")
def test_prints_numbers_as_javascript_does(javascript: Restringify, literal: str) -> None:
    """Any literal of a number comes out in JavaScript's spelling of the double that it means."""
    assert javascript(literal) == javascript_json.dumps(ijson.parse(literal.encode()))


@pytest.mark.parametrize("literal", ["9007199254740993", "-9007199254740993", "18446744073709551616", "1" + "0" * 400])
def test_prints_integers_beyond_a_double_as_javascript_does(javascript: Restringify, literal: str) -> None:
    """An integer that never passed `parse` is printed as the double that JavaScript would hold."""
    assert javascript(literal) == javascript_json.dumps(int(literal))


def test_prints_the_deepest_value_that_it_reads(javascript: Restringify) -> None:
    """A value at the limit of nesting is read and printed like any other."""
    text = '{"a":[' * (ijson.MAX_DEPTH // 2) + "]}" * (ijson.MAX_DEPTH // 2)
    assert javascript(text) == javascript_json.dumps(ijson.parse(text.encode())) == text.encode()


def test_prints_lone_surrogates_as_javascript_does(javascript: Restringify) -> None:
    """A lone surrogate, which the output of another program can hold, is printed as an escape and never fails."""
    text = r'{"\ud83d":"a\udc00"}'
    assert javascript(text) == javascript_json.dumps(json.loads(text)) == text.encode()


def test_prints_values_nested_beyond_any_limit() -> None:
    """What never passed `parse` may be nested deeper than Python calls functions."""
    value: Any = 1
    for _ in range(50_000):
        value = [value]
    expected = b"[" * 50_000 + b"1" + b"]" * 50_000
    assert expected == javascript_json.dumps(value)


def test_prints_what_json_does_not_have_as_javascript_does() -> None:
    """NaN and infinities, which JSON does not have, are printed as null."""
    expected = b"[null,null,null]"
    assert expected == javascript_json.dumps([float("nan"), float("inf"), float("-inf")])


@given(value=VALUES)
@example(value=1e16)
def test_prints_the_same_after_storage(value: Any) -> None:
    """What was printed can be stored, read by any JSON reader and printed again without a byte changing."""
    printed = javascript_json.dumps(value)
    assert printed == javascript_json.dumps(json.loads(printed))


def test_prints_tuples_and_mappings() -> None:
    """Frozen facts hold tuples and read-only mappings; they are printed as lists and objects, mapping in mapping."""
    value = MappingProxyType({"a": ({"b": {"c": 1}}, ()), "d": {"e": [True, False, None]}})
    expected = b'{"a":[{"b":{"c":1}},[]],"d":{"e":[true,false,null]}}'
    assert expected == javascript_json.dumps(value)


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, {"a": object()}, {1: "a"}])
def test_refuses_to_print_what_is_not_json(value: Any) -> None:
    """A value that JSON does not have is a mistake of the program and never printed as something else."""
    with pytest.raises(TypeError):
        javascript_json.dumps(value)


# --- what is read ----------------------------------------------------------------------------------------------------


@given(value=VALUES)
def test_reads_what_json_says(value: Any) -> None:
    """An I-JSON text is read as the value that it spells, members in their order."""
    read = ijson.parse(json.dumps(value).encode())
    assert json.dumps(value) == json.dumps(read)


def test_tells_every_fault_at_once() -> None:
    """Each fault of a text is told with its own path, so that one answer is enough to correct them all."""
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
    assert expected == faults_of(text)


@pytest.mark.parametrize("literal", ["9007199254740991", "-9007199254740991", "1e308", "-0", "1E+2", "0.1e-7"])
def test_reads_numbers_up_to_the_limits(literal: str) -> None:
    """Numbers that a double holds are read."""
    assert json.loads(literal) == ijson.parse(literal.encode())


@pytest.mark.parametrize(
    "literal", ["9007199254740992", "-9007199254740992", "1" * 10_000, "1e400", "-1e309", "1" * 400 + ".5"]
)
def test_refuses_numbers_beyond_the_limits(literal: str) -> None:
    """Numbers that no double holds are refused, however many digits they have."""
    [(field, _)] = faults_of(literal)
    assert not field


def test_tells_doubled_names_whatever_their_spelling() -> None:
    """Names that differ only in their escapes are the same name."""
    expected = [("a", "a is given more than once")]
    assert expected == faults_of(r'{"a": 1, "\u0061": 2, "a": 3}')


def test_path_has_one_reading() -> None:
    """A name that would read like a path, or could not be printed, is quoted in it."""
    text = r'{"a.b": NaN, "c[0]": NaN, "": NaN, "d\n": NaN, "glob Patterns": NaN, "é": {"x-y_1": NaN}}'
    fields = ['["a.b"]', '["c[0]"]', '[""]', r'["d\n"]', "glob Patterns", "é.x-y_1"]
    assert fields == [field for field, _ in faults_of(text)]


def test_path_and_number_of_faults_are_bounded() -> None:
    """A hostile text cannot make the answer large: neither one long path nor very many."""
    text = ('{"' + "k" * 10_000 + '":') * 200 + "[" + ",".join(["NaN"] * 1000) + "]" + "}" * 200
    errors = faults_of(text)
    expected = [ijson.MAX_PATH_CHARS + len("…")] * ijson.MAX_JSON_ERRORS
    assert expected == [len(field) for field, _ in errors]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "The text is empty."),
        (b" \n", "The text is empty."),
        (b"\xef\xbb\xbf{}", "The text begins with a byte order mark, which JSON does not allow."),
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
def test_tells_what_is_no_json(text: bytes, message: str) -> None:
    """What is no JSON is told in one sentence, by its place and never by its content."""
    assert [("", message)] == faults_of(text)


@pytest.mark.parametrize("deep", [ijson.MAX_DEPTH + 1, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_refuses_to_nest_too_deep(deep: int, opening: str, closing: str) -> None:
    """Nesting beyond the limit is a fault like any other, never an exhausted stack."""
    [(_, message)] = faults_of(opening * deep + "0" + closing * deep)
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
    ids=["open", "wide and deep", "one name", "integer", "fraction", "unterminated", "blank", "long path"],
)
def test_hostile_texts_take_time_in_proportion(text: bytes) -> None:
    """Half a megabyte made to hurt takes well under the seconds that anything quadratic would."""
    began = time.perf_counter()
    with contextlib.suppress(ijson.NotIJson):
        ijson.parse(text)
    assert time.perf_counter() - began < 3

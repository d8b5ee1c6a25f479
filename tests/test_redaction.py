from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, quote_plus

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccrun.redaction import MASK, MIN_SECRET_CHARS, Redactor
from ccrun.results import GitCommit, Recovery
from ccrun.task import Secret

KEY_FILE = "-----BEGIN MADE-UP KEY-----\nfirst/line+of/it==\nsecond/line\n-----END MADE-UP KEY-----\n"

#: Secrets with characters that JSON escapes.
secret_texts = st.text('ab"\\\n\té/\U0001f600', min_size=6, max_size=12)


def redactor(*secrets: str) -> Redactor:
    """Return a redactor of these secrets."""
    return Redactor(Secret(secret) for secret in secrets)


def masked_line(secret: str, line: bytes) -> bytes:
    """Return a line with a secret masked."""
    return bytes(redactor(secret).lines([line])[0])


def strings(value: Any) -> list[str]:
    """Return all strings in a JSON value."""
    match value:
        case str():
            return [value]
        case dict():
            return [text for item in value.items() for part in item for text in strings(part)]
        case list():
            return [text for item in value for text in strings(item)]
    return []


@given(secret_texts, st.text('ab"\\\n', max_size=5), st.text('ab"\\\n', max_size=5))
def test_secret_is_redacted_in_text(secret: str, before: str, after: str) -> None:
    """The position in the text does not matter."""
    redacted = redactor(secret).text(before + secret + after)
    assert secret not in redacted
    assert MASK in redacted


@given(secret_texts, st.booleans(), st.booleans())
def test_secret_is_redacted_in_a_json_line(secret: str, ascii_outside: bool, ascii_inside: bool) -> None:
    """It is redacted in strings and in JSON within strings, and the line is valid JSON."""
    inner = json.dumps({"output": f"<{secret}>"}, ensure_ascii=ascii_inside)
    line = json.dumps({"text": f"<{secret}>", "file": inner, "n": 1}, ensure_ascii=ascii_outside).encode()
    redacted = json.loads(masked_line(secret, line))
    assert {"text": f"<{MASK}>", "file": json.dumps({"output": f"<{MASK}>"}), "n": 1} == redacted


@given(
    st.sampled_from(["aaaaaa\\", 'aaaaaa"', '"aaaaaa', "\\aaaaaa"]), st.text('a"\\\n', max_size=30), st.integers(6, 8)
)
def test_redacted_line_is_valid_json(secret: str, text: str, count: int) -> None:
    """A JSON escape sequence may look like a part of a secret."""
    line = json.dumps({"text": text + "a" * count + text})
    assert isinstance(json.loads(masked_line(secret, line.encode())), dict)


def test_lines_of_a_key_file_are_redacted() -> None:
    """Each line of the key is a secret, also when text is between the lines."""
    output = "".join(f"{number:3}| {line}\r\n" for number, line in enumerate(KEY_FILE.splitlines(), 1))
    redacted = redactor(KEY_FILE).text(output)
    assert [] == [line for line in KEY_FILE.splitlines() if line in redacted]
    assert 4 == redacted.count(MASK)


def test_longest_secret_is_redacted_first() -> None:
    """A secret may contain another one."""
    two_secrets = redactor("secret", "my-secret-token")
    assert two_secrets.text("my-secret-token secret") == f"{MASK} {MASK}"
    assert [f'"{MASK} {MASK}"'.encode()] == two_secrets.lines([b'"my-secret-token secret"'])


@pytest.mark.parametrize("secret", ["", "a", "true", "8080", "é", "ééé", "\n", '"', "a\nb\nc"])
def test_short_values_are_not_redacted(secret: str) -> None:
    """Values of less than six characters occur in every log."""
    text = f"{secret} true 8080 é"
    line = json.dumps({"text": f'{text} \u00e9 \n " abc'}).encode()
    assert (text, line) == (redactor(secret).text(text), masked_line(secret, line))


def test_line_without_a_secret_is_not_copied() -> None:
    """The result has the same objects, also beside a line with a secret, and for many megabytes."""
    lines = [bytearray(b"x" * 100_000), bytearray(b'{"n":1}'), bytearray(b"x" * 3_000_000)]
    assert redactor("made-up-secret").lines(lines[:2]) is not None
    for kept, line in zip(lines, redactor("made-up-secret").lines(lines), strict=True):
        assert kept is line
    assert Redactor([]).lines(lines) is lines
    assert lines[1] is redactor("made-up-secret").lines([b'"made-up-secret"', lines[1]])[1]


def escaped(text: str) -> str:
    """Return each character as an escape of JSON, in capitals."""
    units = text.encode("utf-16-be")
    return "".join(f"\\u{units[index] * 256 + units[index + 1]:04X}" for index in range(0, len(units), 2))


#: How programs spell a text.
SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "JSON": json.dumps,
    "JSON twice": lambda text: json.dumps(json.dumps(text)),
    "JSON three times": lambda text: json.dumps(json.dumps(json.dumps(text))),
    "escapes": escaped,
    "escapes in JSON": lambda text: json.dumps(json.dumps(escaped(text))),
    "escaped slashes": lambda text: json.dumps(text).replace("/", "\\/"),
    "escaped slashes in JSON": lambda text: json.dumps(json.dumps(text).replace("/", "\\/")),
    "URL": lambda text: quote(text, safe=""),
    "path of a URL": quote,
    "form": quote_plus,
    "hexadecimal": lambda text: text.encode().hex(),
    "HEXADECIMAL": lambda text: text.encode().hex().upper(),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 of user:token": lambda text: base64.b64encode(f"user:{text}".encode()).decode(),
    "base64 of x:token": lambda text: base64.b64encode(f"x:{text}/more".encode()).decode(),
    "base64 for URLs": lambda text: base64.urlsafe_b64encode(f"me:{text}".encode()).decode(),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@settings(max_examples=30)
@given(secret=st.text('abZ9"\\\n/+?é\U0001f600', min_size=9, max_size=16), is_ascii=st.booleans())
def test_every_spelling_is_masked(spelling: str, secret: str, is_ascii: bool) -> None:
    """In a text, and in a line, which remains JSON."""
    spelled = SPELLINGS[spelling](secret)
    masked = redactor(secret).text(f"<{spelled}>")
    assert MASK in masked
    line = json.dumps({"text": f"<{spelled}>", "n": 1}, ensure_ascii=is_ascii).encode()
    assert MASK in json.loads(masked_line(secret, line))["text"]
    if "base64" not in spelling:
        # Of base64, the first and the last character may also have bits of something else.
        assert spelled.strip('"\\') not in masked


@pytest.mark.parametrize(
    "secret", ["123456789", "1234.5", "-12345", "},{},{", '":{"a"', "nabcdef", "u00e9ab", "false,"]
)
def test_masked_line_is_json(secret: str) -> None:
    """A secret may look like a number, like the structure of the line, or like the end of an escape."""
    value = {
        "n": 123456789,
        "m": [1234.5, -12345.0, {}, {}, {}],
        "a": {"a": False, "b": "\nabcdef\u00e9ab"},
        "s": secret,
    }
    for is_ascii in (True, False):
        line = json.dumps(value, ensure_ascii=is_ascii, separators=(",", ":")).encode()
        masked = masked_line(secret, line)
        assert value.keys() == json.loads(masked).keys()
        assert MASK == json.loads(masked)["s"]


json_text = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**8) | st.text('ab1\\"\n/é…', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab1\\"', max_size=8), inner, max_size=3),
)


@given(st.text('ab1\\"\n/', min_size=6, max_size=7), json_text, st.booleans())
def test_any_masked_line_is_json(secret: str, value: Any, is_ascii: bool) -> None:
    """For any secret and line, the line remains JSON and does not have the secret in its strings."""
    line = json.dumps({"v": value}, ensure_ascii=is_ascii).encode()
    masked = json.loads(masked_line(secret, line))
    assert [] == [text for text in strings(masked) if secret in text]


@given(st.text("abcdefgh", min_size=12, max_size=40), st.integers(1, 39), st.booleans())
def test_part_of_a_secret_at_a_cut_is_masked(secret: str, at: int, is_start: bool) -> None:
    """Where a text was cut, which `…` shows, less than six characters of a secret remain. Elsewhere, words stay."""
    part = secret[at:] if is_start else secret[:at]
    text = f"…{part} more" if is_start else f"more {part}…"
    masked = redactor(secret).text(text)
    if MIN_SECRET_CHARS <= len(part):
        assert (f"…{MASK} more" if is_start else f"more {MASK}…") == masked
    assert not is_start or part == secret or f"{part} more" == redactor(secret).text(f"{part} more")


def test_long_runs_of_escapes_take_linear_time() -> None:
    """A hostile line does not stop the worker: the bound is on processor time."""
    started = time.process_time()
    for text in ("\\" * 1_000_000 + "\\/", "\\/" * 300_000, "\\u0061" * 200_000, "a" * 1_000_000):
        redactor("aaaaaaaaab/", "\\\\\\\\\\\\b").text(text)
    assert time.process_time() - started < 20


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.just("<made-up-secret>"), st.text("ab")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", "made-up-secret", "b"]), inner, max_size=3)
    ),
)


@given(json_values)
def test_strings_of_a_value_are_redacted_at_any_depth(value: Any) -> None:
    """Keys are redacted as well; other values are unchanged."""
    redacted = redactor("made-up-secret").value(value)
    assert [text.replace("made-up-secret", MASK) for text in strings(value)] == strings(redacted)
    assert json.dumps(value).replace("made-up-secret", MASK) == json.dumps(redacted)


def test_attrs_objects_are_redacted() -> None:
    """Tuples and nested objects are redacted as well."""
    recovery = Recovery(method="rebase", remote_sha="b2", conflict_files=("made-up-secret.txt",))
    commit = GitCommit(sha="a1", message="made-up-secret", pushed=True, branch="main", recovery=recovery)
    redacted = attrs.evolve(commit, message=MASK, recovery=attrs.evolve(recovery, conflict_files=(f"{MASK}.txt",)))
    assert (redacted,) == redactor("made-up-secret").value((commit,))

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccrun.results import GitCommit, Recovery
from ccrun.task import Secret
from ccrun.worker.redaction import MASK, Redactor

KEY_FILE = "-----BEGIN MADE-UP KEY-----\nfirst/line+of/it==\nsecond/line\n-----END MADE-UP KEY-----\n"

#: Secrets with characters that JSON escapes.
secret_texts = st.text('ab"\\\n\té/\U0001f600', min_size=6, max_size=12)


def redactor(*secrets: str) -> Redactor:
    """Return a redactor of these secrets."""
    return Redactor(Secret(secret) for secret in secrets)


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
    redacted = json.loads(redactor(secret).line(line))
    assert {"text": f"<{MASK}>", "file": json.dumps({"output": f"<{MASK}>"}), "n": 1} == redacted


@given(
    st.sampled_from(["aaaaaa\\", 'aaaaaa"', '"aaaaaa', "\\aaaaaa"]), st.text('a"\\\n', max_size=30), st.integers(6, 8)
)
def test_redacted_line_is_valid_json(secret: str, text: str, count: int) -> None:
    """A JSON escape sequence may look like a part of a secret."""
    line = json.dumps({"text": text + "a" * count + text})
    assert isinstance(json.loads(redactor(secret).line(line.encode())), dict)


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
    assert two_secrets.line(b"my-secret-token secret") == f"{MASK} {MASK}".encode()


@pytest.mark.parametrize("secret", ["", "a", "true", "8080", "é", "ééé", "\n", '"', "a\nb\nc"])
def test_short_values_are_not_redacted(secret: str) -> None:
    """Values of less than six characters occur in every log."""
    text = f"{secret} true 8080 é"
    line = json.dumps({"text": f'{text} \u00e9 \n " abc'}).encode()
    assert (text, line) == (redactor(secret).text(text), redactor(secret).line(line))


def test_line_without_a_secret_is_not_copied() -> None:
    """The result is the same object."""
    line = bytearray(b"x" * 100_000)
    assert redactor("made-up-secret").line(line) is line
    assert Redactor([]).line(line) is line


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

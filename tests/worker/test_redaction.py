from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccrun.task import GitCommit, Recovery, Secret
from ccrun.worker.redaction import MASK, Redactor

KEY_FILE = "-----BEGIN MADE-UP KEY-----\nfirst/line+of/it==\nsecond/line\n-----END MADE-UP KEY-----\n"

#: Values with all that JSON spells in another way.
secret_texts = st.text('ab"\\\n\té/\U0001f600', min_size=6, max_size=12)


def redactor(*secrets: str) -> Redactor:
    """Return what knows these secrets."""
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
def test_secret_is_found_in_any_text(secret: str, before: str, after: str) -> None:
    """Wherever a secret stands in a text, it stands there no more."""
    masked = redactor(secret).text(before + secret + after)
    assert secret not in masked
    assert MASK in masked


@given(secret_texts, st.booleans(), st.booleans())
def test_secret_is_found_in_a_line_of_json(secret: str, ascii_outside: bool, ascii_inside: bool) -> None:
    """A secret in a JSON line is masked, also inside of JSON in a string, and the line stays JSON."""
    inner = json.dumps({"output": f"<{secret}>"}, ensure_ascii=ascii_inside)
    line = json.dumps({"text": f"<{secret}>", "file": inner, "n": 1}, ensure_ascii=ascii_outside).encode()
    masked = json.loads(redactor(secret).line(line))
    assert {"text": f"<{MASK}>", "file": json.dumps({"output": f"<{MASK}>"}), "n": 1} == masked


@given(
    st.sampled_from(["aaaaaa\\", 'aaaaaa"', '"aaaaaa', "\\aaaaaa"]), st.text('a"\\\n', max_size=30), st.integers(6, 8)
)
def test_line_stays_json_whatever_is_like_a_secret(secret: str, text: str, count: int) -> None:
    """What only looks like a secret where JSON escapes something else does not make a line unreadable."""
    line = json.dumps({"text": text + "a" * count + text})
    assert isinstance(json.loads(redactor(secret).line(line.encode())), dict)


def test_key_file_is_masked_line_by_line() -> None:
    """The lines of a key are masked each, whatever stands between them."""
    printed = "".join(f"{number:3}| {line}\r\n" for number, line in enumerate(KEY_FILE.splitlines(), 1))
    masked = redactor(KEY_FILE).text(printed)
    assert [] == [line for line in KEY_FILE.splitlines() if line in masked]
    assert 4 == masked.count(MASK)


def test_longest_secret_is_masked_first() -> None:
    """Of a secret that contains another one nothing is left over."""
    both = redactor("secret", "my-secret-token")
    assert both.text("my-secret-token secret") == f"{MASK} {MASK}"
    assert both.line(b"my-secret-token secret") == f"{MASK} {MASK}".encode()


@pytest.mark.parametrize("secret", ["", "a", "true", "8080", "é", "ééé", "\n", '"', "a\nb\nc"])
def test_short_values_are_left(secret: str) -> None:
    """A value of less than six characters would mask half of every log and protects nothing, however JSON spells it."""
    text = f"{secret} true 8080 é"
    line = json.dumps({"text": f'{text} \u00e9 \n " abc'}).encode()
    assert (text, line) == (redactor(secret).text(text), redactor(secret).line(line))


def test_line_without_a_secret_is_the_same_object() -> None:
    """A line that holds no secret, however long, is not copied."""
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
def test_values_are_masked_in_every_depth(value: Any) -> None:
    """Every string of a JSON value is masked, keys as well, and all else is as it was."""
    masked = redactor("made-up-secret").value(value)
    assert [text.replace("made-up-secret", MASK) for text in strings(value)] == strings(masked)
    assert json.dumps(value).replace("made-up-secret", MASK) == json.dumps(masked)


def test_facts_of_an_outcome_are_values_too() -> None:
    """Facts and tuples of facts are masked too."""
    recovery = Recovery(method="rebase", remote_sha="b2", conflict_files=("made-up-secret.txt",))
    commit = GitCommit(sha="a1", message="made-up-secret", pushed=True, branch="main", recovery=recovery)
    masked = attrs.evolve(commit, message=MASK, recovery=attrs.evolve(recovery, conflict_files=(f"{MASK}.txt",)))
    assert (masked,) == redactor("made-up-secret").value((commit,))

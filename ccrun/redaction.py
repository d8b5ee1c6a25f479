"""Masking the values of secrets in what leaves the process. Pure.

A value is found as it is and in the spellings that programs give it: in JSON, also in JSON inside of JSON; in base64, wherever it
starts in the encoded text; in hexadecimal; and in URLs. A value that an agent has encoded in another way is not found.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final
from urllib.parse import quote, quote_plus

import attrs

from ccrun.task import Secret

#: Characters. Shorter values ("true", "8080", "dev") are common in logs and protect nothing.
MIN_SECRET_CHARS: Final = 6
MASK: Final = "***"
#: What stands where a text was cut.
ELLIPSIS: Final = "…"
#: Levels of JSON in JSON: the line, the output of a tool in it, a file with JSON in that, and a message in that.
JSON_LEVELS: Final = 4
#: Bytes of lines that are searched at once. Joining them needs a copy.
MAX_JOINED_BYTES: Final = 2 * 1024**2

#: Strings and other scalars of a line of JSON, keys included.
_TOKEN: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[^\s"{}\[\],:]+', re.DOTALL)
#: A character that is escaped though encoders do not need to. With non-ASCII secrets, every `\u` may be in capitals.
_UNUSUAL: Final = re.compile(r"\\u00[2-7]|\\/")
_UNUSUAL_OR_NOT_ASCII: Final = re.compile(r"\\u|\\/")
#: Backslashes of one escape. At each level of JSON in JSON, their number doubles. Without a bound, long runs take quadratic time.
_BACKSLASHES: Final = rf"\\{{1,{2**JSON_LEVELS}}}"
_ESCAPE: Final = re.compile(r"\\+(?:u([0-9a-fA-F]{4}))?")
#: The one-letter escapes of JSON (RFC 8259, section 7).
_ESCAPES: Final = {"\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_LETTERS: Final = str.maketrans({**_ESCAPES, "\\": ""})


class Redactor:
    """Masks the secrets of one task."""

    def __init__(self, secrets: Iterable[Secret]) -> None:
        self._parts = sorted({part for secret in secrets for part in _parts(secret.reveal())}, key=len, reverse=True)
        spellings = {spelling for part in self._parts for spelling in _spellings(part)}
        # The longest first, so that a secret that contains another is masked completely.
        longest_first = sorted(spellings, key=len, reverse=True)
        self._text = re.compile("|".join(map(re.escape, longest_first))) if spellings else None
        self._bytes = [spelling.encode(errors="surrogatepass") for spelling in longest_first]
        self._unusual = _UNUSUAL if all(part.isascii() for part in self._parts) else _UNUSUAL_OR_NOT_ASCII
        self._unusual_bytes = re.compile(self._unusual.pattern.encode())
        self._plain_parts = [_unescaped(part) for part in self._parts]
        # Slow, so that it is used only when it is known to match.
        self._any_spelling = re.compile("|".join(map(_any_spelling, self._parts)))

    def text(self, text: str) -> str:
        """Return a text with all secrets masked, and with what is left of secrets where it was cut, before and after `…`."""
        if self._text is None:
            return text
        text = self._text.sub(MASK, text)
        if self._unusual.search(text):
            plain = _unescaped(text)
            if any(part in plain for part in self._plain_parts):
                text = self._any_spelling.sub(MASK, text)
        if ELLIPSIS in text:
            first, *others = text.split(ELLIPSIS)
            pieces = [first, *map(self._without_end_of_secret, others)]
            text = ELLIPSIS.join([*map(self._without_start_of_secret, pieces[:-1]), pieces[-1]])
        return text

    def _without_end_of_secret(self, text: str) -> str:
        """Return a text without the end of a secret at its start."""
        # A character may have been cut, too.
        text = text.lstrip("\ufffd")
        for part in self._parts:
            for start in _positions(part, text[:MIN_SECRET_CHARS]):
                if text.startswith(part[start:]):
                    return MASK + text[len(part) - start :]
        return text

    def _without_start_of_secret(self, text: str) -> str:
        """Return a text without the start of a secret at its end."""
        for part in self._parts:
            for start in _positions(part, text[-MIN_SECRET_CHARS:]):
                end = start + MIN_SECRET_CHARS
                if text.endswith(part[:end]):
                    return text[:-end] + MASK
        return text

    def lines(self, lines: Sequence[bytes | bytearray]) -> Sequence[bytes | bytearray]:
        """Return lines of JSON with all secrets masked in their strings and numbers. A line without a secret is not copied."""
        if self._text is None:
            return lines
        # One search in many lines is faster than one in each.
        if len(lines) > 1 and sum(map(len, lines)) <= MAX_JOINED_BYTES and not self._may_have_secret(b"\n".join(lines)):
            return lines
        return [self._line(line) if self._may_have_secret(line) else line for line in lines]

    def _may_have_secret(self, content: bytes | bytearray) -> bool:
        return any(spelling in content for spelling in self._bytes) or bool(self._unusual_bytes.search(content))

    def _line(self, line: bytes | bytearray) -> bytes | bytearray:
        # Only whole strings and numbers are replaced, so that the line remains JSON.
        masked = _TOKEN.sub(self._token, line)
        return line if masked == line else masked

    def _token(self, match: re.Match[bytes]) -> bytes:
        token = match[0]
        try:
            text = json.loads(token, strict=False) if token.startswith(b'"') else token.decode()
        except ValueError:
            # Not JSON, so it cannot be read to be checked.
            return json.dumps(MASK).encode()
        masked = self.text(text)
        if masked == text:
            return token
        try:
            return json.dumps(masked, ensure_ascii=token.isascii()).encode()
        except UnicodeEncodeError:
            return json.dumps(masked).encode()

    def value(self, value: Any) -> Any:
        """Return a fact or a JSON value with all secrets in its strings and keys masked."""
        match value:
            case str():
                return self.text(value)
            case dict():
                return {self.text(key): self.value(item) for key, item in value.items()}
            case tuple():
                return tuple(self.value(item) for item in value)
            case list():
                return [self.value(item) for item in value]
            case _ if attrs.has(type(value)):
                return attrs.evolve(
                    value, **{field.name: self.value(getattr(value, field.name)) for field in attrs.fields(type(value))}
                )
        return value


def _parts(secret: str) -> set[str]:
    # Tools print a key file line by line, with indentation or other line ends.
    parts = {secret, secret.strip(), *secret.splitlines()} if "\n" in secret else {secret}
    return {part for part in parts if len(part) >= MIN_SECRET_CHARS}


def _spellings(part: str) -> Iterator[str]:
    content = part.encode(errors="surrogatepass")
    yield from (quote(content, safe=""), quote(content), quote_plus(content))
    yield from (content.hex(), content.hex().upper())
    yield from _base64_spellings(content)
    spellings = {part}
    yield part
    for _ in range(JSON_LEVELS):
        spellings = {
            json.dumps(spelling, ensure_ascii=is_ascii)[1:-1] for spelling in spellings for is_ascii in (True, False)
        }
        yield from spellings


def _base64_spellings(content: bytes) -> Iterator[str]:
    """Yield the characters that the content always has in base64, for each position in a group of three bytes."""
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + content)
        # Characters of six bits, of which the first and the last may also have bits of what is around the content.
        inner = encoded[-(-before * 8 // 6) : (before + len(content)) * 8 // 6].decode()
        if len(inner) >= MIN_SECRET_CHARS:
            yield from {inner, inner.replace("+", "-").replace("/", "_")}


def _unescaped(text: str) -> str:
    """Return a text in which all spellings of a character in JSON, at any depth, are the same. Others may be, too."""
    plain = _ESCAPE.sub(lambda match: chr(int(match[1], 16)) if match[1] else "", text).translate(_LETTERS)
    # A character of two escapes.
    return plain.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def _any_spelling(part: str) -> str:
    """Return a pattern for every way to spell a text in JSON, at any depth."""
    return "".join(map(_any_character, part))


def _any_character(char: str) -> str:
    units = char.encode("utf-16-be", errors="surrogatepass").hex()
    escaped = "".join(rf"{_BACKSLASHES}u(?i:{units[start : start + 4]})" for start in range(0, len(units), 4))
    if char == "\\":
        return rf"(?:{_BACKSLASHES}|{escaped})"
    if char in _ESCAPES:
        return rf"(?:{re.escape(char)}|{_BACKSLASHES}{_ESCAPES[char]}|{escaped})"
    optional = f"(?:{_BACKSLASHES})?" if char in '"/' else ""
    return f"(?:{optional}{re.escape(char)}|{escaped})"


def _positions(part: str, piece: str) -> Iterator[int]:
    """Yield where a piece of `MIN_SECRET_CHARS` occurs in a secret."""
    if len(piece) == MIN_SECRET_CHARS:
        start = part.find(piece)
        while start >= 0:
            yield start
            start = part.find(piece, start + 1)

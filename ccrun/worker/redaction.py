"""Redacting the values of secrets in what leaves the worker. Pure.

A value is found as it is and as JSON escapes it, once and twice: the output of a tool is inside a JSON string, and a file that
the tool printed may itself be JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Final

import attrs

from ccrun.task import Secret

#: Characters. Shorter values ("true", "8080", "dev") are common in logs and protect nothing.
MIN_SECRET_CHARS: Final = 6
MASK: Final = "***"


class Redactor:
    """Redacts the secrets of one task."""

    def __init__(self, secrets: Iterable[Secret]) -> None:
        parts = {part for secret in secrets for part in _parts(secret.reveal())}
        once = {spelling for part in parts for spelling in _json_spellings(part)}
        twice = {spelling for part in once for spelling in _json_spellings(part)}
        # The longest first, so that a secret that contains another is redacted completely.
        spellings = sorted(parts | once | twice, key=len, reverse=True)
        self._text = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        # A line is JSON, so only escaped forms are replaced; replacing another form would break the line.
        self._bytes = [spelling.encode() for spelling in spellings if spelling in once | twice]

    def text(self, text: str) -> str:
        """Return a text with all secrets redacted."""
        return self._text.sub(MASK, text) if self._text else text

    def line(self, line: bytes | bytearray) -> bytes | bytearray:
        """Return a line of JSON with all secrets redacted; the same object if it has none."""
        for spelling in self._bytes:
            if spelling in line:
                line = line.replace(spelling, MASK.encode())
        return line

    def value(self, value: Any) -> Any:
        """Return a fact or a JSON value with all secrets in its strings redacted."""
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


def _json_spellings(text: str) -> tuple[str, str]:
    return json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]

"""Takes the values of secrets out of what leaves the worker. Pure.

A value is found as it is and as JSON spells it, once and twice, since a tool's output stands inside a JSON string and a file that
the tool printed may be JSON itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Final

import attrs

from ccrun.task import Secret

#: Characters. Shorter values ("true", "8080", "dev") stand everywhere in a log and protect nothing.
MIN_SECRET_CHARS: Final = 6
MASK: Final = "***"


class Redactor:
    """Knows the secrets of one task."""

    def __init__(self, secrets: Iterable[Secret]) -> None:
        parts = {part for secret in secrets for part in _parts(secret.reveal())}
        once = {spelling for part in parts for spelling in _json_spellings(part)}
        twice = {spelling for part in once for spelling in _json_spellings(part)}
        # The longest first, so that of a secret that contains another nothing is left over.
        spellings = sorted(parts | once | twice, key=len, reverse=True)
        self._text = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        # A line is JSON: what stands there as it is and is no spelling of JSON is something else, and to mask it would break it.
        self._bytes = [spelling.encode() for spelling in spellings if spelling in once | twice]

    def text(self, text: str) -> str:
        """Return the text with every secret masked."""
        return self._text.sub(MASK, text) if self._text else text

    def line(self, line: bytes | bytearray) -> bytes | bytearray:
        """Return the line of JSON with every secret masked; the very same object when there is none in it."""
        for spelling in self._bytes:
            if spelling in line:
                line = line.replace(spelling, MASK.encode())
        return line

    def value(self, value: Any) -> Any:
        """Return the JSON value with every secret masked in its strings."""
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
    # A key file is printed line by line, by tools that add margins or other line ends.
    parts = {secret, secret.strip(), *secret.splitlines()} if "\n" in secret else {secret}
    return {part for part in parts if len(part) >= MIN_SECRET_CHARS}


def _json_spellings(text: str) -> tuple[str, str]:
    return json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]

"""Takes the values of secrets out of what leaves the worker. Pure.

A value is found as it is and as JSON spells it, once and twice, since a tool's output stands inside a JSON string and a file that
the tool printed may be JSON itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Final

from ccrun.task import Secret

#: Characters. Shorter values ("true", "8080", "dev") stand everywhere in a log and protect nothing.
MIN_SECRET_CHARS: Final = 6
MASK: Final = "***"


class Redactor:
    """Knows the secrets of one task."""

    def __init__(self, secrets: Iterable[Secret]) -> None:
        spellings = sorted(
            {spelling for secret in secrets for spelling in _spellings(secret.reveal())}, key=len, reverse=True
        )
        # The longest first, so that of a secret that contains another nothing is left over.
        self._text = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        self._bytes = [spelling.encode() for spelling in spellings]

    def text(self, text: str) -> str:
        """Return the text with every secret masked."""
        return self._text.sub(MASK, text) if self._text else text

    def line(self, line: bytes | bytearray) -> bytes | bytearray:
        """Return the line with every secret masked; the very same object when there is none in it."""
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
            case list() | tuple():
                return [self.value(item) for item in value]
        return value


def _spellings(secret: str) -> set[str]:
    # A key file is printed line by line, by tools that add margins or other line ends.
    parts = {secret, secret.strip(), *secret.splitlines()} if "\n" in secret else {secret}
    once = {spelling for part in parts for spelling in (part, *_json_spellings(part))}
    twice = {spelling for part in once for spelling in _json_spellings(part)}
    return {spelling for spelling in once | twice if len(spelling) >= MIN_SECRET_CHARS}


def _json_spellings(text: str) -> tuple[str, str]:
    return json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]

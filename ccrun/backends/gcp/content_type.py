"""With which content type, and whether inline, a browser gets an object."""

from __future__ import annotations

import mimetypes
import posixpath
import re
from collections.abc import Mapping
from typing import Final

#: What mimetypes does not know, or knows by the tables of the machine as something else.
_CONTENT_TYPES: Final[Mapping[str, str]] = {
    ".diff": "text/x-diff",
    ".jsonl": "application/x-ndjson",
    ".log": "text/plain",
    ".map": "application/json",
    ".md": "text/markdown",
    ".ndjson": "application/x-ndjson",
    ".patch": "text/x-diff",
    ".toml": "application/toml",
    ".ts": "text/plain",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
}
#: What a browser shows and nothing in it can run.
_INERT: Final = re.compile(r"image/(?!svg).*|audio/.*|video/.*|text/plain|application/(json|x-ndjson)")


def presentation(name: str) -> tuple[str, str]:
    """Return as what a browser gets an object, and whether it shows it.

    An agent may write whatever it likes into a page, and all objects of a bucket share one origin with each other, behind a load
    balancer even with other things. So what could run there says what it is and is still downloaded, not opened; whoever
    wants to open a report all the same signs its URL with `response-content-disposition=inline`.
    """
    kind = _content_type(name)
    return kind, "inline" if _INERT.fullmatch(kind) else "attachment"


def _content_type(name: str) -> str:
    known = _CONTENT_TYPES.get(posixpath.splitext(name)[1].lower())
    if known:
        return known
    kind, encoding = mimetypes.guess_type(name)
    # `a.tar.gz` is no tar file.
    return kind if kind and not encoding else "application/octet-stream"

"""The content type of an object, and whether a browser may show it."""

from __future__ import annotations

import mimetypes
import posixpath
import re
from collections.abc import Mapping
from typing import Final

#: Types that mimetypes does not have, or has differently depending on the machine.
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
#: Types that a browser shows without running anything.
_INERT: Final = re.compile(r"image/(?!svg).*|audio/.*|video/.*|text/plain|application/(json|x-ndjson)")


def presentation(name: str) -> tuple[str, str]:
    """Return the content type of an object, and whether a browser may show it.

    An agent may write any script into a page, and all objects of a bucket share an origin, behind a load balancer even with other
    sites. So what could run is downloaded and not shown. To show a report anyway, sign its URL with
    `response-content-disposition=inline`.
    """
    kind = _content_type(name)
    return kind, "inline" if _INERT.fullmatch(kind) else "attachment"


def _content_type(name: str) -> str:
    known = _CONTENT_TYPES.get(posixpath.splitext(name)[1].lower())
    if known:
        return known
    kind, encoding = mimetypes.guess_type(name)
    # `a.tar.gz` is not a tar file.
    return kind if kind and not encoding else "application/octet-stream"

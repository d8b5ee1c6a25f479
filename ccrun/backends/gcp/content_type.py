"""The content type and content disposition of objects, which decide whether a browser displays or downloads them."""

from __future__ import annotations

import mimetypes
import posixpath
import re
from collections.abc import Mapping
from typing import Final

#: Extensions that `mimetypes` does not know, or that the tables of the machine may map to another type.
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
#: Types that a browser displays without running anything in them.
_INERT: Final = re.compile(r"image/(?!svg).*|audio/.*|video/.*|text/plain|application/(json|x-ndjson)")


def presentation(name: str) -> tuple[str, str]:
    """Return the content type and the content disposition of an object.

    An agent may write arbitrary content, and all objects of a bucket share an origin, behind a load balancer even with other
    sites. So types that can run code are downloaded and not displayed. To display a report in spite of this, sign its URL
    with `response-content-disposition=inline`.
    """
    kind = _content_type(name)
    return kind, "inline" if _INERT.fullmatch(kind) else "attachment"


def _content_type(name: str) -> str:
    known = _CONTENT_TYPES.get(posixpath.splitext(name)[1].lower())
    if known:
        return known
    kind, encoding = mimetypes.guess_type(name)
    # With an encoding, such as gzip for `a.tar.gz`, the guessed type is that of the content before encoding.
    return kind if kind and not encoding else "application/octet-stream"

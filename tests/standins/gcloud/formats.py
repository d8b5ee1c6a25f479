"""The output of gcloud for `--format='value(…)'` and `--flatten`."""

from __future__ import annotations

import json
import re

from .project import Call, fail

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


def format_output(call: Call, resource: Any) -> str:
    """Return a resource, or a list of resources, as `--format` and `--flatten` define it."""
    rows = resource if isinstance(resource, list) else [resource]
    path = ""
    for part in call.get("flatten", "").split("[]")[:-1]:
        path += part
        rows = [row for each in rows for row in _flatten(each, path)]
    match = re.fullmatch(r"value(?:\[separator=['\"](.)['\"]\])?\((.*)\)", call["format"])
    if match is None:
        fail(f"The stand-in does not support this format: {call['format']}", 2)
    separator, paths = match.groups()
    lines = ((separator or "\t").join(_to_text(_get_path(row, path)) for path in paths.split(",")) for row in rows)
    return "".join(f"{line}\n" for line in lines)


def _split_path(path: str) -> list[str | int]:
    """Return the parts of a key of a projection: names, and numbers in brackets."""
    parts = re.findall(r"'([^']+)'|([A-Za-z_][A-Za-z0-9_-]*)|\[(\d+)\]", path)
    return [int(number) if number else quoted or plain for quoted, plain, number in parts]


def _get_path(resource: Any, path: str) -> Any:
    for part in _split_path(path):
        if isinstance(part, int):
            resource = resource[part] if isinstance(resource, list) and len(resource) > part else None
        else:
            resource = resource.get(part) if isinstance(resource, dict) else None
    return resource


def _flatten(resource: Any, path: str) -> Iterator[Any]:
    """Yield a copy of the resource for each element of the list at the path, with the element in place of the list."""
    *parents, last = _split_path(path)
    elements = _get_path(resource, path)
    if not isinstance(elements, list):
        # gcloud prints an empty row for a resource without the list.
        yield None
        return
    for element in elements:
        copy = json.loads(json.dumps(resource))
        parent = copy
        for part in parents:
            parent = parent[part]
        parent[last] = element
        yield copy


def _to_text(value: Any) -> str:
    if value is None:
        return ""
    return ";".join(map(str, value)) if isinstance(value, list) else str(value)

"""Stored JSON to facts and back: camelCase names, strict types.

Owns the JSON form of the sealed request, the task record and the callback. The only module that imports cattrs.
"""

from __future__ import annotations

import base64
import datetime as dt
import enum
import functools
import json
from collections.abc import Mapping
from typing import Any, Final

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from ccrun import javascript_json
from ccrun.errors import SealError, StorageError
from ccrun.task import Secret, TaskRecord, TaskSpec

# --- facts to JSON and back ------------------------------------------------------------------------------------------

#: Names that are not the attribute in camelCase.
_JSON_NAMES: Final = {"anthropic_oauth_token": "anthropicOAuthToken"}
#: Fields of a stored record that no caller sees; the webhook's `rounds` is another.
_INTERNAL_FIELDS: Final = frozenset({"sealedCallbackUrl", "idempotencyDigest", "writeId"})
#: Fields of a record that are left out where there is nothing to tell; all others are there with null.
_OPTIONAL_FIELDS: Final = ("uploadedFiles", "gitCommit")
#: The fields of a callback that are always there, in the order in which they are told.
_CALLBACK_FIELDS: Final = ("taskId", "status", "exitCode", "logsPath", "summary", "error", "metadata")


def to_json(value: Any) -> bytes:
    """Return JSON values as one line of JSON in UTF-8."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        # A NaN, which JSON does not have, or a lone surrogate, which UTF-8 does not have: printed as null and as an escape.
        return javascript_json.dumps(value)


def spec_to_bytes(spec: TaskSpec) -> bytes:
    """Return the task as it is sealed: every default spelled out, every secret plain."""
    return to_json(_converter().unstructure(spec))


def spec_from_values(values: Mapping[str, Any]) -> TaskSpec:
    """Return the task that checked JSON values describe."""
    return _converter().structure(values, TaskSpec)


def spec_from_bytes(content: bytes) -> TaskSpec:
    """Return the task that was sealed. Fields that a newer version added are ignored.

    Raises:
        SealError: These bytes are no task.
    """
    try:
        return _converter().structure(json.loads(content), TaskSpec)
    except _DECODE_ERRORS as error:
        # The cause would show the plain text of the task.
        raise SealError(
            f"The sealed payload holds no task that this version can read ({type(error).__name__})."
        ) from None


def record_to_bytes(record: TaskRecord) -> bytes:
    """Return the record as it is stored. Times keep their milliseconds."""
    return to_json(_converter().unstructure(record))


def record_from_bytes(content: bytes) -> TaskRecord:
    """Return the record that was stored. Fields that a newer version added are ignored.

    Raises:
        StorageError: These bytes are no record.
    """
    try:
        return _converter().structure(json.loads(content), TaskRecord)
    except _DECODE_ERRORS as error:
        raise StorageError("A stored task record cannot be read.") from error


def record_to_public(record: TaskRecord) -> dict[str, Any]:
    """Return the record as callers see it, as JSON values.

    Its shape is stable: what is not known is null; `uploadedFiles` and `gitCommit` alone are absent when there are none.
    """
    public = _converter().unstructure(record)
    if public["webhook"] is not None:
        del public["webhook"]["rounds"]
    return {
        name: value
        for name, value in public.items()
        if name not in _INTERNAL_FIELDS and not (name in _OPTIONAL_FIELDS and value is None)
    }


def callback_body(record: TaskRecord) -> bytes:
    """Return the body of the callback, which is also the data of the stream's `done`. The same record gives the same bytes."""
    public = record_to_public(record)
    body = {name: public[name] for name in _CALLBACK_FIELDS}
    body |= {name: public[name] for name in (*_OPTIONAL_FIELDS, "actionErrors") if public.get(name)}
    return javascript_json.dumps(body)


#: What structuring a value of another shape raises, and what reading bytes that are no JSON does.
_DECODE_ERRORS: Final = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@functools.cache
def _converter() -> cattrs.Converter:
    """Return the one converter; made when it is first needed, since that takes some milliseconds of every start."""
    converter = cattrs.Converter(detailed_validation=False)
    for kind in (str, int, float, bool):
        converter.register_structure_hook(kind, _exact)
    # Enumerations are strings too, and would fall under that.
    converter.register_structure_hook(enum.StrEnum, lambda value, kind: kind(value))
    converter.register_unstructure_hook(enum.StrEnum, lambda member: member.value)
    converter.register_structure_hook(Secret, lambda value, _: Secret(_exact(value, str)))
    converter.register_unstructure_hook(Secret, Secret.reveal)
    converter.register_structure_hook(dt.datetime, lambda value, _: dt.datetime.fromisoformat(_exact(value, str)))
    converter.register_unstructure_hook(dt.datetime, _format_time)
    converter.register_structure_hook(bytes, lambda value, _: base64.b64decode(_exact(value, str), validate=True))
    converter.register_unstructure_hook(bytes, lambda value: base64.b64encode(value).decode())
    # JSON of any shape goes through as it is, however deeply it is nested.
    converter.register_structure_hook_func(lambda kind: kind == Mapping[str, Any], lambda value, _: _exact(value, dict))
    converter.register_unstructure_hook_func(lambda kind: kind == Mapping[str, Any], lambda value: value)
    converter.register_structure_hook_factory(
        attrs.has, lambda fact: make_dict_structure_fn(fact, converter, **_json_names(fact))
    )
    converter.register_unstructure_hook_factory(
        attrs.has, lambda fact: make_dict_unstructure_fn(fact, converter, **_json_names(fact))
    )
    return converter


def _exact(value: Any, kind: type) -> Any:
    """Return a value of just this type, where cattrs would convert; a double may have been printed as a whole number."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _format_time(moment: dt.datetime) -> str:
    return moment.astimezone(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _json_names(fact: type) -> dict[str, Any]:
    return {field.name: override(rename=_json_name(field.name)) for field in attrs.fields(fact)}


def _json_name(attribute: str) -> str:
    first, *others = attribute.split("_")
    return _JSON_NAMES.get(attribute) or first + "".join(word.capitalize() for word in others)

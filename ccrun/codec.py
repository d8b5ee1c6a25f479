"""Conversion between facts and JSON: camelCase names, strict types.

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
from ccrun.results import GitCommit, Isolation
from ccrun.spec import GitToken, TaskSpec
from ccrun.task import CallbackState, Secret, Summary, TaskRecord
from ccrun.urls import GitUrl, parse_git_url

#: JSON names that are not the attribute's name in camelCase.
_JSON_NAMES: Final = {"anthropic_oauth_token": "anthropicOAuthToken"}
#: Fields of a stored record that clients do not see, like `rounds` of the callback.
_INTERNAL_FIELDS: Final = frozenset({"sealedCallbackUrl", "idempotencyDigest", "launchRejected", "writeId"})
#: Fields of a record that are absent instead of null.
_OPTIONAL_FIELDS: Final = ("uploadedFiles", "gitCommit", "isolation")
#: Fields that are absent instead of null or empty.
_OMITTED_BY_DEFAULT: Final = {
    GitCommit: ("committed", "recovery"),
    Isolation: ("reasons", "refused_hosts"),
    Summary: ("background_tasks", "api_error", "mcp_servers"),
}
#: The fields that every callback has, in order.
_CALLBACK_FIELDS: Final = ("taskId", "status", "exitCode", "logsPath", "summary", "error", "metadata")
#: The fields that a callback has when there is something to say, in order.
_OPTIONAL_CALLBACK_FIELDS: Final = ("uploadedFiles", "gitCommit", "actionErrors")


def to_json(value: Any) -> bytes:
    """Return JSON values as one line of JSON in UTF-8."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        # A NaN, which JSON does not have, or a lone surrogate, which UTF-8 does not have: printed as null and as an escape.
        return javascript_json.dumps(value)


def spec_to_bytes(spec: TaskSpec) -> bytes:
    """Return the JSON of a request to be sealed, with all defaults and with its secrets in plain text."""
    return to_json(_converter().unstructure(spec))


def spec_from_values(values: Mapping[str, Any]) -> TaskSpec:
    """Return the request that checked JSON values describe."""
    return _converter().structure(values, TaskSpec)


def spec_from_bytes(content: bytes) -> TaskSpec:
    """Return a request that was sealed. Fields that a newer version added are ignored.

    Raises:
        SealError: The bytes are not a request.
    """
    try:
        return _converter().structure(json.loads(content), TaskSpec)
    except _DECODE_ERRORS as error:
        # The cause would reveal the plain text of the request.
        raise SealError(
            f"The sealed payload is not a task that this version can read ({type(error).__name__})."
        ) from None


def record_to_bytes(record: TaskRecord) -> bytes:
    """Return the JSON of a record to be stored. Times are rounded down to milliseconds."""
    return to_json(_converter().unstructure(record))


def record_from_bytes(content: bytes) -> TaskRecord:
    """Return a stored record. Fields that a newer version added are ignored.

    Raises:
        StorageError: The bytes are not a record.
    """
    try:
        return _converter().structure(json.loads(content), TaskRecord)
    except _DECODE_ERRORS as error:
        raise StorageError("A stored task record cannot be read.") from error


def record_to_public(record: TaskRecord) -> dict[str, Any]:
    """Return a record as clients see it, as JSON values.

    Every record has the same fields, null where there is no value, except for `uploadedFiles`, `gitCommit` and some in `summary`.
    """
    public = _converter().unstructure(record)
    if public["webhook"] is not None:
        del public["webhook"]["rounds"]
        if record.webhook is not None and record.webhook.state is CallbackState.DELIVERING:
            # It is the end of a lease, not the time of an attempt.
            public["webhook"]["nextAttemptAt"] = None
    return {
        name: value
        for name, value in public.items()
        if name not in _INTERNAL_FIELDS and not (name in _OPTIONAL_FIELDS and value is None)
    }


def isolation_to_public(isolation: Isolation) -> dict[str, Any]:
    """Return an isolation as clients see it, as JSON values."""
    return dict(_converter().unstructure(isolation))


def callback_body(record: TaskRecord) -> bytes:
    """Return the body of the callback, which is also the data of the `done` event. Equal records give equal bytes."""
    public = record_to_public(record)
    body = {name: public[name] for name in _CALLBACK_FIELDS}
    body |= {name: public[name] for name in _OPTIONAL_CALLBACK_FIELDS if public.get(name)}
    return javascript_json.dumps(body)


#: What parsing bytes that are not JSON raises, and what structuring a value of another shape raises.
_DECODE_ERRORS: Final = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@functools.cache
def _converter() -> cattrs.Converter:
    """Return the converter. It is made on first use, since that takes some milliseconds of every start."""
    converter = cattrs.Converter(detailed_validation=False)
    for kind in (str, int, float, bool):
        converter.register_structure_hook(kind, _exact)
    # Members of enumerations are strings too, and need hooks of their own.
    converter.register_structure_hook(enum.StrEnum, lambda value, kind: kind(value))
    converter.register_unstructure_hook(enum.StrEnum, lambda member: member.value)
    converter.register_structure_hook(Secret, lambda value, _: Secret(_exact(value, str)))
    converter.register_unstructure_hook(Secret, Secret.reveal)
    # A request has been parsed already; a stored payload has the text.
    converter.register_structure_hook(
        GitUrl, lambda value, _: value if isinstance(value, GitUrl) else parse_git_url(_exact(value, str))
    )
    converter.register_unstructure_hook(GitUrl, lambda url: url.url)
    converter.register_structure_hook(GitToken, lambda value, _: GitToken.parse(_exact(value, str)))
    converter.register_unstructure_hook(GitToken, lambda token: token.text.reveal())
    converter.register_structure_hook(dt.datetime, lambda value, _: dt.datetime.fromisoformat(_exact(value, str)))
    converter.register_unstructure_hook(dt.datetime, _format_time)
    converter.register_structure_hook(bytes, lambda value, _: base64.b64decode(_exact(value, str), validate=True))
    converter.register_unstructure_hook(bytes, lambda value: base64.b64encode(value).decode())
    # JSON of any shape is passed through, however deeply it is nested.
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
    """Return a value of exactly this type, where cattrs would convert it. An integer is accepted for a float."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _format_time(moment: dt.datetime) -> str:
    return moment.astimezone(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _json_names(fact: type) -> dict[str, Any]:
    omitted = _OMITTED_BY_DEFAULT.get(fact, ())
    return {
        field.name: override(rename=_json_name(field.name), omit_if_default=field.name in omitted)
        for field in attrs.fields(fact)
    }


def _json_name(attribute: str) -> str:
    first, *others = attribute.split("_")
    return _JSON_NAMES.get(attribute) or first + "".join(word.capitalize() for word in others)

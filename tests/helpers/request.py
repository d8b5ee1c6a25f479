"""Request bodies, and what `parse_request` returns for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import pytest

from ccrun.api.request import Defaults, parse_request
from ccrun.errors import InvalidRequest
from ccrun.spec import TaskSpec
from ccrun.task import TaskId, TaskType

#: A valid body with no more fields than `/run-async` requires.
MINIMAL: Final[Mapping[str, Any]] = {
    "prompt": "Fix the tests.",
    "anthropicApiKey": "made-up-key",
    "callbackUrl": "https://example.com/hook",
}


def parse(body: object, *, task_type: TaskType = TaskType.ASYNC, **defaults: Any) -> TaskSpec:
    """Return the task that a body describes.

    Args:
        body: The bytes of a body, or the value to print as JSON.
        defaults: Fields of `Defaults`.
    """
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_request(content, task_type=task_type, task_id=TaskId("made-id"), defaults=Defaults(**defaults))


def errors_of(body: object, *, task_type: TaskType = TaskType.ASYNC, **defaults: Any) -> dict[str, str]:
    """Return the errors of an invalid body, message by field. Check that the first message is the one of the exception."""
    with pytest.raises(InvalidRequest) as caught:
        parse(body, task_type=task_type, **defaults)
    assert caught.value.message == caught.value.errors[0].message
    return {error.field: error.message for error in caught.value.errors}


def field_errors(field: str, value: object, **defaults: Any) -> dict[str, str]:
    """Return the errors of a minimal body with one invalid field."""
    return errors_of({**MINIMAL, field: value}, **defaults)

from __future__ import annotations

import inspect
import re

import pytest

from ccrun import errors
from ccrun.errors import (
    BlobChanged,
    BlobExists,
    BlobNotFound,
    Busy,
    CcrunError,
    FieldError,
    InvalidRequest,
    StorageError,
    TaskNotFound,
)

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CcrunError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_default_message(kind: type[CcrunError]) -> None:
    """The default message of an error is one sentence: the docstring of its class."""
    error = kind.__new__(kind)
    CcrunError.__init__(error)
    assert re.fullmatch(r"[A-Z][^\n]*\.", error.message)
    assert error.message == str(error)


def test_given_message_replaces_the_default() -> None:
    """An error with a message has that message instead of the default."""
    assert [TaskNotFound().message, TaskNotFound("There is no task t-1.").message] == [
        "There is no task with this ID.",
        "There is no task t-1.",
    ]


def test_invalid_request_has_the_message_of_its_first_error() -> None:
    """The message is that of the first field error, unless another is given; `errors` has all of them."""
    errors = [FieldError("prompt", "prompt is required"), FieldError("taskId", "taskId must be URL-safe")]
    assert ("prompt is required", errors) == (InvalidRequest(errors).message, InvalidRequest(errors).errors)
    assert InvalidRequest(errors, "The request is broken.").message == "The request is broken."


def test_busy_has_a_retry_delay() -> None:
    """`retry_after` is five seconds unless another delay is given."""
    assert [5, 30] == [Busy().retry_after, Busy("It is full.", retry_after=30).retry_after]


def test_object_errors_are_storage_errors() -> None:
    """A handler of `StorageError` also catches failed preconditions."""
    assert all(issubclass(error, StorageError) for error in (BlobNotFound, BlobExists, BlobChanged))

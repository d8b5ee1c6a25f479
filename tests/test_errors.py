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
def test_every_error_has_a_sentence(kind: type[CcrunError]) -> None:
    """What an error says by itself, by its class's docstring, is one sentence for a person."""
    error = kind.__new__(kind)
    CcrunError.__init__(error)
    assert re.fullmatch(r"[A-Z][^\n]*\.", error.message)
    assert error.message == str(error)


def test_own_sentence_replaces_that_of_the_class() -> None:
    """Where the fault is known better, the error says that."""
    assert [TaskNotFound().message, TaskNotFound("There is no task t-1.").message] == [
        "There is no task with this ID.",
        "There is no task t-1.",
    ]


def test_invalid_request_speaks_of_its_first_fault() -> None:
    """A request with many faults carries them all and says the first one."""
    errors = [FieldError("prompt", "prompt is required"), FieldError("taskId", "taskId must be URL-safe")]
    assert ("prompt is required", errors) == (InvalidRequest(errors).message, InvalidRequest(errors).errors)
    assert InvalidRequest(errors, "The request is broken.").message == "The request is broken."


def test_busy_tells_when_to_come_back() -> None:
    """A caller who is sent away knows after how many seconds a further try makes sense."""
    assert [5, 30] == [Busy().retry_after, Busy("It is full.", retry_after=30).retry_after]


def test_conditions_of_objects_are_errors_of_the_storage() -> None:
    """Whoever minds only that the storage failed catches its preconditions too."""
    assert {BlobNotFound, BlobExists, BlobChanged} == set(StorageError.__subclasses__())

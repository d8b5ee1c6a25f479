"""The error tree.

Every error that ccrun raises on purpose is a `CcrunError`. Errors hold plain values; the first paragraph of the docstring
is the message when none is given. Which HTTP status an error becomes is told in one table, in `ccrun.api.app`.
"""

from __future__ import annotations

import inspect
from typing import Final

import attrs


class CcrunError(Exception):
    """Something that ccrun has to do could not be done."""

    def __init__(self, message: str | None = None) -> None:
        self.message = message or inspect.cleandoc(type(self).__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        super().__init__(self.message)


class ConfigError(CcrunError):
    """A setting has a value that is not allowed."""


#: Exit statuses of sysexits(3): a setting is wrong; something that ccrun needs failed.
EX_CONFIG: Final = 78
EX_SOFTWARE: Final = 70


def exit_status(error: CcrunError) -> int:
    """Return what a command that ends with this error tells whoever started it."""
    return EX_CONFIG if isinstance(error, ConfigError) else EX_SOFTWARE


@attrs.frozen
class FieldError:
    """One thing that is wrong with a request: where (in wire names) and what is allowed."""

    field: str
    message: str


class InvalidRequest(CcrunError):
    """The request is not valid.

    Args:
        faults: Every fault that was found, at least one.
        message: The sentence for `error`; by default the message of the first fault.
    """

    def __init__(self, errors: list[FieldError], message: str | None = None) -> None:
        self.errors = errors
        super().__init__(message or errors[0].message)


class NotConfigured(CcrunError):
    """The service lacks a setting that this request needs."""


class TaskNotFound(CcrunError):
    """There is no task of that ID."""


class TaskExists(CcrunError):
    """The task ID is in use."""


class TaskAlreadyFinished(CcrunError):
    """The task is already over."""


class NotRedeliverable(CcrunError):
    """There is no callback to deliver again."""


class IllegalTransition(CcrunError):
    """A task cannot go from its present state to that one."""


class Busy(CcrunError):
    """The service cannot take this on right now; try again.

    Args:
        retry_after: After how many seconds a further try makes sense.
    """

    def __init__(self, message: str | None = None, *, retry_after: int = 5) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class LaunchFailed(CcrunError):
    """The task could not be started."""


class StorageError(CcrunError):
    """The storage does not answer."""


class BlobNotFound(StorageError):
    """There is no object of that name."""


class BlobExists(StorageError):
    """There is already an object of that name."""


class BlobChanged(StorageError):
    """The object was changed by somebody else meanwhile."""


class FileUnreadable(CcrunError):
    """The file cannot be read."""


class SealError(CcrunError):
    """The sealed payload cannot be opened."""


class KeyServiceError(CcrunError):
    """The key service does not answer."""


class CredentialUnusable(CcrunError):
    """The credential of the model API is empty, or has a space, a line break or a character outside ASCII in it."""

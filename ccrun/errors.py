"""The exception hierarchy.

Every exception that ccrun raises on purpose is a `CcrunError`. When no message is given, the first paragraph of the class's
docstring is the message. The API maps exceptions to HTTP statuses in one table.
"""

from __future__ import annotations

import inspect
from typing import Final

import attrs


class CcrunError(Exception):
    """The operation failed."""

    def __init__(self, message: str | None = None) -> None:
        self.message = message or inspect.cleandoc(type(self).__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        super().__init__(self.message)


class ConfigError(CcrunError):
    """A setting has a value that is not allowed."""


#: Exit statuses from sysexits(3): a configuration error, and an internal error.
EX_CONFIG: Final = 78
EX_SOFTWARE: Final = 70


def exit_status(error: CcrunError) -> int:
    """Return the exit status of a command that fails with this error."""
    return EX_CONFIG if isinstance(error, ConfigError) else EX_SOFTWARE


@attrs.frozen
class FieldError:
    """One invalid field of a request: its path in JSON names, and a message that says what is allowed."""

    field: str
    message: str


class InvalidRequest(CcrunError):
    """The request is not valid.

    Args:
        errors: All errors that were found, at least one.
        message: The message; by default that of the first error.
    """

    def __init__(self, errors: list[FieldError], message: str | None = None) -> None:
        self.errors = errors
        super().__init__(message or errors[0].message)


class NotConfigured(CcrunError):
    """A setting that this request needs is missing."""


class TaskNotFound(CcrunError):
    """There is no task with this ID."""


class TaskExists(CcrunError):
    """The task ID is already in use."""


class TaskAlreadyFinished(CcrunError):
    """The task has already finished."""


class NotRedeliverable(CcrunError):
    """The task has no callback that could be delivered again."""


class IllegalTransition(CcrunError):
    """The task cannot change from its current status to the requested one."""


class Busy(CcrunError):
    """The service cannot accept this request now; retry later.

    Args:
        retry_after: Seconds after which the client should retry.
    """

    def __init__(self, message: str | None = None, *, retry_after: int = 5) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class LaunchFailed(CcrunError):
    """The task could not be started."""


class StorageError(CcrunError):
    """The storage does not answer."""


class BlobNotFound(StorageError):
    """There is no object with this name."""


class BlobExists(StorageError):
    """There is already an object with this name."""


class BlobChanged(StorageError):
    """The object was changed by another process."""


class FileUnreadable(CcrunError):
    """The file cannot be read."""


class SealError(CcrunError):
    """The sealed payload cannot be opened."""


class KeyServiceError(CcrunError):
    """The key service does not answer."""


class CredentialUnusable(CcrunError):
    """The model API credential is empty or contains a space, a line break or a non-ASCII character."""

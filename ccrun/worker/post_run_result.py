"""The results of the actions after a run, which are added to the outcome of the task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import attrs
import structlog

from ccrun.errors import CcrunError
from ccrun.redaction import Redactor
from ccrun.results import ActionError, GitCommit, UploadedFile
from ccrun.task import Outcome

log = structlog.get_logger()


@attrs.define(kw_only=True)
class PostRunResult:
    """What has been done so far. It stays valid when the rest is cancelled."""

    git_commit: GitCommit | None = None
    uploaded: list[UploadedFile] | None = None
    errors: list[ActionError] = attrs.field(factory=list)
    #: Whether changes that should be pushed exist only in the workspace.
    is_unpushed: bool = False
    #: Whether files of Git LFS were left out of the push.
    lfs_left_out: bool = False

    def fail(self, action: str, sentence: str) -> None:
        """Record that an action has failed."""
        self.errors.append(ActionError(action=action, error=sentence))

    @contextlib.contextmanager
    def errors_recorded(self, action: str) -> Iterator[None]:
        """Record an error as that of the action, whatever it is."""
        try:
            yield
        except CcrunError as error:
            self.fail(action, error.message)
        except Exception as error:
            # No exception may lose the outcome of the task.
            log.exception("action_crashed", message="Unexpected error in a post-run action", action=action)
            self.fail(action, f"An internal error ({type(error).__name__}); see the log of the worker.")

    def apply_to(self, outcome: Outcome, redactor: Redactor) -> Outcome:
        """Return the outcome with what was done."""
        return attrs.evolve(
            outcome,
            git_commit=redactor.value(self.git_commit),
            uploaded_files=None if self.uploaded is None else redactor.value(tuple(self.uploaded)),
            action_errors=redactor.value(tuple(self.errors)),
        )

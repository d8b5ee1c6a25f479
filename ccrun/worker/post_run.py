"""The actions after a successful run: commit, push and uploads; and a patch of the changes when work would be lost.

Each action fails on its own, with one sentence on the record. A failed action does not fail the task.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final

import attrs
import structlog

from ccrun.errors import CcrunError
from ccrun.globs import Globs
from ccrun.results import ActionError, GitCommit, UploadedFile
from ccrun.spec import GitAction, TaskSpec, UploadAction
from ccrun.store import Store
from ccrun.task import Outcome, TaskId
from ccrun.worker.dependencies import PostRunLimits
from ccrun.worker.git import push
from ccrun.worker.git.changes import DOTENV, Changes, Staged
from ccrun.worker.git.checkout import Checkout, Origin
from ccrun.worker.git.clone import PackSnapshot
from ccrun.worker.git.run import GitError
from ccrun.worker.lines import worker_line
from ccrun.worker.redaction import Redactor
from ccrun.worker.uploads import upload_files
from ccrun.worker.workspace import Workspace, private_directory

log = structlog.get_logger()

#: The path of the patch below the uploads of the task.
RESCUE_PATCH: Final = "rescue.patch"
#: What each file's part of a patch starts with, after the first.
_FILE_HEADER: Final = b"\ndiff --git "
#: Paths that one sentence names at most.
MAX_NAMED_PATHS: Final = 5


@attrs.define(kw_only=True)
class PostRunResult:
    """What has been done so far. It stays valid when the rest is cancelled."""

    git_commit: GitCommit | None = None
    uploaded: list[UploadedFile] | None = None
    errors: list[ActionError] = attrs.field(factory=list)
    #: Whether changes that should be pushed exist only in the workspace.
    is_unpushed: bool = False

    def fail(self, action: str, sentence: str) -> None:
        """Record that an action has failed."""
        self.errors.append(ActionError(action=action, error=sentence))

    def apply_to(self, outcome: Outcome, redactor: Redactor) -> Outcome:
        """Return the outcome with what was done."""
        return attrs.evolve(
            outcome,
            git_commit=redactor.value(self.git_commit),
            uploaded_files=None if self.uploaded is None else tuple(self.uploaded),
            action_errors=redactor.value(tuple(self.errors)),
        )


@attrs.frozen(kw_only=True)
class PostRun:
    """Runs the actions that the request asks for.

    Args:
        log_line: Adds a line to the log of the task.
    """

    store: Store
    spec: TaskSpec
    workspace: Workspace
    checkout: Checkout | None
    redactor: Redactor
    log_line: Callable[[bytes | bytearray], Awaitable[None]]
    limits: PostRunLimits = attrs.field(factory=PostRunLimits)
    result: PostRunResult = attrs.field(factory=PostRunResult, init=False)

    @property
    def task_id(self) -> TaskId:
        """The ID of the task."""
        return self.spec.task_id

    async def run(self) -> None:
        """Commit, push and upload. git comes first, so that the uploads can be matched to a commit."""
        actions = self.spec.post_execution_actions
        if actions.git is not None and (actions.git.commit or actions.git.push) and self.checkout is not None:
            with self._errors_recorded("git"):
                await self._commit_and_push(self.checkout, actions.git)
        if actions.upload_files is not None:
            self.result.uploaded = []
            with self._errors_recorded("uploadFiles"):
                self.result.uploaded += await self._upload(actions.upload_files)

    async def rescue(self) -> None:
        """Upload all changes as a patch, if there are any. Errors are recorded like those of an action."""
        if self.checkout is None or self.checkout.origin is None:
            return
        with self._errors_recorded("rescue"):
            found = await self.checkout.changes()
            staged = await found.stage()
            if staged.is_empty and found.head == found.base:
                return
            async with private_directory(self.task_id) as directory:
                path = directory / RESCUE_PATCH
                is_complete = await self._write_patch(found, path)
                size = (await asyncio.to_thread(path.stat)).st_size
                if not size:
                    if is_complete:
                        # Only files that must not be shown were changed.
                        return
                    raise CcrunError(
                        f"The changes are lost: no file's patch fits into {self.limits.rescue_bytes} bytes."
                    )
                with await asyncio.to_thread(path.open, "rb") as file:
                    url = await self.store.add_upload(self.task_id, RESCUE_PATCH, file, size=size)
            uploaded = UploadedFile(original_path=RESCUE_PATCH, gcs_path=url, size_bytes=size)
            self.result.uploaded = [*(self.result.uploaded or ()), uploaded]
            if not is_complete:
                self.result.fail(
                    "rescue",
                    f"The patch of the changes was cut at {self.limits.rescue_bytes} bytes; the rest is lost.",
                )
            await self._log("rescue", f"The changes are stored as {uploaded.gcs_path}.")

    @contextlib.contextmanager
    def _errors_recorded(self, action: str) -> Iterator[None]:
        try:
            yield
        except CcrunError as error:
            self.result.fail(action, error.message)
        except Exception as error:
            # No exception may lose the outcome of the task.
            log.exception("action_crashed", message="Unexpected error in a post-run action", action=action)
            self.result.fail(action, f"An internal error ({type(error).__name__}); see the log of the worker.")

    async def _log(self, step: str, sentence: str, **fields: Any) -> None:
        await self.log_line(worker_line(step, content=sentence, **fields))

    # Uploads.

    async def _upload(self, action: UploadAction) -> tuple[UploadedFile, ...]:
        excluded = (DOTENV,) if self.spec.environment_secrets else ()
        try:
            async with asyncio.timeout(self.limits.uploads):
                uploads = await upload_files(
                    self.store, self.task_id, self.workspace.repository, action, excluded=excluded
                )
        except TimeoutError:
            raise CcrunError(f"The uploads did not finish within {self.limits.uploads / 60:g} minutes.") from None
        for error in uploads.errors:
            self.result.fail("uploadFiles", error)
        await self._log("upload", f"Uploaded {len(uploads.files)} files.")
        return uploads.files

    # git.

    async def _commit_and_push(self, checkout: Checkout, action: GitAction) -> None:
        self.result.is_unpushed = action.push
        found = await checkout.changes()
        staged = await found.stage(Globs(action.files).matches if action.files else None)
        self._record_skipped(staged)
        identity = await found.identity()
        message = action.commit_message or f"Changes by Claude Code\n\nTask: {self.task_id}"
        commit = found.head
        if action.commit and not staged.is_empty:
            commit = await found.commit(staged, message, identity)
            await self._log("git", f"Committed {commit[:12]}.", commit=commit)
        if commit is None or commit == found.base:
            self.result.is_unpushed = False
            self.result.git_commit = GitCommit(
                sha=commit, message="Nothing to commit", pushed=False, branch=action.branch, committed=False
            )
            await self._log("git", "Nothing to commit.")
            return
        if commit == found.head:
            message = await found.message(commit)
        git_commit = GitCommit(sha=commit, message=message, pushed=False, branch=action.branch)
        self.result.git_commit = git_commit
        if await found.contains_dotenv():
            raise GitError("The agent has committed .env, which holds secrets, so nothing was pushed.")
        origin = checkout.origin
        if not action.push or origin is None or origin.snapshot is None:
            return
        wanted = push.Push(
            branch=action.branch, base=found.base, identity=identity, rebases=action.conflict_strategy == "auto"
        )
        pushed = await self._push(checkout, origin, origin.snapshot, found, commit, wanted)
        self.result.is_unpushed = False
        self.result.git_commit = attrs.evolve(git_commit, sha=pushed.sha, pushed=True, recovery=pushed.recovery)
        await self._log("git", f"Pushed {pushed.sha[:12]} to {action.branch}.", commit=pushed.sha)

    async def _push(
        self,
        checkout: Checkout,
        origin: Origin,
        snapshot: PackSnapshot,
        found: Changes,
        commit: str,
        wanted: push.Push,
    ) -> push.Pushed:
        async with private_directory(self.task_id) as directory:
            pack = directory / "pack"
            with await asyncio.to_thread(pack.open, "xb") as target:
                await found.pack(commit, target)
            # No process that the task has started is left at this point: see `ccrun.process`.
            bare_repo = await push.import_commit(
                checkout.worker_git(directory),
                directory / "repository",
                commit=commit,
                pack=pack,
                clone=origin.clone,
                snapshot=snapshot,
                shallow=found.shallow,
            )
            return await push.push(bare_repo, origin.access, wanted, seconds=self.limits.push)

    def _record_skipped(self, staged: Staged) -> None:
        if staged.left_out:
            paths = ", ".join(staged.left_out[:MAX_NAMED_PATHS])
            others = " and others" if len(staged.left_out) > MAX_NAMED_PATHS else ""
            self.result.fail("git", f"Repositories inside the repository were left out of the commit: {paths}{others}.")
        if staged.unreadable:
            self.result.fail("git", f"Not all files could be committed: {staged.unreadable}")

    # The patch.

    async def _write_patch(self, found: Changes, path: Path) -> bool:
        """Write the patch, with secrets redacted. Return whether it is complete."""
        with await asyncio.to_thread(path.open, "x+b") as file:
            is_complete = await found.patch(file, max_bytes=self.limits.rescue_bytes)
            await asyncio.to_thread(_finish_patch, file, self.redactor, is_complete=is_complete)
        return is_complete


def _finish_patch(file: IO[bytes], redactor: Redactor, *, is_complete: bool) -> None:
    """Redact the secrets in a patch. Cut an incomplete one after its last complete file."""
    file.seek(0)
    content = file.read()
    if not is_complete:
        content = content[: content.rfind(_FILE_HEADER) + 1]
    file.seek(0)
    file.truncate()
    file.write(redactor.text(content.decode(errors="surrogateescape")).encode(errors="surrogateescape"))

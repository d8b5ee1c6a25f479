"""What follows a successful run: commit, push and uploads; and a patch of the changes when work would be lost.

Each action fails separately, with one sentence. No failure of an action fails the task.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any, Final

import attrs
import structlog

from ccrun.errors import CcrunError
from ccrun.globs import Globs
from ccrun.store import Store
from ccrun.task import GitAction, Outcome, TaskId, TaskSpec, UploadedFile
from ccrun.worker.git import changes, push
from ccrun.worker.git.changes import DOTENV, Changes, Staged
from ccrun.worker.git.checkout import Checkout
from ccrun.worker.git.run import GitError
from ccrun.worker.lines import worker_line
from ccrun.worker.redaction import Redactor
from ccrun.worker.uploads import upload_files
from ccrun.worker.workspace import Workspace, private_directory

log = structlog.get_logger()

#: The patch that keeps what would be lost, below `uploads/`.
RESCUE_PATCH: Final = "rescue.patch"
#: Bytes of that patch: it is held in memory while secrets are masked in it.
MAX_RESCUE_BYTES: Final = 32 * 1024 * 1024
#: Between the files of a patch.
_FILE_HEADER: Final = b"\ndiff --git "
#: Paths named in one sentence.
MAX_NAMED_PATHS: Final = 5


@attrs.frozen(kw_only=True)
class PostRunLimits:
    """How long an action may take, in seconds, and how large a patch may be, in bytes.

    With a minute each for a patch, the record and the callback, all of it fits the 15 minutes that the job has beside the
    agent's time (`scripts/deploy-job.sh`).
    """

    push: float = 300.0
    uploads: float = 420.0
    #: Of a larger patch the files that fit are kept.
    rescue_bytes: int = MAX_RESCUE_BYTES


@attrs.define(kw_only=True)
class PostRunResult:
    """What was done so far; it counts also when the rest is broken off."""

    git_commit: dict[str, Any] | None = None
    uploaded: list[UploadedFile] | None = None
    errors: list[dict[str, str]] = attrs.field(factory=list)
    #: Whether the agent's changes are nowhere but in the workspace although they were to be pushed.
    is_unpushed: bool = False

    def fail(self, action: str, sentence: str) -> None:
        """Note a failure."""
        self.errors.append({"action": action, "error": sentence})

    def apply_to(self, outcome: Outcome, redactor: Redactor) -> Outcome:
        """Return the outcome with what was done."""
        return attrs.evolve(
            outcome,
            git_commit=redactor.value(self.git_commit),
            uploaded_files=None if self.uploaded is None else tuple(self.uploaded),
            action_errors=tuple(redactor.value(self.errors)),
        )


@attrs.frozen(kw_only=True)
class PostRun:
    """Does what the request asks for after the agent.

    Args:
        say: Takes a line for the log.
    """

    store: Store
    spec: TaskSpec
    workspace: Workspace
    checkout: Checkout | None
    result: PostRunResult
    redactor: Redactor
    say: Callable[[bytes | bytearray], Awaitable[None]]
    limits: PostRunLimits = attrs.field(factory=PostRunLimits)

    @property
    def task_id(self) -> TaskId:
        """The task."""
        return self.spec.task_id

    async def run(self) -> None:
        """Do all of it: git first, so that what is uploaded can be told to belong to a commit."""
        actions = self.spec.post_execution_actions
        if actions.git is not None and (actions.git.commit or actions.git.push) and self.checkout is not None:
            with self._noted("git"):
                await self._commit_and_push(self.checkout, actions.git)
        if actions.upload_files is not None:
            self.result.uploaded = []
            with self._noted("uploadFiles"):
                try:
                    async with asyncio.timeout(self.limits.uploads):
                        uploads = await upload_files(
                            self.store,
                            self.task_id,
                            self.workspace.repository,
                            actions.upload_files,
                            never=(DOTENV,) if self.spec.environment_secrets else (),
                        )
                except TimeoutError:
                    raise CcrunError(
                        f"The uploads were not done within {self.limits.uploads / 60:g} minutes."
                    ) from None
                self.result.uploaded += uploads.files
                for fault in uploads.errors:
                    self.result.fail("uploadFiles", fault)
                await self._tell("upload", f"Uploaded {len(uploads.files)} files.")

    @contextlib.contextmanager
    def _noted(self, action: str) -> Any:
        try:
            yield
        except CcrunError as error:
            self.result.fail(action, error.message)
        except Exception as error:
            # Whatever it is, it may not cost the task its outcome.
            log.exception("action_crashed", message="Unexpected error in a post-run action", action=action)
            self.result.fail(action, f"A fault inside ccrun ({type(error).__name__}): see the log of the worker.")

    async def _tell(self, step: str, sentence: str, **fields: Any) -> None:
        await self.say(worker_line(step, content=sentence, **fields))

    # git

    async def _commit_and_push(self, checkout: Checkout, action: GitAction) -> None:
        self.result.is_unpushed = action.push
        found = await checkout.changes()
        wanted = Globs(action.files).matches if action.files else None
        staged = await found.stage(wanted)
        self._note_left_out(staged)
        identity = await found.identity()
        message = action.commit_message or f"Changes by Claude Code\n\nTask: {self.task_id}"
        commit = found.head
        if action.commit and not staged.is_empty:
            commit = await found.commit(staged, message, identity)
            await self._tell("git", f"Committed {commit[:12]}.", commit=commit)
        if commit is None or commit == found.base:
            self.result.is_unpushed = False
            self.result.git_commit = self._told(commit, "Nothing to commit", action, committed=False)
            await self._tell("git", "Nothing to commit.")
            return
        if commit == found.head:
            message = await found.message(commit)
        self.result.git_commit = self._told(commit, message, action)
        if await found.contains_dotenv():
            raise GitError("The agent has committed .env, which holds secrets, so nothing was pushed.")
        if action.push and checkout.access is not None and checkout.clone is not None and checkout.snapshot is not None:
            await self._push(checkout, action, found, commit, identity)

    async def _push(
        self, checkout: Checkout, action: GitAction, found: Changes, commit: str, identity: changes.Identity
    ) -> None:
        assert checkout.access and checkout.clone and checkout.snapshot  # noqa: S101, PT018 - the caller has looked
        wanted = push.Push(
            branch=action.branch, base=found.base, identity=identity, rebases=action.conflict_strategy == "auto"
        )
        async with private_directory(self.task_id) as room:
            pack = room / "pack"
            with await asyncio.to_thread(pack.open, "xb") as target:
                await found.pack(commit, target)
            # Nothing that the task has started runs from here on; see `ccrun.process`.
            bare_repo = await push.import_commit(
                checkout.worker_git(room),
                room / "vault",
                commit=commit,
                pack=pack,
                clone=checkout.clone,
                snapshot=checkout.snapshot,
                shallow=found.shallow,
            )
            pushed = await push.push(bare_repo, checkout.access, wanted, seconds=self.limits.push)
        self.result.is_unpushed = False
        assert self.result.git_commit is not None  # noqa: S101
        self.result.git_commit |= {"sha": pushed.sha, "pushed": True}
        if pushed.recovery is not None:
            self.result.git_commit["recovery"] = pushed.recovery.as_json()
        await self._tell("git", f"Pushed {pushed.sha[:12]} to {action.branch}.", commit=pushed.sha)

    def _told(self, sha: str | None, message: str, action: GitAction, **more: Any) -> dict[str, Any]:
        return {"sha": sha, "message": message, "pushed": False, "branch": action.branch, **more}

    def _note_left_out(self, staged: Staged) -> None:
        if staged.left_out:
            some = ", ".join(staged.left_out[:MAX_NAMED_PATHS]) + (
                " and others" if len(staged.left_out) > MAX_NAMED_PATHS else ""
            )
            self.result.fail("git", f"Repositories inside the repository were left out of the commit: {some}.")
        if staged.unreadable:
            self.result.fail("git", f"Not all files could be committed: {staged.unreadable}")

    # What would be lost.

    async def rescue(self) -> None:
        """Keep all that was changed as a patch, unless nothing was. That this fails is noted too."""
        if self.checkout is None or self.checkout.clone is None:
            return
        with self._noted("rescue"):
            found = await self.checkout.changes()
            staged = await found.stage()
            if staged.is_empty and found.head == found.base:
                return
            async with private_directory(self.task_id) as room:
                path = room / RESCUE_PATCH
                kept = await self._patch(found, path)
                size = (await asyncio.to_thread(path.stat)).st_size
                if not size:
                    if kept:
                        # All that was changed is what nobody may see.
                        return
                    raise CcrunError(f"The changes are lost: no file's patch fits {self.limits.rescue_bytes} bytes.")
                with await asyncio.to_thread(path.open, "rb") as file:
                    url = await self.store.add_upload(self.task_id, RESCUE_PATCH, file, size=size)
            uploaded = UploadedFile(original_path=RESCUE_PATCH, gcs_path=url, size_bytes=size)
            self.result.uploaded = [*(self.result.uploaded or ()), uploaded]
            if not kept:
                self.result.fail(
                    "rescue",
                    f"The patch of the changes ends within {self.limits.rescue_bytes} bytes; what follows is lost.",
                )
            await self._tell("rescue", f"The changes are kept as {uploaded.gcs_path}.")

    async def _patch(self, found: Changes, path: Path) -> bool:
        """Write the patch without secrets; return whether all of it fitted."""
        with await asyncio.to_thread(path.open, "x+b") as file:
            is_whole = await found.patch(file, max_bytes=self.limits.rescue_bytes)
            await asyncio.to_thread(_finish_patch, file, self.redactor, is_whole=is_whole)
        return is_whole


def _finish_patch(file: IO[bytes], redactor: Redactor, *, is_whole: bool) -> None:
    """Mask the secrets in a patch, and end one that was cut off with its last whole file."""
    file.seek(0)
    content = file.read()
    if not is_whole:
        content = content[: content.rfind(_FILE_HEADER) + 1]
    file.seek(0)
    file.truncate()
    file.write(redactor.text(content.decode(errors="surrogateescape")).encode(errors="surrogateescape"))

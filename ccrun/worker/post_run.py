"""The actions after a successful run: commit, push and uploads.

Each action fails on its own, with one sentence on the record. A failed action does not fail the task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import attrs

from ccrun.errors import CcrunError
from ccrun.globs import Globs
from ccrun.redaction import Redactor
from ccrun.results import GitCommit, UploadedFile
from ccrun.spec import GitAction, TaskSpec, UploadAction
from ccrun.store import Store
from ccrun.task import TaskId
from ccrun.worker.dependencies import PostRunLimits
from ccrun.worker.git import lfs, push
from ccrun.worker.git.changes import DOTENV, Changes, Staged
from ccrun.worker.git.checkout import Checkout, Origin
from ccrun.worker.git.clone import PackSnapshot
from ccrun.worker.git.host_errors import timeout_error
from ccrun.worker.git.links import Link, unconfirmed
from ccrun.worker.git.run import GitError
from ccrun.worker.lines import worker_line
from ccrun.worker.post_run_result import PostRunResult
from ccrun.worker.rescue import Rescue
from ccrun.worker.upload_search import printable
from ccrun.worker.uploads import upload_files
from ccrun.worker.workspace import Workspace, private_directory

#: Paths that one sentence names at most.
MAX_NAMED_PATHS: Final = 5
#: The part of the time for a push in which the servers of changed submodule links are asked: of five minutes, one.
LINKS_SHARE: Final = 0.2
#: The message of a commit that does nothing but leave out what the agent has committed.
RESTORE_MESSAGE: Final = "Leave out what the server cannot have"


@attrs.define(kw_only=True)
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
    #: What the push was made from.
    _found: Changes | None = attrs.field(default=None, init=False)

    @property
    def task_id(self) -> TaskId:
        """The ID of the task."""
        return self.spec.task_id

    async def run(self) -> None:
        """Commit, push and upload. git comes first, so that the uploads can be matched to a commit."""
        actions = self.spec.post_execution_actions
        if actions.git is not None and (actions.git.commit or actions.git.push) and self.checkout is not None:
            with self.result.errors_recorded("git"):
                await self._commit_and_push(self.checkout, actions.git)
        if actions.upload_files is not None:
            self.result.uploaded = []
            with self.result.errors_recorded("uploadFiles"):
                self.result.uploaded += await self._upload(actions.upload_files)

    @property
    def pushes(self) -> bool:
        """Whether the request asks for a push."""
        git = self.spec.post_execution_actions.git
        return git is not None and git.push

    async def rescue(self, *, is_pushed: bool) -> None:
        """Upload all changes that were not pushed as patches. Errors are recorded like those of an action.

        Args:
            is_pushed: Whether nothing of the work tree and the last commit is left to be pushed.
        """
        if self.checkout is None or self.checkout.origin is None:
            return
        rescue = Rescue(
            store=self.store,
            task_id=self.task_id,
            checkout=self.checkout,
            redactor=self.redactor,
            log_line=self.log_line,
            max_bytes=self.limits.rescue_bytes,
            result=self.result,
        )
        await rescue.run(self._found if is_pushed else None)

    async def _log(self, step: str, sentence: str, **fields: Any) -> None:
        await self.log_line(worker_line(step, content=sentence, **fields))

    # Uploads.

    async def _upload(self, action: UploadAction) -> tuple[UploadedFile, ...]:
        excluded = (DOTENV,) if self.spec.environment_secrets else ()
        try:
            async with asyncio.timeout(self.limits.uploads):
                uploads = await upload_files(
                    self.store,
                    self.task_id,
                    self.workspace.repository,
                    action,
                    max_bytes=self.limits.upload_bytes,
                    excluded=excluded,
                    mask=self.redactor.text,
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
        found = self._found = await checkout.changes(with_lfs=True)
        staged = await found.stage(Globs(action.files).matches if action.files else None)
        self._record_skipped(staged)
        identity = await found.identity()
        message = action.commit_message or f"Changes by Claude Code\n\nTask: {self.task_id}"
        last = await found.tree_of(found.head)
        objects: tuple[lfs.LfsObject, ...] = ()
        if not action.commit or staged.is_empty:
            # Then the only reason for a commit is a link or a file that the agent has committed and that is left out.
            staged, message = attrs.evolve(staged, tree=last), RESTORE_MESSAGE
        deadline = asyncio.get_running_loop().time() + self.limits.push
        if action.push and checkout.origin is not None:
            tree = await self._with_known_links(checkout, checkout.origin, found, staged)
            tree, objects = await self._with_lfs_objects(checkout, found, tree)
            staged = attrs.evolve(staged, tree=tree)
        commit = found.head
        if staged.tree != last:
            commit = await found.commit(staged, message, identity)
            await self._log("git", f"Committed {commit[:12]}.", commit=commit)
        if commit is None or commit == found.base:
            self.result.is_unpushed = self.result.lfs_left_out
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
        try:
            async with asyncio.timeout_at(deadline):
                pushed = await self._push(checkout, origin, origin.snapshot, found, commit, objects, wanted)
        except TimeoutError:
            raise timeout_error(origin.access.remote, "pushed", self.limits.push) from None
        self.result.is_unpushed = self.result.lfs_left_out
        self.result.git_commit = attrs.evolve(git_commit, sha=pushed.sha, pushed=True, recovery=pushed.recovery)
        await self._log("git", f"Pushed {pushed.sha[:12]} to {action.branch}.", commit=pushed.sha)

    async def _push(
        self,
        checkout: Checkout,
        origin: Origin,
        snapshot: PackSnapshot,
        found: Changes,
        commit: str,
        objects: Sequence[lfs.LfsObject],
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
            if objects:
                stores = lfs.stores_of(found, self.workspace.repository)
                await lfs.import_objects(found.git, stores, objects, bare_repo.cwd)
                await lfs.upload(bare_repo, origin.access, objects, seconds=self.limits.push)
            return await push.push(bare_repo, origin.access, wanted, seconds=self.limits.push)

    async def _with_known_links(self, checkout: Checkout, origin: Origin, found: Changes, staged: Staged) -> str:
        """Return the staged tree without the submodule links whose commit their server does not have."""
        changed = await found.new_links(staged.tree)
        if not changed:
            return staged.tree
        checked = [Link(path=entry.path, commit=entry.blob, url=url) for entry, url in changed]
        seconds = self.limits.push * LINKS_SHARE
        async with private_directory(self.task_id) as directory:
            reasons = await unconfirmed(checkout.worker_git(directory), origin.access, checked, seconds=seconds)
        left_out = [link for link in checked if link.path in reasons]
        for link in left_out[:MAX_NAMED_PATHS]:
            self.result.fail(
                "git",
                f"The submodule link {printable(link.path)} to {link.commit[:12]} was left out of the push, "
                f"since its server did not confirm that commit: {reasons[link.path]}.",
            )
        if (others := len(left_out) - MAX_NAMED_PATHS) > 0:
            self.result.fail("git", f"{others} other submodule links were left out of the push for such reasons.")
        return await found.restored(staged.tree, [entry for entry, _ in changed if entry.path in reasons])

    async def _with_lfs_objects(
        self, checkout: Checkout, found: Changes, tree: str
    ) -> tuple[str, tuple[lfs.LfsObject, ...]]:
        """Return the tree without the files of Git LFS that cannot be pushed as such, and the objects of the others."""
        stores = lfs.stores_of(found, self.workspace.repository)
        files = await lfs.examine_tree(found, tree, stores, is_installed=checkout.has_lfs)
        for entry, reason in files.left_out[:MAX_NAMED_PATHS]:
            self.result.fail(
                "git", f"{printable(entry.path)}, a file of Git LFS, was left out of the push, since {reason}."
            )
        if (others := len(files.left_out) - MAX_NAMED_PATHS) > 0:
            self.result.fail("git", f"{others} other files of Git LFS were left out of the push for such reasons.")
        self.result.lfs_left_out = bool(files.left_out)
        if files.left_out:
            tree = await found.restored(tree, [entry for entry, _ in files.left_out])
        return tree, tuple(files.objects.values())

    def _record_skipped(self, staged: Staged) -> None:
        if staged.left_out:
            paths = _first_paths(staged.left_out)
            self.result.fail("git", f"Repositories inside the repository were left out of the commit: {paths}.")
        if staged.kept:
            paths = _first_paths(staged.kept)
            self.result.fail("git", f"Files outside sparseCheckout are missing from the index, and were kept: {paths}.")
        if staged.unreadable:
            self.result.fail("git", f"Not all files could be committed: {staged.unreadable}")


def _first_paths(paths: Sequence[str]) -> str:
    others = " and others" if len(paths) > MAX_NAMED_PATHS else ""
    return f"{', '.join(map(printable, paths[:MAX_NAMED_PATHS]))}{others}"

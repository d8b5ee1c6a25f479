"""Pushes the agent's changes from a repository that the agent could never access.

That repository is new and gets the agent's commit as data: a pack whose objects git checks. (git 2.39 does not check the
objects of a bundle.) git has a secret here, so no process of the task may still run.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from ccrun.task import Recovery
from ccrun.worker.git.changes import Identity
from ccrun.worker.git.clone import COMMIT, Clone, PackSnapshot
from ccrun.worker.git.remote import Access, RemoteError, exchange_error, timeout_error
from ccrun.worker.git.run import Git, GitError, first_error, last_error, shortened

#: Attempts when others push to the branch at the same time.
PUSH_ATTEMPTS: Final = 3
#: Commits of a moved branch that are fetched, to find out whether the agent's work is based on its tip.
ANCESTRY_COMMITS: Final = 100
#: Commits that are rebased, one by one. With more, the push replaces the branch.
MAX_REBASED: Final = 200
#: Paths in `recovery.conflictFiles`, which the record and the callback have.
MAX_CONFLICT_FILES: Final = 1000
#: Harmless errors in objects of old tools, which are in the history of many repositories. See git-fsck(1).
_OLD_FAULTS: Final = (
    *("badDate", "badDateOverflow", "badEmail", "badName", "badTimezone", "missingEmail", "missingNameBeforeEmail"),
    *(
        "missingSpaceBeforeDate",
        "missingSpaceBeforeEmail",
        "missingTaggerEntry",
        "zeroPaddedDate",
        "zeroPaddedFilemode",
    ),
)

RESULT: Final = "refs/ccrun/result"


@attrs.frozen(kw_only=True)
class Pushed:
    """The commit that the branch is at now."""

    sha: str
    recovery: Recovery | None = None


class BranchMoved(RemoteError):
    """The branch has moved, and the request wants an error."""


@attrs.frozen(kw_only=True)
class Push:
    """What to push, and to which branch.

    Args:
        branch: The name without `refs/heads/`.
        base: The commit that was cloned, None when there was none.
        identity: The committer of rebased commits.
        rebases: Whether to rebase onto a moved branch; otherwise it is an error.
    """

    branch: str
    base: str | None
    identity: Identity
    rebases: bool

    @property
    def ref(self) -> str:
        """The complete name of the branch."""
        return f"refs/heads/{self.branch}"


async def import_commit(
    git: Git, bare_repo: Path, *, commit: str, pack: Path, clone: Clone, snapshot: PackSnapshot, shallow: bytes
) -> Git:
    """Create a bare repository with the agent's commit, as `RESULT`.

    Args:
        git: git as the worker's user.
        bare_repo: A new directory for the repository.
        commit: The agent's commit.
        pack: The objects of the commit, from `Changes.pack`. The file is moved into the repository.
        shallow: The shallow commits of the agent's repository, in addition to those of the clone.

    Raises:
        GitError: The objects are damaged, incomplete, or dangerous to check out.
    """
    await git("init", "--quiet", "--bare", "--template=", str(bare_repo))
    await snapshot.restore(bare_repo)
    cut = sorted({*clone.shallow.decode().split(), *shallow.decode().split()})
    if cut:
        await asyncio.to_thread((bare_repo / "shallow").write_text, "".join(f"{boundary}\n" for boundary in cut))
    ours = git.at(bare_repo)
    if clone.base is not None:
        await ours("update-ref", "refs/ccrun/base", clone.base)
    placed = bare_repo / "objects" / "pack" / f"pack-{commit}.pack"
    await asyncio.to_thread(pack.rename, placed)
    checked = await ours.run(
        "index-pack", f"--strict={','.join(f'{fault}=ignore' for fault in _OLD_FAULTS)}", str(placed)
    )
    if not checked.exit.ok:
        raise GitError(f"The agent's commit has objects that must not be pushed: {first_error(checked.stderr)}")
    # All objects are there, down to those that were cloned.
    await ours("rev-list", "--objects", "--quiet", commit, "--not", "--all")
    await ours("update-ref", RESULT, commit)
    return ours


async def push(git: Git, access: Access, wanted: Push, *, seconds: float) -> Pushed:
    """Push `RESULT` to the branch. When the branch has moved, do what the request wants.

    Each push has a lease on the commit that the branch is expected to be at, so that no concurrent push is overwritten.

    Args:
        git: git in the repository that `import_commit` has created.
        seconds: The timeout.

    Raises:
        BranchMoved: The branch has moved, and the request wants an error.
        GitError: The server has rejected the push, or cannot be reached.
    """
    try:
        async with asyncio.timeout(seconds), access.opened(git) as opened:
            exchange = _Exchange(local=git, server=opened, access=access, wanted=wanted)
            for _ in range(PUSH_ATTEMPTS):
                if (pushed := await exchange.attempt()) is not None:
                    return pushed
    except TimeoutError:
        raise timeout_error(access.remote, "pushed", seconds) from None
    raise RemoteError(f"{wanted.branch} was changed by others during each attempt, so nothing was pushed.")


@attrs.frozen(kw_only=True)
class _Exchange:
    """The exchange with the server. `server` is git with the secret, for the network; `local` is git without it."""

    local: Git
    server: Git
    access: Access
    wanted: Push

    async def attempt(self) -> Pushed | None:
        """Make one attempt. Return None when another push was faster."""
        result = (await self.local("rev-parse", RESULT)).decode().strip()
        seen = await self._tip()
        if seen == result:
            return Pushed(sha=result)
        if seen is None or await self._is_ancestor(seen, result):
            return Pushed(sha=result) if await self._send(result, seen) else None
        if not self.wanted.rebases:
            raise BranchMoved(f"{self.wanted.branch} has moved to {seen[:12]}, so nothing was pushed.")
        try:
            sha, conflicts = await _rebased(self.local, self.wanted, seen, result)
            recovery = Recovery(method="rebase", remote_sha=seen, conflict_files=conflicts)
        except GitError:
            sha, recovery = result, Recovery(method="force-with-lease", remote_sha=seen)
        return Pushed(sha=sha, recovery=recovery) if await self._send(sha, seen) else None

    async def _tip(self) -> str | None:
        """Return the commit of the branch at the server, None when it has no such branch."""
        ref = self.wanted.ref
        ran = await self.server.run("ls-remote", "--quiet", "--", self.access.remote.url, ref, seconds=None)
        if not ran.exit.ok:
            raise exchange_error(self.access.remote, ran, self.access, "pushed")
        for line in ran.stdout.decode(errors="replace").splitlines():
            commit, _, name = line.partition("\t")
            if name == ref and COMMIT.fullmatch(commit):
                return commit
        return None

    async def _is_ancestor(self, seen: str, result: str) -> bool:
        """Return whether the agent's work is based on the commit of the server, which is fetched if it is missing."""
        # First together with the base, which may be a descendant; not all servers serve a commit by its ID.
        for commits in ((seen, self.wanted.base), (seen,)):
            if not await self._has(seen):
                await self._fetch(*filter(None, commits))
        if not await self._has(seen):
            raise RemoteError(f"The server does not send {seen[:12]}, the commit of {self.wanted.branch}.")
        return (await self.local.run("merge-base", "--is-ancestor", seen, result)).exit.ok

    async def _has(self, commit: str) -> bool:
        return (await self.local.run("cat-file", "-e", f"{commit}^{{commit}}")).exit.ok

    async def _fetch(self, *commits: str) -> None:
        options = (*_FETCH_OPTIONS, f"--depth={ANCESTRY_COMMITS}")
        await self.server.run("fetch", *options, "--", self.access.remote.url, *commits, seconds=None)

    async def _send(self, commit: str, seen: str | None) -> bool:
        """Push a commit with a lease on the commit that was seen. Return False when another push was faster."""
        ref = self.wanted.ref
        options = ("--porcelain", "--no-verify", "--no-follow-tags", "--recurse-submodules=no")
        lease = f"--force-with-lease={ref}:{seen or ''}"
        ran = await self.server.run(
            "push", *options, lease, "--", self.access.remote.url, f"{commit}:{ref}", seconds=None
        )
        if ran.exit.ok:
            return True
        output = ran.stdout.decode(errors="replace")
        if _LEASE_LOST.search(output):
            return False
        if "rejected]" in output:
            raise RemoteError(f"The server rejected the push to {self.wanted.branch}: {_reason(output, ran.stderr)}")
        raise exchange_error(self.access.remote, ran, self.access, "pushed")


#: The messages of a push when the branch has moved.
_LEASE_LOST: Final = re.compile(
    r"stale info|cannot lock ref|incorrect old value|reference already exists|failed to update ref"
)
#: Options of a fetch that only gets objects.
_FETCH_OPTIONS: Final = ("--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance")


def _reason(output: str, stderr: bytes) -> str:
    """Return why the server has rejected a push, with its own message if there is one."""
    lines = [
        re.sub(r"^remote:\s*(?:error:\s*|fatal:\s*)?", "", line).strip()
        for line in stderr.decode(errors="replace").splitlines()
        if line.startswith("remote:")
    ]
    message = " ".join(line for line in lines if line)
    status = re.search(r"\[(?:remote )?rejected\] \((.*)\)", output)
    reason = (
        f"{message} ({status[1]})" if message and status else message or (status[1] if status else last_error(stderr))
    )
    return shortened(reason)


# --- rebasing ----------------------------------------------------------------------------------------------------------


async def _rebased(git: Git, wanted: Push, onto: str, result: str) -> tuple[str, tuple[str, ...]]:
    """Rebase the agent's commits onto another one. Return the last of them, and the paths in which the agent's side has won.

    No hook, filter or merge driver runs, since all of them need a configuration.

    Raises:
        GitError: The commits cannot be rebased.
    """
    beyond = ("--not", wanted.base) if wanted.base else ()
    listed = await git(
        "rev-list", "--reverse", "--topo-order", "--no-merges", f"--max-count={MAX_REBASED + 1}", result, *beyond
    )
    commits = listed.decode().split()
    if not commits or len(commits) > MAX_REBASED:
        raise GitError("The agent's history is too long to be rebased.")
    conflicts: set[str] = set()
    async with _worktree(git, onto, wanted.identity) as tree:
        for commit in commits:
            conflicts |= await _pick(tree, commit)
        rebased = (await tree("rev-parse", "HEAD")).decode().strip()
    return rebased, tuple(sorted(conflicts)[:MAX_CONFLICT_FILES])


@contextlib.asynccontextmanager
async def _worktree(git: Git, commit: str, identity: Identity) -> AsyncIterator[Git]:
    """Check out a commit in a directory next to the bare repository."""
    directory = git.cwd.with_name(f"{git.cwd.name}-tree")
    await git("worktree", "add", "--quiet", "--detach", str(directory), commit)
    try:
        yield git.at(directory, "merge.conflictStyle=merge", **identity.environment(), **_NO_EDITOR)
    finally:
        await git.run("worktree", "remove", "--force", str(directory))


_NO_EDITOR: Final[Mapping[str, str]] = {"GIT_EDITOR": "true", "GIT_MERGE_AUTOEDIT": "no"}


async def _pick(tree: Git, commit: str) -> set[str]:
    """Cherry-pick one commit. Return the paths in which its side has won."""
    arguments = ("cherry-pick", "--allow-empty", "--keep-redundant-commits")
    if (await tree.run(*arguments, commit)).exit.ok:
        return set()
    conflicts = await _unmerged(tree)
    # Retry it with the agent's side for conflicting lines.
    await tree.run("cherry-pick", "--abort")
    await tree("reset", "--quiet", "--hard")
    if (await tree.run(*arguments, "--strategy-option=theirs", commit)).exit.ok:
        return set(conflicts)
    # The other conflicts are not about lines: one side has removed what the other has changed, or both have added it.
    left = await _unmerged(tree)
    if not left:
        raise GitError("A commit of the agent cannot be rebased onto the branch.")
    for path in left:
        pathspec = f":(top,literal){path}"
        if not (await tree.run("checkout", "--quiet", "--theirs", "--", pathspec)).exit.ok:
            await tree("rm", "--quiet", "--force", "--cached", "--", pathspec)
        else:
            await tree("add", "--force", "--", pathspec)
    await tree("cherry-pick", "--continue")
    return {*conflicts, *left}


async def _unmerged(tree: Git) -> list[str]:
    printed = await tree("diff", "--name-only", "--diff-filter=U", "-z")
    return [path for path in printed.decode(errors="surrogateescape").split("\0") if path]

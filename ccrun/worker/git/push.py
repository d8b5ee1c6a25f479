"""Pushes the agent's changes from a repository that the agent could never access.

That repository is new and gets the agent's commit as data: a pack whose objects git checks. (git 2.39 does not check the
objects of a bundle.) git has a secret here, so no process of the task may still run.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import attrs

from ccrun.results import Recovery
from ccrun.worker.git.changes import Identity
from ccrun.worker.git.clone import COMMIT, RETRY_PAUSES, Clone, PackSnapshot
from ccrun.worker.git.gerrit import REVIEW_PREFIX, with_change_ids
from ccrun.worker.git.host_errors import RemoteError, exchange_error, server_words, timeout_error
from ccrun.worker.git.remote import Access
from ccrun.worker.git.run import Git, GitError, first_error, last_error, shortened

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
        branch: The name without `refs/heads/`, or `refs/for/BRANCH` for reviews on a Gerrit server.
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
        return self.branch if self.is_review else f"refs/heads/{self.branch}"

    @property
    def is_review(self) -> bool:
        """Whether the commits become reviews. No branch moves then."""
        return self.branch.startswith(REVIEW_PREFIX)


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
            for pause in (*RETRY_PAUSES, None):
                try:
                    if (pushed := await exchange.attempt()) is not None:
                        return pushed
                except RemoteError as error:
                    # If only the response to a push was lost, the next attempt finds its commit at the server.
                    if not error.is_transient or pause is None:
                        raise
                    await asyncio.sleep(pause)
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
        if self.wanted.is_review:
            result = await with_change_ids(self.local, result, self.wanted.base)
            await self._send(result, ())
            return Pushed(sha=result)
        seen = await self._tip()
        if seen == result:
            return Pushed(sha=result)
        if seen is None or await self._is_ancestor(seen, result):
            return Pushed(sha=result) if await self._send(result, self._lease(seen)) else None
        if not self.wanted.rebases:
            raise BranchMoved(f"{self.wanted.branch} has moved to {seen[:12]}, so nothing was pushed.")
        rebased = await _rebased(self.local, self.wanted, seen, result)
        return rebased if await self._send(rebased.sha, self._lease(seen)) else None

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
            raise RemoteError(f"The server does not serve {seen[:12]}, the commit of {self.wanted.branch}.")
        ran = await self.local.run("merge-base", "--is-ancestor", seen, result)
        # 1 means no; anything else is an error, which must not count as a branch that has moved.
        if ran.exit.code not in (0, 1):
            raise GitError(f"git merge-base failed: {last_error(ran.stderr)}")
        return ran.exit.ok

    async def _has(self, commit: str) -> bool:
        return (await self.local.run("cat-file", "-e", f"{commit}^{{commit}}")).exit.ok

    async def _fetch(self, *commits: str) -> None:
        options = (*_FETCH_OPTIONS, f"--depth={ANCESTRY_COMMITS}")
        await self.server.run("fetch", *options, "--", self.access.remote.url, *commits, seconds=None)

    def _lease(self, seen: str | None) -> tuple[str]:
        return (f"--force-with-lease={self.wanted.ref}:{seen or ''}",)

    async def _send(self, commit: str, lease: tuple[str, ...]) -> bool:
        """Push a commit, with a lease on the commit that was seen. Return False when another push was faster."""
        ref = self.wanted.ref
        options = ("--porcelain", "--no-verify", "--no-follow-tags", "--recurse-submodules=no")
        ran = await self.server.run(
            "push", *options, *lease, "--", self.access.remote.url, f"{commit}:{ref}", seconds=None
        )
        if ran.exit.ok:
            return True
        output = ran.stdout.decode(errors="replace")
        if lease and _LEASE_LOST.search(output):
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
    words = server_words(stderr)
    short = re.search(r"\[(?:remote )?rejected\] \((.*)\)", output)
    reason = f"{words} ({short[1]})" if words and short else words or (short[1] if short else last_error(stderr))
    return shortened(reason)


# --- rebasing ----------------------------------------------------------------------------------------------------------


async def _rebased(git: Git, wanted: Push, onto: str, result: str) -> Pushed:
    """Rebase the agent's commits onto another one, or merge them if they are too many.

    The branch is replaced only if a merge has conflicts: any other error leaves it as it is. No hook, filter or merge driver
    runs, since all of them need a configuration.

    Raises:
        GitError: The commits can be neither rebased nor merged, for another reason than a conflict.
    """
    beyond = ("--not", wanted.base) if wanted.base else ()
    listed = await git(
        "rev-list", "--reverse", "--topo-order", "--no-merges", f"--max-count={MAX_REBASED + 1}", result, *beyond
    )
    commits = listed.decode().split()
    conflicts: set[str] = set()
    async with _worktree(git, onto, wanted.identity) as tree:
        if commits and len(commits) <= MAX_REBASED:
            for commit in commits:
                conflicts |= await _pick(tree, commit, wanted.identity)
            recovery = Recovery(
                method="rebase", remote_sha=onto, conflict_files=tuple(sorted(conflicts)[:MAX_CONFLICT_FILES])
            )
        elif await _merge(tree, result):
            recovery = Recovery(method="merge", remote_sha=onto)
        else:
            return Pushed(sha=result, recovery=Recovery(method="force-with-lease", remote_sha=onto))
        return Pushed(sha=(await tree("rev-parse", "HEAD")).decode().strip(), recovery=recovery)


@contextlib.asynccontextmanager
async def _worktree(git: Git, commit: str, identity: Identity) -> AsyncIterator[Git]:
    """Check out a commit in a directory next to the bare repository."""
    directory = git.cwd.with_name(f"{git.cwd.name}-tree")
    await git("worktree", "add", "--quiet", "--detach", str(directory), commit)
    try:
        yield git.at(directory, **identity.environment())
    finally:
        await git.run("worktree", "remove", "--force", str(directory))


async def _merge(tree: Git, commit: str) -> bool:
    """Merge a commit. Return False if there are conflicts."""
    ran = await tree.run("merge", "--quiet", "--no-ff", "--no-edit", "-m", "Merge the commits of the agent", commit)
    if not ran.exit.ok and not await _unmerged(tree):
        raise GitError(f"The agent's commits cannot be merged into the branch: {last_error(ran.stderr)}")
    return ran.exit.ok


async def _pick(tree: Git, commit: str, identity: Identity) -> set[str]:
    """Apply one commit to HEAD and commit the result. Return the paths in which its side has won.

    Raises:
        GitError: It cannot be applied, for another reason than a conflict.
    """
    conflicts: set[str] = set()
    if not (await tree.run("cherry-pick", "--no-commit", commit)).exit.ok:
        conflicts.update(await _conflicts(tree, commit))
        # Again from the start, with the agent's side for conflicting lines.
        await tree("reset", "--quiet", "--hard")
        if not (await tree.run("cherry-pick", "--no-commit", "--strategy-option=theirs", commit)).exit.ok:
            # The other conflicts are not about lines: one side has removed what the other has changed, or both have added it.
            for path in await _conflicts(tree, commit):
                conflicts.add(path)
                pathspec = f":(top,literal){path}"
                if not (await tree.run("checkout", "--quiet", "--theirs", "--", pathspec)).exit.ok:
                    await tree("rm", "--quiet", "--force", "--cached", "--", pathspec)
                else:
                    await tree("add", "--force", "--", pathspec)
    await _commit_as(tree, commit, identity)
    return conflicts


async def _conflicts(tree: Git, commit: str) -> list[str]:
    """Return the paths in conflict after a commit could not be applied.

    Raises:
        GitError: There are none, so the reason was another one.
    """
    if not (paths := await _unmerged(tree)):
        raise GitError(f"The agent's commit {commit[:12]} cannot be applied to the branch.")
    return paths


async def _commit_as(tree: Git, commit: str, identity: Identity) -> None:
    """Commit the index with the author and the message of a commit, byte for byte.

    `git commit` would clean up the message: it takes a line that starts with `#` for a comment.
    """
    headers, _, message = (await tree("cat-file", "commit", commit)).partition(b"\n\n")
    kept = {line.partition(b" ")[0]: line for line in headers.split(b"\n")}
    new = [
        b"tree " + (await tree("write-tree")).strip(),
        b"parent " + (await tree("rev-parse", "HEAD")).strip(),
        kept[b"author"],
        f"committer {identity.name} <{identity.email}> {time.time():.0f} +0000".encode(),
        *([kept[b"encoding"]] if b"encoding" in kept else []),
    ]
    content = b"\n".join(new) + b"\n\n" + message
    made = await tree("hash-object", "-t", "commit", "-w", "--stdin", stdin=content)
    await tree("reset", "--quiet", "--hard", made.decode().strip())


async def _unmerged(tree: Git) -> list[str]:
    printed = await tree("diff", "--name-only", "--diff-filter=U", "-z")
    return [path for path in printed.decode(errors="surrogateescape").split("\0") if path]

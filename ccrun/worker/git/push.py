"""The push: what the agent changed goes to the server from a repository of the worker's own.

That repository is new, stands where the agent never was, and takes in the agent's work as data: a pack whose objects git
checks. (A bundle would do the same, but of a bundle git 2.39 checks no object.) Only here git has a secret, and nothing
that the task has started runs any more.
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
from ccrun.worker.git.remote import Access, RemoteError, network_error, refusal
from ccrun.worker.git.run import Git, GitError, first_error, last_error, shortened

#: Tries at a branch that others push to at the same time.
PUSH_ATTEMPTS: Final = 3
#: Commits that are fetched of a branch that moved, to see whether the agent's work stands on its tip.
ANCESTRY_COMMITS: Final = 100
#: Commits that are rebased one by one; a longer history is no work of one agent.
MAX_REBASED: Final = 200
#: Paths told in `recovery.conflictFiles`: the record and the callback carry them.
MAX_CONFLICT_FILES: Final = 1000
#: Faults of objects that old tools made, that every server has in its history and nobody is harmed by. See git-fsck(1).
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
    """What the server has now."""

    sha: str
    recovery: Recovery | None = None


class BranchMoved(RemoteError):
    """The branch has moved, and the request wants that to be reported."""


@attrs.frozen(kw_only=True)
class Push:
    """What is pushed, and where to.

    Args:
        branch: Its name, without `refs/heads/`.
        base: The commit that was cloned, None when there was none.
        identity: Whoever commits what is rebased.
        rebases: Whether a branch that moved is dealt with; else it is reported.
    """

    branch: str
    base: str | None
    identity: Identity
    rebases: bool

    @property
    def ref(self) -> str:
        """The whole name of the branch."""
        return f"refs/heads/{self.branch}"


async def import_commit(
    git: Git, bare_repo: Path, *, commit: str, pack: Path, clone: Clone, snapshot: PackSnapshot, shallow: bytes
) -> Git:
    """Make the worker's own repository with the agent's commit in it, at `RESULT`.

    Args:
        git: As the worker's user.
        vault: A new folder for it.
        commit: The agent's.
        pack: What it has beyond the clone: see `Changes.pack`. The file is moved into the repository.
        shallow: At which commits the agent's history is cut off, besides that of the clone.

    Raises:
        GitError: The objects are damaged, not complete, or would hurt who checks them out.
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
        raise GitError(f"The agent's commit holds what no server should get: {first_error(checked.stderr)}")
    # Nothing is missing: each object is there, down to what was cloned.
    await ours("rev-list", "--objects", "--quiet", commit, "--not", "--all")
    await ours("update-ref", RESULT, commit)
    return ours


async def push(git: Git, access: Access, wanted: Push, *, seconds: float) -> Pushed:
    """Push `RESULT` to the branch; when the branch has moved, do as the request wants.

    What is expected of the branch goes with each push, so nothing is lost that somebody pushes meanwhile.

    Args:
        git: In the repository that `import_commit` made.
        seconds: What all of it has.

    Raises:
        BranchMoved: It has moved, and that is to be reported.
        GitError: The server refuses, or cannot be reached.
    """
    try:
        async with asyncio.timeout(seconds), access.opened(git) as opened:
            exchange = _Exchange(local=git, server=opened, access=access, wanted=wanted)
            for _ in range(PUSH_ATTEMPTS):
                if (pushed := await exchange.once()) is not None:
                    return pushed
    except TimeoutError:
        raise network_error(access.remote, "pushed", seconds) from None
    raise RemoteError(f"{wanted.branch} is pushed to by others all the time, so nothing could be pushed.")


@attrs.frozen(kw_only=True)
class _Exchange:
    """The talk with the server. `server` has the secret; all that needs no network is done by `local`, which has not."""

    local: Git
    server: Git
    access: Access
    wanted: Push

    async def once(self) -> Pushed | None:
        """Push once; None when somebody else was faster."""
        result = (await self.local("rev-parse", RESULT)).decode().strip()
        seen = await self._tip()
        if seen == result:
            return Pushed(sha=result)
        if seen is None or await self._is_ancestor(seen, result):
            return Pushed(sha=result) if await self._send(result, seen) else None
        if not self.wanted.rebases:
            raise BranchMoved(f"{self.wanted.branch} has moved to {seen[:12]} meanwhile, so nothing was pushed.")
        try:
            sha, conflicts = await _rebased(self.local, self.wanted, seen, result)
            recovery = Recovery(method="rebase", remote_sha=seen, conflict_files=conflicts)
        except GitError:
            sha, recovery = result, Recovery(method="force-with-lease", remote_sha=seen)
        return Pushed(sha=sha, recovery=recovery) if await self._send(sha, seen) else None

    async def _tip(self) -> str | None:
        """Return at which commit the server has the branch, None when it has none."""
        ref = self.wanted.ref
        ran = await self.server.run("ls-remote", "--quiet", "--", self.access.remote.url, ref, seconds=None)
        if not ran.exit.ok:
            raise refusal(self.access.remote, ran, self.access, "pushed")
        for line in ran.stdout.decode(errors="replace").splitlines():
            commit, _, name = line.partition("\t")
            if name == ref and COMMIT.fullmatch(commit):
                return commit
        return None

    async def _is_ancestor(self, seen: str, result: str) -> bool:
        """Tell whether the agent's work stands on what the server has; fetch that if it is not there."""
        # First with what was cloned, for that may have the branch in its past; not every server hands it out by its ID.
        for commits in ((seen, self.wanted.base), (seen,)):
            if not await self._has(seen):
                await self._fetch(*filter(None, commits))
        if not await self._has(seen):
            raise RemoteError(f"The server does not hand out {seen[:12]}, at which it has {self.wanted.branch}.")
        return (await self.local.run("merge-base", "--is-ancestor", seen, result)).exit.ok

    async def _has(self, commit: str) -> bool:
        return (await self.local.run("cat-file", "-e", f"{commit}^{{commit}}")).exit.ok

    async def _fetch(self, *commits: str) -> None:
        options = (*_QUIETLY, f"--depth={ANCESTRY_COMMITS}")
        await self.server.run("fetch", *options, "--", self.access.remote.url, *commits, seconds=None)

    async def _send(self, commit: str, seen: str | None) -> bool:
        """Push a commit onto the very state of the branch that was seen; False when somebody else was faster."""
        ref = self.wanted.ref
        options = ("--porcelain", "--no-verify", "--no-follow-tags", "--recurse-submodules=no")
        lease = f"--force-with-lease={ref}:{seen or ''}"
        ran = await self.server.run(
            "push", *options, lease, "--", self.access.remote.url, f"{commit}:{ref}", seconds=None
        )
        if ran.exit.ok:
            return True
        told = ran.stdout.decode(errors="replace")
        if _LEASE_LOST.search(told):
            return False
        if "rejected]" in told:
            raise RemoteError(f"The server refused the push to {self.wanted.branch}: {_reason(told, ran.stderr)}")
        raise refusal(self.access.remote, ran, self.access, "pushed")


#: What a push says when the branch is not where it was a moment ago.
_LEASE_LOST: Final = re.compile(
    r"stale info|cannot lock ref|incorrect old value|reference already exists|failed to update ref"
)
#: A fetch into a repository in which nothing but what is asked for may happen.
_QUIETLY: Final = ("--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance")


def _reason(told: str, stderr: bytes) -> str:
    """Return why the server refused, in its own words where it has any."""
    own = [
        re.sub(r"^remote:\s*(?:error:\s*|fatal:\s*)?", "", line).strip()
        for line in stderr.decode(errors="replace").splitlines()
        if line.startswith("remote:")
    ]
    words = " ".join(line for line in own if line)
    short = re.search(r"\[(?:remote )?rejected\] \((.*)\)", told)
    reason = f"{words} ({short[1]})" if words and short else words or (short[1] if short else last_error(stderr))
    return shortened(reason)


# --- putting the agent's commits on top of others' ---------------------------------------------------------------------


async def _rebased(git: Git, wanted: Push, onto: str, result: str) -> tuple[str, tuple[str, ...]]:
    """Return the last of the agent's commits after all of them were put on top of `onto`, and where its side had to win.

    No hook, filter or merge driver runs: all of them need a configuration, and there is none but ours.

    Raises:
        GitError: It cannot be done.
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
    """Check a commit out, in a folder beside the worker's repository."""
    folder = git.cwd.with_name(f"{git.cwd.name}-tree")
    await git("worktree", "add", "--quiet", "--detach", str(folder), commit)
    try:
        yield git.at(folder, "merge.conflictStyle=merge", **identity.environment(), **_NO_EDITOR)
    finally:
        await git.run("worktree", "remove", "--force", str(folder))


_NO_EDITOR: Final[Mapping[str, str]] = {"GIT_EDITOR": "true", "GIT_MERGE_AUTOEDIT": "no"}


async def _pick(tree: Git, commit: str) -> set[str]:
    """Put one commit on top; return the paths in which its side had to win."""
    arguments = ("cherry-pick", "--allow-empty", "--keep-redundant-commits")
    if (await tree.run(*arguments, commit)).exit.ok:
        return set()
    conflicts = await _unmerged(tree)
    # Once more from the start, with the agent's side winning where lines collide and the rest of a file merged.
    await tree.run("cherry-pick", "--abort")
    await tree("reset", "--quiet", "--hard")
    if (await tree.run(*arguments, "--strategy-option=theirs", commit)).exit.ok:
        return set(conflicts)
    # What is left is no matter of lines: one side has removed, or both have added, what the other has changed.
    left = await _unmerged(tree)
    if not left:
        raise GitError("A commit of the agent's cannot be put on top of the branch.")
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

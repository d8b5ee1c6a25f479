"""Where else than in the work tree and the last commit of the repository the agent may have left changes.

They are other branches and tags, stashes, worktrees, submodules and repositories inside the repository. What is read here was
written by the agent: git runs as the agent's user, and only commands that execute nothing run with the agent's configuration.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import IO, Final

import attrs

from ccrun.errors import CcrunError
from ccrun.process.capture import capture
from ccrun.worker.git import changes
from ccrun.worker.git.changes import Changes
from ccrun.worker.git.run import Git, GitError

#: Branches and tags of one repository that are looked at. Each takes some milliseconds.
MAX_REFS: Final = 200
#: Stashes of one repository that are looked at.
MAX_STASHES: Final = 50
#: Repositories and worktrees that are looked at. Each takes a few tenths of a second.
MAX_DIRECTORIES: Final = 50
#: Seconds for the search for them, which takes one for a million files.
FIND_SECONDS: Final = 20.0


@attrs.frozen(kw_only=True)
class Place:
    """Changes in one place.

    Args:
        kind: `branch`, `tag`, `ref`, `stash`, `worktree`, `submodule` or `repository`.
        name: The name of the ref, the number of the stash or the path of the directory.
        inside: The path of the repository that has the branch or stash; empty for the repository of the task.
        differences: Pairs of commits whose differences are the changes: None for the first means no files, None for the second
            what was staged.
    """

    kind: str
    name: str
    inside: str = ""
    changes: Changes = attrs.field(repr=False)
    differences: tuple[tuple[str | None, str | None], ...]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" in {self.inside}" if self.inside else "")

    async def patch(self, target: IO[bytes], *, max_bytes: int) -> bool:
        """Write the changes as a patch for `git apply`. See `Changes.patch`."""
        for old, new in self.differences:
            if not await self.changes.patch(target, old=old, new=new, max_bytes=max_bytes - target.tell()):
                return False
        return True


async def find_places(
    git: Git, repository: Path, top: Changes, *, sparse: tuple[str, ...], parent: Path
) -> AsyncIterator[Place | str]:
    """Yield each place with changes, and a sentence for each place that cannot be looked at.

    Args:
        git: git as the agent's user.
        repository: The directory of the repository.
        top: The changes of its work tree and last commit, which are not repeated.
        sparse: The directories of it that were checked out; if empty, all were.
        parent: A directory that the agent's user may write to.
    """
    search = _Search(git=git, repository=repository, top=top, sparse=sparse, parent=parent)
    known = [commit for commit in (top.base, top.head) if commit]
    async for place in _in_refs(git.at(repository), top, known, inside=""):
        yield place
    try:
        paths, common = await search.directories()
    except CcrunError as error:
        yield f"Repositories inside the repository were not looked for: {error.message}"
        return
    if len(paths) > MAX_DIRECTORIES:
        yield f"{len(paths) - MAX_DIRECTORIES} repositories inside the repository were not looked at, since there are too many."
    for path in paths[:MAX_DIRECTORIES]:
        try:
            async for place in search.in_directory(path, common):
                yield place
        except GitError as error:
            yield f"The changes in the repository {search.name(path)} cannot be read: {error.message}"


@attrs.frozen(kw_only=True)
class _Search:
    git: Git
    repository: Path
    top: Changes
    sparse: tuple[str, ...]
    parent: Path

    def name(self, path: Path) -> str:
        """Return the path as the caller knows it."""
        return str(path.relative_to(self.repository if path.is_relative_to(self.repository) else self.parent))

    async def directories(self) -> tuple[list[Path], str]:
        """Return the directories of other repositories and worktrees, and the git directory of the repository."""
        here = self.git.at(self.repository)
        found = await capture(
            ["find", ".", "-path", "./.git", "-prune", "-o", "-name", ".git", "-prune", "-print0"],
            env=here.environment,
            cwd=self.repository,
            confinement=here.confinement,
            seconds=FIND_SECONDS,
        )
        paths = {self.repository / os.fsdecode(path)[2:-5] for path in found.stdout.split(b"\0") if path}
        listed = await here("worktree", "list", "--porcelain", "-z")
        # The first is the repository itself.
        for line in listed.split(b"\0\0")[1:]:
            if line.startswith(b"worktree "):
                path = Path(os.fsdecode(line.split(b"\0")[0].removeprefix(b"worktree ")))
                # Of what is elsewhere, the agent's user may not even own the files.
                if path.is_relative_to(self.parent):
                    paths.add(path)
        if not paths:
            return [], ""
        return sorted(paths), os.fsdecode(await here("rev-parse", "--path-format=absolute", "--git-common-dir"))

    async def in_directory(self, path: Path, common: str) -> AsyncIterator[Place | str]:
        here = self.git.at(path)
        ran = await here.run("rev-parse", "--path-format=absolute", "--show-toplevel", "--git-common-dir")
        lines = os.fsdecode(ran.stdout).splitlines(keepends=True)
        if not ran.exit.ok or len(lines) != 2 or Path(lines[0].rstrip("\n")) != path:
            # Without its git directory it is part of the repository around it.
            return
        name = self.name(path)
        if lines[1] == common:
            # The commits of a branch are found as those of a branch.
            known = ["--branches", "--remotes", *(commit for commit in (self.top.base, self.top.head) if commit)]
            place = await self._work_tree(here, "worktree", name, known, sparse=self.sparse)
        else:
            links = await self._links(here, name)
            known = ["--remotes", *links]
            place = await self._work_tree(here, "submodule" if links else "repository", name, known)
            head = [place.changes.head] if place.changes.head else []
            async for other in _in_refs(here, place.changes, [*known, *head], inside=name):
                yield other
        if place.differences:
            yield place

    async def _links(self, here: Git, name: str) -> list[str]:
        """Return the commits of a submodule that the repository had at the start, and has now, as far as it has them."""
        found = []
        for commit in dict.fromkeys(filter(None, (self.top.base, self.top.head))):
            listed = (await self.top.git("ls-tree", "-z", commit, "--", f":(literal){name}")).split()
            if listed[:2] == [b"160000", b"commit"]:
                found.append(listed[2].decode())
        return [commit for commit in found if (await here.run("cat-file", "-e", f"{commit}^{{commit}}")).exit.ok]

    async def _work_tree(
        self, here: Git, kind: str, name: str, known: Sequence[str], *, sparse: tuple[str, ...] = ()
    ) -> Place:
        """Return the changes of a work tree and the commits of its HEAD that are not known."""
        ran = await here.run("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        base = await _base(here, ran.stdout.decode().strip(), known) if ran.exit.ok else None
        found = await changes.examine(
            self.git, here.cwd, base=base, excludes_dotenv=False, sparse=sparse, parent=self.parent
        )
        staged = await found.stage()
        differences = () if staged.is_empty and found.head == base else ((base, None),)
        return Place(kind=kind, name=name, changes=found, differences=differences)


async def _in_refs(here: Git, found: Changes, known: Sequence[str], *, inside: str) -> AsyncIterator[Place | str]:
    """Yield the refs and stashes whose commits are not known.

    Args:
        here: git in the agent's repository.
        known: What git-rev-list(1) excludes.
    """
    listed = await here("for-each-ref", "--format=%(objecttype)%00%(objectname)%00%(*objectname)%00%(refname)")
    refs, has_stash = [], False
    for line in listed.splitlines():
        kind, commit, peeled, ref = os.fsdecode(line).split("\0")
        has_stash = has_stash or ref == "refs/stash"
        is_own = kind in ("commit", "tag") and not ref.startswith("refs/remotes/") and ref != "refs/stash"
        if is_own and (peeled or commit) not in known:
            refs.append((peeled or commit, ref))
    known = [*known, "--remotes"]
    if len(refs) > MAX_REFS:
        yield f"{len(refs) - MAX_REFS} branches and tags were not looked at, since there are too many."
    for commit, ref in refs[:MAX_REFS]:
        base = await _base(here, commit, known)
        if base != commit:
            kind, name = _kind_of(ref)
            yield Place(kind=kind, name=name, inside=inside, changes=found, differences=((base, commit),))
    if not has_stash:
        return
    ran = await here.run("rev-list", "--walk-reflogs", f"--max-count={MAX_STASHES + 1}", "refs/stash", "--")
    stashes = ran.stdout.decode().split() if ran.exit.ok else []
    if len(stashes) > MAX_STASHES:
        yield f"Only the last {MAX_STASHES} stashes were looked at."
    for number, stash in enumerate(stashes[:MAX_STASHES]):
        # The parents are HEAD, the index and, if there were any, the untracked files.
        parents = await _parents(here, stash)
        differences = ((next(iter(parents), None), stash), *((None, commit) for commit in parents[2:]))
        yield Place(kind="stash", name=str(number), inside=inside, changes=found, differences=differences)


async def _base(here: Git, commit: str, known: Sequence[str]) -> str | None:
    """Return the commit from which the unknown history of a commit starts: itself if it is known, None if all is unknown."""
    unknown = (await here("rev-list", "--first-parent", "--reverse", commit, "--not", *known, "--")).split()
    if not unknown:
        return commit
    return next(iter(await _parents(here, unknown[0].decode())), None)


async def _parents(here: Git, commit: str) -> list[str]:
    return (await here("rev-list", "--parents", "--max-count=1", commit, "--")).decode().split()[1:]


def _kind_of(ref: str) -> tuple[str, str]:
    for prefix, kind in (("refs/heads/", "branch"), ("refs/tags/", "tag")):
        if ref.startswith(prefix):
            return kind, ref.removeprefix(prefix)
    return "ref", ref

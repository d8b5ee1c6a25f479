"""The agent's changes, as a commit, a pack of objects or a patch.

git runs as the agent's user, without any secret, after the agent has exited. Of the agent's repository, only objects and HEAD
are used, as data; its configuration and hooks have no effect, since git uses another git directory. The results are untrusted
data too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Final

import attrs

from ccrun.errors import CcrunError
from ccrun.process.capture import capture
from ccrun.process.child import spawn
from ccrun.worker.git.clone import COMMIT, in_sparse_checkout
from ccrun.worker.git.run import LOCAL_SECONDS, Git, GitError, last_error
from ccrun.worker.git.tree_changes import MISSING, RAW, TreeChange, parse_raw

#: The committer, unless the repository configures another one.
DEFAULT_NAME: Final = "Claude Code"
DEFAULT_EMAIL: Final = "noreply@anthropic.com"
#: Characters of a name or an address in `.gitconfig`.
MAX_IDENTITY_CHARS: Final = 200
#: Bytes of the objects that the agent has added. Servers reject larger pushes: the limit of GitHub is 2 GiB.
MAX_PACK_BYTES: Final = 2 * 1024**3
#: Bytes of the list of shallow commits, 41 for each.
MAX_SHALLOW_BYTES: Final = 1024 * 1024
#: Bytes of the first line of a message.
MAX_SUBJECT_BYTES: Final = 64 * 1024
#: Seconds for copying the agent's index, which has some hundred bytes for each file.
COPY_SECONDS: Final = 20.0
#: The file that ccrun writes into the workspace.
DOTENV: Final = ".env"

#: The exit code of git when it has stopped early. After 1, it has only skipped files that it cannot read.
FATAL: Final = 128


@attrs.frozen(kw_only=True)
class Identity:
    """The author and committer of a commit."""

    name: str = DEFAULT_NAME
    email: str = DEFAULT_EMAIL

    def environment(self) -> dict[str, str]:
        """Return the environment variables that set the identity for git."""
        return {
            f"GIT_{role}_{part}": value
            for role in ("AUTHOR", "COMMITTER")
            for part, value in (("NAME", self.name), ("EMAIL", self.email))
        }


@attrs.frozen(kw_only=True)
class Staged:
    """The tree as it would be committed.

    Args:
        left_out: Directories that are repositories themselves.
        kept: Files outside the sparse checkout that the index lacks. They are not deleted.
        unreadable: The message of git about files that it could not read.
    """

    tree: str
    is_empty: bool
    left_out: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    unreadable: str | None = None


@attrs.frozen(kw_only=True)
class Changes:
    """The tree as the agent left it. Created by `examine`.

    Args:
        git: git with another git directory and without a work tree, where a broken `.gitmodules` does not stop it.
        tree: The same with the agent's tree as its work tree.
        base: The commit that was cloned, None when there was none.
        head: The agent's last commit, None when there is none.
        shallow: The shallow commits of the agent's repository.
        excludes_dotenv: Whether ccrun has written `.env`, which has secrets.
        sparse: The directories whose files were checked out; if empty, all files were.
    """

    git: Git
    tree: Git
    base: str | None
    head: str | None
    shallow: bytes = attrs.field(repr=False)
    excludes_dotenv: bool
    sparse: tuple[str, ...] = ()

    async def stage(self, wanted: Callable[[str], bool] | None = None) -> Staged:
        """Stage all changes, or those of the wanted paths.

        Raises:
            GitError: The tree cannot be read.
        """
        unreadable = await self._add()
        entries = parse_raw(await self.git("diff-index", "--cached", *RAW, await self._or_empty_tree(self.head)))
        modules = await self._modules() if any(entry.is_new_repository for entry in entries) else {}
        nested = [entry.path for entry in entries if entry.is_new_repository and entry.path not in modules]
        # A damaged index no longer tells the files that were never checked out from those that were deleted.
        kept = [entry.path for entry in entries if entry.is_deleted and not self._was_checked_out(entry.path)]
        skipped = {*nested, *kept}
        chosen = [entry for entry in entries if entry.path not in skipped and (wanted is None or wanted(entry.path))]
        if self.excludes_dotenv:
            chosen = [entry for entry in chosen if entry.path != DOTENV]
        # A new index from the last commit and the chosen paths, without anything that the agent has staged.
        await self.git("read-tree", *([self.head] if self.head else ["--empty"]))
        tree = await self._write_tree([(entry.path, entry.mode, entry.blob) for entry in chosen])
        return Staged(tree=tree, is_empty=not chosen, left_out=tuple(nested), kept=tuple(kept), unreadable=unreadable)

    async def tree_of(self, commit: str | None) -> str:
        """Return the tree of a commit, the empty tree for None."""
        since = await self._or_empty_tree(commit)
        return since if commit is None else _commit(await self.git("rev-parse", "--verify", f"{commit}^{{tree}}"))

    async def new_links(self, tree: str) -> tuple[tuple[TreeChange, str | None], ...]:
        """Return the submodule links that differ from the base, each with its URL in `.gitmodules`."""
        # `.gitmodules` must not hide a link.
        arguments = ("diff-tree", "-r", "--ignore-submodules=none", *RAW, await self._or_empty_tree(self.base), tree)
        found = [entry for entry in parse_raw(await self.git(*arguments)) if entry.is_link]
        modules = await self._modules(tree) if found else {}
        return tuple((entry, modules.get(entry.path)) for entry in found)

    async def filtered(self, tree: str, name: str) -> tuple[TreeChange, ...]:
        """Return the files of a tree that differ from the base and have this filter, see gitattributes(5)."""
        raw = await self.git("diff-tree", "-r", *RAW, await self._or_empty_tree(self.base), tree)
        files = {entry.path: entry for entry in parse_raw(raw) if entry.mode.startswith("100")}
        pattern = ("-e", f"filter={name}", tree, "--", ".gitattributes", ":(glob)**/.gitattributes")
        if not files or not (await self.git.run("grep", "--quiet", *pattern)).exit.ok:
            return ()
        await self.git("read-tree", tree)
        paths = b"".join(os.fsencode(path) + b"\0" for path in files)
        printed = await self.git("check-attr", "--cached", "-z", "--stdin", "filter", stdin=paths)
        fields = os.fsdecode(printed).split("\0")
        return tuple(files[path] for path, value in zip(fields[::3], fields[2::3], strict=False) if value == name)

    async def base_has_blob(self, blob: str) -> bool:
        """Return whether a file of the base has this content."""
        if self.base is None:
            return False
        listed = await self.git("ls-tree", "-r", "--format=%(objectname)", self.base)
        return blob.encode() in listed.split()

    async def restored(self, tree: str, entries: Sequence[TreeChange]) -> str:
        """Return the tree with these paths as they were before their changes."""
        await self.git("read-tree", tree)
        return await self._write_tree([(entry.path, entry.old_mode, entry.old_blob) for entry in entries])

    async def _write_tree(self, entries: list[tuple[str, str, str]]) -> str:
        """Return the tree of the index with other entries, of path, mode and object."""
        # Deletions come first: a directory may have become a file.
        entries.sort(key=lambda entry: entry[1] != MISSING)
        lines = b"".join(os.fsencode(f"{mode} {blob}\t{path}") + b"\0" for path, mode, blob in entries)
        await self.git("update-index", "-z", "--index-info", stdin=lines)
        return (await self.git("write-tree")).decode().strip()

    async def commit(self, staged: Staged, message: str, identity: Identity) -> str:
        """Commit what was staged on top of the agent's last commit. Return the new commit."""
        git = self.git.at(self.git.cwd, **identity.environment())
        parents = ["-p", self.head] if self.head else []
        printed = await git("commit-tree", *parents, "-F", "-", staged.tree, stdin=message.encode())
        return _commit(printed)

    async def identity(self) -> Identity:
        """Return the committer, from `.gitconfig` in the staged tree if it has one."""
        found = []
        for name in ("user.name", "user.email"):
            # Read as a blob: git neither follows a link nor includes another file.
            ran = await self.git.run("config", "--blob=:.gitconfig", "--get", name)
            text = re.sub(r"[\x00-\x1f\x7f<>]", "", ran.stdout.decode(errors="replace")).strip() if ran.exit.ok else ""
            found.append(text[:MAX_IDENTITY_CHARS])
        return Identity(name=found[0] or DEFAULT_NAME, email=found[1] or DEFAULT_EMAIL)

    async def message(self, commit: str) -> str:
        """Return the first line of the message of a commit."""
        output = await self.git(
            "log", "-1", "--no-show-signature", "--format=%s", commit, "--", max_bytes=MAX_SUBJECT_BYTES
        )
        return output.decode(errors="replace").strip()

    async def contains_dotenv(self) -> bool:
        """Return whether a commit of the agent has changed `.env`, which has secrets."""
        if not self.excludes_dotenv or self.head is None or self.head == self.base:
            return False
        return bool(await self.git("rev-list", "--max-count=1", self.head, *self._not_base(), "--", DOTENV))

    async def pack(self, commit: str, target: IO[bytes]) -> None:
        """Write a pack of the objects of a commit that the base does not have.

        Raises:
            GitError: The objects cannot be read, or are larger than `MAX_PACK_BYTES`.
        """
        wanted = "".join(f"{line}\n" for line in (commit, *self._not_base())).encode()
        if not await self._write(("pack-objects", "--quiet", "--revs", "--stdout"), target, MAX_PACK_BYTES, wanted):
            raise GitError(f"The changes are larger than {MAX_PACK_BYTES // 1024**3} GiB.")

    async def patch(self, target: IO[bytes], *, old: str | None, new: str | None = None, max_bytes: int) -> bool:
        """Write the differences between two commits as a patch for `git apply`.

        Args:
            old: None for no files.
            new: None for what was staged.

        Returns:
            Whether the patch is complete. Otherwise it is cut at `max_bytes`.
        """
        options = ("--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv")
        compared = ["--cached"] if new is None else []
        compared += [await self._or_empty_tree(old), *([] if new is None else [new])]
        exclusions = (".", f":(top,exclude){DOTENV}") if self.excludes_dotenv else ()
        return await self._write(("diff", *options, *compared, "--", *exclusions), target, max_bytes)

    async def _write(self, arguments: Sequence[str], target: IO[bytes], max_bytes: int, stdin: bytes = b"") -> bool:
        left = max_bytes
        git = self.git
        async with spawn(
            git.argv(*arguments), env=git.environment, cwd=git.cwd, confinement=git.confinement, stdin=stdin
        ) as child:
            try:
                async with asyncio.timeout(LOCAL_SECONDS):
                    async for chunk in child.chunks():
                        await asyncio.to_thread(target.write, chunk[:left])
                        left -= len(chunk)
                        if left < 0:
                            return False
                    exit_status = await child.wait()
            except TimeoutError:
                raise GitError(f"git {arguments[0]} did not finish within {LOCAL_SECONDS:g} s.") from None
            except OSError as error:
                raise GitError(f"The output of git {arguments[0]} cannot be written: {error.strerror}.") from None
            if not exit_status.ok:
                raise GitError(f"git {arguments[0]} failed: {last_error(child.stderr_tail)}")
        return True

    async def _add(self) -> str | None:
        """Add all files to the index. Return the message of git when it could not read all of them."""
        exclusions = (f":(top,exclude){DOTENV}",) if self.excludes_dotenv else ()
        sparse = ("--sparse",) if self.sparse else ()
        arguments = ("add", "--all", "--ignore-errors", *sparse, "--", ".", *exclusions)
        ran = await self.tree.run(*arguments)
        if ran.exit.code == FATAL:
            # The agent's index, which only saves time, may be damaged. The next attempt is without it.
            await self.git("read-tree", *([self.head] if self.head else ["--empty"]))
            ran = await self.tree.run(*arguments)
        if ran.exit.code == FATAL:
            raise GitError(f"git add failed: {last_error(ran.stderr)}")
        return None if ran.exit.ok else last_error(ran.stderr) or "git add failed"

    async def _modules(self, tree: str = "") -> dict[str, str | None]:
        """Return the URLs of the submodules in `.gitmodules` of a tree, by default of the index, by their paths."""
        ran = await self.git.run(
            "config", f"--blob={tree}:.gitmodules", "-z", "--get-regexp", r"^submodule\..*\.(path|url)$"
        )
        settings = {}
        for item in os.fsdecode(ran.stdout).split("\0") if ran.exit.ok else ():
            key, _, settings[key] = item.partition("\n")
        suffix = ".path"
        return {
            path: settings.get(f"{key.removesuffix(suffix)}.url")
            for key, path in settings.items()
            if key.endswith(suffix) and path
        }

    async def _or_empty_tree(self, commit: str | None) -> str:
        """Return the commit, or the empty tree when there is none."""
        return commit or (await self.git("hash-object", "-t", "tree", "-w", "--stdin")).decode().strip()

    def _was_checked_out(self, path: str) -> bool:
        return not self.sparse or in_sparse_checkout(path, self.sparse)

    def _not_base(self) -> tuple[str, ...]:
        return (f"^{self.base}",) if self.base else ()


async def examine(
    git: Git,
    repository: Path,
    *,
    base: str | None,
    excludes_dotenv: bool,
    sparse: tuple[str, ...] = (),
    filters: Sequence[str] = (),
    parent: Path,
) -> Changes:
    """Return the changes of the agent.

    Args:
        git: git as the agent's user.
        repository: The agent's tree.
        sparse: The directories whose files were checked out; if empty, all files were.
        filters: Settings of filters with which files are staged.
        parent: A directory that this user may write to. The new git directory is created in it.

    Raises:
        GitError: The tree is not a repository, or no longer the one that was cloned.
    """
    in_repository = git.at(repository)
    objects, index, shallow = [
        repository / os.fsdecode(path) for path in (await _paths(in_repository)).split(b"\n")[:3]
    ]
    if any(letter in str(objects) for letter in ':"\n'):
        raise GitError("The path of the object directory contains a character that git does not accept there.")
    git_dir = parent / f"changes-{secrets.token_hex(8)}"
    await git("init", "--quiet", "--bare", "--template=", str(git_dir))
    # `git init` has set what depends on the file system. No setting comes from the agent.
    ours = git.at(git_dir, GIT_DIR=str(git_dir), GIT_ALTERNATE_OBJECT_DIRECTORIES=str(objects))
    # With the second setting, git does not ignore a file that exists although it was not checked out.
    settings = ("core.bare=false", f"core.sparseCheckout={'true' if sparse else 'false'}")
    tree = ours.at(repository, *settings, *filters, GIT_WORK_TREE=str(repository))
    for source, name in ((index, "index"), (shallow, "shallow")):
        # As the agent's user, so that a link cannot expose a file that the agent cannot read.
        await _copy(ours, source, git_dir / name)
    ran = await in_repository.run("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    head = _commit(ran.stdout) if ran.exit.ok else None
    for commit in filter(None, (base, head)):
        if not (await ours.run("cat-file", "-e", f"{commit}^{{commit}}")).exit.ok:
            raise GitError("The repository no longer has the commit that was cloned, so the changes are unknown.")
    boundary = await ours.run("rev-parse", "--is-shallow-repository")
    listed = await _read(ours, git_dir / "shallow") if boundary.stdout.strip() == b"true" else b""
    return Changes(
        git=ours, tree=tree, base=base, head=head, shallow=listed, excludes_dotenv=excludes_dotenv, sparse=sparse
    )


async def _paths(git: Git) -> bytes:
    try:
        return await git("rev-parse", "--git-path", "objects", "--git-path", "index", "--git-path", "shallow")
    except GitError:
        raise GitError("The workspace is not a git repository, or git can no longer read it.") from None


async def _copy(git: Git, source: Path, target: Path) -> None:
    """Copy a file if it exists and can be read."""
    # With its modification time: git compares that of the index with those of the files.
    argv = ["sh", "-c", 'test -f "$1" && cp -p -- "$1" "$2"', "sh", str(source), str(target)]
    with contextlib.suppress(CcrunError):
        await capture(argv, env=git.environment, cwd=git.cwd, confinement=git.confinement, seconds=COPY_SECONDS)


async def _read(git: Git, path: Path) -> bytes:
    """Return the lines of a list that are commit IDs."""
    ran = await capture(
        ["cat", "--", str(path)],
        env=git.environment,
        cwd=git.cwd,
        confinement=git.confinement,
        seconds=LOCAL_SECONDS,
        max_bytes=MAX_SHALLOW_BYTES,
    )
    lines = ran.stdout.decode(errors="replace").split()
    return "".join(f"{line}\n" for line in lines if COMMIT.fullmatch(line)).encode()


def _commit(printed: bytes) -> str:
    """Return the commit ID that git printed. A process of the agent's user may print anything."""
    commit = printed.decode(errors="replace").strip()
    if COMMIT.fullmatch(commit) is None:
        raise GitError("git did not print the ID of a commit.")
    return commit

"""Cloning the repository of a request into the workspace, before any code of the task runs."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Final, Self

import attrs

from ccrun.process.capture import ProcessResult
from ccrun.worker.git.host_errors import RemoteError, exchange_error, timeout_error
from ccrun.worker.git.remote import Access
from ccrun.worker.git.run import Git, GitError

#: A complete commit ID of SHA-1 or SHA-256.
COMMIT: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
#: Seconds between the attempts of an exchange with a server whose error may be gone soon: three attempts within the timeout.
RETRY_PAUSES: Final = (1.0, 4.0)
#: Commits by which the history is deepened until the common ancestor with the base is found; then it is fetched completely.
DEEPEN_STEPS: Final = (50, 500, 5000)
#: Branches that an error names.
MAX_NAMED_BRANCHES: Final = 10
#: Bytes that are copied in one step.
_COPY_BYTES: Final = 1024 * 1024


@attrs.frozen(kw_only=True)
class CloneOptions:
    """What to clone of a repository.

    Args:
        revision: A branch, a tag, a complete commit ID, or a ref that starts with `refs/`; None for the HEAD of the server.
        depth: The number of commits from the tip.
        submodules: Whether to clone submodules, with the same depth.
        review_base: A branch that is fetched as `origin/{review_base}`, with the history down to the common ancestor.
        sparse: The directories whose files are checked out; if empty, all files are.
    """

    revision: str | None = None
    depth: int = 1
    submodules: bool = False
    review_base: str | None = None
    sparse: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Clone:
    """What was cloned.

    Args:
        base: The commit that was checked out, None in an empty repository.
        shallow: The content of the file `shallow`: the commits whose parents were not fetched.
    """

    base: str | None
    shallow: bytes = attrs.field(repr=False)


async def clone(
    git: Git,
    access: Access,
    into: Path,
    options: CloneOptions,
    *,
    finish: Callable[[Git], Awaitable[None]] | None = None,
    seconds: float,
    pauses: Sequence[float] = RETRY_PAUSES,
) -> Clone:
    """Clone into an empty directory.

    Args:
        git: git with an empty current directory.
        finish: Called with git in the clone while it can connect to the server. Part of each attempt.
        seconds: The timeout.
        pauses: Seconds between the attempts.

    Raises:
        GitError: The repository cannot be cloned.
    """
    revision = options.revision
    try:
        async with asyncio.timeout(seconds), access.opened(git) as opened:
            for pause in (*pauses, None):
                try:
                    if revision is not None and (COMMIT.fullmatch(revision) or revision.startswith("refs/")):
                        await _fetch(opened, access, into, revision, options)
                    else:
                        await _clone(opened, access, into, options)
                    if options.review_base is not None:
                        await _fetch_base(opened.at(into), access, options.review_base, options.depth)
                    if finish is not None:
                        await finish(opened.at(into))
                    break
                except RemoteError as error:
                    if not error.is_transient or pause is None:
                        raise
                    await asyncio.to_thread(_empty, into)
                    await asyncio.sleep(pause)
    except TimeoutError:
        raise timeout_error(access.remote, "cloned", seconds) from None
    here = git.at(into)
    head = await here.run("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    base = head.stdout.decode().strip() if head.exit.ok else None
    return Clone(base=base, shallow=await asyncio.to_thread(_read, into / ".git" / "shallow"))


async def _clone(git: Git, access: Access, into: Path, options: CloneOptions) -> None:
    revision = options.revision
    arguments = ["--template=", "--no-hardlinks", f"--depth={options.depth}"]
    if options.sparse:
        arguments += ["--no-checkout"]
    elif options.submodules:
        arguments += ["--recurse-submodules", "--shallow-submodules"]
    chosen = [] if revision is None else [f"--branch={revision}"]
    ran = await _ask(git, "clone", *arguments, *chosen, "--", access.remote.url, str(into))
    here = git.at(into)
    if ran.exit.ok:
        if revision is None and not (await here.run("rev-parse", "--verify", "--quiet", "HEAD")).exit.ok:
            await _check_empty(
                git, access, "The HEAD of the repository names a branch that does not exist: give gitBranch."
            )
        elif options.sparse:
            await _check_out_sparsely(here, options.sparse)
            await here("checkout", "--quiet")
            if options.submodules:
                await _clone_submodules(here, access, options.sparse)
        return
    if revision is None or b"Remote branch " not in ran.stderr:
        raise exchange_error(access.remote, ran, access, "cloned")
    await _check_empty(git, access, f"The repository has no branch or tag of the name in gitBranch: {revision}.")
    # An empty repository has no branch yet, so the first may have any name.
    await asyncio.to_thread(_empty, into)
    ran = await _ask(git, "clone", *arguments, "--", access.remote.url, str(into))
    if not ran.exit.ok:
        raise exchange_error(access.remote, ran, access, "cloned")
    await here("symbolic-ref", "HEAD", f"refs/heads/{revision}")


async def _check_empty(git: Git, access: Access, error: str) -> None:
    """Check that the repository has no branches and tags.

    Raises:
        RemoteError: It has. The message is the error, with the names of branches.
    """
    ran = await _ask(git, "ls-remote", "--quiet", "--heads", "--tags", "--", access.remote.url)
    if not ran.exit.ok:
        raise exchange_error(access.remote, ran, access, "cloned")
    refs = [line.partition("\t")[2] for line in ran.stdout.decode(errors="replace").splitlines()]
    if refs:
        branches = [ref.removeprefix("refs/heads/") for ref in refs if ref.startswith("refs/heads/")]
        more = ", …" if len(branches) > MAX_NAMED_BRANCHES else ""
        names = f" Its branches: {', '.join(branches[:MAX_NAMED_BRANCHES])}{more}." if branches else ""
        raise RemoteError(f"{error}{names}")


async def _fetch(git: Git, access: Access, into: Path, revision: str, options: CloneOptions) -> None:
    """Check out a commit or a ref that is no branch or tag."""
    here = git.at(into)
    await here("init", "--quiet", "--template=")
    await here("remote", "add", "--", "origin", access.remote.url)
    ran = await _ask(here, "fetch", "--quiet", f"--depth={options.depth}", "--", access.remote.url, revision)
    if not ran.exit.ok:
        if _NO_SUCH_REF.search(ran.stderr):
            kind = "ref" if revision.startswith("refs/") else "commit"
            raise RemoteError(f"The repository has no {kind} {revision}, or does not serve it.")
        raise exchange_error(access.remote, ran, access, "cloned")
    if options.sparse:
        await _check_out_sparsely(here, options.sparse)
    await here("checkout", "--quiet", "--detach", "FETCH_HEAD", "--")
    if options.submodules:
        await _clone_submodules(here, access, options.sparse)


async def _check_out_sparsely(here: Git, directories: Sequence[str]) -> None:
    """Limit the files that a checkout writes: those in the directories, and the files next to and above them."""
    quoted = ['"{}"'.format(re.sub(r'(["\\])', r"\\\1", directory)) for directory in directories]
    await here("sparse-checkout", "set", "--cone", "--stdin", stdin="".join(f"{line}\n" for line in quoted).encode())


async def _clone_submodules(here: Git, access: Access, sparse: Sequence[str]) -> None:
    """Clone the submodules that are checked out."""
    paths = []
    if sparse:
        listed = os.fsdecode(await here("ls-files", "--stage", "-z")).split("\0")[:-1]
        links = [line.partition("\t")[2] for line in listed if line.startswith("160000 ")]
        paths = [path for path in links if in_sparse_checkout(path, sparse)]
        if not paths:
            return
    ran = await _ask(here, "submodule", "--quiet", "update", "--init", "--recursive", "--depth=1", "--", *paths)
    if not ran.exit.ok:
        raise exchange_error(access.remote, ran, access, "cloned")


def in_sparse_checkout(path: str, directories: Sequence[str]) -> bool:
    """Return whether a file is checked out: cone mode of git-sparse-checkout(1)."""
    parent = f"{PurePosixPath(path).parent}/"
    return parent == "./" or any(
        parent.startswith(f"{directory}/") or f"{directory}/".startswith(parent) for directory in directories
    )


async def _fetch_base(here: Git, access: Access, branch: str, depth: int) -> None:
    """Fetch a branch, and both histories down to the common ancestor if there is one."""
    ref = f"refs/remotes/origin/{branch}"
    wanted = ("--", access.remote.url, f"+refs/heads/{branch}:{ref}")
    ran = await _ask(here, "fetch", "--quiet", "--no-tags", f"--depth={depth}", *wanted)
    if not ran.exit.ok and _NO_SUCH_REF.search(ran.stderr):
        raise RemoteError(f"The repository has no branch of the name in gitBase: {branch}.")
    head = (await here("rev-parse", "HEAD")).decode().strip()
    for deeper in (*(f"--deepen={commits}" for commits in DEEPEN_STEPS), "--unshallow"):
        if not ran.exit.ok:
            raise exchange_error(access.remote, ran, access, "cloned")
        is_shallow = (await here("rev-parse", "--is-shallow-repository")).strip() == b"true"
        if not is_shallow or (await here.run("merge-base", head, ref)).exit.ok:
            return
        ran = await _ask(here, "fetch", "--quiet", "--no-tags", deeper, *wanted, head)
    if not ran.exit.ok:
        raise exchange_error(access.remote, ran, access, "cloned")


async def _ask(git: Git, *arguments: str) -> ProcessResult:
    """Run a command that connects to the server. The caller has the timeout."""
    return await git.run(*arguments, seconds=None)


_NO_SUCH_REF: Final = re.compile(rb"not our ref|unadvertised object|upload-pack: not our|couldn't find remote ref")


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


class PackSnapshot:
    """A copy of the fetched packs in files without a name, which the agent cannot reach.

    The agent may change or remove everything in its workspace. A push must be based on the objects that came from the server,
    which also tell which objects need not be pushed.
    """

    def __init__(self, packs: Sequence[tuple[str, IO[bytes]]]) -> None:
        self._packs = packs

    @classmethod
    async def of(cls, repository: Path) -> Self:
        """Copy the packs of a new clone.

        Raises:
            GitError: They cannot be copied.
        """
        return await asyncio.to_thread(cls._copied, repository / ".git" / "objects" / "pack")

    @classmethod
    def _copied(cls, folder: Path) -> Self:
        packs: list[tuple[str, IO[bytes]]] = []
        try:
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if path.suffix in (".pack", ".idx"):
                    packs.append((path.name, tempfile.TemporaryFile()))  # noqa: SIM115 - closed by `close`
                    with path.open("rb") as source:
                        shutil.copyfileobj(source, packs[-1][1], _COPY_BYTES)
        except OSError as error:
            for _, file in packs:
                file.close()
            raise GitError(f"The cloned objects cannot be stored for the push: {error.strerror}.") from None
        return cls(packs)

    async def restore(self, repository: Path) -> None:
        """Copy the packs into a bare repository."""
        await asyncio.to_thread(self._restore, repository / "objects" / "pack")

    def _restore(self, folder: Path) -> None:
        try:
            folder.mkdir(exist_ok=True)
            for name, file in self._packs:
                file.seek(0)
                with (folder / name).open("xb") as target:
                    shutil.copyfileobj(file, target, _COPY_BYTES)
        except OSError as error:
            raise GitError(f"The cloned objects cannot be restored for the push: {error.strerror}.") from None

    def close(self) -> None:
        """Close the files, which deletes them."""
        for _, file in self._packs:
            file.close()

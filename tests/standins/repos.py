"""Bare repositories for the git servers of the tests, and git itself in an environment that nothing of this machine changes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs
import psutil

#: Seconds. No git of a test is longer at work than this, however busy the machine is.
GIT_SECONDS: Final = 60.0
CHUNK_BYTES: Final = 64 * 1024
#: A fixed moment, so that the same commits have the same IDs.
DATE: Final = "1700000000 +0000"
SOMEBODY: Final = "Somebody Else <somebody@example.com>"

#: What GitHub says when a branch may not be pushed to.
PROTECTED: Final = "error: GH006: Protected branch update failed for {ref}."

# Nothing may go on in the background after a push: nobody would wait for it.
_CONFIG: Final = (
    "[gc]\n\tauto = 0\n[maintenance]\n\tauto = false\n[receive]\n\tautogc = false\n[http]\n\treceivepack = true\n"
)


@attrs.frozen
class Executable:
    """A file that may be executed."""

    content: str | bytes


@attrs.frozen
class Link:
    """A symbolic link."""

    target: str


@attrs.frozen
class Submodule:
    """Another repository at one of its commits; `.gitmodules` names it."""

    url: str
    sha: str


#: A file of a commit; None is one that the commit takes away.
File = str | bytes | Executable | Link | Submodule | None


@attrs.frozen(kw_only=True)
class Commit:
    """A commit as `git log` shows it."""

    sha: str
    parents: tuple[str, ...]
    author: str
    committer: str
    message: str


class GitFailed(AssertionError):
    """A git that a test called, and that it expected to succeed, failed."""


@attrs.frozen(kw_only=True)
class Result:
    """What became of a git."""

    code: int
    stdout: bytes
    stderr: str


def environment(**more: str) -> dict[str, str]:
    """Return an environment for git in which only its own defaults and a fixed identity count."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": os.environ["HOME"],
        "LC_ALL": "C.UTF-8",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_AUTHOR_NAME": "A Test",
        "GIT_AUTHOR_EMAIL": "test@example.com",
        "GIT_AUTHOR_DATE": DATE,
        "GIT_COMMITTER_NAME": "A Test",
        "GIT_COMMITTER_EMAIL": "test@example.com",
        "GIT_COMMITTER_DATE": DATE,
        **more,
    }


async def run_git(
    *args: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    seconds: float = GIT_SECONDS,
) -> Result:
    """Run git to its end, whatever that is."""
    async with asyncio.timeout(seconds), backend(["git", *map(str, args)], cwd=cwd, env=env or environment()) as git:
        feeding = asyncio.create_task(feed(git, stdin))
        stdout, stderr, _ = await asyncio.gather(_out(git).read(), _err(git).read(), feeding)
        return Result(code=await git.wait(), stdout=stdout, stderr=stderr.decode(errors="replace"))


async def git(
    *args: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    seconds: float = GIT_SECONDS,
) -> str:
    """Run git and return what it prints, without the last newline.

    Raises:
        GitFailed: It did not exit with 0.
    """
    result = await run_git(*args, cwd=cwd, env=env, stdin=stdin, seconds=seconds)
    if result.code != 0:
        raise GitFailed(f"git {' '.join(map(str, args))} exited with {result.code}: {result.stderr}")
    return result.stdout.decode().removesuffix("\n")


# --- a git at work, for the servers too --------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def backend(
    argv: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program with pipes, and kill all of its group on the way out if it has not ended."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        cwd=cwd,
        env=dict(env),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # The group may be there although its leader is gone.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await asyncio.shield(_over(process))


async def _over(process: asyncio.subprocess.Process) -> None:
    # `wait` alone does not return as long as a pipe is not read to its end.
    await asyncio.gather(process.wait(), _out(process).read(), _err(process).read())


async def feed(process: asyncio.subprocess.Process, content: bytes) -> None:
    """Write all of the input; a program that does not read it is no error."""
    stdin = _in(process)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stdin.write(content)
        await stdin.drain()
    stdin.close()


async def pump(reader: asyncio.StreamReader, write: Callable[[bytes], Awaitable[None]]) -> None:
    """Hand on what comes out of a pipe as it comes, until its end."""
    while piece := await reader.read(CHUNK_BYTES):
        await write(piece)


def _in(process: asyncio.subprocess.Process) -> asyncio.StreamWriter:
    assert process.stdin is not None
    return process.stdin


def _out(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    assert process.stdout is not None
    return process.stdout


def _err(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    assert process.stderr is not None
    return process.stderr


def descendants() -> set[psutil.Process]:
    """Return what this process has started, and what that has, as far as it lives."""
    return {process for process in psutil.Process().children(recursive=True) if _command(process)}


def is_at_work(word: str) -> bool:
    """Return whether a descendant of this process has that argument, `upload-pack` say."""
    return any(word in _command(process) for process in descendants())


def _command(process: psutil.Process) -> list[str]:
    # A zombie has none.
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


# --- repositories ------------------------------------------------------------------------------------------------------


class Repos:
    """A folder of bare repositories, which a server serves."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    async def create(
        self,
        name: str,
        files: Mapping[str, File] | None = None,
        *,
        branch: str = "main",
        allow_filter: bool = False,
        allow_any_sha1: bool = False,
        deny_non_fast_forwards: bool = False,
    ) -> Repository:
        """Make a repository, with one commit if there are files, else empty.

        Args:
            name: With the groups above it, and without `.git`.
            branch: The default branch.
            allow_filter: Whether a client may leave out objects (`--filter`).
            allow_any_sha1: Whether a client may ask for any object, not only for those that a ref names.
            deny_non_fast_forwards: Whether a push may not rewrite history, by force or not.
        """
        repository = Repository(path=self.root / f"{name}.git", name=name, branch=branch)
        await git("init", "--quiet", "--bare", "--template=", f"--initial-branch={branch}", repository.path)
        config = [_CONFIG]
        if allow_filter:
            config.append("[uploadpack]\n\tallowFilter = true\n")
        if allow_any_sha1:
            config.append("[uploadpack]\n\tallowAnySHA1InWant = true\n")
        if deny_non_fast_forwards:
            config.append("[receive]\n\tdenyNonFastForwards = true\n")
        with (repository.path / "config").open("a", encoding="utf-8") as written:
            written.writelines(config)
        if files is not None:
            await repository.commit(files, message="The first commit", author="A Test <test@example.com>")
        return repository

    def find(self, path: str) -> Path | None:
        """Return the repository of a path as a URL has it, with or without `.git`; none outside of the root."""
        root = self.root.resolve()
        for spelling in (path.strip("/"), f"{path.strip('/')}.git"):
            with contextlib.suppress(OSError, ValueError):
                found = (root / spelling).resolve()
                if found != root and found.is_relative_to(root) and (found / "HEAD").is_file():
                    return found
        return None


@attrs.frozen(kw_only=True)
class Repository:
    """A bare repository. What a test writes to it comes past the servers, as from somebody else, and past its hooks."""

    path: Path
    #: With the groups above it, and without `.git`.
    name: str
    #: The default branch.
    branch: str = "main"

    async def git(self, *args: str, stdin: bytes = b"") -> str:
        """Run git in the repository and return what it prints."""
        return await git(*args, cwd=self.path, stdin=stdin)

    async def commit(
        self,
        files: Mapping[str, File],
        *,
        branch: str | None = None,
        message: str = "Somebody else's commit",
        author: str = SOMEBODY,
    ) -> str:
        """Put a commit on top of a branch, which need not exist yet, and return its ID."""
        branch = branch or self.branch
        ref = f"refs/heads/{branch}"
        lines = [b"commit %s" % ref.encode(), b"mark :1"]
        lines += [b"%s %s %s" % (role, author.encode(), DATE.encode()) for role in (b"author", b"committer")]
        lines.append(_data(message))
        if await self.sha(branch) is not None:
            lines.append(b"from %s^0" % ref.encode())
        modules = {path: file for path, file in files.items() if isinstance(file, Submodule)}
        if modules:
            lines += _change(".gitmodules", _gitmodules(modules))
        for path, file in files.items():
            lines += _change(path, file)
        lines += [b"", b"get-mark :1", b"done", b""]
        return await self.git("fast-import", "--quiet", "--done", stdin=b"\n".join(lines))

    async def make_branch(self, name: str, at: str | None = None) -> None:
        """Let a branch, new or not, stand at a commit, by default at that of the default branch."""
        await self.git("update-ref", f"refs/heads/{name}", await self._commit_id(at or self.branch))

    async def make_tag(self, name: str, at: str | None = None, *, message: str | None = None) -> None:
        """Put a tag at a commit, by default at that of the default branch; with a message it is annotated."""
        options = ("-a", "-m", message) if message is not None else ()
        await self.git("tag", *options, name, await self._commit_id(at or self.branch))

    async def delete_branch(self, name: str) -> None:
        """Take a branch away."""
        await self.git("update-ref", "-d", f"refs/heads/{name}")

    def protect(self, branch: str, *, hook: str = "update") -> None:
        """Refuse every push to a branch, with a message as GitHub's.

        Args:
            hook: `update` refuses that branch alone, `pre-receive` the whole push.
        """
        ref = f"refs/heads/{branch}"
        refuse = f'echo "{PROTECTED.format(ref=ref)}" >&2; echo "error: Changes must be made through a pull request." >&2; exit 1'
        if hook == "update":
            self.hook("update", f'[ "$1" = "{ref}" ] || exit 0\n{refuse}')
        else:
            self.hook("pre-receive", f'while read -r old new ref; do [ "$ref" != "{ref}" ] || {{ {refuse}; }}; done')

    def hook(self, name: str, script: str) -> None:
        """Let the repository run a hook: lines for sh."""
        path = self.path / "hooks" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)

    async def sha(self, ref: str | None = None) -> str | None:
        """Return the ID of a ref's commit, by default of the default branch's; None when there is no such ref."""
        result = await run_git("rev-parse", "--quiet", "--verify", f"{ref or self.branch}^0", cwd=self.path)
        return result.stdout.decode().strip() if result.code == 0 else None

    async def tree(self, ref: str | None = None) -> str:
        """Return the ID of a ref's tree."""
        return await self.git("rev-parse", "--verify", f"{ref or self.branch}^{{tree}}")

    async def refs(self) -> dict[str, str]:
        """Return every ref, by its whole name, and the ID of what it names."""
        printed = await self.git("for-each-ref", "--format=%(objectname) %(refname)")
        return {name: sha for sha, name in (line.split(" ", 1) for line in printed.splitlines())}

    async def branches(self) -> dict[str, str]:
        """Return the branches and the IDs of their commits."""
        prefix = "refs/heads/"
        return {name.removeprefix(prefix): sha for name, sha in (await self.refs()).items() if name.startswith(prefix)}

    async def modes(self, ref: str | None = None) -> dict[str, str]:
        """Return the paths of a ref's commit and their modes: 100644, 100755, 120000 (link) or 160000 (submodule)."""
        return {path: mode for mode, _, path in await self._entries(ref)}

    async def files(self, ref: str | None = None) -> dict[str, bytes]:
        """Return the contents of a ref's commit by path: of a link its target, of a submodule the ID of its commit."""
        entries = await self._entries(ref)
        wanted = "".join(f"{sha}\n" for mode, sha, _ in entries if mode != "160000").encode()
        result = await run_git("cat-file", "--batch", cwd=self.path, stdin=wanted)
        rest, found = result.stdout, {}
        for mode, sha, path in entries:
            if mode == "160000":
                found[path] = sha.encode()
                continue
            header, _, rest = rest.partition(b"\n")
            size = int(header.split()[-1])
            found[path], rest = rest[:size], rest[size + 1 :]
        return found

    async def log(self, ref: str | None = None) -> list[Commit]:
        """Return the commits of a ref, the newest first."""
        form = "%H%x00%P%x00%an <%ae>%x00%cn <%ce>%x00%B"
        printed = await self.git("log", "-z", "--topo-order", f"--format={form}", ref or self.branch, "--")
        fields = printed.removesuffix("\0").split("\0")
        return [
            Commit(
                sha=sha,
                parents=tuple(parents.split()),
                author=author,
                committer=committer,
                message=message.removesuffix("\n"),
            )
            for sha, parents, author, committer, message in (fields[n : n + 5] for n in range(0, len(fields), 5))
        ]

    async def _entries(self, ref: str | None) -> list[tuple[str, str, str]]:
        printed = await self.git("ls-tree", "-r", "-z", ref or self.branch)
        lines = [line.partition("\t") for line in printed.split("\0") if line]
        return [(facts.split()[0], facts.split()[2], path) for facts, _, path in lines]

    async def _commit_id(self, ref: str) -> str:
        sha = await self.sha(ref)
        assert sha is not None, f"{self.name} has no {ref}"
        return sha


def _gitmodules(modules: Mapping[str, Submodule]) -> str:
    return "".join(f'[submodule "{path}"]\n\tpath = {path}\n\turl = {module.url}\n' for path, module in modules.items())


def _change(path: str, file: File) -> list[bytes]:
    """Return what a commit does to a path, as git-fast-import(1) reads it."""
    quoted = path.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n").encode()
    match file:
        case None:
            return [b'D "%s"' % quoted]
        case Submodule(sha=sha):
            return [b'M 160000 %s "%s"' % (sha.encode(), quoted)]
        case Link(target=target):
            return [b'M 120000 inline "%s"' % quoted, _data(target)]
        case Executable(content=content):
            return [b'M 100755 inline "%s"' % quoted, _data(content)]
        case _:
            return [b'M 100644 inline "%s"' % quoted, _data(file)]


def _data(content: str | bytes) -> bytes:
    encoded = content.encode() if isinstance(content, str) else content
    return b"data %d\n%s" % (len(encoded), encoded)

"""Bare repositories for the stand-in git servers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs
from standins.git_process import (
    DATE,
    git,
    run_git,
)

OTHER_AUTHOR: Final = "Another Author <another@example.com>"

#: GitHub's message when a push to a branch is not allowed.
PROTECTED: Final = "error: GH006: Protected branch update failed for {ref}."

# No background process may run after a push, since the tests would not wait for it.
_CONFIG: Final = (
    "[gc]\n\tauto = 0\n[maintenance]\n\tauto = false\n[receive]\n\tautogc = false\n[http]\n\treceivepack = true\n"
)


@attrs.frozen
class Executable:
    """An executable file."""

    content: str | bytes


@attrs.frozen
class Link:
    """A symbolic link."""

    target: str


@attrs.frozen
class Submodule:
    """A submodule: another repository at one of its commits."""

    url: str
    sha: str


#: A file in a commit. None: the commit deletes the file.
File = str | bytes | Executable | Link | Submodule | None


@attrs.frozen(kw_only=True)
class Commit:
    """A commit as `git log` shows it."""

    sha: str
    parents: tuple[str, ...]
    author: str
    committer: str
    message: str


class Repos:
    """A directory of bare repositories, which a server serves."""

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
        """Create a repository.

        Args:
            name: Its path below the root, without `.git`.
            files: The files of the first commit. None: the repository is empty.
            branch: The default branch.
            allow_filter: Whether clients may omit objects (`--filter`).
            allow_any_sha1: Whether clients may fetch any object, not only those that a ref names.
            deny_non_fast_forwards: Whether pushes that rewrite history are rejected, even with `--force`.
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
        with (repository.path / "config").open("a", encoding="utf-8") as file:
            file.writelines(config)
        if files is not None:
            await repository.commit(files, message="The first commit", author="A Test <test@example.com>")
        return repository

    def find(self, path: str) -> Path | None:
        """Return the repository of the path in a URL, with or without `.git`; None outside the root."""
        root = self.root.resolve()
        for spelling in (path.strip("/"), f"{path.strip('/')}.git"):
            with contextlib.suppress(OSError, ValueError):
                found = (root / spelling).resolve()
                if found != root and found.is_relative_to(root) and (found / "HEAD").is_file():
                    return found
        return None


@attrs.frozen(kw_only=True)
class Repository:
    """A bare repository. Changes by its methods bypass the servers and the hooks, as if another client had pushed them."""

    path: Path
    #: The path below the root, without `.git`.
    name: str
    #: The default branch.
    branch: str = "main"

    async def git(self, *args: str, stdin: bytes = b"") -> str:
        """Run git in the repository and return its output."""
        return await git(*args, cwd=self.path, stdin=stdin)

    async def commit(
        self,
        files: Mapping[str, File],
        *,
        branch: str | None = None,
        message: str = "Another commit",
        author: str = OTHER_AUTHOR,
    ) -> str:
        """Add a commit to a branch, which is created if it does not exist, and return the commit's ID."""
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
        """Create a branch, or move it, to a ref; by default to the default branch."""
        await self.git("update-ref", f"refs/heads/{name}", await self._commit_id(at or self.branch))

    async def make_tag(self, name: str, at: str | None = None, *, message: str | None = None) -> None:
        """Create a tag at a ref, by default at the default branch. With a message, it is annotated."""
        options = ("-a", "-m", message) if message is not None else ()
        await self.git("tag", *options, name, await self._commit_id(at or self.branch))

    async def delete_branch(self, name: str) -> None:
        """Delete a branch."""
        await self.git("update-ref", "-d", f"refs/heads/{name}")

    def protect(self, branch: str, *, hook: str = "update") -> None:
        """Reject every push to a branch, with GitHub's message.

        Args:
            branch: The branch.
            hook: `update` rejects only this branch, `pre-receive` the whole push.
        """
        ref = f"refs/heads/{branch}"
        reject = f'echo "{PROTECTED.format(ref=ref)}" >&2; echo "error: Changes must be made through a pull request." >&2; exit 1'
        if hook == "update":
            self.hook("update", f'[ "$1" = "{ref}" ] || exit 0\n{reject}')
        else:
            self.hook("pre-receive", f'while read -r old new ref; do [ "$ref" != "{ref}" ] || {{ {reject}; }}; done')

    def hook(self, name: str, script: str) -> None:
        """Install a hook.

        Args:
            name: The name of the hook, such as `pre-receive`.
            script: Its lines, for sh.
        """
        path = self.path / "hooks" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)

    async def sha(self, ref: str | None = None) -> str | None:
        """Return the ID of a ref's commit, by default that of the default branch; None if there is no such ref."""
        result = await run_git("rev-parse", "--quiet", "--verify", f"{ref or self.branch}^0", cwd=self.path)
        return result.stdout.decode().strip() if result.code == 0 else None

    async def tree(self, ref: str | None = None) -> str:
        """Return the ID of a ref's tree."""
        return await self.git("rev-parse", "--verify", f"{ref or self.branch}^{{tree}}")

    async def refs(self) -> dict[str, str]:
        """Return the full names of all refs, with the IDs of their objects."""
        printed = await self.git("for-each-ref", "--format=%(objectname) %(refname)")
        return {name: sha for sha, name in (line.split(" ", 1) for line in printed.splitlines())}

    async def branches(self) -> dict[str, str]:
        """Return the names of the branches, with the IDs of their commits."""
        prefix = "refs/heads/"
        return {name.removeprefix(prefix): sha for name, sha in (await self.refs()).items() if name.startswith(prefix)}

    async def modes(self, ref: str | None = None) -> dict[str, str]:
        """Return the modes of the files of a ref by path: 100644, 100755, 120000 (link) or 160000 (submodule)."""
        return {path: mode for mode, _, path in await self._entries(ref)}

    async def files(self, ref: str | None = None) -> dict[str, bytes]:
        """Return the contents of the files of a ref by path: the target of a link, the commit ID of a submodule."""
        entries = await self._entries(ref)
        stdin = "".join(f"{sha}\n" for mode, sha, _ in entries if mode != "160000").encode()
        result = await run_git("cat-file", "--batch", cwd=self.path, stdin=stdin)
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
        """Return the commits of a ref, newest first."""
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
        return [(info.split()[0], info.split()[2], path) for info, _, path in lines]

    async def _commit_id(self, ref: str) -> str:
        sha = await self.sha(ref)
        assert sha is not None, f"{self.name} has no {ref}"
        return sha


def _gitmodules(modules: Mapping[str, Submodule]) -> str:
    return "".join(f'[submodule "{path}"]\n\tpath = {path}\n\turl = {module.url}\n' for path, module in modules.items())


def _change(path: str, file: File) -> list[bytes]:
    """Return the change of a path in a commit, in the format of git-fast-import(1)."""
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

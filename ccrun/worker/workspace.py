"""The directories of a task on disk, and what is written into them before the agent starts.

What ccrun itself writes is beside the directory that the agent works in, never inside it, so that none of it gets into a commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from ccrun.errors import CcrunError
from ccrun.process.confinement import Confinement
from ccrun.process.user import User
from ccrun.removal import remove_tree
from ccrun.spec import ConfigFile
from ccrun.task import TaskId
from ccrun.task_directories import candidate_names, private_prefix
from ccrun.worker.git.changes import DEFAULT_EMAIL, DEFAULT_NAME

#: The name of a file with trusted certificates.
CA_FILE: Final = "ca-bundle.pem"
#: Names to try for the workspace. The first is taken when the same task has left a directory.
NAME_ATTEMPTS: Final = 3


class WorkspaceError(CcrunError):
    """The workspace cannot be created or used."""


@attrs.frozen(kw_only=True)
class Workspace:
    """The directories of a task.

    Args:
        confinement: How the processes of the agent are started.
    """

    root: Path
    confinement: Confinement = attrs.field(factory=Confinement)

    @property
    def repository(self) -> Path:
        """The working directory of the agent."""
        return self.root / "repository"

    @property
    def home(self) -> Path:
        """HOME of the agent."""
        return self.root / "home"

    @property
    def config(self) -> Path:
        """CLAUDE_CONFIG_DIR of the CLI."""
        return self.root / "config"

    @property
    def inputs(self) -> Path:
        """The files that options of the CLI and commands of the request need."""
        return self.root / "inputs"

    @property
    def temporary(self) -> Path:
        """TMPDIR of the agent."""
        return self.root / "tmp"

    def start_directory(self, cwd_relative: str) -> Path:
        """Return the directory in which the agent starts.

        Raises:
            WorkspaceError: There is no such directory inside the workspace.
        """
        try:
            folder = (self.repository / cwd_relative).resolve()
            if folder.is_relative_to(self.repository.resolve()) and folder.is_dir():
                return folder
        except (OSError, RuntimeError, ValueError):
            # The path is too long, has a NUL, or leads through a symbolic link to itself.
            pass
        raise WorkspaceError(f"cwdRelative is not a directory of the workspace: {cwd_relative}")


@contextlib.asynccontextmanager
async def open_workspace(task_id: TaskId, confinement: Confinement | None = None) -> AsyncIterator[Workspace]:
    """Create the directories of a task, and remove them afterwards with everything in them.

    They belong to the worker's user until `chown_to_agent` is called.

    Raises:
        WorkspaceError: They cannot be created.
    """
    workspace = await asyncio.to_thread(_make, task_id)
    if confinement is not None:
        workspace = attrs.evolve(workspace, confinement=confinement.within(workspace.root))
    try:
        yield workspace
    finally:
        await asyncio.shield(asyncio.to_thread(remove_tree, workspace.root))


@contextlib.asynccontextmanager
async def private_directory(task_id: TaskId) -> AsyncIterator[Path]:
    """Create a directory for what the agent must not read. It is new each time, since the agent may have found an older one.

    Raises:
        WorkspaceError: It cannot be created.
    """
    try:
        directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=private_prefix(task_id)))
    except OSError as error:
        raise WorkspaceError(f"A temporary directory cannot be created: {error.strerror}.") from error
    try:
        yield directory
    finally:
        await asyncio.shield(asyncio.to_thread(remove_tree, directory))


async def chown_to_agent(workspace: Workspace) -> None:
    """Give the directories to the agent's user. From now on the worker must not write there itself.

    Raises:
        WorkspaceError: The owner cannot be changed.
    """
    if workspace.confinement.user is not None:
        await asyncio.to_thread(_chown, workspace.root, workspace.confinement.user)


def _chown(root: Path, agent: User) -> None:
    try:
        directories = [os.fspath(root)]
        # Not `os.walk`, which exceeds Python's recursion limit in deep directories.
        while directories:
            with os.scandir(directories.pop()) as entries:
                for entry in entries:
                    os.chown(entry.path, agent.uid, agent.gid, follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
        # Last, since the agent's user can enter it from now on.
        os.chown(root, agent.uid, agent.gid, follow_symlinks=False)
    except OSError as error:
        raise WorkspaceError(f"The workspace cannot be given to the agent's user: {error.strerror}.") from error


async def write_inputs(
    workspace: Workspace,
    *,
    config_files: Mapping[str, ConfigFile],
    option_files: Mapping[str, bytes],
    other_files: Mapping[str, bytes],
) -> dict[str, Path]:
    """Write what the request gives the CLI, and return the paths of the option files by option.

    Args:
        config_files: The files in the configuration directory of the CLI, by path.
        option_files: The contents of files for options of the CLI, by option.
        other_files: The contents of more files for the agent and its commands, by name.

    Raises:
        WorkspaceError: A file cannot be written.
    """
    return await asyncio.to_thread(_write_inputs, workspace, config_files, option_files, other_files)


def _make(task_id: TaskId) -> Workspace:
    temporary = Path(tempfile.gettempdir())
    try:
        for name in itertools.islice(candidate_names(task_id), NAME_ATTEMPTS):
            # A directory that exists may have been prepared by another user of a shared /tmp.
            with contextlib.suppress(FileExistsError):
                root = temporary / name
                root.mkdir(mode=0o700)
                workspace = Workspace(root=root)
                for directory in (
                    workspace.repository,
                    workspace.home,
                    workspace.config,
                    workspace.inputs,
                    workspace.temporary,
                ):
                    directory.mkdir(mode=0o700)
                # The identity for commits of the agent. Settings of a repository and variables of the request override it.
                (workspace.home / ".gitconfig").write_text(
                    f"[user]\n\tname = {DEFAULT_NAME}\n\temail = {DEFAULT_EMAIL}\n"
                )
                return workspace
    except OSError as error:
        raise WorkspaceError(f"The workspace cannot be created: {error.strerror}.") from error
    raise WorkspaceError("The workspace cannot be created: its directory exists already.")


def _write_inputs(
    workspace: Workspace,
    config_files: Mapping[str, ConfigFile],
    option_files: Mapping[str, bytes],
    other_files: Mapping[str, bytes],
) -> dict[str, Path]:
    try:
        for name, file in config_files.items():
            path = workspace.config / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_text(file), encoding="utf-8")
            if file.content.startswith("#!"):
                path.chmod(0o700)
        for name, content in (*option_files.items(), *other_files.items()):
            (workspace.inputs / name).write_bytes(content)
    except OSError as error:
        raise WorkspaceError(f"The CLI's configuration cannot be written: {error.strerror}.") from error
    return {option: workspace.inputs / option for option in option_files}


def _text(file: ConfigFile) -> str:
    if not file.frontmatter:
        return file.content
    # Few tasks need it, and it takes a tenth of the time in which a worker is loaded.
    import frontmatter

    post = frontmatter.Post(file.content)
    post.metadata = dict(file.frontmatter)
    return frontmatter.dumps(post, sort_keys=False)

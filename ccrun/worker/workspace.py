"""The rooms of a task on disk, and what is put into them before the agent comes.

What ccrun itself writes stands beside the folder that the agent works in, never inside it, so nothing of it reaches a commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final

import attrs
import frontmatter

from ccrun.errors import CcrunError
from ccrun.process.user import User
from ccrun.removal import remove_tree
from ccrun.task import ConfigFile, TaskId

#: Names of the workspace to try before giving up; only a leftover of the same task takes the first.
NAME_ATTEMPTS: Final = 3


class WorkspaceError(CcrunError):
    """The workspace cannot be made."""


@attrs.frozen(kw_only=True)
class Workspace:
    """The folders of a task. `repository` is the agent's; the others belong to the CLI that serves it.

    Args:
        agent: Whom the agent runs as, None where that is the worker's own user.
    """

    root: Path
    agent: User | None = None

    @property
    def repository(self) -> Path:
        """Where the agent works."""
        return self.root / "repository"

    @property
    def home(self) -> Path:
        """The agent's HOME."""
        return self.root / "home"

    @property
    def config(self) -> Path:
        """The CLI's CLAUDE_CONFIG_DIR."""
        return self.root / "config"

    @property
    def inputs(self) -> Path:
        """What options of the CLI name."""
        return self.root / "inputs"

    @property
    def temporary(self) -> Path:
        """The agent's TMPDIR."""
        return self.root / "tmp"

    def start_folder(self, cwd_relative: str) -> Path:
        """Return where the agent starts.

        Raises:
            WorkspaceError: There is no such folder inside the workspace.
        """
        try:
            folder = (self.repository / cwd_relative).resolve()
            if folder.is_relative_to(self.repository.resolve()) and folder.is_dir():
                return folder
        except (OSError, RuntimeError, ValueError):
            # Too long, a link that leads to itself, a NUL: no folder either.
            pass
        raise WorkspaceError(f"cwdRelative names no folder of the workspace: {cwd_relative}")


@contextlib.asynccontextmanager
async def open_workspace(task_id: TaskId, agent: User | None = None) -> AsyncIterator[Workspace]:
    """Make the rooms of a task, and remove them with all that the agent left in them.

    They are the worker's own until `chown_to_agent`.

    Raises:
        WorkspaceError: They cannot be made.
    """
    workspace = attrs.evolve(await asyncio.to_thread(_make, task_id), agent=agent)
    try:
        yield workspace
    finally:
        await asyncio.shield(asyncio.to_thread(remove_tree, workspace.root))


@contextlib.asynccontextmanager
async def private_directory(task_id: TaskId) -> AsyncIterator[Path]:
    """Make a folder for what the agent may not have: a new one each time, for one that was there before may have been found.

    Raises:
        WorkspaceError: It cannot be made.
    """
    try:
        # Its name is one that whoever clears up after a worker knows: see `ccrun.jobs`.
        room = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=f"ws-{task_id}."))
    except OSError as error:
        raise WorkspaceError(f"A folder cannot be made: {error.strerror}.") from error
    try:
        yield room
    finally:
        await asyncio.shield(asyncio.to_thread(remove_tree, room))


async def chown_to_agent(workspace: Workspace) -> None:
    """Make all that is in the rooms the agent's. From here on nothing may be written there by the worker's own hand.

    Raises:
        WorkspaceError: It cannot be done.
    """
    if workspace.agent is not None:
        await asyncio.to_thread(_chown, workspace.root, workspace.agent)


def _chown(root: Path, agent: User) -> None:
    try:
        for folder, folders, files in os.walk(root):
            for name in (*folders, *files):
                os.chown(Path(folder, name), agent.uid, agent.gid, follow_symlinks=False)
        os.chown(root, agent.uid, agent.gid, follow_symlinks=False)
    except OSError as error:
        raise WorkspaceError(f"The workspace cannot be given to the agent's user: {error.strerror}.") from error


async def write_inputs(
    workspace: Workspace, *, commands: Mapping[str, ConfigFile], inputs: Mapping[str, bytes]
) -> dict[str, Path]:
    """Write what the request gives the CLI: slash commands, and the files that options name; return where the latter are.

    Raises:
        WorkspaceError: It cannot be written.
    """
    return await asyncio.to_thread(_write_inputs, workspace, commands, inputs)


def _make(task_id: TaskId) -> Workspace:
    temporary = Path(tempfile.gettempdir())
    # No task ID has a dot; see `ccrun.jobs`, which clears up after a worker that was killed.
    names = [f"ws-{task_id}", *(f"ws-{task_id}.{secrets.token_hex(4)}" for _ in range(NAME_ATTEMPTS - 1))]
    try:
        for name in names:
            # A folder that is already there may be somebody else's trap in a place where everybody may write.
            with contextlib.suppress(FileExistsError):
                root = temporary / name
                root.mkdir(mode=0o700)
                workspace = Workspace(root=root)
                for room in (
                    workspace.repository,
                    workspace.home,
                    workspace.config,
                    workspace.inputs,
                    workspace.temporary,
                ):
                    room.mkdir(mode=0o700)
                return workspace
    except OSError as error:
        raise WorkspaceError(f"The workspace cannot be made: {error.strerror}.") from error
    raise WorkspaceError("The workspace cannot be made: its folder is there already.")


def _write_inputs(
    workspace: Workspace, commands: Mapping[str, ConfigFile], inputs: Mapping[str, bytes]
) -> dict[str, Path]:
    try:
        (workspace.config / "commands").mkdir(mode=0o700)
        for name, file in commands.items():
            (workspace.config / "commands" / f"{name}.md").write_text(_markdown(file), encoding="utf-8")
        files = {option: workspace.inputs / option for option in inputs}
        for option, path in files.items():
            path.write_bytes(inputs[option])
    except OSError as error:
        raise WorkspaceError(f"The CLI's configuration cannot be written: {error.strerror}.") from error
    return files


def _markdown(file: ConfigFile) -> str:
    if not file.frontmatter:
        return file.content
    post = frontmatter.Post(file.content)
    post.metadata = dict(file.frontmatter)
    return frontmatter.dumps(post, sort_keys=False)

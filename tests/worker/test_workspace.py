from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import frontmatter
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ccrun.process.confinement import Confinement
from ccrun.process.user import find_user
from ccrun.spec import ConfigFile
from ccrun.task import TaskId
from ccrun.worker.git.run import SYSTEM_PATH
from ccrun.worker.workspace import (
    Workspace,
    WorkspaceError,
    chown_to_agent,
    open_workspace,
    private_directory,
    write_inputs,
)

TASK = TaskId("t-1")
#: The ID of an unprivileged user.
UNPRIVILEGED_UID = 65534
#: More than the recursion limit of Python.
DEPTH = 1200


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a directory for temporary files that no other test uses."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def workspace(temporary: Path) -> Workspace:
    """The directories of a workspace, without `open_workspace`."""
    workspace = Workspace(root=temporary / "workspace")
    for directory in (workspace.repository, workspace.config, workspace.inputs):
        directory.mkdir(parents=True)
    return workspace


# --- creation and deletion -------------------------------------------------------------------------------------------


async def test_workspace_is_private(temporary: Path) -> None:
    """The workspace is named `ws-{taskId}`, and only its owner has access, with any umask."""
    before = os.umask(0)
    try:
        async with open_workspace(TASK) as workspace:
            inside = [workspace.repository, workspace.home, workspace.config, workspace.inputs, workspace.temporary]
            modes = {stat.S_IMODE(directory.stat().st_mode) for directory in (workspace.root, *inside)}
    finally:
        os.umask(before)
    assert (temporary / "ws-t-1", {0o700}) == (workspace.root, modes)


async def test_other_directories_are_outside_the_repository() -> None:
    """The working directory of the agent is empty and contains no other directory of the workspace."""
    async with open_workspace(TASK) as workspace:
        assert list(workspace.repository.iterdir()) == []
        others = (workspace.home, workspace.config, workspace.inputs, workspace.temporary)
        assert [] == [directory for directory in others if directory.is_relative_to(workspace.repository)]


async def test_workspace_is_deleted_after_an_error(temporary: Path) -> None:
    """After an error, all files of the workspace are deleted. The targets of links are not."""
    (temporary / "outside").mkdir()
    (temporary / "outside" / "file").write_text("content")

    async def work() -> None:
        async with open_workspace(TASK) as workspace:
            (workspace.repository / "directory" / "inner").mkdir(parents=True)
            (workspace.repository / "directory" / "file").write_text("")
            (workspace.repository / "link").symlink_to(temporary / "outside")
            (workspace.home / "file").symlink_to(temporary / "outside" / "file")
            (workspace.home / "dangling").symlink_to("missing")
            os.mkfifo(workspace.home / "pipe")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await work()
    assert [temporary / "outside"] == list(temporary.iterdir())
    assert (temporary / "outside" / "file").read_text() == "content"


async def test_workspace_is_deleted_after_a_cancellation(temporary: Path) -> None:
    """The workspace is deleted if the task is cancelled while it is open."""
    entered = asyncio.Event()

    async def work() -> None:
        async with open_workspace(TASK):
            entered.set()
            await asyncio.Event().wait()

    worker = asyncio.create_task(work())
    await entered.wait()
    worker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await worker
    assert list(temporary.iterdir()) == []


async def test_deep_directories_are_deleted(temporary: Path) -> None:
    """Directories that are nested deeper than the recursion limit of Python are deleted."""
    async with open_workspace(TASK) as workspace:
        directory = os.open(workspace.repository, os.O_RDONLY)
        for _ in range(DEPTH):
            os.mkdir("deep", dir_fd=directory)
            inner = os.open("deep", os.O_RDONLY, dir_fd=directory)
            os.close(directory)
            directory = inner
        os.close(directory)
    assert list(temporary.iterdir()) == []


LOCK_DIRECTORIES = """
import asyncio, concurrent.futures.thread, os, sys, tempfile
from pathlib import Path
from ccrun.worker.workspace import open_workspace

async def main():
    async with open_workspace("t-1") as workspace:
        for name in ("no-list", "no-write", "nothing"):
            (workspace.repository / name / "inner").mkdir(parents=True)
            (workspace.repository / name / "inner" / "file").write_text("")
        (workspace.repository / "no-list").chmod(0o333)
        (workspace.repository / "no-write" / "inner").chmod(0o555)
        (workspace.repository / "no-write").chmod(0o555)
        (workspace.repository / "nothing").chmod(0)
        workspace.repository.chmod(0)
        workspace.root.chmod(0o555)

tempfile.tempdir = sys.argv[1]
if os.geteuid() == 0:
    os.setuid(int(sys.argv[2]))
asyncio.run(main())
"""


def test_locked_directories_are_deleted() -> None:
    """Directories without permissions are deleted. As root, the test switches users, since permissions do not limit root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        if os.geteuid() == 0:
            os.chown(temporary, UNPRIVILEGED_UID, UNPRIVILEGED_UID)
        subprocess.run(
            [sys.executable, "-c", LOCK_DIRECTORIES, temporary, str(UNPRIVILEGED_UID)], check=True, timeout=30
        )
        assert list(Path(temporary).iterdir()) == []


async def test_existing_directory_is_not_used(temporary: Path) -> None:
    """A directory of a killed worker or of another user is neither used nor deleted."""
    (temporary / "ws-t-1").mkdir()
    (temporary / "ws-t-1" / "file").write_text("")
    async with open_workspace(TASK) as workspace:
        assert workspace.root.name.startswith("ws-t-1.")
    assert [temporary / "ws-t-1" / "file"] == list((temporary / "ws-t-1").iterdir())


async def test_existing_link_is_not_followed(temporary: Path) -> None:
    """A link with the name of the workspace is not used."""
    (temporary / "target").mkdir()
    (temporary / "ws-t-1").symlink_to(temporary / "target")
    async with open_workspace(TASK) as workspace:
        assert workspace.root.name.startswith("ws-t-1.")
        assert list((temporary / "target").iterdir()) == []


async def test_error_when_the_workspace_cannot_be_created(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for a missing temporary directory does not contain the path."""
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "missing"))
    with pytest.raises(WorkspaceError, match=r"^The workspace cannot be created: No such file or directory\.$"):
        async with open_workspace(TASK):
            pass


# --- the start directory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("relative", "expected"), [(".", ""), ("a/b", "a/b"), ("a/../a/b/", "a/b"), ("inside", "a")])
def test_start_directory_in_the_repository(workspace: Workspace, relative: str, expected: str) -> None:
    """The path may contain `..` and links within the repository."""
    (workspace.repository / "a" / "b").mkdir(parents=True)
    (workspace.repository / "inside").symlink_to("a")
    assert workspace.repository / expected == workspace.start_directory(relative)


@pytest.mark.parametrize(
    "relative",
    ["..", "../config", "a/../../config", "/", "/tmp", "missing", "file", "link", "loop", "x" * 300, "nul\0"],
)
def test_start_directory_elsewhere_is_an_error(workspace: Workspace, relative: str) -> None:
    """A path that is outside the repository or is not a directory is rejected, and the error contains the path."""
    (workspace.repository / "file").write_text("")
    (workspace.repository / "link").symlink_to(workspace.config)
    (workspace.repository / "loop").symlink_to("loop")
    with pytest.raises(WorkspaceError) as raised:
        workspace.start_directory(relative)
    assert f"cwdRelative is not a directory of the workspace: {relative}" == raised.value.message


# --- input files -----------------------------------------------------------------------------------------------------


async def test_slash_commands_are_files_for_the_cli(workspace: Workspace) -> None:
    """A slash command is a file in the configuration directory of the CLI."""
    await write_inputs(
        workspace,
        config_files={"commands/deploy.md": ConfigFile(content="Deploy it.\n")},
        other_files={},
        option_files={},
    )
    assert (workspace.config / "commands" / "deploy.md").read_bytes() == b"Deploy it.\n"


async def test_scripts_are_executable(workspace: Workspace) -> None:
    """A file that begins with `#!` can be run; other files cannot."""
    files = {"skills/a/run.sh": ConfigFile(content="#!/bin/sh\n"), "skills/a/SKILL.md": ConfigFile(content="x")}
    await write_inputs(workspace, config_files=files, other_files={}, option_files={})
    assert [True, False] == [os.access(workspace.config / path, os.X_OK) for path in files]


async def test_option_files_are_written(workspace: Workspace) -> None:
    """The files have the exact contents and are outside the repository."""
    files = await write_inputs(
        workspace,
        config_files={},
        other_files={},
        option_files={"system-prompt": b"\xc3\xa9\r\n", "mcp-config": b"{}"},
    )
    assert {"system-prompt": b"\xc3\xa9\r\n", "mcp-config": b"{}"} == {
        option: path.read_bytes() for option, path in files.items()
    }
    assert [] == [path for path in files.values() if path.is_relative_to(workspace.repository)]


json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.text(st.characters(exclude_categories=["Cs"]))
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("ab: #", max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(
    fields=st.dictionaries(st.sampled_from(["description", "allowed-tools", "model"]), json_values, min_size=1),
    content=st.text("ab\n-#: é", max_size=20).map(str.strip),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_front_matter_is_preserved(temporary: Path, fields: dict[str, object], content: str) -> None:
    """Front matter with any values and the content after it are parsed back unchanged."""
    workspace = Workspace(root=Path(tempfile.mkdtemp(dir=temporary)))
    workspace.config.mkdir()
    await write_inputs(
        workspace,
        config_files={"c.md": ConfigFile(frontmatter=fields, content=content)},
        other_files={},
        option_files={},
    )
    post = frontmatter.loads((workspace.config / "c.md").read_text(encoding="utf-8"))
    assert (fields, content) == (post.metadata, post.content)


async def test_error_when_the_configuration_cannot_be_written(workspace: Workspace) -> None:
    """The error for a name that is too long for the file system does not contain the path."""
    with pytest.raises(WorkspaceError, match=r"^The CLI's configuration cannot be written: File name too long\.$"):
        await write_inputs(workspace, config_files={"x" * 300: ConfigFile(content="")}, other_files={}, option_files={})


# --- a separate user -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the owner of files")
async def test_agent_owns_the_workspace(tmp_path: Path) -> None:
    """The agent owns all files and links of the workspace, but not the targets of the links."""
    user = await asyncio.to_thread(find_user, "61239", SYSTEM_PATH)
    outside = tmp_path / "outside"
    outside.write_text("x")
    async with open_workspace(TASK, Confinement(user=user)) as workspace:
        (workspace.repository / "deep").mkdir()
        (workspace.repository / "deep" / "file").write_text("x")
        (workspace.repository / "link").symlink_to(outside)
        await chown_to_agent(workspace)
        owners = {path.lstat().st_uid for path in (workspace.root, *workspace.root.rglob("*"))}
    assert ({61239}, 0) == (owners, outside.stat().st_uid)


async def test_private_directories_are_unique_and_deleted(tmp_path: Path) -> None:
    """Only the owner has access. The name contains the task ID, so that leftovers of a task can be deleted."""
    async with private_directory(TASK) as first, private_directory(TASK) as second:
        assert first != second
        assert 0o700 == stat.S_IMODE(first.stat().st_mode)
        assert first.name.startswith(f"ws-{TASK}.")
        (first / "file").write_text("x")
    assert not first.exists()
    assert not second.exists()

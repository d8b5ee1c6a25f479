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

from ccrun.process.user import find_user
from ccrun.task import ConfigFile, TaskId
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
#: A user who owns nothing.
NOBODY = 65534
#: More than Python may recurse.
DEPTH = 1200


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a folder for temporary files that nobody else uses."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def workspace(temporary: Path) -> Workspace:
    """Rooms whose end a test need not wait for."""
    workspace = Workspace(root=temporary / "rooms")
    for room in (workspace.repository, workspace.config, workspace.inputs):
        room.mkdir(parents=True)
    return workspace


# --- the rooms -------------------------------------------------------------------------------------------------------


async def test_rooms_are_their_owners_alone(temporary: Path) -> None:
    """The workspace is `ws-{taskId}`, and nobody else can look into it, whatever the umask."""
    before = os.umask(0)
    try:
        async with open_workspace(TASK) as workspace:
            inside = [workspace.repository, workspace.home, workspace.config, workspace.inputs, workspace.temporary]
            modes = {stat.S_IMODE(folder.stat().st_mode) for folder in (workspace.root, *inside)}
    finally:
        os.umask(before)
    assert (temporary / "ws-t-1", {0o700}) == (workspace.root, modes)


async def test_what_ccrun_writes_stands_beside_the_repository() -> None:
    """The folder that the agent works in is empty, and no other room lies in it."""
    async with open_workspace(TASK) as workspace:
        assert list(workspace.repository.iterdir()) == []
        others = (workspace.home, workspace.config, workspace.inputs, workspace.temporary)
        assert [] == [room for room in others if room.is_relative_to(workspace.repository)]


async def test_rooms_are_removed_with_all_in_them(temporary: Path) -> None:
    """Nothing of a task stays on the disk, also when it failed; what links in it lead to stays."""
    (temporary / "outside").mkdir()
    (temporary / "outside" / "file").write_text("kept")

    async def work() -> None:
        async with open_workspace(TASK) as workspace:
            (workspace.repository / "folder" / "inner").mkdir(parents=True)
            (workspace.repository / "folder" / "file").write_text("")
            (workspace.repository / "link").symlink_to(temporary / "outside")
            (workspace.home / "file").symlink_to(temporary / "outside" / "file")
            (workspace.home / "dangling").symlink_to("nowhere")
            os.mkfifo(workspace.home / "pipe")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await work()
    assert [temporary / "outside"] == list(temporary.iterdir())
    assert (temporary / "outside" / "file").read_text() == "kept"


async def test_rooms_are_removed_when_the_task_is_cancelled(temporary: Path) -> None:
    """A task that is ended in the middle leaves nothing."""
    entered = asyncio.Event()

    async def work() -> None:
        async with open_workspace(TASK):
            entered.set()
            await asyncio.Event().wait()

    working = asyncio.create_task(work())
    await entered.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert list(temporary.iterdir()) == []


async def test_folders_of_any_depth_are_removed(temporary: Path) -> None:
    """Folders nested as deeply as an agent likes, which it makes with a short loop, are removed as well."""
    async with open_workspace(TASK) as workspace:
        folder = os.open(workspace.repository, os.O_RDONLY)
        for _ in range(DEPTH):
            os.mkdir("deep", dir_fd=folder)
            inner = os.open("deep", os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = inner
        os.close(folder)
    assert list(temporary.iterdir()) == []


LOCKED = """
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


def test_locked_folders_are_removed() -> None:
    """Permissions that the agent took away from its own files keep nothing on the disk; not as root, whom they never stop."""
    with tempfile.TemporaryDirectory(dir="/tmp") as own:
        if os.geteuid() == 0:
            os.chown(own, NOBODY, NOBODY)
        subprocess.run([sys.executable, "-c", LOCKED, own, str(NOBODY)], check=True, timeout=30)
        assert list(Path(own).iterdir()) == []


async def test_leftover_is_not_moved_into(temporary: Path) -> None:
    """A folder that is already there, of a worker that was killed or a trap of somebody else's, is neither used nor removed."""
    (temporary / "ws-t-1").mkdir()
    (temporary / "ws-t-1" / "trap").write_text("")
    async with open_workspace(TASK) as workspace:
        assert workspace.root.name.startswith("ws-t-1.")
    assert [temporary / "ws-t-1" / "trap"] == list((temporary / "ws-t-1").iterdir())


async def test_link_in_the_place_of_a_workspace_is_not_followed(temporary: Path) -> None:
    """A link that somebody put where the workspace should be leads nowhere."""
    (temporary / "elsewhere").mkdir()
    (temporary / "ws-t-1").symlink_to(temporary / "elsewhere")
    async with open_workspace(TASK) as workspace:
        assert workspace.root.name.startswith("ws-t-1.")
        assert list((temporary / "elsewhere").iterdir()) == []


async def test_workspace_that_cannot_be_made_is_told_without_its_path(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no workspace can be, the error names no local path."""
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "missing"))
    with pytest.raises(WorkspaceError, match=r"^The workspace cannot be created: No such file or directory\.$"):
        async with open_workspace(TASK):
            pass


# --- where the agent starts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("relative", "expected"), [(".", ""), ("a/b", "a/b"), ("a/../a/b/", "a/b"), ("inside", "a")])
def test_agent_starts_inside_of_the_repository(workspace: Workspace, relative: str, expected: str) -> None:
    """A relative path names a folder of the repository, through links that stay inside too."""
    (workspace.repository / "a" / "b").mkdir(parents=True)
    (workspace.repository / "inside").symlink_to("a")
    assert workspace.repository / expected == workspace.start_directory(relative)


@pytest.mark.parametrize(
    "relative",
    ["..", "../config", "a/../../config", "/", "/tmp", "missing", "file", "link", "loop", "x" * 300, "nul\0"],
)
def test_agent_starts_nowhere_else(workspace: Workspace, relative: str) -> None:
    """What leads out of the repository, or is no folder, is refused with its name, however odd that is."""
    (workspace.repository / "file").write_text("")
    (workspace.repository / "link").symlink_to(workspace.config)
    (workspace.repository / "loop").symlink_to("loop")
    with pytest.raises(WorkspaceError) as caught:
        workspace.start_directory(relative)
    assert f"cwdRelative is not a directory of the workspace: {relative}" == caught.value.message


# --- what is put into them -------------------------------------------------------------------------------------------


async def test_commands_are_found_by_the_cli(workspace: Workspace) -> None:
    """A slash command is a file of its name in the CLI's configuration folder."""
    await write_inputs(
        workspace, slash_commands={"deploy": ConfigFile(content="Deploy it.\n")}, command_files={}, option_files={}
    )
    assert (workspace.config / "commands" / "deploy.md").read_bytes() == b"Deploy it.\n"


async def test_inputs_are_files_of_their_own(workspace: Workspace) -> None:
    """What an option names stands in a file beside the repository, byte for byte."""
    files = await write_inputs(
        workspace,
        slash_commands={},
        command_files={},
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
    front=st.dictionaries(st.sampled_from(["description", "allowed-tools", "model"]), json_values, min_size=1),
    content=st.text("ab\n-#: é", max_size=20).map(str.strip),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_front_matter_says_what_was_asked_for(temporary: Path, front: dict[str, object], content: str) -> None:
    """Whatever values a front matter has, they are read back as they are, and none gets out of it."""
    workspace = Workspace(root=Path(tempfile.mkdtemp(dir=temporary)))
    workspace.config.mkdir()
    await write_inputs(
        workspace,
        slash_commands={"c": ConfigFile(frontmatter=front, content=content)},
        command_files={},
        option_files={},
    )
    post = frontmatter.loads((workspace.config / "commands" / "c.md").read_text(encoding="utf-8"))
    assert (front, content) == (post.metadata, post.content)


async def test_configuration_that_cannot_be_written_is_told(workspace: Workspace) -> None:
    """A name that the disk does not take is an error without a local path."""
    with pytest.raises(WorkspaceError, match=r"^The CLI's configuration cannot be written: File name too long\.$"):
        await write_inputs(
            workspace, slash_commands={"x" * 300: ConfigFile(content="")}, command_files={}, option_files={}
        )


# --- rooms for another user -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
async def test_what_is_handed_over_is_the_agents(tmp_path: Path) -> None:
    """All of it, links as links; what they lead to stays whose it was."""
    user = await asyncio.to_thread(find_user, "61239", SYSTEM_PATH)
    outside = tmp_path / "outside"
    outside.write_text("x")
    async with open_workspace(TASK, user) as workspace:
        (workspace.repository / "deep").mkdir()
        (workspace.repository / "deep" / "file").write_text("x")
        (workspace.repository / "link").symlink_to(outside)
        await chown_to_agent(workspace)
        owners = {path.lstat().st_uid for path in (workspace.root, *workspace.root.rglob("*"))}
    assert ({61239}, 0) == (owners, outside.stat().st_uid)


async def test_a_private_room_is_new_each_time_and_goes(tmp_path: Path) -> None:
    """For its owner's eyes alone, under a name that whoever clears up after a worker knows."""
    async with private_directory(TASK) as one, private_directory(TASK) as other:
        assert one != other
        assert 0o700 == stat.S_IMODE(one.stat().st_mode)
        assert one.name.startswith(f"ws-{TASK}.")
        (one / "file").write_text("x")
    assert not one.exists()
    assert not other.exists()

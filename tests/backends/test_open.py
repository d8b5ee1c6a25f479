from __future__ import annotations

import stat
from pathlib import Path

import pytest

from ccrun import config
from ccrun.backends.local.layout import callback_secret_file, process_marker
from ccrun.backends.open import open_backend
from ccrun.errors import ConfigError
from ccrun.task import TaskId


async def test_the_folder_and_its_keys_are_private(tmp_path: Path) -> None:
    """Nobody else on the machine can list the tasks or read a key."""
    settings = config.load({"CCRUN_DATA_DIR": str(tmp_path / "data")})
    async with open_backend(settings) as backend:
        await backend.wrapper.check()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (settings.data_dir, *settings.data_dir.glob(".keys/*"))]
    assert [0o700, 0o600, 0o600] == modes


async def test_the_made_callback_secret_is_kept(tmp_path: Path) -> None:
    """A receiver that was set up once goes on to verify after a restart."""
    settings = config.load({"CCRUN_DATA_DIR": str(tmp_path)})
    async with open_backend(settings) as first, open_backend(settings) as second:
        assert first.callback_secret == second.callback_secret
        assert first.callback_secret is not None
        assert first.callback_secret.reveal() == callback_secret_file(tmp_path).read_text().strip()


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """The sentence names the setting and shows no path."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^CCRUN_DATA_DIR must name a directory that exists or can be created: "):
        async with open_backend(config.load({"CCRUN_DATA_DIR": str(tmp_path / "file")})):
            pass


def test_tasks_of_one_id_in_two_folders_have_two_marks() -> None:
    """A service does not end the processes of another service's task."""
    assert process_marker(Path("/a"), TaskId("t")) != process_marker(Path("/b"), TaskId("t"))

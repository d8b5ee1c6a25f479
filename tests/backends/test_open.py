from __future__ import annotations

import stat
from pathlib import Path

import pytest

from ccrun import config
from ccrun.backends.local.layout import callback_secret_file
from ccrun.backends.open import open_backend
from ccrun.errors import ConfigError


async def test_data_directory_and_keys_are_private(tmp_path: Path) -> None:
    """Other users of the machine can neither list the tasks nor read a key."""
    settings = config.load({"CCRUN_DATA_DIR": str(tmp_path / "data")})
    async with open_backend(settings) as backend:
        await backend.wrapper.check()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (settings.data_dir, *settings.data_dir.glob(".keys/*"))]
    assert [0o700, 0o600, 0o600] == modes


async def test_generated_callback_secret_is_kept(tmp_path: Path) -> None:
    """A generated callback secret stays the same after a restart."""
    settings = config.load({"CCRUN_DATA_DIR": str(tmp_path)})
    async with open_backend(settings) as first, open_backend(settings) as second:
        assert first.callback_secret == second.callback_secret
        assert first.callback_secret is not None
        assert first.callback_secret.reveal() == callback_secret_file(tmp_path).read_text().strip()


async def test_error_for_the_data_directory_names_the_setting(tmp_path: Path) -> None:
    """If the data directory cannot be created, the error names the setting and does not contain the path."""
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"^CCRUN_DATA_DIR must name a directory that exists or can be created: "
    ) as caught:
        async with open_backend(config.load({"CCRUN_DATA_DIR": str(tmp_path / "file")})):
            pass
    assert str(tmp_path) not in caught.value.message

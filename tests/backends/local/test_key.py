"""The key file. `tests/test_seal.py` tests what every key service must do."""

from __future__ import annotations

import asyncio
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.seal import PLAINTEXT, TASK, sealed_by

from ccrun.backends.local.key import LocalKey, load_or_create_secret
from ccrun.errors import KeyServiceError, SealError
from ccrun.seal import Purpose
from ccrun.unseal import unseal


async def test_key_file_is_private(tmp_path: Path) -> None:
    """The key file is created on first use, with mode 0600 in a directory with mode 0700."""
    path = tmp_path / "keys" / "sealing.key"
    await LocalKey(path).check()
    assert (0o600, 0o700) == (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode))
    assert [path] == list(path.parent.iterdir())


async def test_key_is_kept_across_restarts(tmp_path: Path) -> None:
    """What was sealed before a restart can be opened after it."""
    sealed = await sealed_by(LocalKey(tmp_path / "key"))
    assert PLAINTEXT == await unseal(LocalKey(tmp_path / "key"), sealed, task_id=TASK, purpose=Purpose.PAYLOAD)


async def test_another_key_does_not_open(tmp_path: Path) -> None:
    """An envelope does not open with another key file."""
    sealed = await sealed_by(LocalKey(tmp_path / "one"))
    with pytest.raises(SealError, match="not sealed under this key"):
        await unseal(LocalKey(tmp_path / "two"), sealed, task_id=TASK, purpose=Purpose.PAYLOAD)


async def test_damaged_key_file_is_not_replaced(tmp_path: Path) -> None:
    """A key file of the wrong length is an error. It is not replaced, since sealed payloads would become unreadable."""
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(KeyServiceError, match="must have 32 bytes"):
        await LocalKey(tmp_path / "key").wrap(bytes(32))
    assert (tmp_path / "key").read_bytes() == b"short"


async def test_error_for_the_key_file_has_no_path(tmp_path: Path) -> None:
    """If the key file cannot be created, the error does not contain its path."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(KeyServiceError) as caught:
        await LocalKey(tmp_path / "file" / "key").check()
    assert str(tmp_path) not in caught.value.message


async def test_threads_get_the_same_new_secret(tmp_path: Path) -> None:
    """Twenty threads that load a missing secret concurrently all get the same bytes."""
    count = iter(range(20))
    secrets = await asyncio.gather(
        *(asyncio.to_thread(load_or_create_secret, tmp_path / "secret", lambda: b"%d" % next(count)) for _ in range(20))
    )
    assert {(tmp_path / "secret").read_bytes()} == set(secrets)
    assert [tmp_path / "secret"] == list(tmp_path.iterdir())


LOAD_SECRET = """
import secrets, sys
from pathlib import Path
from ccrun.backends.local.key import load_or_create_secret
print("ready", flush=True)
sys.stdin.readline()
print(load_or_create_secret(Path(sys.argv[1]), lambda: secrets.token_bytes(32)).hex())
"""


def test_processes_get_the_same_new_secret(tmp_path: Path) -> None:
    """Services that start concurrently on one data directory use the same key."""
    command = [sys.executable, "-c", LOAD_SECRET, str(tmp_path / "key")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    outputs = {process.communicate(b"go\n", 30)[0] for process in processes}
    assert {(tmp_path / "key").read_bytes().hex().encode() + b"\n"} == outputs

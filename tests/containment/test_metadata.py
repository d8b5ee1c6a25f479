"""The metadata server of a cloud, which gives away the identity of a machine, is not reached from a sandbox."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from containment.metadata_attack import SPELLINGS
from helpers.service import WAIT_SECONDS


@pytest.mark.skipif(
    any(shutil.which(name) is None for name in ("unshare", "ip", "curl")), reason="needs unshare, ip and curl"
)
async def test_metadata_server_is_not_reached(tmp_path: Path) -> None:
    """No spelling of its address leads to it, directly or through the proxy; all of them do without a sandbox.

    The stand-in has the addresses in a namespace of its own, which has no way to a real one.
    """
    attack = Path(__file__).with_name("metadata_attack.py")
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--user", "--map-root-user", "--mount", "--net", sys.executable, str(attack), str(tmp_path)),
        env={**os.environ, "PYTHONPATH": str(attack.parents[1])},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(WAIT_SECONDS * 5):
        stdout, stderr = await process.communicate()
    if b"unshare" in stderr:
        pytest.skip(stderr.decode())
    assert 0 == process.returncode, stderr.decode()
    result = json.loads(stdout)
    if "skipped" in result:
        pytest.skip(result["skipped"])
    assert sorted(SPELLINGS) == result["none"]
    assert [] == result["sandbox"]
    assert "metadata.google.internal:80" in result["refused"]

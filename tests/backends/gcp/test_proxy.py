"""Google's services behind the operator's proxy."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Final

import attrs
import pytest
from helpers.gcs import POLICY
from helpers.service import WAIT_SECONDS
from standins.forward_proxy import ForwardProxy
from standins.gcs import BUCKET

from ccrun.backends.gcp.blobs import open_blobs
from ccrun.errors import StorageError


async def test_calls_and_credentials_go_through_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is sent directly. Names that `NO_PROXY` has are not sent to the proxy."""
    user = {"type": "authorized_user", "client_id": "id", "client_secret": "secret", "refresh_token": "refresh"}
    credentials = tmp_path / "credentials.json"
    credentials.write_text(json.dumps({**user, "token_uri": "https://oauth2.googleapis.com/token"}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(credentials))
    async with ForwardProxy({}) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        async with open_blobs(BUCKET, policy=attrs.evolve(POLICY, attempts=1)) as blobs:
            with pytest.raises(StorageError):
                await blobs.check()
    assert {"oauth2.googleapis.com"} == proxy.hosts


#: Asks for the state of an execution. In a process of its own, since gRPC reads the environment when it is loaded.
ASK: Final = """
import asyncio
from google.auth.credentials import AnonymousCredentials
from ccrun.backends.gcp import jobs

async def main():
    async def anonymous():
        return AnonymousCredentials()
    jobs._credentials = anonymous
    async with jobs.open_cloud_run(project="p", region="us-central1", job="j") as found:
        await found.state("task-a", "execution-a")

asyncio.run(main())
"""


async def test_cloud_run_is_reached_through_the_proxy() -> None:
    """GRPC reads the variable itself."""
    async with ForwardProxy({}) as proxy:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", ASK), env={**os.environ, "https_proxy": proxy.url}
        )
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while not proxy.requests:
                    await asyncio.sleep(0.02)
        finally:
            process.kill()
            await process.wait()
    assert {"run.googleapis.com"} == proxy.hosts

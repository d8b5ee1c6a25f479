"""Google's services behind the operator's proxy."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
from helpers.gcs import POLICY
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

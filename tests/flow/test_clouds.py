"""A service whose model API is that of a cloud."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.service import remove_workers, serve_process
from standins.clouds import CloudModel

from ccrun.testing.model import Say, sequence

TOKEN = "made-up-access-token"


@pytest.fixture
async def token_url() -> AsyncIterator[str]:
    """The URL of a server of Google's access tokens."""

    async def issue(request: web.Request) -> web.Response:
        return web.json_response({"access_token": TOKEN, "expires_in": 3600})

    app = web.Application()
    app.router.add_post("/token", issue)
    async with TestServer(app) as server:
        yield str(server.make_url("/token"))


async def test_task_runs_on_vertex_ai(tmp_path: Path, token_url: str) -> None:
    """The worker gets access tokens by the credentials of the machine. The request needs no credential."""
    user = {"type": "authorized_user", "client_id": "id", "client_secret": "secret", "refresh_token": "refresh"}
    credentials = tmp_path / "credentials.json"
    credentials.write_text(json.dumps({**user, "token_uri": token_url}))
    async with CloudModel(
        sequence(Say("Hello.")), lambda method, path, headers, body: headers.get("Authorization") == f"Bearer {TOKEN}"
    ) as model:
        settings: dict[str, Any] = {
            "CLAUDE_CODE_USE_VERTEX": "1",
            "ANTHROPIC_VERTEX_PROJECT_ID": "proj-1",
            "CLOUD_ML_REGION": "us-east5",
            "ANTHROPIC_VERTEX_BASE_URL": model.url,
            "GOOGLE_APPLICATION_CREDENTIALS": str(credentials),
        }
        async with (
            serve_process(tmp_path / "data", **settings) as service,
            aiohttp.ClientSession() as http,
            http.post(f"{service.url}/run", json={"prompt": "Say hello."}) as response,
        ):
            events = await response.text()
    assert '"result":"Hello."' in events
    assert 0 == model.rejected
    remove_workers(tmp_path / "data")

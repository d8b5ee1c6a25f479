"""A credential proxy in front of a model API that behaves as a test needs it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import pytest
from aiohttp import web
from pytest_aiohttp import AiohttpServer

from ccrun.task import Secret
from ccrun.worker.proxy import MAX_BODY_BYTES, CredentialProxy
from ccrun.worker.upstream import CredentialKind
from ccrun.worker.upstream import Upstream as ModelApi

CREDENTIAL = "made-up-real-credential"


#: Seconds for a request. On a busy machine it takes one or two, and a run of the CLI a few.
MAX_SECONDS = 60.0


CLI_SECONDS = 60.0


Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


Upstream: TypeAlias = Callable[[Handler], Awaitable[str]]


Cli: TypeAlias = Callable[..., Awaitable[tuple[int, list[dict[str, Any]]]]]


@pytest.fixture
def upstream(aiohttp_server: AiohttpServer) -> Upstream:
    """Return a function that serves a handler as the model API and returns its base URL."""

    async def start(handler: Handler) -> str:
        app = web.Application(client_max_size=2 * MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", handler)
        server = await aiohttp_server(app, auto_decompress=False)
        return str(server.make_url("/"))

    return start


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Return a function that runs the real CLI with a proxy and returns its exit code and its output lines."""
    spec = importlib.util.find_spec("claude_agent_sdk")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the claude-agent-sdk package, which contains the CLI, is not installed")
    binary = Path(spec.submodule_search_locations[0], "_bundled", "claude")
    (tmp_path / "work").mkdir()

    async def run(proxy: CredentialProxy, kind: CredentialKind) -> tuple[int, list[dict[str, Any]]]:
        variable = "CLAUDE_CODE_OAUTH_TOKEN" if kind is CredentialKind.OAUTH else "ANTHROPIC_API_KEY"
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "CLAUDE_CONFIG_DIR": str(tmp_path / ".claude"),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
            "ANTHROPIC_BASE_URL": proxy.url,
            variable: proxy.run_token.reveal(),
        }
        process = await asyncio.create_subprocess_exec(
            binary,
            *("-p", "--verbose", "--output-format", "stream-json", "--allowedTools", "Bash"),
            cwd=tmp_path / "work",
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(b"Hello"), CLI_SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, [json.loads(line) for line in output.splitlines()]

    return run


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client, as the agent has one."""
    timeout = aiohttp.ClientTimeout(total=MAX_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:
        yield session


def new_proxy(upstream: str, kind: CredentialKind = CredentialKind.API_KEY, **options: Any) -> CredentialProxy:
    """Return a proxy that adds a made-up credential."""
    model_api = ModelApi(url=upstream, credential=Secret(CREDENTIAL), kind=kind)
    return CredentialProxy(model_api, **options)


def token_header(proxy: CredentialProxy) -> dict[str, str]:
    """Return the header by which a client shows the run token."""
    return {"X-Api-Key": proxy.run_token.reveal()}


async def error_of(response: aiohttp.ClientResponse) -> tuple[int, str, str]:
    """Return status, type and message of an error in the format of the model API."""
    body = await response.json()
    assert body["type"] == "error"
    return response.status, body["error"]["type"], body["error"]["message"]

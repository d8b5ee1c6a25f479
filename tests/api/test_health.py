from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from helpers.api import TOKEN, Api, api_on

from ccrun import __version__
from ccrun.api.dependencies import ApiTimeouts
from ccrun.api.health import ENDPOINTS
from ccrun.errors import KeyServiceError, StorageError
from ccrun.results import AgentNetwork, Isolation, IsolationLevel
from ccrun.task import Secret

# --- GET / -----------------------------------------------------------------------------------------------------------


async def test_index_has_name_version_and_endpoints(api: Api) -> None:
    """`GET /` lists the endpoints."""
    response = await api.call("GET", "/")
    assert 200 == response.status
    assert {"name": "ccrun", "version": __version__, "endpoints": list(ENDPOINTS)} == response.body


# --- GET /health -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/healthz", "/health?verbose=false"])
async def test_health_is_ok_while_the_process_is_alive(api: Api, path: str) -> None:
    """The response has these exact bytes, even when the storage fails."""
    api.blobs.error = StorageError()
    response = await api.call("GET", path)
    assert (200, '{"status":"ok"}') == (response.status, response.text)


async def test_verbose_health_has_checks_and_no_tokens(tmp_path: Path) -> None:
    """`?verbose=true` adds version, backend and checks, and nothing about the tokens."""
    async with api_on(tmp_path / "data", tokens=[Secret(TOKEN)]) as api:
        response = await api.call("GET", "/health?verbose=true")
        assert {
            "status": "ok",
            "version": __version__,
            "backend": "local",
            "checks": {"storage": "ok", "keyService": "ok"},
            "callbacks": "ok",
        } == response.body


async def test_verbose_health_has_the_errors_of_checks(tmp_path: Path) -> None:
    """A failed check has an error; the status is still 200."""
    async with api_on(tmp_path / "data", callbacks_unavailable="There is no secret to sign with.") as api:
        api.key.error = KeyServiceError()
        response = await api.call("GET", "/health?verbose=true")
    assert 200 == response.status
    assert {"storage": "ok", "keyService": "The key service does not answer."} == response.body["checks"]
    assert "There is no secret to sign with." == response.body["callbacks"]


async def test_verbose_health_has_the_isolation_of_agents(tmp_path: Path) -> None:
    """Where agents run on the same machine, it says how they are kept apart."""
    isolation = Isolation(level=IsolationLevel.USER, network=AgentNetwork.HOST, reasons=("Why.",))
    async with api_on(tmp_path / "data", isolation=isolation) as api:
        response = await api.call("GET", "/health?verbose=true")
    assert {"level": "user", "network": "host", "reasons": ["Why."]} == response.body["isolation"]


# --- GET /ready ------------------------------------------------------------------------------------------------------


async def test_ready_is_200_when_dependencies_work(api: Api) -> None:
    """When storage and key service work, the service is ready."""
    response = await api.call("GET", "/ready")
    assert (200, {"status": "ready"}) == (response.status, response.body)


@pytest.mark.parametrize(
    ("storage", "keys", "failing", "message"),
    [
        (StorageError(), None, ["storage"], "The storage does not answer."),
        (None, KeyServiceError(), ["keyService"], "The key service does not answer."),
        (
            StorageError(),
            KeyServiceError(),
            ["keyService", "storage"],
            "The storage does not answer. The key service does not answer.",
        ),
    ],
)
async def test_ready_is_503_when_a_dependency_fails(
    api: Api, storage: Exception | None, keys: Exception | None, failing: list[str], message: str
) -> None:
    """The response has the failed dependencies, their errors and `Retry-After`."""
    api.blobs.error, api.key.error = storage, keys
    response = await api.call("GET", "/ready")
    assert (503, "5") == (response.status, response.headers["Retry-After"])
    assert {"error": message, "failing": failing} == response.body


async def test_ready_is_503_when_the_storage_does_not_respond(tmp_path: Path) -> None:
    """A storage that hangs is reported after the timeout."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(ready=0.05)) as api:
        api.blobs.gate = asyncio.Event()
        response = await api.call("GET", "/ready")
    assert (503, ["storage"]) == (response.status, response.body["failing"])

"""Credentials of calls. The test modules of the adapters test timeouts, retries and error messages."""

from __future__ import annotations

import asyncio
import io
import json
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import attrs
import pytest
from aiohttp import web
from pytest_aiohttp import AiohttpServer
from standins.gcs import BUCKET, Fault, Gcs

from ccrun.backends.gcp.blobs import GcsBlobs
from ccrun.backends.gcp.calls import CallPolicy, CallTarget, Credentials, call, credentials
from ccrun.backends.gcp.upload import PART_BYTES, ResumableStorage
from ccrun.errors import ConfigError, StorageError

POLICY = CallPolicy(attempt_seconds=0.4, attempts=4, total_seconds=2.0, first_delay_seconds=0.001)
TARGET = CallTarget(service="Cloud Storage", resource="the bucket logs", settings="GCS_LOGS_BUCKET", error=StorageError)
TOKEN = "a-made-up-access-token"


@attrs.define
class TokenServer:
    """A stand-in for Google's server of access tokens."""

    calls: int = 0
    #: The statuses of the next responses. Then all requests succeed.
    statuses: deque[int] = attrs.field(factory=deque)
    delay_seconds: float = 0.0

    async def handle(self, request: web.Request) -> web.Response:
        """Return an access token."""
        self.calls += 1
        await asyncio.sleep(self.delay_seconds)
        if self.statuses:
            return web.Response(status=self.statuses.popleft())
        return web.json_response({"access_token": TOKEN, "expires_in": 3600})


@pytest.fixture
async def tokens(aiohttp_server: AiohttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenServer:
    """Return the token server that the credentials of this process use."""
    tokens = TokenServer()
    app = web.Application()
    app.router.add_post("/token", tokens.handle)
    server = await aiohttp_server(app)
    file = tmp_path / "credentials.json"
    user = {"type": "authorized_user", "client_id": "id", "client_secret": "secret", "refresh_token": "refresh"}
    file.write_text(json.dumps({**user, "token_uri": str(server.make_url("/token"))}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    return tokens


@pytest.fixture
async def found(tokens: TokenServer) -> AsyncIterator[Credentials]:
    """Return the credentials of this process."""
    async with aiohttp.ClientSession() as session:
        yield await credentials(session, emulated=False)


async def get_token(found: Credentials, policy: CallPolicy = POLICY) -> str | None:
    """Get an access token, as a call does."""
    return await call(found.get, target=TARGET, permission="none", policy=policy)


async def test_call_carries_the_token(tokens: TokenServer, found: Credentials) -> None:
    """A call of the real service carries the access token, which is fetched once for concurrent calls."""
    async with Gcs() as gcs, aiohttp.ClientSession() as session:
        storage = ResumableStorage(
            session=session,  # type: ignore[arg-type] # Annotated with the synchronous variant's type.
            token=found,
            api_root=gcs.url,
            api_is_dev=False,
        )
        blobs = GcsBlobs(storage, BUCKET, policy=POLICY)
        await asyncio.gather(*(blobs.create(str(number), b"") for number in range(10)))
        assert gcs.latest is not None
        assert f"Bearer {TOKEN}" == gcs.latest.headers["Authorization"]
        # The start of an upload in parts carries it too. The stand-in checks that the parts do not.
        size = 2 * PART_BYTES
        await blobs.create_from("large", io.BytesIO(bytes(size)), size=size)
        gcs.fail_always("storage.objects.create", Fault(status=401))
        with pytest.raises(StorageError):
            await blobs.create_from("rejected", io.BytesIO(bytes(size)), size=size)
        assert f"Bearer {TOKEN}" == gcs.latest.headers["Authorization"]
    assert 1 == tokens.calls


async def test_cancelled_caller_does_not_affect_others(tokens: TokenServer, found: Credentials) -> None:
    """If one of two callers that wait for the same token is cancelled, the other one gets the token."""
    tokens.delay_seconds = 0.2
    first = asyncio.create_task(get_token(found))
    second = asyncio.create_task(get_token(found))
    async with asyncio.timeout(30):
        while not tokens.calls:
            await asyncio.sleep(0.005)
    first.cancel()
    assert TOKEN == await second
    assert 1 == tokens.calls


async def test_transient_fault_of_the_token_server_is_retried(tokens: TokenServer, found: Credentials) -> None:
    """If the token server fails temporarily, the request is retried."""
    tokens.statuses.extend([503, 500])
    assert TOKEN == await get_token(found)
    assert 3 == tokens.calls


async def test_rejected_credentials_are_an_error(tokens: TokenServer, found: Credentials) -> None:
    """If the credentials are rejected, the call fails without a retry, and the error says what to do."""
    tokens.statuses.extend([400] * 9)
    with pytest.raises(StorageError) as caught:
        await get_token(found)
    assert (
        "There are no Google credentials: check the service account, or run `gcloud auth application-default login`."
        == str(caught.value)
    )
    assert 1 == tokens.calls


async def test_slow_token_is_used_by_a_later_attempt(tokens: TokenServer, found: Credentials) -> None:
    """A token that arrives after the timeout of an attempt is used by the next attempt, and not requested again."""
    tokens.delay_seconds = 0.3
    policy = attrs.evolve(POLICY, attempt_seconds=0.1, attempts=20)
    assert TOKEN == await get_token(found, policy)
    assert 1 == tokens.calls


async def test_hanging_token_server_is_an_error_in_bounded_time(tokens: TokenServer, found: Credentials) -> None:
    """If the token server does not respond, the call fails within its total timeout."""
    tokens.delay_seconds = 3.0
    policy = attrs.evolve(POLICY, attempt_seconds=0.05)
    async with asyncio.timeout(30):
        with pytest.raises(StorageError, match="Cloud Storage did not respond in time"):
            await get_token(found, policy)


@pytest.mark.parametrize("content", [None, '{"type": "unknown"}', '{"no": "type"}', "[1]"])
async def test_unusable_credentials_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """A credentials file that is missing or of an unknown type is a `ConfigError` that does not contain its path."""
    file = tmp_path / "credentials.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    async with aiohttp.ClientSession() as session:
        with pytest.raises(ConfigError) as caught:
            await credentials(session, emulated=False)
    assert "GOOGLE_APPLICATION_CREDENTIALS must be the path of a readable credentials file." == str(caught.value)

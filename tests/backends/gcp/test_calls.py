"""Calls of Google's services and their credentials. How faults are met is tested with the services, in the modules beside."""

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

HASTY = CallPolicy(attempt_seconds=0.4, attempts=4, total_seconds=2.0, first_delay_seconds=0.001)
TARGET = CallTarget(service="Cloud Storage", resource="the bucket logs", settings="GCS_LOGS_BUCKET", error=StorageError)
TOKEN = "a-made-up-access-token"


@attrs.define
class Tokens:
    """Google's server of access tokens, on loopback."""

    calls: int = 0
    #: The statuses of the next answers; after them, all goes well.
    statuses: deque[int] = attrs.field(factory=deque)
    delay_seconds: float = 0.0

    async def answer(self, request: web.Request) -> web.Response:
        """Give a token."""
        self.calls += 1
        await asyncio.sleep(self.delay_seconds)
        if self.statuses:
            return web.Response(status=self.statuses.popleft())
        return web.json_response({"access_token": TOKEN, "expires_in": 3600})


@pytest.fixture
async def tokens(aiohttp_server: AiohttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokens:
    """Return the server that the credentials of this process lead to."""
    tokens = Tokens()
    app = web.Application()
    app.router.add_post("/token", tokens.answer)
    server = await aiohttp_server(app)
    file = tmp_path / "credentials.json"
    user = {"type": "authorized_user", "client_id": "id", "client_secret": "secret", "refresh_token": "refresh"}
    file.write_text(json.dumps({**user, "token_uri": str(server.make_url("/token"))}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    return tokens


@pytest.fixture
async def found(tokens: Tokens) -> AsyncIterator[Credentials]:
    """Return the credentials of this process."""
    async with aiohttp.ClientSession() as session:
        yield await credentials(session, emulated=False)


async def get(found: Credentials, policy: CallPolicy = HASTY) -> str | None:
    """Get the token as a call does."""
    return await call(found.get, target=TARGET, permission="none", policy=policy)


async def test_token_goes_with_the_call(tokens: Tokens, found: Credentials) -> None:
    """A call of the service, not of an emulator, carries the access token, which is fetched once for many calls at once."""
    async with Gcs() as gcs, aiohttp.ClientSession() as session:
        storage = ResumableStorage(
            session=session,  # type: ignore[arg-type] # It names the session of its synchronous twin.
            token=found,
            api_root=gcs.url,
            api_is_dev=False,
        )
        blobs = GcsBlobs(storage, BUCKET, policy=HASTY)
        await asyncio.gather(*(blobs.create(str(number), b"") for number in range(10)))
        assert gcs.latest is not None
        assert f"Bearer {TOKEN}" == gcs.latest.headers["Authorization"]
        # So does the beginning of an upload in parts. The parts go without: the stand-in wants it so.
        size = 2 * PART_BYTES
        await blobs.create_from("large", io.BytesIO(bytes(size)), size=size)
        gcs.fail_always("storage.objects.create", Fault(status=401))
        with pytest.raises(StorageError):
            await blobs.create_from("refused", io.BytesIO(bytes(size)), size=size)
        assert f"Bearer {TOKEN}" == gcs.latest.headers["Authorization"]
    assert 1 == tokens.calls


async def test_impatient_caller_does_not_take_the_token_from_others(tokens: Tokens, found: Credentials) -> None:
    """When one of two calls that wait for the same token gives up, the other one gets it."""
    tokens.delay_seconds = 0.2
    impatient = asyncio.create_task(get(found))
    patient = asyncio.create_task(get(found))
    async with asyncio.timeout(5):
        while not tokens.calls:
            await asyncio.sleep(0.005)
    impatient.cancel()
    assert TOKEN == await patient
    assert 1 == tokens.calls


async def test_passing_fault_of_credentials_is_not_noticed(tokens: Tokens, found: Credentials) -> None:
    """A server of tokens that is out of order for a moment is asked again."""
    tokens.statuses.extend([503, 500])
    assert TOKEN == await get(found)
    assert 3 == tokens.calls


async def test_lasting_fault_of_credentials_is_told(tokens: Tokens, found: Credentials) -> None:
    """Credentials that are not accepted end the call at once, and the sentence says what to do."""
    tokens.statuses.extend([400] * 9)
    with pytest.raises(StorageError) as caught:
        await get(found)
    assert (
        "There are no Google credentials: check the service account, or run `gcloud auth application-default login`."
        == str(caught.value)
    )
    assert 1 == tokens.calls


async def test_slow_token_outlives_the_try_that_waits_for_it(tokens: Tokens, found: Credentials) -> None:
    """A token that comes later than a try may take serves the next try: it is not asked for again and again."""
    tokens.delay_seconds = 0.3
    policy = attrs.evolve(HASTY, attempt_seconds=0.1, attempts=20)
    assert TOKEN == await get(found, policy)
    assert 1 == tokens.calls


async def test_token_that_never_comes_is_told_in_bounded_time(tokens: Tokens, found: Credentials) -> None:
    """A server of tokens that hangs holds a call up no longer than its patience."""
    tokens.delay_seconds = 3.0
    policy = attrs.evolve(HASTY, attempt_seconds=0.05)
    async with asyncio.timeout(2):
        with pytest.raises(StorageError, match="Cloud Storage did not respond in time"):
            await get(found, policy)


@pytest.mark.parametrize("content", [None, '{"type": "unknown"}', '{"no": "type"}', "[1]"])
async def test_unusable_file_of_credentials_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """A file of credentials that is missing or of no known kind stops the start, without its path."""
    file = tmp_path / "credentials.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    async with aiohttp.ClientSession() as session:
        with pytest.raises(ConfigError) as caught:
            await credentials(session, emulated=False)
    assert "GOOGLE_APPLICATION_CREDENTIALS must be the path of a readable credentials file." == str(caught.value)

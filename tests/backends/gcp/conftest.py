"""The API on stand-ins for Google Cloud, and a receiver of callbacks."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.cloud import CLI, Cloud, Receiver, StartCloud, start_cloud
from helpers.gcs import PART_BYTES, POLICY
from standins.gcs import BUCKET, Gcs

from ccrun.backends.gcp.blobs import GcsBlobs, open_blobs


@pytest.fixture
def backend_name() -> str:
    """Return the backend of these tests."""
    return "gcp"


@pytest.fixture
def make_cloud(fake_cli: Callable[[str], Path]) -> StartCloud:
    """Return a function that starts instances of the API."""
    return functools.partial(start_cloud, fake_cli(CLI))


@pytest.fixture
async def cloud(make_cloud: StartCloud) -> AsyncIterator[Cloud]:
    """Return an instance of the API with its own cloud."""
    async with make_cloud() as opened:
        yield opened


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """Return a receiver of callbacks."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.handle)
    async with TestServer(app) as server:
        receiver.url = str(server.make_url("/hook"))
        yield receiver


@pytest.fixture
async def gcs() -> AsyncIterator[Gcs]:
    """Return a stand-in for Cloud Storage."""
    async with Gcs() as server:
        yield server


@pytest.fixture
async def blobs(gcs: Gcs) -> AsyncIterator[GcsBlobs]:
    """Return the adapter with short timeouts and small parts. Its calls are subject to injected faults."""
    async with open_blobs(BUCKET, emulator=gcs.url, policy=POLICY, part_bytes=PART_BYTES) as opened:
        yield opened


@pytest.fixture
async def other_blobs(gcs: Gcs) -> AsyncIterator[GcsBlobs]:
    """Return the adapter of another client. Its calls are not subject to injected faults."""
    async with open_blobs(BUCKET, emulator=gcs.direct) as opened:
        yield opened

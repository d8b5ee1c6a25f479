"""A cloud of stand-ins for a test, and a receiver of callbacks."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from helpers.cloud import CLI, Cloud, OpenCloud, Receiver, cloud_of


@pytest.fixture
def backend_name() -> str:
    """The backend of all that is tested here."""
    return "gcp"


@pytest.fixture
def open_cloud(fake_cli: Callable[[str], Path]) -> OpenCloud:
    """Return what opens instances of the API."""
    return functools.partial(cloud_of, fake_cli(CLI))


@pytest.fixture
async def cloud(open_cloud: OpenCloud) -> AsyncIterator[Cloud]:
    """An instance of the API on a cloud of its own."""
    async with open_cloud() as opened:
        yield opened


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver on loopback."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.take)
    async with TestServer(app) as server:
        receiver.url = str(server.make_url("/hook"))
        yield receiver

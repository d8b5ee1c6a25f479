"""Running APIs without workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from helpers.api import OTHER_TOKEN, TOKEN, Api, api_on

from ccrun.task import Secret


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """An API without authorization."""
    async with api_on(tmp_path / "data") as running:
        yield running


@pytest.fixture
async def api_with_tokens(tmp_path: Path) -> AsyncIterator[Api]:
    """An API with two tokens."""
    async with api_on(tmp_path / "data", tokens=[Secret(TOKEN), Secret(OTHER_TOKEN)]) as running:
        yield running


@pytest.fixture
async def loopback_api(tmp_path: Path) -> AsyncIterator[Api]:
    """An API on loopback without tokens."""
    async with api_on(tmp_path / "data", loopback_only=True) as running:
        yield running

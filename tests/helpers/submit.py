"""An API that cancels abandoned tasks soon."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ccrun.api.dependencies import ApiTimeouts
from helpers.api import Api, api_on


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """An API without authorization, and with a short grace period for abandoned tasks."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(abandon=0.1)) as running:
        yield running

"""Tests that run on both backends."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["local", "gcp"])
def backend_name(request: pytest.FixtureRequest) -> str:
    """Return each backend, unless the test selects one."""
    return str(request.param)

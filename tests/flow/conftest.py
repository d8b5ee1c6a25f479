"""What is shown here holds on both backends."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["local", "gcp"])
def backend_name(request: pytest.FixtureRequest) -> str:
    """Each backend in turn, unless the test chooses."""
    return str(request.param)

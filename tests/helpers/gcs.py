"""Calls of the Cloud Storage stand-in, with timeouts short enough for tests of failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import pytest
from google.cloud import storage  # type: ignore[attr-defined]
from standins.gcs import HANG, Fault, Gcs, Method

from ccrun.backends.gcp.calls import CallPolicy

CREATE: Final[Method] = "storage.objects.create"
GET: Final[Method] = "storage.objects.get"
LIST: Final[Method] = "storage.objects.list"
DELETE: Final[Method] = "storage.objects.delete"
#: A request for a part of an upload, or for the progress of an upload.
PART: Final[Method] = "part"

#: The smallest size of a part that the protocol allows.
PART_BYTES: Final = 256 * 1024

POLICY: Final = CallPolicy(attempt_seconds=0.7, attempts=4, total_seconds=3.0, first_delay_seconds=0.001)
#: Faults after which a call is retried, by test ID.
TRANSIENT_FAULTS: Final = {
    **{str(status): Fault(status=status) for status in (408, 429, 500, 502, 503, 504)},
    "reset before": Fault(reset="before"),
    "reset after": Fault(reset="after"),
    "reset in the middle": Fault(reset="middle"),
    "hang before": HANG,
    "hang after": Fault(response_delay_seconds=3600.0),
}


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def google_client(gcs: Gcs) -> Any:
    """Return Google's own client of the stand-in."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("STORAGE_EMULATOR_HOST", gcs.url)
        return storage.Client()

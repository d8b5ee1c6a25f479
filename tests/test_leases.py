from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.leases import Lease, Leases
from ccrun.task import TaskId

TASK = TaskId("one")
NOW = dt.datetime(2026, 1, 10, 12, 34, 56, 789000, dt.UTC)
LATER = NOW + dt.timedelta(seconds=10)


@pytest.fixture
def leases(tmp_path: Path) -> Leases:
    """Return the leases in a directory."""
    return Leases(DirectoryBlobs(tmp_path))


async def test_lease_is_written_again(leases: Leases) -> None:
    """The second one replaces the first: it has another generation and the later time."""
    first = await leases.write(TASK, at=NOW)
    second = await leases.write(TASK, at=LATER)
    assert first is not None
    assert second is not None
    assert first != second
    assert Lease(generation=second, renewed_at=LATER) == await leases.get(TASK)


async def test_only_the_present_lease_is_renewed(leases: Leases) -> None:
    """A lease that another process has renewed or deleted is left as it is."""
    first = await leases.write(TASK, at=NOW)
    assert first is not None
    second = await leases.renew(TASK, generation=first, at=LATER)
    assert second is not None
    assert await leases.renew(TASK, generation=first, at=NOW) is None
    assert Lease(generation=second, renewed_at=LATER) == await leases.get(TASK)
    await leases.delete(TASK)
    assert await leases.renew(TASK, generation=second, at=NOW) is None
    assert await leases.get(TASK) is None


async def test_deletion_of_no_lease_does_nothing(leases: Leases) -> None:
    """Several instances may delete it."""
    await leases.delete(TASK)
    assert await leases.get(TASK) is None

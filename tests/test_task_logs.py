from __future__ import annotations

from pathlib import Path

import pytest
from helpers.store import NOW, TASK, WatchedBlobs, pending

from ccrun import names
from ccrun.errors import (
    BlobExists,
)
from ccrun.seal import Sealed
from ccrun.store import Store
from ccrun.task_logs import LISTING_NAMES


@pytest.fixture
def blobs(tmp_path: Path) -> WatchedBlobs:
    """Return an empty storage."""
    return WatchedBlobs(tmp_path / "blobs")


@pytest.fixture
def store(blobs: WatchedBlobs) -> Store:
    """Return a store in the storage."""
    return Store(blobs)


async def test_listing_has_chunks_and_the_generation(store: Store) -> None:
    """A listing has the chunks from a number on and the generation of the record, and no other objects."""
    await store.add_payload(TASK, Sealed(b""))
    await store.add(pending())
    for number in range(1, 4):
        await store.logs.add_chunk(TASK, number, [b"line"], NOW)
    listing = await store.logs.listing(TASK, first=2)
    assert [2, 3] == [chunk.number for chunk in listing.chunks]
    assert (await store.read_versioned(TASK)).generation == listing.record_generation
    assert [] == (await store.logs.listing(TASK, first=4)).chunks


@pytest.mark.parametrize("first", [1, 2, 999, 1000, 1001])
async def test_listing_starts_at_the_first_number(store: Store, blobs: WatchedBlobs, first: int) -> None:
    """Chunks with lower numbers are not listed, whatever their times and the lengths of their codes are."""
    for number, hour in ((1, 3), (2, 2), (998, 9), (999, 8), (1000, 7), (1001, 6)):
        await store.logs.add_chunk(TASK, number, [b""], NOW.replace(hour=hour))
    listing = await store.logs.listing(TASK, first=first)
    assert [number for number in (1, 2, 998, 999, 1000, 1001) if number >= first] == [
        chunk.number for chunk in listing.chunks
    ]


async def test_incomplete_listing_has_no_generation(store: Store, tmp_path: Path) -> None:
    """When there are more chunks than one listing holds, its `record_generation` is None."""
    await store.add(pending())
    for number in range(1, LISTING_NAMES + 3):
        (tmp_path / "blobs" / names.chunk_name(TASK, number, NOW)).touch()
    listing = await store.logs.listing(TASK, first=1)
    assert (LISTING_NAMES, None) == (len(listing.chunks), listing.record_generation)
    rest = await store.logs.listing(TASK, first=LISTING_NAMES + 1)
    assert [LISTING_NAMES + 1, LISTING_NAMES + 2] == [chunk.number for chunk in rest.chunks]
    assert rest.record_generation is not None


async def test_different_chunk_is_not_overwritten(store: Store) -> None:
    """Adding an equal chunk again does nothing; adding a different chunk with the same name raises `BlobExists`."""
    await store.logs.add_chunk(TASK, 1, [b"first"], NOW)
    await store.logs.add_chunk(TASK, 1, [b"first"], NOW)
    with pytest.raises(BlobExists):
        await store.logs.add_chunk(TASK, 1, [b"second"], NOW)

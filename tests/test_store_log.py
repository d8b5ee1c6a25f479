from __future__ import annotations

from pathlib import Path

import pytest
from helpers.store import NOW, TASK, WatchedBlobs, pending

from ccrun import names
from ccrun.errors import (
    BlobExists,
)
from ccrun.seal import Sealed
from ccrun.store import LISTING_NAMES, Store


@pytest.fixture
def blobs(tmp_path: Path) -> WatchedBlobs:
    """Where the store of a test keeps its objects."""
    return WatchedBlobs(tmp_path / "blobs")


@pytest.fixture
def store(blobs: WatchedBlobs) -> Store:
    """The store of a test."""
    return Store(blobs)


async def test_listing_shows_chunks_and_the_record(store: Store) -> None:
    """One look shows the chunks from a number on and the generation of the record, and no other object."""
    await store.add_payload(TASK, Sealed(b""))
    await store.add(pending())
    for number in range(1, 4):
        await store.add_chunk(TASK, number, [b"line"], NOW)
    listing = await store.listing(TASK, first=2)
    assert [2, 3] == [chunk.number for chunk in listing.chunks]
    assert (await store.read_versioned(TASK)).generation == listing.record_generation
    assert [] == (await store.listing(TASK, first=4)).chunks


@pytest.mark.parametrize("first", [1, 2, 999, 1000, 1001])
async def test_listing_begins_at_any_number(store: Store, blobs: WatchedBlobs, first: int) -> None:
    """Chunks before the first one asked for are not listed, whenever they were written, also where the digits change."""
    for number, hour in ((1, 3), (2, 2), (998, 9), (999, 8), (1000, 7), (1001, 6)):
        await store.add_chunk(TASK, number, [b""], NOW.replace(hour=hour))
    listing = await store.listing(TASK, first=first)
    assert [number for number in (1, 2, 998, 999, 1000, 1001) if number >= first] == [
        chunk.number for chunk in listing.chunks
    ]


async def test_long_log_is_listed_in_parts(store: Store, tmp_path: Path) -> None:
    """A log of more chunks than one listing shows says that there are more, by not telling of the record."""
    await store.add(pending())
    for number in range(1, LISTING_NAMES + 3):
        (tmp_path / "blobs" / names.chunk_name(TASK, number, NOW)).touch()
    listing = await store.listing(TASK, first=1)
    assert (LISTING_NAMES, None) == (len(listing.chunks), listing.record_generation)
    rest = await store.listing(TASK, first=LISTING_NAMES + 1)
    assert [LISTING_NAMES + 1, LISTING_NAMES + 2] == [chunk.number for chunk in rest.chunks]
    assert rest.record_generation is not None


async def test_chunk_of_another_writer_is_not_taken_for_the_own(store: Store) -> None:
    """A name that holds something else is an error at once: lines are never dropped in silence."""
    await store.add_chunk(TASK, 1, [b"of another"], NOW)
    await store.add_chunk(TASK, 1, [b"of another"], NOW)
    with pytest.raises(BlobExists):
        await store.add_chunk(TASK, 1, [b"our own"], NOW)

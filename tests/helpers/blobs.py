"""Listings of object storage, for tests."""

from __future__ import annotations

from ccrun.blobs import Blobs


async def list_names(
    blobs: Blobs, prefix: str, after: str = "", before: str | None = None, limit: int = 1000
) -> list[str]:
    """Return the names in a listing."""
    return [entry.name for entry in await blobs.entries(prefix, after=after, before=before, limit=limit)]

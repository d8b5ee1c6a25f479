from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest
from helpers.gcs import PART_BYTES, google_client
from standins.gcs import BUCKET, Gcs

from ccrun.backends.gcp.blobs import GcsBlobs


@pytest.mark.parametrize(
    ("name", "content_type", "disposition"),
    [
        ("001-20250101-000000.jsonl", "application/x-ndjson", "inline"),
        ("metadata.json", "application/json", "inline"),
        ("video-1.webm", "video/webm", "inline"),
        ("screen.PNG", "image/png", "inline"),
        ("out.log", "text/plain", "inline"),
        ("notes.md", "text/markdown", "attachment"),
        ("report.html", "text/html", "attachment"),
        ("picture.svg", "image/svg+xml", "attachment"),
        ("feed.xml", "text/xml", "attachment"),
        ("page.xhtml", "application/xhtml+xml", "attachment"),
        ("archive.tar.gz", "application/octet-stream", "attachment"),
        ("page.html.gz", "application/octet-stream", "attachment"),
        ("encrypted-payload.bin", "application/octet-stream", "attachment"),
        ("none", "application/octet-stream", "attachment"),
    ],
)
@pytest.mark.parametrize("size", [1, 3 * PART_BYTES])
async def test_object_has_a_content_type(
    gcs: Gcs, blobs: GcsBlobs, name: str, content_type: str, disposition: str, size: int
) -> None:
    """An object has a content type and a disposition. What a browser could run is downloaded, not displayed."""
    await blobs.create_from(name, io.BytesIO(bytes(size)), size=size)

    def get() -> Any:
        client = google_client(gcs)
        blob = client.bucket(BUCKET).get_blob(name)
        client.close()
        return blob.content_type, blob.content_disposition

    # RFC 7303: both names of the XML type mean the same.
    expected = (content_type, disposition)
    assert expected == tuple(text.replace("application/xml", "text/xml") for text in await asyncio.to_thread(get))

"""Uploads in parts, with the resumable upload protocol of Cloud Storage. Makes single requests and does not retry them.

https://cloud.google.com/storage/docs/resumable-uploads, https://cloud.google.com/storage/docs/performing-resumable-uploads

Implemented here because gcloud-aio-storage sends the whole content in one request, and starts from the beginning when that
fails.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any, Final, cast

import aiohttp
import attrs
from gcloud.aio.storage import Storage
from yarl import URL

#: The size of every part but the last, and the memory that an upload needs. The protocol requires a multiple of 256 KiB;
#: Google recommends at least 8 MiB.
PART_BYTES: Final = 8 * 1024 * 1024

#: How much is written to the connection at a time.
_WRITE_BYTES: Final = 64 * 1024
_RANGE: Final = re.compile(r"bytes=0-([0-9]+)")


@attrs.frozen
class UploadProgress:
    """The progress of an upload."""

    #: How many bytes the service has stored.
    stored_bytes: int
    #: The generation of the object, once the upload is complete.
    generation: int | None = None


class ResumableStorage(Storage):
    """The library's client, extended by uploads in parts."""

    async def start_upload(
        self, bucket: str, resource: dict[str, Any], *, size: int, parameters: dict[str, str], timeout: Any
    ) -> str:
        """Start an upload and return its URL, to which the parts are sent.

        The URL is a secret: for a week, a client needs no credentials to write the object with it.

        Args:
            bucket: The bucket of the object.
            resource: The object's metadata in the JSON API's form, with `name` and `contentType`.
            size: The size of the content in bytes.
            parameters: Further query parameters.
            timeout: An `aiohttp.ClientTimeout`.
        """
        headers = {
            **await self._headers(),
            "X-Upload-Content-Type": resource["contentType"],
            "X-Upload-Content-Length": str(size),
        }
        async with self._http.post(
            f"{self._api_root_write}/{bucket}/o",
            params={**parameters, "uploadType": "resumable"},
            json=resource,
            headers=headers,
            timeout=timeout,
        ) as response:
            response.raise_for_status()
            return response.headers["Location"]

    async def send_part(self, url: str, part: bytes, *, start: int, size: int, timeout: Any) -> UploadProgress:
        """Send a part of the content.

        Args:
            url: What `start_upload` returned.
            part: The bytes of the part.
            start: The offset of the part.
            size: The size of the whole content in bytes.
            timeout: An `aiohttp.ClientTimeout`.
        """
        return await self._put(url, f"bytes {start}-{start + len(part) - 1}/{size}", part, timeout)

    async def get_progress(self, url: str, *, size: int, timeout: Any) -> UploadProgress:
        """Query the progress of an upload.

        Args:
            url: What `start_upload` returned.
            size: The size of the whole content in bytes.
            timeout: An `aiohttp.ClientTimeout`.
        """
        return await self._put(url, f"bytes */{size}", b"", timeout)

    async def _put(self, url: str, content_range: str, content: bytes, timeout: Any) -> UploadProgress:
        async with self._http.put(
            URL(url, encoded=True),
            data=_single_use(content),
            headers={"Content-Range": content_range, "Content-Length": str(len(content))},
            # In this protocol, 308 means that the upload is not complete.
            allow_redirects=False,
            timeout=timeout,
        ) as response:
            if response.status == 308:
                # Without a range, the service has not stored anything yet.
                stored = _RANGE.fullmatch(response.headers.get("Range", ""))
                return UploadProgress(int(stored[1]) + 1 if stored else 0)
            response.raise_for_status()
            written = await response.json(content_type=None)
            return UploadProgress(int(written["size"]), int(written["generation"]))

    @property
    def _http(self) -> aiohttp.ClientSession:
        # The library annotates it with the session type of its synchronous variant.
        session: Any = self.session.session
        return cast("aiohttp.ClientSession", session)


async def _single_use(content: bytes) -> AsyncIterator[memoryview]:
    """Yield the content as a stream, which aiohttp cannot resend.

    aiohttp resends a PUT with a bytes body when the connection breaks. But the part may have arrived, so the progress must be
    queried first.
    """
    whole = memoryview(content)
    for start in range(0, len(content), _WRITE_BYTES):
        yield whole[start : start + _WRITE_BYTES]

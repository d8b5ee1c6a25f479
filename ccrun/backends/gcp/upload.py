"""Resumable uploads of Cloud Storage.

https://cloud.google.com/storage/docs/resumable-uploads, https://cloud.google.com/storage/docs/performing-resumable-uploads

gcloud-aio-storage sends the complete content in one request, and starts again when it fails. Here parts are sent, and the service
is asked what it has. Implements the protocol only; the caller retries.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any, Final, cast

import aiohttp
import attrs
from gcloud.aio.storage import Storage
from yarl import URL

#: Bytes of each part but the last, which an upload holds in memory: a multiple of 256 KiB, as the protocol requires, and the
#: minimum that Google recommends.
PART_BYTES: Final = 8 * 1024 * 1024

#: Bytes that are written to a connection in one step.
_BITE_BYTES: Final = 64 * 1024
_RANGE: Final = re.compile(r"bytes=0-([0-9]+)")


@attrs.frozen
class UploadProgress:
    """The bytes of an upload that the service has, and the generation of the object when it has all."""

    held: int
    generation: int | None = None


class ResumableStorage(Storage):
    """The client of the library, with resumable uploads in parts."""

    async def begin_upload(
        self, bucket: str, description: dict[str, Any], *, size: int, parameters: dict[str, str], timeout: Any
    ) -> str:
        """Start an upload, and return the URL for its parts.

        The URL is a secret: for a week, it permits writing this object without credentials.

        Args:
            bucket: The bucket of the object.
            description: The object resource of the API, with its `name`.
            size: The bytes of its content.
            parameters: Additional query parameters.
            timeout: A timeout of aiohttp.
        """
        headers = {
            **await self._headers(),
            "X-Upload-Content-Type": description["contentType"],
            "X-Upload-Content-Length": str(size),
        }
        async with self._http.post(
            f"{self._api_root_write}/{bucket}/o",
            params={**parameters, "uploadType": "resumable"},
            json=description,
            headers=headers,
            timeout=timeout,
        ) as response:
            response.raise_for_status()
            return response.headers["Location"]

    async def send_part(self, address: str, part: bytes, *, start: int, size: int, timeout: Any) -> UploadProgress:
        """Send bytes from `start` on, of `size` in all."""
        return await self._put(address, f"bytes {start}-{start + len(part) - 1}/{size}", part, timeout)

    async def ask_progress(self, address: str, *, size: int, timeout: Any) -> UploadProgress:
        """Return the progress of an upload of `size` bytes."""
        return await self._put(address, f"bytes */{size}", b"", timeout)

    async def _put(self, address: str, content_range: str, content: bytes, timeout: Any) -> UploadProgress:
        async with self._http.put(
            URL(address, encoded=True),
            data=_once(content),
            headers={"Content-Range": content_range, "Content-Length": str(len(content))},
            # 308 means "continue" here, and is not a redirect.
            allow_redirects=False,
            timeout=timeout,
        ) as response:
            if response.status == 308:
                # Without a range, the service has nothing yet.
                held = _RANGE.fullmatch(response.headers.get("Range", ""))
                return UploadProgress(int(held[1]) + 1 if held else 0)
            response.raise_for_status()
            written = await response.json(content_type=None)
            return UploadProgress(int(written["size"]), int(written["generation"]))

    @property
    def _http(self) -> aiohttp.ClientSession:
        # The annotation is that of the synchronous variant of the library.
        session: Any = self.session.session
        return cast("aiohttp.ClientSession", session)


async def _once(content: bytes) -> AsyncIterator[memoryview]:
    """Yield the content, so that only one request can send it.

    When a connection breaks, aiohttp sends a PUT again if it still has the content. But the content may have arrived, so the
    progress has to be read first.
    """
    whole = memoryview(content)
    for start in range(0, len(content), _BITE_BYTES):
        yield whole[start : start + _BITE_BYTES]

"""An upload in parts, by the resumable protocol of Cloud Storage.

https://cloud.google.com/storage/docs/resumable-uploads, https://cloud.google.com/storage/docs/performing-resumable-uploads

gcloud-aio-storage sends such an upload as one request of the whole content and begins again from nothing when it fails; here a
part at a time is sent, and what the service holds already is asked for. Knows the protocol; repeats nothing by itself.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any, Final, cast

import aiohttp
import attrs
from gcloud.aio.storage import Storage
from yarl import URL

#: Bytes of every part but the last: a multiple of 256 KiB, as the protocol wants it, and what Google recommends at least.
#: It is what an upload keeps in memory.
PART_BYTES: Final = 8 * 1024 * 1024

#: Bytes that are handed to a connection at once.
_BITE_BYTES: Final = 64 * 1024
_RANGE: Final = re.compile(r"bytes=0-([0-9]+)")


@attrs.frozen
class UploadProgress:
    """How far an upload has come: the bytes that the service holds, and the object's generation once it has all of them."""

    held: int
    generation: int | None = None


class ResumableStorage(Storage):
    """The library's client, which can also upload in parts."""

    async def begin_upload(
        self, bucket: str, description: dict[str, Any], *, size: int, parameters: dict[str, str], timeout: Any
    ) -> str:
        """Return the address that the parts go to.

        It carries its own permission for a week, so whoever knows it may write that one object: it is a secret.

        Args:
            bucket: Where the object will be.
            description: Of the object, as the API spells it, with its `name`.
            size: Bytes of its content.
            parameters: Further ones of the call.
            timeout: As aiohttp has it.
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
        """Send the bytes from `start` on of `size`."""
        return await self._put(address, f"bytes {start}-{start + len(part) - 1}/{size}", part, timeout)

    async def ask_progress(self, address: str, *, size: int, timeout: Any) -> UploadProgress:
        """Ask how far an upload of `size` bytes has come."""
        return await self._put(address, f"bytes */{size}", b"", timeout)

    async def _put(self, address: str, content_range: str, content: bytes, timeout: Any) -> UploadProgress:
        async with self._http.put(
            URL(address, encoded=True),
            data=_once(content),
            headers={"Content-Range": content_range, "Content-Length": str(len(content))},
            # 308 means "go on" here, and is no redirection.
            allow_redirects=False,
            timeout=timeout,
        ) as response:
            if response.status == 308:
                # Without a range nothing is held yet.
                held = _RANGE.fullmatch(response.headers.get("Range", ""))
                return UploadProgress(int(held[1]) + 1 if held else 0)
            response.raise_for_status()
            written = await response.json(content_type=None)
            return UploadProgress(int(written["size"]), int(written["generation"]))

    @property
    def _http(self) -> aiohttp.ClientSession:
        # The library annotates what its twin for requests takes.
        session: Any = self.session.session
        return cast("aiohttp.ClientSession", session)


async def _once(content: bytes) -> AsyncIterator[memoryview]:
    """Yield the content in a form that only one request can send.

    When a connection breaks, aiohttp by itself sends a PUT again whose content it still has. But what was sent may have arrived:
    the service has to be asked first.
    """
    whole = memoryview(content)
    for start in range(0, len(content), _BITE_BYTES):
        yield whole[start : start + _BITE_BYTES]

"""Objects in a bucket of Cloud Storage.

Every write names the generation that it is made on, so that it can be repeated when its answer was lost. Knows nothing of
what any object means.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import mimetypes
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Any, Final, TypeVar

import aiohttp
import attrs
from gcloud.aio.storage import Storage

from ccrun.blobs import Blob, Entry, check_name
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, StorageError
from ccrun.gcp import calls
from ccrun.gcp.calls import Patience, Target

API_ROOT: Final = "https://storage.googleapis.com"
#: Bytes. What a slow line carries; a write may take as long as its content needs at this speed, besides its usual time.
SLOWEST_BYTES_PER_SECOND: Final = 1024 * 1024
#: The most that one listing gives: https://cloud.google.com/storage/docs/json_api/v1/objects/list
PAGE_NAMES: Final = 1000
#: Only what an `Entry` holds: a tenth of what else would be sent.
LISTED_FIELDS: Final = "items(name,generation,updated),nextPageToken"
#: The custom metadata that names the write which made an object; see `GcsBlobs._write`.
WRITE_KEY: Final = "ccrun-write"
WRITE_BYTES: Final = 8
#: Tries at an object that is written again and again while it is to be deleted.
DELETE_ATTEMPTS: Final = 20
#: Listed by a check. A role can be limited to prefixes, and this one ccrun lists under any identity that may list.
CHECKED_PREFIX: Final = "sessions/"

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class _Look:
    """What a look at an object shows besides its content."""

    generation: int
    #: The write that made it, unless somebody else did.
    write: str | None


@contextlib.asynccontextmanager
async def open_blobs(
    bucket: str, *, emulator: str | None = None, patience: Patience | None = None, page_names: int = PAGE_NAMES
) -> AsyncIterator[GcsBlobs]:
    """Open a bucket, for as long as the context lasts.

    Args:
        bucket: Its name.
        emulator: The URL of what stands in for Cloud Storage; it gets no credentials.
        patience: How long a call goes on.
        page_names: Names that one call for a listing gives.

    Raises:
        ConfigError: The credentials cannot be read.
    """
    # Tables of the machine are read the first time, which would block the loop.
    await asyncio.to_thread(mimetypes.init)
    async with aiohttp.ClientSession() as session:
        shared: Any = session  # The library annotates what its twin for requests takes.
        storage = Storage(
            session=shared,
            token=await calls.credentials(session, emulated=emulator is not None),
            api_root=emulator or API_ROOT,
            api_is_dev=emulator is not None,
        )
        yield GcsBlobs(storage, bucket, patience=patience or Patience(), page_names=page_names)


class GcsBlobs:
    """Objects in a bucket. `open_blobs` makes it."""

    def __init__(self, storage: Storage, bucket: str, *, patience: Patience, page_names: int = PAGE_NAMES) -> None:
        self._storage = storage
        self._bucket = bucket
        self._patience = patience
        self._page_names = page_names
        self._target = Target(
            service="Cloud Storage", resource=f"the bucket {bucket}", settings="GCS_LOGS_BUCKET", error=StorageError
        )
        # How long nothing may come; a whole try is bounded by `calls`. Annotated as whole seconds, it takes this as well.
        self._silence: Any = aiohttp.ClientTimeout(sock_connect=patience.try_seconds, sock_read=patience.try_seconds)

    async def read(self, name: str) -> Blob:
        check_name(name)

        async def download() -> Blob:
            stream = await self._storage.download_stream(self._bucket, name, timeout=self._silence)
            async with stream as response:
                # In one answer, so that the content is that of the generation.
                return Blob(content=await response.read(), generation=int(response.headers["X-Goog-Generation"]))

        try:
            return await self._call(
                download, "storage.objects.get", expected={404}, seconds=self._patience.total_seconds
            )
        except aiohttp.ClientResponseError:
            raise BlobNotFound from None

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        whole = content if isinstance(content, bytes) else b"".join(content)
        generation = await self._write(check_name(name), whole, on=0)
        if generation is None:
            raise BlobExists
        return generation

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        new_generation = await self._write(check_name(name), content, on=generation)
        if new_generation is None:
            raise BlobChanged
        return new_generation

    async def delete(self, name: str) -> None:
        check_name(name)
        for _ in range(DELETE_ATTEMPTS):
            found = await self._look(name)
            if found is None or await self._delete(name, found.generation):
                return
        raise StorageError("The object is being changed too often.")

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[Entry]:
        folder = prefix.rpartition("/")[0]
        if folder:
            check_name(folder)
        if before is not None and before <= after:
            return []
        wanted = {
            "prefix": prefix,
            "startOffset": after,
            # No name holds a NUL, and nowhere does it stand that Cloud Storage takes one.
            "endOffset": (before or "").replace("\x00", " "),
            "fields": LISTED_FIELDS,
        }
        entries: list[Entry] = []
        token = ""
        while len(entries) < limit:
            # One more, for `startOffset` shows `after` itself.
            size = min(limit - len(entries) + 1, self._page_names)
            page, token = await self._page({**wanted, "maxResults": str(size), "pageToken": token})
            entries += (entry for entry in page if entry.name > after and (before is None or entry.name < before))
            if not token:
                break
        return entries[:limit]

    def url(self, name: str) -> str:
        return f"gs://{self._bucket}/{name}"

    async def check(self) -> None:
        await self.entries(CHECKED_PREFIX, limit=1)

    # One method of the API each.

    async def _write(self, name: str, content: bytes, *, on: int) -> int | None:
        """Write over that generation (0: where nothing is) and return the new one; None when another one is there.

        What is there may be of this very write, when the answer to an earlier try was lost: its metadata tell.
        """
        write = secrets.token_hex(WRITE_BYTES)

        async def upload() -> int:
            written = await self._storage.upload(
                self._bucket,
                name,
                content,
                content_type=_content_type(name),
                # New for each try: the library adds to it.
                parameters={"ifGenerationMatch": str(on)},
                metadata={"metadata": {WRITE_KEY: write}},
                force_resumable_upload=False,
                timeout=self._silence,
            )
            return int(written["generation"])

        permission = "storage.objects.create and storage.objects.delete" if on else "storage.objects.create"
        seconds = self._patience.try_seconds + len(content) / SLOWEST_BYTES_PER_SECOND
        try:
            return await self._call(upload, permission, expected={412}, seconds=seconds)
        except aiohttp.ClientResponseError:
            found = await self._look(name)
        return found.generation if found is not None and found.write == write else None

    async def _look(self, name: str) -> _Look | None:
        async def get() -> _Look:
            known = await self._storage.download_metadata(self._bucket, name, timeout=self._silence)
            return _Look(generation=int(known["generation"]), write=known.get("metadata", {}).get(WRITE_KEY))

        try:
            return await self._call(get, "storage.objects.get", expected={404})
        except aiohttp.ClientResponseError:
            return None

    async def _delete(self, name: str, generation: int) -> bool:
        """Remove that generation of the object; False when another one is there."""

        async def delete() -> None:
            # A try that comes late, when the name is used again, must not remove what is new.
            only = {"ifGenerationMatch": str(generation)}
            await self._storage.delete(self._bucket, name, params=only, timeout=self._silence)

        try:
            await self._call(delete, "storage.objects.delete", expected={404, 412})
        except aiohttp.ClientResponseError as error:
            return error.status == 404
        return True

    async def _page(self, parameters: dict[str, str]) -> tuple[list[Entry], str]:
        given = {name: value for name, value in parameters.items() if value}

        async def list_objects() -> tuple[list[Entry], str]:
            page = await self._storage.list_objects(self._bucket, params=given, timeout=self._silence)
            return [_entry(item) for item in page.get("items", ())], page.get("nextPageToken", "")

        return await self._call(list_objects, "storage.objects.list")

    async def _call(
        self,
        attempt: Callable[[], Awaitable[T]],
        permission: str,
        *,
        expected: Collection[int] = (),
        seconds: float | None = None,
    ) -> T:
        return await calls.call(
            attempt,
            target=self._target,
            permission=permission,
            patience=self._patience,
            expected=expected,
            seconds=seconds,
        )


def _entry(item: dict[str, str]) -> Entry:
    return Entry(
        name=item["name"], generation=int(item["generation"]), updated=dt.datetime.fromisoformat(item["updated"])
    )


def _content_type(name: str) -> str:
    """Return as what a browser gets an object."""
    if name.endswith(".jsonl"):
        return "application/x-ndjson"
    kind, encoding = mimetypes.guess_type(name)
    # `a.tar.gz` is no tar file.
    return kind if kind and not encoding else "application/octet-stream"

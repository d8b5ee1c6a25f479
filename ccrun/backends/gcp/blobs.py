"""Objects in a bucket of Cloud Storage.

Every write names the generation that it is based on, so that it can be retried when its response was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
import mimetypes
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Any, BinaryIO, Final, TypeVar

import aiohttp
import attrs

from ccrun.backends.gcp import calls
from ccrun.backends.gcp.calls import CallPolicy, Target
from ccrun.backends.gcp.content_type import presentation
from ccrun.backends.gcp.upload import PART_BYTES, ResumableStorage, UploadProgress
from ccrun.blobs import Blob, BlobInfo, check_name, read_piece, run_in_thread
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, StorageError

API_ROOT: Final = "https://storage.googleapis.com"
#: Bytes a second of a slow connection. A write may take as long as its content needs at this speed, plus the usual time.
SLOWEST_BYTES_PER_SECOND: Final = 1024 * 1024
#: The maximum of one listing: https://cloud.google.com/storage/docs/json_api/v1/objects/list
PAGE_NAMES: Final = 1000
#: The fields of a `BlobInfo`: a tenth of the complete response.
LISTED_FIELDS: Final = "items(name,generation,updated),nextPageToken"
#: The custom metadata with the ID of the write that created the object; see `GcsBlobs._write`.
WRITE_ID_KEY: Final = "ccrun-write"
WRITE_ID_BYTES: Final = 8
#: Attempts to delete an object that is replaced meanwhile.
DELETE_ATTEMPTS: Final = 20
#: Starts of a resumable upload. The service keeps one for a week, so that losing one is rare.
UPLOAD_ATTEMPTS: Final = 3
#: The prefix that a check lists. A role can be limited to prefixes, and all identities of ccrun that may list may list this one.
CHECKED_PREFIX: Final = "sessions/"

T = TypeVar("T")


class _UploadLost(Exception):
    """The service has lost a resumable upload."""


@attrs.frozen(kw_only=True)
class _ObjectVersion:
    """The version of an object, without its content."""

    generation: int
    #: The ID of the write that created it, if ccrun did.
    write: str | None


@contextlib.asynccontextmanager
async def open_blobs(
    bucket: str,
    *,
    emulator: str | None = None,
    policy: CallPolicy | None = None,
    page_names: int = PAGE_NAMES,
    part_bytes: int = PART_BYTES,
) -> AsyncIterator[GcsBlobs]:
    """Open a bucket while the context is open.

    Args:
        bucket: The name of the bucket.
        emulator: The URL of an emulator, which is called without credentials.
        policy: How often and for how long a call is retried.
        page_names: Names in one page of a listing.
        part_bytes: Bytes of a file that are sent in one request, and held in memory: a multiple of 256 KiB.

    Raises:
        ConfigError: The credentials cannot be read.
    """
    # The first call reads the tables of the machine, which blocks.
    await asyncio.to_thread(mimetypes.init)
    async with aiohttp.ClientSession() as session:
        shared: Any = session  # The annotation is that of the synchronous variant of the library.
        storage = ResumableStorage(
            session=shared,
            token=await calls.credentials(session, emulated=emulator is not None),
            api_root=emulator or API_ROOT,
            api_is_dev=emulator is not None,
        )
        yield GcsBlobs(storage, bucket, policy=policy or CallPolicy(), page_names=page_names, part_bytes=part_bytes)


class GcsBlobs:
    """Object storage in a bucket. Created by `open_blobs`."""

    def __init__(
        self,
        storage: ResumableStorage,
        bucket: str,
        *,
        policy: CallPolicy,
        page_names: int = PAGE_NAMES,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._storage = storage
        self._bucket = bucket
        self._policy = policy
        self._page_names = page_names
        self._part_bytes = part_bytes
        self._target = Target(
            service="Cloud Storage", resource=f"the bucket {bucket}", settings="GCS_LOGS_BUCKET", error=StorageError
        )
        # The timeout for silence; `calls` has the timeout of an attempt. The annotation is int, but a ClientTimeout is accepted.
        self._silence: Any = aiohttp.ClientTimeout(
            sock_connect=policy.attempt_seconds, sock_read=policy.attempt_seconds
        )

    async def read(self, name: str) -> Blob:
        check_name(name)

        async def download() -> Blob:
            stream = await self._storage.download_stream(self._bucket, name, timeout=self._silence)
            async with stream as response:
                # In one response, so that the content belongs to the generation.
                return Blob(content=await response.read(), generation=int(response.headers["X-Goog-Generation"]))

        try:
            return await self._call(download, "storage.objects.get", expected={404}, seconds=self._policy.total_seconds)
        except aiohttp.ClientResponseError:
            raise BlobNotFound from None

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        whole = content if isinstance(content, bytes) else b"".join(content)
        generation = await self._write(check_name(name), whole, on=0)
        if generation is None:
            raise BlobExists
        return generation

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        check_name(name)
        if size <= self._part_bytes:
            content = await run_in_thread(lambda: read_piece(file, size, is_last=True))
            generation = await self._write(name, content, on=0)
        else:
            generation = await self._write_in_parts(name, file, size)
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
        raise StorageError("The object was changed by other processes too often.")

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        folder = prefix.rpartition("/")[0]
        if folder:
            check_name(folder)
        if before is not None and before <= after:
            return []
        wanted = {
            "prefix": prefix,
            "startOffset": after,
            # No name has a NUL, which Cloud Storage may not accept.
            "endOffset": (before or "").replace("\x00", " "),
            "fields": LISTED_FIELDS,
        }
        entries: list[BlobInfo] = []
        token = ""
        while len(entries) < limit:
            # One more, since `startOffset` includes `after`.
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

    # One method for each method of the API.

    async def _write(self, name: str, content: bytes, *, on: int) -> int | None:
        """Replace this generation (0: no object) and return the new one, None when there is another generation.

        The object may come from this write, when the response of an earlier attempt was lost. Its metadata shows that.
        """
        write = secrets.token_hex(WRITE_ID_BYTES)
        kind, disposition = presentation(name)

        async def upload() -> int:
            written = await self._storage.upload(
                self._bucket,
                name,
                content,
                content_type=kind,
                # New for each attempt, since the library changes it.
                parameters={"ifGenerationMatch": str(on)},
                metadata={"metadata": {WRITE_ID_KEY: write}, "Content-Disposition": disposition},
                force_resumable_upload=False,
                timeout=self._silence,
            )
            return int(written["generation"])

        permission = "storage.objects.create and storage.objects.delete" if on else "storage.objects.create"
        seconds = self._policy.attempt_seconds + len(content) / SLOWEST_BYTES_PER_SECOND
        try:
            return await self._call(upload, permission, expected={412}, seconds=seconds)
        except aiohttp.ClientResponseError:
            return await self._made_by(write, name)

    async def _write_in_parts(self, name: str, file: BinaryIO, size: int) -> int | None:
        """Write a new object from a file and return its generation, None when there is an object with this name."""
        write = secrets.token_hex(WRITE_ID_BYTES)
        begin = await run_in_thread(file.tell)
        for _ in range(UPLOAD_ATTEMPTS):
            try:
                await run_in_thread(lambda: file.seek(begin))
                return await self._upload(name, file, size, write)
            except _UploadLost:
                continue
            except aiohttp.ClientResponseError:
                # It may come from an upload that was lost after its last part.
                return await self._made_by(write, name)
        raise StorageError("Cloud Storage lost the upload several times: retry later.")

    async def _upload(self, name: str, file: BinaryIO, size: int, write: str) -> int:
        """Upload a file in parts. Raise `ClientResponseError` when there is an object with this name."""
        kind, disposition = presentation(name)
        description = {
            "name": name,
            "contentType": kind,
            "contentDisposition": disposition,
            "metadata": {WRITE_ID_KEY: write},
        }

        async def begin() -> str:
            return await self._storage.begin_upload(
                self._bucket,
                description,
                size=size,
                parameters={"ifGenerationMatch": "0"},
                timeout=self._silence,
            )

        address = await self._call(begin, "storage.objects.create", expected={412})
        for start in range(0, size, self._part_bytes):
            length = min(self._part_bytes, size - start)
            # The last part creates the object, so it is sent only when the file has ended.
            read = functools.partial(read_piece, file, length, is_last=start + length == size)
            generation = await self._send(address, await run_in_thread(read), start, size)
            if generation is not None:
                return generation
        raise AssertionError("the last part has a generation")

    async def _send(self, address: str, part: bytes, start: int, size: int) -> int | None:
        """Send a part until the service has it. After the last part, return the generation of the object.

        Raises:
            _UploadLost: The service does not have the upload, or has less of it than before.
            aiohttp.ClientResponseError: There is an object with this name.
        """
        end = start + len(part)
        present: UploadProgress | None = UploadProgress(start)

        async def send() -> int | None:
            nonlocal present
            if present is None:
                present = await self._storage.ask_progress(address, size=size, timeout=self._silence)
            while present.generation is None and (present.held < end or end == size):
                if present.held < start:
                    raise _UploadLost
                # Without a response, it is unknown how much has arrived.
                before, present = present.held, None
                if before < size:
                    rest = part[before - start :]
                    present = await self._storage.send_part(
                        address, rest, start=before, size=size, timeout=self._silence
                    )
                if present is None or (present.generation is None and present.held <= before):
                    # The service accepts nothing or does not create the object: retry after a delay.
                    present = None
                    raise TimeoutError
            return present.generation

        seconds = self._policy.attempt_seconds + len(part) / SLOWEST_BYTES_PER_SECOND
        try:
            return await self._call(send, "storage.objects.create", expected={404, 410, 412}, seconds=seconds)
        except aiohttp.ClientResponseError as error:
            if error.status == 412:
                raise
            raise _UploadLost from error

    async def _made_by(self, write: str, name: str) -> int | None:
        """Return the generation of the object if this write created it."""
        found = await self._look(name)
        return found.generation if found is not None and found.write == write else None

    async def _look(self, name: str) -> _ObjectVersion | None:
        async def get() -> _ObjectVersion:
            known = await self._storage.download_metadata(self._bucket, name, timeout=self._silence)
            return _ObjectVersion(
                generation=int(known["generation"]), write=known.get("metadata", {}).get(WRITE_ID_KEY)
            )

        try:
            return await self._call(get, "storage.objects.get", expected={404})
        except aiohttp.ClientResponseError:
            return None

    async def _delete(self, name: str, generation: int) -> bool:
        """Delete this generation of the object. Return False when there is another one."""

        async def delete() -> None:
            # An attempt that arrives late must not delete a newer object with this name.
            only = {"ifGenerationMatch": str(generation)}
            await self._storage.delete(self._bucket, name, params=only, timeout=self._silence)

        try:
            await self._call(delete, "storage.objects.delete", expected={404, 412})
        except aiohttp.ClientResponseError as error:
            return error.status == 404
        return True

    async def _page(self, parameters: dict[str, str]) -> tuple[list[BlobInfo], str]:
        given = {name: value for name, value in parameters.items() if value}

        async def list_objects() -> tuple[list[BlobInfo], str]:
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
            policy=self._policy,
            expected=expected,
            seconds=seconds,
        )


def _entry(item: dict[str, str]) -> BlobInfo:
    return BlobInfo(
        name=item["name"], generation=int(item["generation"]), updated=dt.datetime.fromisoformat(item["updated"])
    )

"""Cloud Storage as object storage.

Every write is conditional on the generation that it replaces. So it can be retried when its response was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
import mimetypes
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Any, BinaryIO, Final, TypeVar

import aiohttp
import attrs

from ccrun.backends.gcp import calls
from ccrun.backends.gcp.calls import CallPolicy, CallTarget
from ccrun.backends.gcp.content_type import presentation
from ccrun.backends.gcp.upload import PART_BYTES, ResumableStorage, UploadProgress
from ccrun.blobs import Blob, BlobInfo, check_name, read_part, run_in_thread
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, StorageError

STORAGE_API_ROOT: Final = "https://storage.googleapis.com"
#: A write may take as long as its content needs at this speed, in addition to the timeout of an attempt.
SLOWEST_BYTES_PER_SECOND: Final = 1024 * 1024
#: The maximum number of names in one response: https://cloud.google.com/storage/docs/json_api/v1/objects/list
PAGE_NAMES: Final = 1000
#: Only what `BlobInfo` needs, which is about a tenth of the full response.
LISTED_FIELDS: Final = "items(name,generation,updated,size),nextPageToken"
#: The key of the custom metadata with the ID of the write that created an object; see `GcsBlobs._write`.
WRITE_ID_KEY: Final = "ccrun-write"
OBJECT_WRITE_ID_BYTES: Final = 8
#: How often `delete` starts again when another process writes the object at the same time.
DELETE_ATTEMPTS: Final = 20
#: How often an upload in parts is started. The service keeps one for a week, so it is rarely lost even once.
UPLOAD_ATTEMPTS: Final = 3
#: What `check` lists. Listing can be restricted to prefixes, and every service account that may list may list this one.
CHECKED_PREFIX: Final = "sessions/"

T = TypeVar("T")


class _UploadLost(Exception):
    """The service no longer has the upload, or has lost a part of it."""


@attrs.frozen(kw_only=True)
class _ObjectVersion:
    """The generation of an object, and which write created it."""

    generation: int
    #: None: not written by ccrun.
    write_id: str | None


@contextlib.asynccontextmanager
async def open_blobs(
    bucket: str,
    *,
    emulator: str | None = None,
    policy: CallPolicy | None = None,
    page_names: int = PAGE_NAMES,
    part_bytes: int = PART_BYTES,
    tls: ssl.SSLContext | bool = True,
) -> AsyncIterator[GcsBlobs]:
    """Connect to a bucket, and close the connections on exit.

    Args:
        bucket: The name of the bucket.
        emulator: The URL of an emulator, which is called instead of Cloud Storage and without credentials.
        policy: Timeouts and retries.
        page_names: How many names one request of a listing returns at most.
        part_bytes: The size of the parts of an upload, which are kept in memory. A multiple of 256 KiB.
        tls: The trusted certificates; True for those of the system.

    Raises:
        ConfigError: The credentials cannot be read.
    """
    # The first use of `mimetypes` reads tables of the machine, which would block the event loop.
    await asyncio.to_thread(mimetypes.init)
    async with calls.open_session(tls, emulated=emulator is not None) as session:
        shared: Any = session  # The library annotates the parameter with the type of its synchronous variant.
        storage = ResumableStorage(
            session=shared,
            token=await calls.credentials(session, emulated=emulator is not None),
            api_root=emulator or STORAGE_API_ROOT,
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
        self._target = CallTarget(
            service="Cloud Storage", resource=f"the bucket {bucket}", settings="GCS_LOGS_BUCKET", error=StorageError
        )
        # Limits the time without any data; `calls` limits an attempt as a whole. The library annotates an int, but passes
        # any value on to aiohttp.
        self._socket_timeout: Any = aiohttp.ClientTimeout(
            sock_connect=policy.attempt_seconds, sock_read=policy.attempt_seconds
        )

    async def read(self, name: str) -> Blob:
        check_name(name)

        async def download() -> Blob:
            stream = await self._storage.download_stream(self._bucket, name, timeout=self._socket_timeout)
            async with stream as response:
                # One response contains both, so they belong together.
                return Blob(content=await response.read(), generation=int(response.headers["X-Goog-Generation"]))

        try:
            return await self._call(download, "storage.objects.get", expected={404}, seconds=self._policy.total_seconds)
        except aiohttp.ClientResponseError:
            raise BlobNotFound from None

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        whole = content if isinstance(content, bytes) else b"".join(content)
        generation = await self._write(check_name(name), whole, replaces=0)
        if generation is None:
            raise BlobExists
        return generation

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        check_name(name)
        if size <= self._part_bytes:
            content = await run_in_thread(lambda: read_part(file, size, is_last=True))
            generation = await self._write(name, content, replaces=0)
        else:
            generation = await self._write_in_parts(name, file, size)
        if generation is None:
            raise BlobExists
        return generation

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        new_generation = await self._write(check_name(name), content, replaces=generation)
        if new_generation is None:
            raise BlobChanged
        return new_generation

    async def delete(self, name: str, *, generation: int | None = None) -> None:
        check_name(name)
        if generation is not None:
            await self._delete(name, generation)
            return
        for _ in range(DELETE_ATTEMPTS):
            version = await self._version(name)
            if version is None or await self._delete(name, version.generation):
                return
        raise StorageError("The object could not be deleted, because it kept changing.")

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        directory = prefix.rpartition("/")[0]
        if directory:
            check_name(directory)
        if before is not None and before <= after:
            return []
        query = {
            "prefix": prefix,
            "startOffset": after,
            # No name contains NUL, and Cloud Storage does not document that it accepts NUL here.
            "endOffset": (before or "").replace("\x00", " "),
            "fields": LISTED_FIELDS,
        }
        entries: list[BlobInfo] = []
        token = ""
        while len(entries) < limit:
            # One more, because the result includes `startOffset` itself.
            size = min(limit - len(entries) + 1, self._page_names)
            page, token = await self._page({**query, "maxResults": str(size), "pageToken": token})
            entries += (entry for entry in page if entry.name > after and (before is None or entry.name < before))
            if not token:
                break
        return entries[:limit]

    def url(self, name: str) -> str:
        return f"gs://{self._bucket}/{name}"

    async def check(self) -> None:
        await self.entries(CHECKED_PREFIX, limit=1)

    async def remove_interrupted_writes(self) -> None:
        """Do nothing: Cloud Storage creates an object when it is complete, and deletes unfinished uploads after a week."""

    async def _write(self, name: str, content: bytes, *, replaces: int) -> int | None:
        """Write an object and return its new generation; None if it does not have the expected generation.

        When the response to an earlier attempt was lost, the conflict may be with this write itself. The write ID in the
        object's metadata shows whether it is.

        Args:
            name: The object's name.
            content: Its new content.
            replaces: The generation that the object must have now; 0 if there must be no object.
        """
        write_id = secrets.token_hex(OBJECT_WRITE_ID_BYTES)
        content_type, disposition = presentation(name)

        async def upload() -> int:
            written = await self._storage.upload(
                self._bucket,
                name,
                content,
                content_type=content_type,
                # A new dict for each attempt, because the library changes it.
                parameters={"ifGenerationMatch": str(replaces)},
                metadata={"metadata": {WRITE_ID_KEY: write_id}, "Content-Disposition": disposition},
                force_resumable_upload=False,
                timeout=self._socket_timeout,
            )
            return int(written["generation"])

        permission = "storage.objects.create and storage.objects.delete" if replaces else "storage.objects.create"
        seconds = self._policy.attempt_seconds + len(content) / SLOWEST_BYTES_PER_SECOND
        try:
            return await self._call(upload, permission, expected={412}, seconds=seconds)
        except aiohttp.ClientResponseError:
            return await self._generation_of(write_id, name)

    async def _write_in_parts(self, name: str, file: BinaryIO, size: int) -> int | None:
        """Write a new object from a file and return its generation; None if there is already one with this name."""
        write_id = secrets.token_hex(OBJECT_WRITE_ID_BYTES)
        file_start = await run_in_thread(file.tell)
        for _ in range(UPLOAD_ATTEMPTS):
            try:
                await run_in_thread(lambda: file.seek(file_start))
                return await self._upload(name, file, size, write_id)
            except _UploadLost:
                continue
            except aiohttp.ClientResponseError:
                # An earlier upload may have created the object although the response to its last part was lost.
                return await self._generation_of(write_id, name)
        raise StorageError(f"Cloud Storage lost the upload {UPLOAD_ATTEMPTS} times: try again later.")

    async def _upload(self, name: str, file: BinaryIO, size: int, write_id: str) -> int:
        """Upload a file in parts.

        Raises:
            _UploadLost: The service no longer has the upload.
            aiohttp.ClientResponseError: There is already an object with this name.
        """
        content_type, disposition = presentation(name)
        resource = {
            "name": name,
            "contentType": content_type,
            "contentDisposition": disposition,
            "metadata": {WRITE_ID_KEY: write_id},
        }

        async def start_upload() -> str:
            return await self._storage.start_upload(
                self._bucket,
                resource,
                size=size,
                parameters={"ifGenerationMatch": "0"},
                timeout=self._socket_timeout,
            )

        url = await self._call(start_upload, "storage.objects.create", expected={412})
        for start in range(0, size, self._part_bytes):
            length = min(self._part_bytes, size - start)
            # The last part creates the object, so check first that the file ends there.
            read = functools.partial(read_part, file, length, is_last=start + length == size)
            generation = await self._send_part(url, await run_in_thread(read), start, size)
            if generation is not None:
                return generation
        raise AssertionError("the last part returns a generation")

    async def _send_part(self, url: str, part: bytes, start: int, size: int) -> int | None:
        """Send a part until the service has stored it. Return the object's generation if it was the last part.

        Args:
            url: The URL of the upload.
            part: The bytes of the part.
            start: The offset of the part.
            size: The size of the whole content in bytes.

        Raises:
            _UploadLost: The service no longer has the upload, or has lost an earlier part.
            aiohttp.ClientResponseError: There is already an object with this name.
        """
        end = start + len(part)
        progress: UploadProgress | None = UploadProgress(start)

        async def send() -> int | None:
            nonlocal progress
            if progress is None:
                progress = await self._storage.get_progress(url, size=size, timeout=self._socket_timeout)
            while progress.generation is None and (progress.stored_bytes < end or end == size):
                if progress.stored_bytes < start:
                    raise _UploadLost
                # Until the response arrives, it is unknown how much of the rest the service has stored.
                offset, progress = progress.stored_bytes, None
                if offset < size:
                    rest = part[offset - start :]
                    progress = await self._storage.send_part(
                        url, rest, start=offset, size=size, timeout=self._socket_timeout
                    )
                if progress is None or (progress.generation is None and progress.stored_bytes <= offset):
                    # The service stored nothing, or has everything but created no object. Query again after a delay.
                    progress = None
                    raise TimeoutError
            return progress.generation

        seconds = self._policy.attempt_seconds + len(part) / SLOWEST_BYTES_PER_SECOND
        try:
            return await self._call(send, "storage.objects.create", expected={404, 410, 412}, seconds=seconds)
        except aiohttp.ClientResponseError as error:
            if error.status == 412:
                raise
            raise _UploadLost from error

    async def _generation_of(self, write_id: str, name: str) -> int | None:
        """Return the generation of an object if this write created it."""
        version = await self._version(name)
        return version.generation if version is not None and version.write_id == write_id else None

    async def _version(self, name: str) -> _ObjectVersion | None:
        async def get() -> _ObjectVersion:
            resource = await self._storage.download_metadata(self._bucket, name, timeout=self._socket_timeout)
            return _ObjectVersion(
                generation=int(resource["generation"]), write_id=resource.get("metadata", {}).get(WRITE_ID_KEY)
            )

        try:
            return await self._call(get, "storage.objects.get", expected={404})
        except aiohttp.ClientResponseError:
            return None

    async def _delete(self, name: str, generation: int) -> bool:
        """Delete an object if it has this generation; return False if it has another one."""

        async def delete() -> None:
            # An attempt that arrives late must not delete a newer object with the same name.
            condition = {"ifGenerationMatch": str(generation)}
            await self._storage.delete(self._bucket, name, params=condition, timeout=self._socket_timeout)

        try:
            await self._call(delete, "storage.objects.delete", expected={404, 412})
        except aiohttp.ClientResponseError as error:
            return error.status == 404
        return True

    async def _page(self, query: dict[str, str]) -> tuple[list[BlobInfo], str]:
        parameters = {name: value for name, value in query.items() if value}

        async def list_objects() -> tuple[list[BlobInfo], str]:
            page = await self._storage.list_objects(self._bucket, params=parameters, timeout=self._socket_timeout)
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
        name=item["name"],
        generation=int(item["generation"]),
        updated=dt.datetime.fromisoformat(item["updated"]),
        size=int(item["size"]),
    )

"""Objects in a bucket of Cloud Storage.

Every write names the generation that it is based on, so that it can be retried when its response was lost. Nothing here knows what
an object means.
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
#: Bytes. What a slow line carries; a write may take as long as its content needs at this speed, besides its usual time.
SLOWEST_BYTES_PER_SECOND: Final = 1024 * 1024
#: The most that one listing gives: https://cloud.google.com/storage/docs/json_api/v1/objects/list
PAGE_NAMES: Final = 1000
#: Only what an `BlobInfo` holds: a tenth of what else would be sent.
LISTED_FIELDS: Final = "items(name,generation,updated),nextPageToken"
#: The custom metadata that names the write which made an object; see `GcsBlobs._write`.
WRITE_ID_KEY: Final = "ccrun-write"
WRITE_ID_BYTES: Final = 8
#: Tries at an object that is written again and again while it is to be deleted.
DELETE_ATTEMPTS: Final = 20
#: Times that an upload in parts is begun. The service keeps one for a week, so losing even one is rare.
UPLOAD_ATTEMPTS: Final = 3
#: Listed by a check. A role can be limited to prefixes, and this one ccrun lists under any identity that may list.
CHECKED_PREFIX: Final = "sessions/"

T = TypeVar("T")


class _UploadLost(Exception):
    """The service knows nothing of an upload in parts any more."""


@attrs.frozen(kw_only=True)
class _ObjectVersion:
    """What a look at an object shows besides its content."""

    generation: int
    #: The write that made it, unless somebody else did.
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
    """Open a bucket, for as long as the context lasts.

    Args:
        bucket: Its name.
        emulator: The URL of what stands in for Cloud Storage; it gets no credentials.
        patience: How long a call goes on.
        page_names: Names that one call for a listing gives.
        part_bytes: Bytes of a file that are sent, and kept in memory, at once: a multiple of 256 KiB.

    Raises:
        ConfigError: The credentials cannot be read.
    """
    # Tables of the machine are read the first time, which would block the loop.
    await asyncio.to_thread(mimetypes.init)
    async with aiohttp.ClientSession() as session:
        shared: Any = session  # The library annotates what its twin for requests takes.
        storage = ResumableStorage(
            session=shared,
            token=await calls.credentials(session, emulated=emulator is not None),
            api_root=emulator or API_ROOT,
            api_is_dev=emulator is not None,
        )
        yield GcsBlobs(storage, bucket, policy=policy or CallPolicy(), page_names=page_names, part_bytes=part_bytes)


class GcsBlobs:
    """Objects in a bucket. `open_blobs` makes it."""

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
        # How long nothing may come; a whole try is bounded by `calls`. Annotated as whole seconds, it takes this as well.
        self._silence: Any = aiohttp.ClientTimeout(
            sock_connect=policy.attempt_seconds, sock_read=policy.attempt_seconds
        )

    async def read(self, name: str) -> Blob:
        check_name(name)

        async def download() -> Blob:
            stream = await self._storage.download_stream(self._bucket, name, timeout=self._silence)
            async with stream as response:
                # In one answer, so that the content is that of the generation.
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
        raise StorageError("The object is being changed too often.")

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
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
        entries: list[BlobInfo] = []
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
        write = secrets.token_hex(WRITE_ID_BYTES)
        kind, disposition = presentation(name)

        async def upload() -> int:
            written = await self._storage.upload(
                self._bucket,
                name,
                content,
                content_type=kind,
                # New for each try: the library adds to it.
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
        """Write a new object of a file and return its generation; None when there is one of that name."""
        write = secrets.token_hex(WRITE_ID_BYTES)
        begin = await run_in_thread(file.tell)
        for _ in range(UPLOAD_ATTEMPTS):
            try:
                await run_in_thread(lambda: file.seek(begin))
                return await self._upload(name, file, size, write)
            except _UploadLost:
                continue
            except aiohttp.ClientResponseError:
                # Maybe by an upload that was lost after its last part.
                return await self._made_by(write, name)
        raise StorageError("Cloud Storage loses the upload again and again: try again later.")

    async def _upload(self, name: str, file: BinaryIO, size: int, write: str) -> int:
        """Upload a file in parts. Raises `ClientResponseError` when there is an object of that name."""
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
            # The last part makes the object, so it is not sent before it is known that nothing follows.
            read = functools.partial(read_piece, file, length, is_last=start + length == size)
            generation = await self._send(address, await run_in_thread(read), start, size)
            if generation is not None:
                return generation
        raise AssertionError("the last part has a generation")

    async def _send(self, address: str, part: bytes, start: int, size: int) -> int | None:
        """Send a part of `size` bytes until the service holds it; return the generation of the object after the last one.

        Raises:
            _UploadLost: The service knows of no such upload, or holds less than it did.
            aiohttp.ClientResponseError: There is an object of that name.
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
                # Until the answer is there, nobody knows how much of the rest has arrived.
                before, present = present.held, None
                if before < size:
                    rest = part[before - start :]
                    present = await self._storage.send_part(
                        address, rest, start=before, size=size, timeout=self._silence
                    )
                if present is None or (present.generation is None and present.held <= before):
                    # It takes nothing, or makes no object of what it has: to be asked again after a pause.
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
        """Return the generation of the object if this write made it."""
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

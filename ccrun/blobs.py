"""The port to object storage: bytes under names, with generations.

Defines what an adapter must do. Nothing here knows what an object means.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Sequence
from typing import BinaryIO, Final, Protocol, TypeVar

import attrs

from ccrun.errors import FileUnreadable

#: Bytes. The limit of Cloud Storage: https://cloud.google.com/storage/docs/objects#naming
MAX_NAME_BYTES: Final = 1024

T = TypeVar("T")


@attrs.frozen
class Blob:
    """The content of an object, and its generation."""

    content: bytes = attrs.field(repr=False)
    generation: int


@attrs.frozen
class BlobInfo:
    """An object in a listing."""

    name: str
    generation: int
    updated: dt.datetime


class Blobs(Protocol):
    """An object storage.

    An adapter must guarantee:

    - A write is atomic: no reader sees a part of it.
    - `create` succeeds for one of several concurrent callers; the others get `BlobExists`.
    - `replace` succeeds only for the given generation (otherwise `BlobChanged`), and each write creates a new generation.
    - Reads and listings after a write see that write (strong consistency).
    - A listing is in the order of the names' UTF-8 bytes.
    - `create_from` holds only a part of the file in memory, and does not use it after the call, even when it is cancelled.
    - When the storage fails, a call raises `StorageError` within a bounded time; the message has no local path.
    """

    async def read(self, name: str) -> Blob:
        """Return an object.

        Raises:
            BlobNotFound: There is no such object.
        """
        ...

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        """Write a new object and return its generation.

        Raises:
            BlobExists: There is an object with this name.
        """
        ...

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        """Write a new object from the rest of a file, and return its generation.

        Args:
            file: Buffered and seekable, as `open(…, "rb")` returns it.
            size: The bytes that are left in the file.

        Raises:
            BlobExists: There is an object with this name.
            FileUnreadable: The file cannot be read, or has another size. No object is written.
        """
        ...

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        """Replace this generation of an object, and return the new one.

        Raises:
            BlobChanged: The object has another generation, or does not exist.
        """
        ...

    async def delete(self, name: str) -> None:
        """Delete an object, if it exists."""
        ...

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        """Return the first `limit` objects whose names start with `prefix` and sort after `after` and before `before`."""
        ...

    def url(self, name: str) -> str:
        """Return the URL of an object."""
        ...

    async def check(self) -> None:
        """Check that objects can be written and read.

        Raises:
            StorageError: They cannot.
        """
        ...


def check_name(name: str) -> str:
    """Return the name of an object.

    Raises:
        ValueError: It leads out of the root, or into what an adapter has there.
    """
    segments = name.split("/")
    if (
        any(segment in ("", ".", "..") for segment in segments)
        or segments[0].startswith(".")
        or any(character < " " or character in "\\\x7f" for character in name)
        or len(name.encode()) > MAX_NAME_BYTES
    ):
        raise ValueError(f"not an object name: {name!r}")
    return name


def read_piece(file: BinaryIO, size: int, *, is_last: bool) -> bytes:
    """Return the next `size` bytes of a file.

    Args:
        is_last: Whether the file must end after them.

    Raises:
        FileUnreadable: The file is shorter or longer, or cannot be read.
    """
    try:
        piece = file.read(size)
        if len(piece) == size and not (is_last and file.read(1)):
            return piece
    except OSError as error:
        raise FileUnreadable(f"The file cannot be read: {error.strerror}.") from error
    raise FileUnreadable("The file changed while it was read.")


async def run_in_thread(work: Callable[[], T], *, give_up: Callable[[], None] = lambda: None) -> T:
    """Run blocking work in a thread. Return only when it has ended, even when cancelled, so that it no longer uses anything.

    Args:
        work: The blocking call.
        give_up: Called when cancelled, to make the work end soon.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        give_up()
        await asyncio.gather(working, return_exceptions=True)
        raise

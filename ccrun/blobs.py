"""The port to object storage, which stores bytes under a name and numbers each version with a generation.

Defines what an adapter must do, and holds the functions that all adapters share. Nothing here depends on what an object
means.
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
    """The content and the generation of an object."""

    content: bytes = attrs.field(repr=False)
    generation: int


@attrs.frozen
class BlobInfo:
    """An object as a listing shows it."""

    name: str
    generation: int
    updated: dt.datetime
    #: Bytes of its content.
    size: int


class Blobs(Protocol):
    """Object storage.

    An adapter must:

    - Write atomically: no reader sees a partly written object.
    - Let exactly one of any number of concurrent `create` calls for a name succeed. The others raise `BlobExists`.
    - Give an object a new generation with each write. `replace` succeeds only if the object still has the generation
      that the caller names; otherwise it raises `BlobChanged`.
    - Be strongly consistent: a read or listing that starts after a write has returned sees that write.
    - List objects in the order of the UTF-8 bytes of their names.
    - Pass every name to `check_name`, so that no name refers to anything outside the adapter's root.
    - Raise `StorageError` within a bounded time when the storage is unavailable. The message must not contain a local
      path.
    """

    async def read(self, name: str) -> Blob:
        """Return an object.

        Raises:
            BlobNotFound: There is no object with this name.
            StorageError: The storage is unavailable.
        """
        ...

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        """Write a new object and return its generation.

        Args:
            name: Its name.
            content: Its content, in one part or several.

        Raises:
            BlobExists: There is already an object with this name.
            StorageError: The storage is unavailable.
        """
        ...

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        """Write a new object with the rest of a file as its content, and return its generation.

        The adapter must hold only a part of the file in memory. It must not use the file after the call has returned,
        raised or been cancelled.

        Args:
            name: The object's name.
            file: Buffered and seekable, as `open(…, "rb")` returns it. The content starts at its current position.
            size: Bytes from the current position to the end of the file.

        Raises:
            BlobExists: There is already an object with this name.
            FileUnreadable: The file cannot be read or does not have this size. No object was created.
            StorageError: The storage is unavailable.
        """
        ...

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        """Replace an object that has this generation, and return the new generation.

        Raises:
            BlobChanged: The object has another generation or was deleted.
            StorageError: The storage is unavailable.
        """
        ...

    async def delete(self, name: str, *, generation: int | None = None) -> None:
        """Delete an object. If there is none with this name, or none with this generation, do nothing.

        Args:
            name: Its name.
            generation: The generation to delete, None for any.

        Raises:
            StorageError: The storage is unavailable.
        """
        ...

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        """Return the first objects whose names start with a prefix.

        Args:
            prefix: The prefix.
            after: Only names that sort after this one.
            before: Only names that sort before this one; None means no upper limit.
            limit: The maximum number of objects to return.

        Raises:
            StorageError: The storage is unavailable.
        """
        ...

    def url(self, name: str) -> str:
        """Return the URL under which users and other programs find an object."""
        ...

    async def check(self) -> None:
        """Check that the storage can be used now.

        Raises:
            StorageError: It cannot.
        """
        ...

    async def remove_interrupted_writes(self) -> None:
        """Remove the leftovers of interrupted writes, for example of a process that was killed.

        Raises:
            StorageError: The storage is unavailable.
        """
        ...


def check_name(name: str) -> str:
    """Return the name if it is valid for an object.

    Raises:
        ValueError: The name could refer to a file outside the root or to an adapter's internal files.
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


def read_part(file: BinaryIO, size: int, *, is_last: bool) -> bytes:
    """Return the next `size` bytes of a file.

    Args:
        file: The file.
        size: The exact number of bytes.
        is_last: Whether the file must end after this part.

    Raises:
        FileUnreadable: The file is shorter or longer, or cannot be read.
    """
    try:
        part = file.read(size)
        if len(part) == size and not (is_last and file.read(1)):
            return part
    except OSError as error:
        raise FileUnreadable(f"The file cannot be read: {error.strerror}.") from error
    raise FileUnreadable("The file changed while it was read.")


async def run_in_thread(work: Callable[[], T], *, on_cancel: Callable[[], None] = lambda: None) -> T:
    """Run a blocking function in a thread.

    Unlike `asyncio.to_thread`, a cancelled call returns only after the function has returned. The caller can
    then close the resources that the function used.

    Args:
        work: The blocking function.
        on_cancel: Called on cancellation, to make `work` return early.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        on_cancel()
        await asyncio.gather(working, return_exceptions=True)
        raise

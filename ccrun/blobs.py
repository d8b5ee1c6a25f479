"""The port to object storage: bytes under names, with generations.

Defines what an adapter must do. Nothing here knows what an object means. A name cannot lead out of the root.
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
    """The content of an object, and the generation that it was read at."""

    content: bytes = attrs.field(repr=False)
    generation: int


@attrs.frozen
class BlobInfo:
    """An object as a listing shows it."""

    name: str
    generation: int
    updated: dt.datetime


class Blobs(Protocol):
    """What the store needs of a place to keep objects.

    An adapter owes:

    - A write is all or nothing: no reader ever sees a part of it.
    - `create` succeeds for one of any number of callers; the others get `BlobExists`.
    - `replace` succeeds only on the generation it names (`BlobChanged` otherwise), and each write makes a new one.
    - Whoever read after a write ended sees that write (strong consistency), in contents and in listings.
    - A listing is in the order of the names' UTF-8 bytes.
    - `create_from` keeps only a part of the file in memory, and is done with it when the call ends, however it ends.
    - A call that fails for want of the storage raises `StorageError` after a bounded time, with a sentence that shows no
      local path.
    """

    async def read(self, name: str) -> Blob:
        """Return the object. Raises `BlobNotFound`."""
        ...

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        """Write a new object and return its generation. Raises `BlobExists`."""
        ...

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        """Write a new object of what a file holds from its present place on, and return its generation.

        Args:
            name: Its name.
            file: Buffered, and able to go back, as `open(…, "rb")` gives it.
            size: Bytes that are left in the file.

        Raises:
            BlobExists: There is an object of that name.
            FileUnreadable: The file cannot be read, or has another size than that. Then there is no object.
        """
        ...

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        """Write over that generation of the object and return the new one. Raises `BlobChanged`, also when it is gone."""
        ...

    async def delete(self, name: str) -> None:
        """Remove the object; that there is none is no error."""
        ...

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        """Return the first `limit` objects whose names begin with `prefix`, are above `after` and below `before`."""
        ...

    def url(self, name: str) -> str:
        """Return where a person or another program finds that object."""
        ...

    async def check(self) -> None:
        """Raise `StorageError` when objects cannot be written and read now."""
        ...


def check_name(name: str) -> str:
    """Return the name, or raise `ValueError` when it could lead out of the root or into what an adapter keeps there."""
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
    """Return the next bytes of a file, all of them; nothing may follow the last ones.

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
    """Run what blocks in a thread, and be back only when it has ended, also when cancelled: what it uses is free again.

    Args:
        work: What blocks.
        give_up: Called when cancelled, to make the work end soon.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        give_up()
        await asyncio.gather(working, return_exceptions=True)
        raise

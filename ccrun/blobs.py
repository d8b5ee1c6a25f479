"""Bytes under names, in a folder or in a bucket.

This module knows objects, names and generations; it does not know what any object means. A name cannot climb out of the
root.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import fcntl
import os
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, Protocol, TypeVar

import attrs

from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, FileUnreadable, StorageError

#: Bytes. The limit of Cloud Storage: https://cloud.google.com/storage/docs/objects#naming
MAX_NAME_BYTES: Final = 1024
#: Seconds. A lock is held for microseconds; whoever waits this long stands before a broken disk.
LOCK_SECONDS: Final = 10.0
#: Seconds between two tries at a lock that somebody else holds.
LOCK_PAUSE_SECONDS: Final = 0.005
#: Lock files; two names that share one only wait for each other, so a few suffice.
LOCK_FILES: Final = 64
#: Bytes of a file that are copied at once.
PIECE_BYTES: Final = 1024 * 1024
#: A file without content has this size and takes no room on a disk: a trap, if it were copied as it reads.
_HOLE: Final = bytes(PIECE_BYTES)

T = TypeVar("T")


@attrs.frozen
class Blob:
    """The content of an object, and the generation that it was read at."""

    content: bytes = attrs.field(repr=False)
    generation: int


@attrs.frozen
class Entry:
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

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[Entry]:
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


async def in_thread(work: Callable[[], T], *, give_up: Callable[[], None] = lambda: None) -> T:
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


class DirectoryBlobs:
    """Objects as files below a folder, with the preconditions of Cloud Storage, for any number of processes at once.

    A file's time of last change, set by hand to a number that only grows, is its generation. A new object appears by
    `link(2)`, which fails when the name is taken; a changed one by `rename(2)` under a lock that dies with its holder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._scratch = root / ".scratch"
        self._locks = root / ".locks"

    async def read(self, name: str) -> Blob:
        return await asyncio.to_thread(self._read, check_name(name))

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        return await asyncio.to_thread(self._create, check_name(name), content)

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        check_name(name)
        given_up = threading.Event()
        pieces = _pieces(file, size, given_up)
        return await in_thread(lambda: self._create(name, pieces), give_up=given_up.set)

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        return await asyncio.to_thread(self._replace, check_name(name), content, generation)

    async def delete(self, name: str) -> None:
        await asyncio.to_thread(self._delete, check_name(name))

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[Entry]:
        return await asyncio.to_thread(self._entries, prefix, after, before, limit)

    def url(self, name: str) -> str:
        folder = "/" if name.endswith("/") else ""
        return (self._root.absolute() / name).as_uri() + folder

    async def check(self) -> None:
        await asyncio.to_thread(self._check)

    # All below runs in a thread.

    def _read(self, name: str) -> Blob:
        with _storage_errors("read"):
            try:
                with (self._root / name).open("rb") as file:
                    generation = os.fstat(file.fileno()).st_mtime_ns
                    return Blob(content=file.read(), generation=generation)
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise BlobNotFound from None

    def _create(self, name: str, content: bytes | Iterable[bytes | bytearray]) -> int:
        target = self._root / name
        with _storage_errors("written"), self._written(content, time.time_ns()) as (scratch, generation):
            try:
                os.link(scratch, target)
            except FileNotFoundError:
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                try:
                    os.link(scratch, target)
                except FileExistsError:
                    raise BlobExists from None
            except FileExistsError:
                raise BlobExists from None
            _sync_folder(target.parent)
            return generation

    def _replace(self, name: str, content: bytes, generation: int) -> int:
        target = self._root / name
        with _storage_errors("written"), self._locked(name):
            try:
                present = target.stat().st_mtime_ns
            except FileNotFoundError:
                raise BlobChanged from None
            if present != generation:
                raise BlobChanged
            with self._written(content, max(time.time_ns(), generation + 1)) as (scratch, new_generation):
                scratch.rename(target)
                _sync_folder(target.parent)
                return new_generation

    def _delete(self, name: str) -> None:
        # Under the lock, so that a swap under way does not bring the object back.
        with _storage_errors("written"), self._locked(name), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (self._root / name).unlink()

    def _entries(self, prefix: str, after: str, before: str | None, limit: int) -> list[Entry]:
        folder = prefix.rpartition("/")[0]
        if folder:
            check_name(folder)
        entries: list[Entry] = []
        with _storage_errors("read"):
            for entry in self._walk(folder, prefix, after, before):
                entries.append(entry)
                if len(entries) == limit:
                    break
        return entries

    def _walk(self, folder: str, prefix: str, after: str, before: str | None) -> Iterator[Entry]:
        """Yield the files below a folder in the order of their names, without entering folders that hold none of them."""
        base = f"{folder}/" if folder else ""
        try:
            with os.scandir(self._root / folder) as found:
                # With its slash a folder's name sorts where the names of its files do.
                names = sorted(
                    base + item.name + ("/" if item.is_dir(follow_symlinks=False) else "")
                    for item in found
                    if folder or not item.name.startswith(".")
                )
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in names:
            if before is not None and name >= before:
                return
            if name.endswith("/"):
                inside = name.startswith(prefix) or prefix.startswith(name)
                if inside and (name > after or after.startswith(name)):
                    yield from self._walk(name[:-1], prefix, after, before)
            elif name.startswith(prefix) and name > after:
                with contextlib.suppress(FileNotFoundError):
                    status = (self._root / name).stat(follow_symlinks=False)
                    updated = dt.datetime.fromtimestamp(status.st_mtime, dt.UTC)
                    yield Entry(name=name, generation=status.st_mtime_ns, updated=updated)

    def _check(self) -> None:
        with _storage_errors("written"), self._written(b"", time.time_ns()):
            pass

    @contextlib.contextmanager
    def _written(self, content: bytes | Iterable[bytes | bytearray], generation: int) -> Iterator[tuple[Path, int]]:
        """Write a file of its own, safe on the disk, and remove it at the end unless it was renamed."""
        self._make_own_folder(self._scratch)
        scratch = self._scratch / secrets.token_hex(16)
        try:
            with os.fdopen(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                for piece in [content] if isinstance(content, bytes) else content:
                    if piece == _HOLE:
                        # What takes no room in one place shall take none in the other.
                        file.seek(len(piece), os.SEEK_CUR)
                    else:
                        file.write(piece)
                # A file may end in a hole. Flushes, too.
                file.truncate()
                os.fsync(file.fileno())
                os.utime(file.fileno(), ns=(generation, generation))
                yield scratch, os.fstat(file.fileno()).st_mtime_ns
        finally:
            scratch.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        self._make_own_folder(self._locks)
        lock = self._locks / str(zlib.crc32(name.encode()) % LOCK_FILES)
        give_up_at = time.monotonic() + LOCK_SECONDS
        with os.fdopen(os.open(lock, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > give_up_at:
                        raise StorageError("The storage folder is locked by a process that does not let go.") from None
                    time.sleep(LOCK_PAUSE_SECONDS)
            yield

    def _make_own_folder(self, folder: Path) -> None:
        # The root by itself: whatever is made as a parent is open to all whom the umask lets in.
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


def _pieces(file: BinaryIO, size: int, given_up: threading.Event) -> Iterator[bytes]:
    """Yield what a file holds; raise `FileUnreadable` when it is no longer wanted."""
    for start in range(0, max(size, 1), PIECE_BYTES):
        if given_up.is_set():
            raise FileUnreadable("The file is not wanted any more.")
        yield read_piece(file, min(PIECE_BYTES, size - start), is_last=start + PIECE_BYTES >= size)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors(done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"The storage folder cannot be {done}: {error.strerror}.") from error

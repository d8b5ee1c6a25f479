"""Object storage in a directory."""

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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from ccrun.blobs import Blob, BlobInfo, check_name, read_piece, run_in_thread
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, FileUnreadable, StorageError

#: Seconds for which a lock is awaited. It is held for microseconds.
LOCK_SECONDS: Final = 10.0
#: Seconds between two attempts to get a lock.
LOCK_POLL_SECONDS: Final = 0.005
#: Lock files. Names that share one wait for each other.
LOCK_FILES: Final = 64
#: Bytes of a file that are copied in one step.
PIECE_BYTES: Final = 1024 * 1024
#: The content of a hole in a sparse file, which must not take space in the copy.
_ZEROS: Final = bytes(PIECE_BYTES)


class DirectoryBlobs:
    """Objects as files in a directory, for any number of concurrent processes.

    The modification time of a file, set to a number that only grows, is its generation. A new object is created by `link(2)`,
    which fails when the name exists; a changed one is replaced by `rename(2)` under a lock that the kernel releases when its
    holder exits.
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
        return await run_in_thread(lambda: self._create(name, pieces), give_up=given_up.set)

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        return await asyncio.to_thread(self._replace, check_name(name), content, generation)

    async def delete(self, name: str) -> None:
        await asyncio.to_thread(self._delete, check_name(name))

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        return await asyncio.to_thread(self._entries, prefix, after, before, limit)

    def url(self, name: str) -> str:
        folder = "/" if name.endswith("/") else ""
        return (self._root.absolute() / name).as_uri() + folder

    async def check(self) -> None:
        await asyncio.to_thread(self._check)

    # All methods below run in a thread.

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
            _sync_directory(target.parent)
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
                _sync_directory(target.parent)
                return new_generation

    def _delete(self, name: str) -> None:
        # Under the lock, so that a concurrent replacement does not create the object again.
        with _storage_errors("written"), self._locked(name), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (self._root / name).unlink()

    def _entries(self, prefix: str, after: str, before: str | None, limit: int) -> list[BlobInfo]:
        folder = prefix.rpartition("/")[0]
        if folder:
            check_name(folder)
        entries: list[BlobInfo] = []
        with _storage_errors("read"):
            for entry in self._walk(folder, prefix, after, before):
                entries.append(entry)
                if len(entries) == limit:
                    break
        return entries

    def _walk(self, folder: str, prefix: str, after: str, before: str | None) -> Iterator[BlobInfo]:
        """Yield the files in the order of their names, without entering directories that have none of them."""
        base = f"{folder}/" if folder else ""
        try:
            with os.scandir(self._root / folder) as found:
                # With its slash, the name of a directory sorts where the names of its files do.
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
                    yield BlobInfo(name=name, generation=status.st_mtime_ns, updated=updated)

    def _check(self) -> None:
        with _storage_errors("written"), self._written(b"", time.time_ns()):
            pass

    @contextlib.contextmanager
    def _written(self, content: bytes | Iterable[bytes | bytearray], generation: int) -> Iterator[tuple[Path, int]]:
        """Write a temporary file and sync it to the disk. It is removed at the end unless it was renamed."""
        self._make_own_folder(self._scratch)
        scratch = self._scratch / secrets.token_hex(16)
        try:
            with os.fdopen(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                for piece in [content] if isinstance(content, bytes) else content:
                    if piece == _ZEROS:
                        # A hole stays a hole.
                        file.seek(len(piece), os.SEEK_CUR)
                    else:
                        file.write(piece)
                # The file may end in a hole. This flushes too.
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
                        raise StorageError(
                            "The storage directory is locked by a process that does not release it."
                        ) from None
                    time.sleep(LOCK_POLL_SECONDS)
            yield

    def _make_own_folder(self, folder: Path) -> None:
        # The root separately: parents are created with the permissions of the umask.
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


def _pieces(file: BinaryIO, size: int, given_up: threading.Event) -> Iterator[bytes]:
    """Yield the content of a file. Raise `FileUnreadable` when the call was cancelled."""
    for start in range(0, max(size, 1), PIECE_BYTES):
        if given_up.is_set():
            raise FileUnreadable("The upload was cancelled.")
        yield read_piece(file, min(PIECE_BYTES, size - start), is_last=start + PIECE_BYTES >= size)


def _sync_directory(folder: Path) -> None:
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
        raise StorageError(f"The storage directory cannot be {done}: {error.strerror}.") from error

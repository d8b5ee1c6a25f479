"""Object storage in a local directory, one file for each object."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import fcntl
import os
import secrets
import shutil
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from ccrun.blobs import Blob, BlobInfo, check_name, read_part, run_in_thread
from ccrun.errors import BlobChanged, BlobExists, BlobNotFound, FileUnreadable, StorageError

#: Seconds. A lock is normally held for one file operation, so a longer wait means a broken disk or a stopped process.
OBJECT_LOCK_SECONDS: Final = 10.0
#: Seconds between two attempts to get a lock.
OBJECT_LOCK_POLL_SECONDS: Final = 0.005
#: Objects share this many lock files. Two objects with the same lock file only wait for each other.
LOCK_FILES: Final = 64
#: Bytes. With less free space, the storage is not ready: records and logs of running tasks must still fit.
MIN_FREE_BYTES: Final = 64 * 1024 * 1024
#: Seconds after its last change at which a temporary file belongs to no write. A write that has stopped for longer fails.
SCRATCH_SECONDS: Final = 60.0
#: How much of a file is copied at a time.
COPY_BYTES: Final = 1024 * 1024
#: Parts with this content become holes. Otherwise a sparse file, which may look huge, would fill the disk when copied.
_ZEROS: Final = bytes(COPY_BYTES)


class DirectoryBlobs:
    """Object storage in a local directory. Any number of processes can use the same directory concurrently.

    An object's generation is the modification time of its file in nanoseconds, which each write sets to a higher value.
    A new object is published with `link(2)`, which fails if the name exists. A changed object is published with
    `rename(2)`, under a lock that the kernel releases when the process exits.

    Args:
        root: The directory. It is created on the first write.
        min_free_bytes: See `MIN_FREE_BYTES`.
    """

    def __init__(self, root: Path, *, min_free_bytes: int = MIN_FREE_BYTES) -> None:
        self._root = root
        self._min_free_bytes = min_free_bytes
        self._scratch = root / ".scratch"
        self._locks = root / ".locks"

    async def read(self, name: str) -> Blob:
        return await asyncio.to_thread(self._read, check_name(name))

    async def create(self, name: str, content: bytes | Sequence[bytes | bytearray]) -> int:
        return await asyncio.to_thread(self._create, check_name(name), content)

    async def create_from(self, name: str, file: BinaryIO, *, size: int) -> int:
        check_name(name)
        cancelled = threading.Event()
        parts = _file_parts(file, size, cancelled)
        return await run_in_thread(lambda: self._create(name, parts), on_cancel=cancelled.set)

    async def replace(self, name: str, content: bytes, *, generation: int) -> int:
        return await asyncio.to_thread(self._replace, check_name(name), content, generation)

    async def delete(self, name: str, *, generation: int | None = None) -> None:
        await asyncio.to_thread(self._delete, check_name(name), generation)

    async def entries(self, prefix: str, *, after: str = "", before: str | None = None, limit: int) -> list[BlobInfo]:
        return await asyncio.to_thread(self._entries, prefix, after, before, limit)

    def url(self, name: str) -> str:
        slash = "/" if name.endswith("/") else ""
        return (self._root.absolute() / name).as_uri() + slash

    async def check(self) -> None:
        await asyncio.to_thread(self._check)

    async def remove_interrupted_writes(self) -> None:
        await asyncio.to_thread(self._remove_old_scratch_files)

    # The methods below block and run in a thread.

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
        with _storage_errors("written"), self._scratch_file(content, time.time_ns()) as (scratch, generation):
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
            with self._scratch_file(content, max(time.time_ns(), generation + 1)) as (scratch, new_generation):
                scratch.rename(target)
                _sync_directory(target.parent)
                return new_generation

    def _delete(self, name: str, generation: int | None) -> None:
        target = self._root / name
        # Without the lock, a concurrent `_replace` could recreate the object.
        with _storage_errors("written"), self._locked(name), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if generation in (None, target.stat().st_mtime_ns):
                target.unlink()

    def _entries(self, prefix: str, after: str, before: str | None, limit: int) -> list[BlobInfo]:
        directory = prefix.rpartition("/")[0]
        if directory:
            check_name(directory)
        entries: list[BlobInfo] = []
        with _storage_errors("read"):
            for entry in self._walk(directory, prefix, after, before):
                entries.append(entry)
                if len(entries) == limit:
                    break
        return entries

    def _walk(self, directory: str, prefix: str, after: str, before: str | None) -> Iterator[BlobInfo]:
        """Yield the matching files of a directory tree, sorted by name. Skip directories that cannot contain any."""
        base = f"{directory}/" if directory else ""
        try:
            with os.scandir(self._root / directory) as found:
                # With its slash, a directory's name sorts to the same position as the names of its files.
                names = sorted(
                    base + item.name + ("/" if item.is_dir(follow_symlinks=False) else "")
                    for item in found
                    if directory or not item.name.startswith(".")
                )
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in names:
            if before is not None and name >= before:
                return
            if name.endswith("/"):
                may_match = name.startswith(prefix) or prefix.startswith(name)
                if may_match and (name > after or after.startswith(name)):
                    yield from self._walk(name[:-1], prefix, after, before)
            elif name.startswith(prefix) and name > after:
                with contextlib.suppress(FileNotFoundError):
                    status = (self._root / name).stat(follow_symlinks=False)
                    updated = dt.datetime.fromtimestamp(status.st_mtime, dt.UTC)
                    yield BlobInfo(name=name, generation=status.st_mtime_ns, updated=updated, size=status.st_size)

    def _check(self) -> None:
        with _storage_errors("written"), self._scratch_file(b"", time.time_ns()):
            free = shutil.disk_usage(self._root).free
        if free < self._min_free_bytes:
            raise StorageError(
                f"The storage directory has less than {self._min_free_bytes // 1024**2} MiB of free space."
            )

    def _remove_old_scratch_files(self) -> None:
        oldest = time.time() - SCRATCH_SECONDS
        with _storage_errors("read"), contextlib.suppress(FileNotFoundError):
            for path in self._scratch.iterdir():
                # Another process may remove the file first.
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < oldest:
                        path.unlink()

    @contextlib.contextmanager
    def _scratch_file(
        self, content: bytes | Iterable[bytes | bytearray], generation: int
    ) -> Iterator[tuple[Path, int]]:
        """Write and sync a temporary file, yield its path and generation, and remove it on exit unless it was renamed."""
        self._make_internal_directory(self._scratch)
        scratch = self._scratch / secrets.token_hex(16)
        try:
            with os.fdopen(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                for part in [content] if isinstance(content, bytes) else content:
                    if part == _ZEROS:
                        file.seek(len(part), os.SEEK_CUR)
                    else:
                        file.write(part)
                # Sets the size when the file ends in a hole. Also flushes the buffer.
                file.truncate()
                os.fsync(file.fileno())
                os.utime(file.fileno(), ns=(generation, generation))
                yield scratch, os.fstat(file.fileno()).st_mtime_ns
        finally:
            scratch.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        self._make_internal_directory(self._locks)
        lock = self._locks / str(zlib.crc32(name.encode()) % LOCK_FILES)
        deadline = time.monotonic() + OBJECT_LOCK_SECONDS
        with os.fdopen(os.open(lock, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StorageError(
                            f"Another process has locked the storage directory for over {OBJECT_LOCK_SECONDS:.0f} s."
                        ) from None
                    time.sleep(OBJECT_LOCK_POLL_SECONDS)
            yield

    def _make_internal_directory(self, directory: Path) -> None:
        # Two calls, because `mkdir(parents=True)` ignores the mode for the parents.
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)


def _file_parts(file: BinaryIO, size: int, cancelled: threading.Event) -> Iterator[bytes]:
    """Yield the content of a file in parts; raise `FileUnreadable` after the event is set."""
    for start in range(0, max(size, 1), COPY_BYTES):
        if cancelled.is_set():
            raise FileUnreadable("The upload was cancelled.")
        yield read_part(file, min(COPY_BYTES, size - start), is_last=start + COPY_BYTES >= size)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors(operation: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"The storage directory cannot be {operation}: {error.strerror}.") from error

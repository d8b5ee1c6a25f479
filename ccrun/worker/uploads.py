"""Uploading the files of the workspace that a request names.

The workspace is hostile. So each file is opened from a descriptor of the workspace, name by name and never through a link; the
file that is read is the one that was checked; and an error of one file does not affect the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import stat
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import attrs

from ccrun.blobs import MAX_NAME_BYTES, check_name, run_in_thread
from ccrun.errors import BlobExists, FileUnreadable, StorageError
from ccrun.globs import BadPattern, Globs, Reach
from ccrun.names import upload_name
from ccrun.results import UploadedFile
from ccrun.store import Store
from ccrun.task import TaskId, UploadAction

#: Files. The record and the callback have the list of them, about a megabyte.
MAX_FILES: Final = 5000
#: Errors that are reported.
MAX_UPLOAD_ERRORS: Final = 20
#: Files and directories that are searched.
MAX_ENTRIES: Final = 1_000_000
#: Seconds of a search, against hostile patterns and trees. A million ordinary files take a tenth of it.
SEARCH_SECONDS: Final = 60.0
#: Concurrent uploads. Each may use some 16 MiB of memory.
PARALLEL_UPLOADS: Final = 4
#: Consecutive files that the storage rejects, each after all of its retries. Then the others are skipped.
MAX_FAILURES: Final = 4
#: Characters of a path in an error.
MAX_PATH_CHARS: Final = 200

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Does not wait for the writer of a FIFO.
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
#: The errors when another kind of file has replaced the one that was found.
_CHANGED: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ESTALE})
#: Never uploaded, in any form that a file system treats as equal.
_GIT: Final = ".git"

#: The device and inode of a file, which may have several names.
FileId = tuple[int, int]


@attrs.frozen(kw_only=True)
class Uploads:
    """The files that were uploaded, and an error for each of the others."""

    files: tuple[UploadedFile, ...] = ()
    errors: tuple[str, ...] = ()


async def upload_files(
    store: Store, task_id: TaskId, root: Path, action: UploadAction, *, never: Collection[str] = ()
) -> Uploads:
    """Upload the files that a request names. All errors are in the result.

    Args:
        root: The directory that the patterns are relative to.
        action: The patterns, and the prefix of the uploads.
        never: Paths in that directory that are never uploaded, since the worker has written them.
    """
    errors = _Errors()
    prefix = "".join(f"{part}/" for part in action.gcs_prefix.split("/") if part not in ("", "."))
    try:
        check_name(upload_name(task_id, f"{prefix}x"))
        globs = await asyncio.to_thread(Globs, action.glob_patterns)
    except BadPattern as error:
        return Uploads(errors=(f"globPatterns {error.message}.",))
    except ValueError:
        return Uploads(errors=("gcsPrefix cannot be a part of an object's name.",))
    given_up = threading.Event()
    with contextlib.ExitStack() as opened:
        try:
            tree = await run_in_thread(lambda: _Tree(root, opened))
        except OSError as error:
            return Uploads(errors=(f"The workspace {_reason(error)}",))
        search = _Search(tree, lambda path: upload_name(task_id, prefix + path), frozenset(never), errors, given_up)
        found = await run_in_thread(lambda: search.find(globs.root), on_cancel=given_up.set)
        if not found.paths and not errors.number:
            errors.add("No file matches globPatterns.")
        callbacks = _Uploader(store, task_id, prefix, tree, found.links, errors)
        files = await callbacks.deliver(found.paths)
    return Uploads(files=tuple(files), errors=errors.messages())


class _Errors:
    """A list of errors with a maximum length."""

    def __init__(self) -> None:
        self.number = 0
        self._first: list[str] = []

    def add(self, sentence: str) -> None:
        self.number += 1
        if self.number <= MAX_UPLOAD_ERRORS:
            self._first.append(sentence)

    def add_file(self, path: str, reason: str) -> None:
        self.add(f"{printable(path)}: {reason}")

    def messages(self) -> tuple[str, ...]:
        more = self.number - len(self._first)
        return (*self._first, f"And {more} more.") if more else tuple(self._first)


def printable(path: str) -> str:
    """Return a path for an error message, with escapes for what cannot be printed."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    plain = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return plain if len(plain) <= MAX_PATH_CHARS else plain[:MAX_PATH_CHARS] + "…"


def _reason(error: OSError) -> str:
    if error.errno in _CHANGED:
        return "changed before it could be read."
    return f"cannot be read: {error.strerror}."


# --- the tree; all of it blocks --------------------------------------------------------------------------------------


class _Skipped(Exception):
    """A file is skipped; the message has the reason."""


class _Tree:
    """The workspace, by a descriptor. Its files are opened name by name, so that no link leads out of it."""

    def __init__(self, root: Path, opened: contextlib.ExitStack) -> None:
        self._root = os.open(root, _FOLDER)
        opened.callback(os.close, self._root)

    @contextlib.contextmanager
    def folder(self, path: str) -> Iterator[int]:
        """Open a directory of the workspace, with one descriptor at a time at any depth."""
        folder = os.dup(self._root)
        try:
            for name in path.split("/") if path else ():
                inner = os.open(name, _FOLDER, dir_fd=folder)
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)

    def open(self, path: str, links: Mapping[FileId, int], opened: contextlib.ExitStack) -> tuple[BinaryIO, int]:
        """Open a file of the workspace, and return it with its size.

        Args:
            path: The path in the workspace.
            links: For files with several hard links, how many are in the workspace.
            opened: Closes the file.
        """
        folder, _, name = path.rpartition("/")
        with self.folder(folder) as above:
            descriptor = os.open(name, _FILE, dir_fd=above)
        try:
            status = os.fstat(descriptor)
            _check_file(status, links)
            file = os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
        opened.enter_context(file)
        return file, status.st_size


def _check_file(status: os.stat_result, links: Mapping[FileId, int]) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _Skipped("changed before it could be read.")
    # A hard link to a file can be made without the right to read it.
    if status.st_nlink > 1 and links.get(_file_id(status)) != status.st_nlink:
        raise _Skipped("has a further name (hard link) outside the workspace, or in .git.")


def _file_id(status: os.stat_result) -> FileId:
    return status.st_dev, status.st_ino


@attrs.frozen(kw_only=True)
class _Found:
    """The result of a search: files in the order of their paths, and the number of hard links of those with several."""

    paths: tuple[str, ...]
    links: Mapping[FileId, int]


@attrs.frozen
class _Pending:
    """A directory with the state of the patterns, or a file with its status, that is still to be searched."""

    path: str
    folder: Reach | None = None
    file: os.stat_result | None = None


class _Search:
    """Searches files that match patterns."""

    def __init__(
        self,
        tree: _Tree,
        name: Callable[[str], str],
        never: frozenset[str],
        errors: _Errors,
        given_up: threading.Event,
    ) -> None:
        self._tree = tree
        #: Returns the object name of a path.
        self._name = name
        self._never = never
        self._errors = errors
        self._given_up = given_up
        self._give_up_at = 0.0

    def find(self, reach: Reach | None) -> _Found:
        """Return the files that match, at most as many as may be uploaded."""
        paths: list[str] = []
        linked: set[FileId] = set()
        more = 0
        for path, status in self._files(reach, self._errors):
            if not self._is_name(path):
                self._errors.add_file(
                    path,
                    "cannot be an object's name: it is too long, or has a control character, a backslash or no UTF-8.",
                )
            elif len(paths) == MAX_FILES:
                more += 1
            else:
                paths.append(path)
                if status.st_nlink > 1:
                    linked.add(_file_id(status))
        if more:
            self._errors.add(f"{more} more files match: at most {MAX_FILES} are uploaded.")
        return _Found(paths=tuple(paths), links=self._count_names(linked))

    def _count_names(self, files: set[FileId]) -> Mapping[FileId, int]:
        """Return how many hard links in the workspace these files have."""
        names: Counter[FileId] = Counter()
        if files:
            for _, status in self._files(Globs(["**"]).root, _Errors()):
                if _file_id(status) in files:
                    names[_file_id(status)] += 1
        return names

    def _files(self, reach: Reach | None, errors: _Errors) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the files that match in the order of their paths. Without recursion, since a tree may be deep."""
        pending = [_Pending("", folder=reach)]
        self._give_up_at = time.monotonic() + SEARCH_SECONDS
        seen = 0
        while pending:
            entry = pending.pop()
            if entry.file is not None:
                yield entry.path, entry.file
            elif entry.folder is not None:
                number, found = self._search_directory(entry.path, entry.folder, errors)
                pending += reversed(found)
                seen += number
                if seen > MAX_ENTRIES or self._is_over():
                    errors.add("The workspace has too many files: the search was stopped before its end.")
                    # The files that were found are uploaded.
                    pending = [each for each in pending if each.file is not None]

    def _is_over(self) -> bool:
        return self._given_up.is_set() or time.monotonic() > self._give_up_at

    def _search_directory(self, path: str, reach: Reach, errors: _Errors) -> tuple[int, list[_Pending]]:
        """Search a directory. Return the number of its entries, and those that match or may contain matches."""
        found: list[_Pending] = []
        try:
            with self._tree.folder(path) as folder, os.scandir(folder) as scanned:
                # With its slash, the name of a directory sorts where the paths of its files do.
                inside = sorted(
                    itertools.islice(scanned, MAX_ENTRIES),
                    key=lambda each: each.name + "/" * each.is_dir(follow_symlinks=False),
                )
                for each in itertools.takewhile(lambda _: not self._is_over(), inside):
                    below = f"{path}/{each.name}" if path else each.name
                    entry = self._entry(folder, each, below, reach, errors)
                    if entry is not None:
                        found.append(entry)
                return len(inside) + 1, found
        except OSError as error:
            errors.add_file(path or ".", _reason(error))
            return 1, found

    def _entry(self, folder: int, each: os.DirEntry[str], path: str, reach: Reach, errors: _Errors) -> _Pending | None:
        """Return an entry of a directory if it must be searched further."""
        if each.name.casefold() == _GIT or path in self._never:
            if reach.names(each.name):
                errors.add_file(path, "is never uploaded.")
        elif each.is_dir(follow_symlinks=False):
            inner = reach.enter(each.name)
            if inner is not None and len(os.fsencode(self._name(path))) + len("/x") > MAX_NAME_BYTES:
                errors.add_file(path, f"lies too deep: no object's name is longer than {MAX_NAME_BYTES} bytes.")
            elif inner is not None:
                return _Pending(path, folder=inner)
        elif each.is_file(follow_symlinks=False):
            if reach.takes(each.name):
                with contextlib.suppress(FileNotFoundError):
                    return _Pending(path, file=os.stat(each.name, dir_fd=folder, follow_symlinks=False))
        elif reach.names(each.name):
            errors.add_file(path, "is a link: links are not followed." if each.is_symlink() else "is no file.")
        return None

    def _is_name(self, path: str) -> bool:
        try:
            check_name(self._name(path))
        except ValueError:
            return False
        return True


# --- uploading -----------------------------------------------------------------------------------------------------------


class _Uploader:
    """Uploads files, some of them concurrently."""

    def __init__(
        self,
        store: Store,
        task_id: TaskId,
        prefix: str,
        tree: _Tree,
        links: Mapping[FileId, int],
        errors: _Errors,
    ) -> None:
        self._store = store
        self._task_id = task_id
        self._prefix = prefix
        self._tree = tree
        self._links = links
        self._errors = errors
        self._files: list[UploadedFile] = []
        #: The files that were not uploaded, and why.
        self._left: list[tuple[str, str]] = []
        #: Consecutive failures.
        self._failures = 0

    async def deliver(self, paths: Sequence[str]) -> list[UploadedFile]:
        """Upload files, and return those that were uploaded, in order."""
        waiting = deque(paths)
        async with asyncio.TaskGroup() as group:
            for _ in range(PARALLEL_UPLOADS):
                group.create_task(self._deliver_some(waiting))
        for path, reason in sorted(self._left):
            self._errors.add_file(path, reason)
        if waiting:
            self._errors.add(f"The storage rejects all files: {len(waiting)} more were skipped.")
        return sorted(self._files, key=lambda file: file.original_path)

    async def _deliver_some(self, waiting: deque[str]) -> None:
        while waiting and self._failures < MAX_FAILURES:
            path = waiting.popleft()
            try:
                self._files.append(await self._deliver(path))
                self._failures = 0
            except _Skipped as left:
                self._left.append((path, str(left)))
            except OSError as error:
                self._left.append((path, _reason(error)))
            except BlobExists:
                self._left.append((path, "there is an upload of that name already."))
            except FileUnreadable as error:
                self._left.append((path, error.message))
            except StorageError as error:
                self._failures += 1
                self._left.append((path, error.message))

    async def _deliver(self, path: str) -> UploadedFile:
        with contextlib.ExitStack() as opened:
            file, size = await run_in_thread(lambda: self._tree.open(path, self._links, opened))
            url = await self._store.add_upload(self._task_id, self._prefix + path, file, size=size)
        return UploadedFile(original_path=path, gcs_path=url, size_bytes=size)

"""The search for the files of the workspace that match the patterns of a request. Blocks; use it in a thread.

The workspace is hostile. So each file is opened relative to a descriptor of the workspace, one directory after another and never
through a symbolic link; the file that is read is the one that was checked; an error with one file does not affect the others.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import attrs

from ccrun.blobs import MAX_NAME_BYTES, check_name
from ccrun.globs import Globs, Matcher

#: Uploaded files. The record and the callback list them, in about a megabyte.
MAX_FILES: Final = 5000
#: Errors in the record and the callback; the others are counted.
MAX_UPLOAD_ERRORS: Final = 20
#: Files and directories that a search visits.
MAX_ENTRIES: Final = 1_000_000
#: Seconds of a search, against hostile patterns and trees. A million ordinary files take a tenth of that.
SEARCH_SECONDS: Final = 60.0
#: Characters of a path in an error message.
MAX_PATH_CHARS: Final = 200
#: The flags that open a directory.
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: The flags that open a file, without waiting for the writer of a FIFO.
_FILE_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
#: The errors when the file that was found has been deleted or replaced by another kind of file.
_CHANGED: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ESTALE})
#: Never uploaded, in lower or upper case, since some file systems ignore case.
_GIT: Final = ".git"

#: The device and inode of a file, which may have several hard links.
FileId = tuple[int, int]


class UploadErrors:
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


def reason_of(error: OSError) -> str:
    """Return why a file could not be read, as the end of a sentence."""
    if error.errno in _CHANGED:
        return "changed before it could be read."
    return f"cannot be read: {error.strerror}."


class Skipped(Exception):
    """A file is skipped; the message has the reason."""


class Tree:
    """The workspace, as an open directory. Paths are opened one directory after another, so that no link leads out of it."""

    def __init__(self, root: Path, stack: contextlib.ExitStack) -> None:
        self._root = os.open(root, _DIRECTORY_FLAGS)
        stack.callback(os.close, self._root)

    @contextlib.contextmanager
    def directory(self, path: str) -> Iterator[int]:
        """Yield a descriptor of a directory of the workspace. At any depth, this needs two descriptors at most."""
        directory = os.dup(self._root)
        try:
            for name in path.split("/") if path else ():
                inner = os.open(name, _DIRECTORY_FLAGS, dir_fd=directory)
                os.close(directory)
                directory = inner
            yield directory
        finally:
            os.close(directory)

    def open(self, path: str, links: Mapping[FileId, int], stack: contextlib.ExitStack) -> tuple[BinaryIO, int]:
        """Open a file of the workspace, and return it with its size.

        Args:
            path: The path in the workspace.
            links: How many hard links in the workspace a file has, for files with several of them.
            stack: Closes the file.
        """
        parent, _, name = path.rpartition("/")
        with self.directory(parent) as directory:
            descriptor = os.open(name, _FILE_FLAGS, dir_fd=directory)
        try:
            status = os.fstat(descriptor)
            _check_file(status, links)
            file = os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
        stack.enter_context(file)
        return file, status.st_size


def _check_file(status: os.stat_result, links: Mapping[FileId, int]) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Skipped("changed before it could be read.")
    # The agent can create a hard link to a file that it has no permission to read.
    if status.st_nlink > 1 and links.get(_file_id(status)) != status.st_nlink:
        raise Skipped("has another hard link outside the workspace or in .git.")


def _file_id(status: os.stat_result) -> FileId:
    return status.st_dev, status.st_ino


@attrs.frozen(kw_only=True)
class Found:
    """The result of a search: the paths in order, and the number of hard links of the files that have several."""

    paths: tuple[str, ...]
    links: Mapping[FileId, int]


@attrs.frozen
class _Pending:
    """A directory that is still to be searched, with its matcher; or a file that matches, with its status."""

    path: str
    matcher: Matcher | None = None
    file: os.stat_result | None = None


class Search:
    """Searches the workspace for files that match."""

    def __init__(
        self,
        tree: Tree,
        object_name: Callable[[str], str],
        excluded: frozenset[str],
        errors: UploadErrors,
        cancelled: threading.Event,
    ) -> None:
        self._tree = tree
        self._object_name = object_name
        self._excluded = excluded
        self._errors = errors
        self._cancelled = cancelled
        self._deadline = 0.0

    def find(self, matcher: Matcher | None) -> Found:
        """Return the files that match, at most `MAX_FILES`."""
        paths: list[str] = []
        linked: set[FileId] = set()
        more = 0
        for path, status in self._files(matcher, self._errors):
            if not self._has_valid_name(path):
                self._errors.add_file(
                    path,
                    "is not a valid object name: it is too long, not UTF-8, or contains a control character or a backslash.",
                )
            elif len(paths) == MAX_FILES:
                more += 1
            else:
                paths.append(path)
                if status.st_nlink > 1:
                    linked.add(_file_id(status))
        if more:
            self._errors.add(f"{more} more files match: at most {MAX_FILES} are uploaded.")
        return Found(paths=tuple(paths), links=self._count_links(linked))

    def _count_links(self, files: set[FileId]) -> Mapping[FileId, int]:
        """Return how many hard links in the workspace each of these files has."""
        links: Counter[FileId] = Counter()
        if files:
            for _, status in self._files(Globs(["**"]).root, UploadErrors()):
                if _file_id(status) in files:
                    links[_file_id(status)] += 1
        return links

    def _files(self, matcher: Matcher | None, errors: UploadErrors) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the files that match, in the order of their paths."""
        # Not recursive, since a tree may be deep.
        pending = [_Pending("", matcher=matcher)]
        self._deadline = time.monotonic() + SEARCH_SECONDS
        visited = 0
        while pending:
            entry = pending.pop()
            if entry.file is not None:
                yield entry.path, entry.file
            elif entry.matcher is not None:
                number, found = self._search_directory(entry.path, entry.matcher, errors)
                pending += reversed(found)
                visited += number
                if visited > MAX_ENTRIES or self._must_stop():
                    errors.add("The workspace has too many files: the search was stopped early.")
                    # What was found until now is uploaded.
                    pending = [each for each in pending if each.file is not None]

    def _must_stop(self) -> bool:
        return self._cancelled.is_set() or time.monotonic() > self._deadline

    def _search_directory(self, path: str, matcher: Matcher, errors: UploadErrors) -> tuple[int, list[_Pending]]:
        """Return the number of entries of a directory, and those entries that match or may contain matches."""
        found: list[_Pending] = []
        try:
            with self._tree.directory(path) as directory, os.scandir(directory) as scanned:
                # A slash makes the name of a directory sort as the paths of its files do.
                entries = sorted(
                    itertools.islice(scanned, MAX_ENTRIES),
                    key=lambda each: each.name + "/" * each.is_dir(follow_symlinks=False),
                )
                for entry in itertools.takewhile(lambda _: not self._must_stop(), entries):
                    inner = f"{path}/{entry.name}" if path else entry.name
                    if (pending := self._pending(directory, entry, inner, matcher, errors)) is not None:
                        found.append(pending)
                return len(entries) + 1, found
        except OSError as error:
            errors.add_file(path or ".", reason_of(error))
            return 1, found

    def _pending(
        self, directory: int, entry: os.DirEntry[str], path: str, matcher: Matcher, errors: UploadErrors
    ) -> _Pending | None:
        """Return an entry if it matches or may contain matches. Add an error for one that is named and cannot be uploaded."""
        if entry.name.casefold() == _GIT or path in self._excluded:
            if matcher.names_entry(entry.name):
                errors.add_file(path, "is never uploaded.")
        elif entry.is_dir(follow_symlinks=False):
            inner = matcher.enter(entry.name)
            if inner is not None and len(os.fsencode(self._object_name(path))) + len("/x") > MAX_NAME_BYTES:
                errors.add_file(path, f"is nested too deeply: an object name has at most {MAX_NAME_BYTES} bytes.")
            elif inner is not None:
                return _Pending(path, matcher=inner)
        elif entry.is_file(follow_symlinks=False):
            if matcher.matches_file(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    return _Pending(path, file=os.stat(entry.name, dir_fd=directory, follow_symlinks=False))
        elif matcher.names_entry(entry.name):
            is_link = entry.is_symlink()
            errors.add_file(path, "is a link: links are not followed." if is_link else "is not a regular file.")
        return None

    def _has_valid_name(self, path: str) -> bool:
        try:
            check_name(self._object_name(path))
        except ValueError:
            return False
        return True

"""Uploads the files of the workspace that match the patterns of a request."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs

from ccrun.blobs import check_name, run_in_thread
from ccrun.errors import BlobExists, FileUnreadable, StorageError
from ccrun.globs import BadPattern, Globs
from ccrun.names import upload_name
from ccrun.results import UploadedFile
from ccrun.spec import UploadAction
from ccrun.store import Store
from ccrun.task import TaskId
from ccrun.worker.upload_search import FileId, Search, Skipped, Tree, UploadErrors, reason_of

#: Concurrent uploads. Each may use some 16 MiB of memory.
PARALLEL_UPLOADS: Final = 4
#: Consecutive files that the storage may reject, each after all retries, before the others are skipped.
MAX_FAILURES: Final = 4


@attrs.frozen(kw_only=True)
class Uploads:
    """The files that were uploaded, and an error for each of the others."""

    files: tuple[UploadedFile, ...] = ()
    errors: tuple[str, ...] = ()


async def upload_files(
    store: Store,
    task_id: TaskId,
    root: Path,
    action: UploadAction,
    *,
    max_bytes: int,
    excluded: Collection[str] = (),
    mask: Callable[[str], str] = lambda path: path,
) -> Uploads:
    """Upload the files that match the patterns. All errors are in the result.

    Args:
        root: The directory that the patterns are relative to.
        action: The patterns, and the prefix of the uploads.
        max_bytes: The bytes of all uploads together.
        excluded: Paths in that directory that are never uploaded, since the worker has written them.
        mask: Masks secrets in the path of a file, for the name of its object.
    """
    errors = UploadErrors()
    prefix = "".join(f"{part}/" for part in action.gcs_prefix.split("/") if part not in ("", "."))
    try:
        check_name(upload_name(task_id, f"{prefix}x"))
        globs = await asyncio.to_thread(Globs, action.glob_patterns)
    except BadPattern as error:
        return Uploads(errors=(f"globPatterns {error.message}.",))
    except ValueError:
        return Uploads(errors=("gcsPrefix is not valid in an object name.",))

    def name(path: str) -> str:
        return prefix + mask(path)

    cancelled = threading.Event()
    with contextlib.ExitStack() as stack:
        try:
            tree = await run_in_thread(lambda: Tree(root, stack))
        except OSError as error:
            return Uploads(errors=(f"The workspace {reason_of(error)}",))
        search = Search(tree, lambda path: upload_name(task_id, name(path)), frozenset(excluded), errors, cancelled)
        found = await run_in_thread(lambda: search.find(globs.root), on_cancel=cancelled.set)
        if not found.paths and not errors.number:
            errors.add("No file matches globPatterns.")
        uploader = _Uploader(store, task_id, name, tree, found.links, errors, max_bytes)
        files = await uploader.upload(found.paths)
    return Uploads(files=tuple(files), errors=errors.messages())


@attrs.define
class _Uploader:
    """Uploads files, some of them concurrently."""

    _store: Store
    _task_id: TaskId
    _name: Callable[[str], str]
    _tree: Tree
    _links: Mapping[FileId, int]
    _errors: UploadErrors
    _bytes_left: int
    _files: list[UploadedFile] = attrs.field(factory=list, init=False)
    #: The files that were not uploaded, and why.
    _skipped: list[tuple[str, str]] = attrs.field(factory=list, init=False)
    #: Consecutive failures.
    _failures: int = attrs.field(default=0, init=False)

    async def upload(self, paths: Sequence[str]) -> list[UploadedFile]:
        """Upload files, and return those that were uploaded, in order."""
        waiting = deque(paths)
        async with asyncio.TaskGroup() as group:
            for _ in range(PARALLEL_UPLOADS):
                group.create_task(self._upload_from(waiting))
        for path, reason in sorted(self._skipped):
            self._errors.add_file(path, reason)
        if waiting:
            self._errors.add(f"The storage rejected {MAX_FAILURES} files in a row: {len(waiting)} more were skipped.")
        return sorted(self._files, key=lambda file: file.original_path)

    async def _upload_from(self, waiting: deque[str]) -> None:
        while waiting and self._failures < MAX_FAILURES:
            path = waiting.popleft()
            try:
                self._files.append(await self._upload_file(path))
                self._failures = 0
            except Skipped as skipped:
                self._skipped.append((path, str(skipped)))
            except OSError as error:
                self._skipped.append((path, reason_of(error)))
            except BlobExists:
                self._skipped.append((path, "an upload with this name already exists."))
            except FileUnreadable as error:
                self._skipped.append((path, error.message))
            except StorageError as error:
                self._failures += 1
                self._skipped.append((path, error.message))

    async def _upload_file(self, path: str) -> UploadedFile:
        with contextlib.ExitStack() as stack:
            file, size = await run_in_thread(lambda: self._tree.open(path, self._links, stack))
            if size > self._bytes_left:
                raise Skipped(f"is too large: {size} bytes, where {self._bytes_left} are left of MAX_UPLOAD_BYTES.")
            self._bytes_left -= size
            url = await self._store.add_upload(self._task_id, self._name(path), file, size=size)
        return UploadedFile(original_path=path, gcs_path=url, size_bytes=size)

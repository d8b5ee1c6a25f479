"""Storing the agent's changes as patches when they would be lost with the workspace."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable
from typing import IO, Final

import attrs

from ccrun.errors import CcrunError
from ccrun.redaction import Redactor
from ccrun.results import UploadedFile
from ccrun.store import Store
from ccrun.task import TaskId
from ccrun.worker.git.changes import Changes
from ccrun.worker.git.checkout import Checkout
from ccrun.worker.git.places import Place
from ccrun.worker.lines import worker_line
from ccrun.worker.post_run_result import PostRunResult
from ccrun.worker.upload_search import printable
from ccrun.worker.workspace import private_directory

#: The path of the patch of the repository's work tree and last commit below the uploads of the task.
RESCUE_PATCH: Final = "rescue.patch"
#: The directory of the other patches.
RESCUE_DIRECTORY: Final = "rescue"
#: Characters of the name of such a patch, without its suffix. A file system limits a name to 255 bytes.
MAX_NAME_CHARS: Final = 100
#: What each file's part of a patch starts with, after the first.
_FILE_HEADER: Final = b"\ndiff --git "

#: Writes a patch of at most so many bytes into a file, and returns whether it is complete.
WritePatch = Callable[[IO[bytes], int], Awaitable[bool]]


@attrs.frozen(kw_only=True)
class Rescue:
    """Stores the changes of a task.

    Args:
        log_line: Adds a line to the log of the task.
        max_bytes: The size of a patch, and of all those of other places together.
        result: Gets the uploaded files and the errors.
    """

    store: Store
    task_id: TaskId
    checkout: Checkout
    redactor: Redactor
    log_line: Callable[[bytes | bytearray], Awaitable[None]]
    max_bytes: int
    result: PostRunResult

    async def run(self, pushed: Changes | None) -> None:
        """Upload all changes as patches, if there are any. Errors are recorded.

        Args:
            pushed: The changes of the work tree and the last commit, if they were pushed. They are not stored then.
        """
        with self.result.errors_recorded("rescue"):
            found = pushed
            if found is None:
                found = await self.checkout.changes()
                with self.result.errors_recorded("rescue"):
                    await self._store_work_tree(found)
            await self._store_places(found)

    async def _store_work_tree(self, found: Changes) -> None:
        staged = await found.stage()
        if not staged.is_empty or found.head != found.base:

            async def write(file: IO[bytes], max_bytes: int) -> bool:
                return await found.patch(file, old=found.base, max_bytes=max_bytes)

            await self._store(RESCUE_PATCH, "changes", write, self.max_bytes)

    async def _store_places(self, found: Changes) -> None:
        left, names = self.max_bytes, set[str]()
        async for place in self.checkout.other_places(found):
            if isinstance(place, str):
                self.result.fail("rescue", place)
                continue
            path = f"{RESCUE_DIRECTORY}/{_file_name(place, names, self.redactor)}"
            with self.result.errors_recorded("rescue"):

                async def write(file: IO[bytes], max_bytes: int, place: Place = place) -> bool:
                    return await place.patch(file, max_bytes=max_bytes)

                left -= await self._store(path, f"changes in {printable(str(place))}", write, left)

    async def _store(self, name: str, what: str, write: WritePatch, max_bytes: int) -> int:
        """Store one patch. Return its size in bytes.

        Raises:
            CcrunError: It cannot be stored.
        """
        async with private_directory(self.task_id) as directory:
            path = directory / RESCUE_PATCH
            with await asyncio.to_thread(path.open, "x+b") as file:
                is_complete = await write(file, max_bytes)
                size = await asyncio.to_thread(_finish_patch, file, self.redactor, is_complete=is_complete)
            if not size:
                if is_complete:
                    # Only files that must not be shown were changed.
                    return 0
                raise CcrunError(f"The {what} are lost: no file's patch fits into {max_bytes} bytes.")
            with await asyncio.to_thread(path.open, "rb") as file:
                url = await self.store.add_upload(self.task_id, name, file, size=size)
        uploaded = UploadedFile(original_path=name, gcs_path=url, size_bytes=size)
        self.result.uploaded = [*(self.result.uploaded or ()), uploaded]
        if not is_complete:
            self.result.fail("rescue", f"The patch of the {what} was cut at {max_bytes} bytes; the rest is lost.")
        await self.log_line(worker_line("rescue", content=f"The {what} are stored as {uploaded.gcs_path}."))
        return size


def _file_name(place: Place, taken: set[str], redactor: Redactor) -> str:
    """Return a new name for the patch of a place, with letters that are safe in any file system."""
    full = redactor.text("-".join(filter(None, (place.inside, place.kind, place.name))))
    stem = re.sub(r"[^A-Za-z0-9._]+", "-", full)[:MAX_NAME_CHARS].strip("-.")
    names = (
        f"{stem}{suffix}.patch" for suffix in itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    )
    name = next(name for name in names if name.lower() not in taken)
    taken.add(name.lower())
    return name


def _finish_patch(file: IO[bytes], redactor: Redactor, *, is_complete: bool) -> int:
    """Redact the secrets in a patch. Cut an incomplete one after its last complete file. Return its size in bytes."""
    file.seek(0)
    content = file.read()
    if not is_complete:
        content = content[: content.rfind(_FILE_HEADER) + 1]
    file.seek(0)
    file.truncate()
    return file.write(redactor.text(content.decode(errors="surrogateescape")).encode(errors="surrogateescape"))

"""Storing the agent's changes as patches when they would be lost with the workspace."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Final

import attrs

from ccrun.errors import CcrunError
from ccrun.results import UploadedFile
from ccrun.store import Store
from ccrun.task import TaskId
from ccrun.worker.git.changes import Changes
from ccrun.worker.git.checkout import Checkout
from ccrun.worker.lines import worker_line
from ccrun.worker.post_run_result import PostRunResult
from ccrun.worker.redaction import Redactor
from ccrun.worker.workspace import private_directory

#: The path of the patch below the uploads of the task.
RESCUE_PATCH: Final = "rescue.patch"
#: What each file's part of a patch starts with, after the first.
_FILE_HEADER: Final = b"\ndiff --git "


@attrs.frozen(kw_only=True)
class Rescue:
    """Stores the changes of a task.

    Args:
        log_line: Adds a line to the log of the task.
        max_bytes: The size of a patch.
        result: Gets the uploaded files and the errors.
    """

    store: Store
    task_id: TaskId
    checkout: Checkout
    redactor: Redactor
    log_line: Callable[[bytes | bytearray], Awaitable[None]]
    max_bytes: int
    result: PostRunResult

    async def run(self) -> None:
        """Upload all changes as a patch, if there are any. Errors are recorded."""
        with self.result.errors_recorded("rescue"):
            found = await self.checkout.changes()
            staged = await found.stage()
            if staged.is_empty and found.head == found.base:
                return
            async with private_directory(self.task_id) as directory:
                path = directory / RESCUE_PATCH
                is_complete = await self._write_patch(found, path)
                size = (await asyncio.to_thread(path.stat)).st_size
                if not size:
                    if is_complete:
                        # Only files that must not be shown were changed.
                        return
                    raise CcrunError(f"The changes are lost: no file's patch fits into {self.max_bytes} bytes.")
                with await asyncio.to_thread(path.open, "rb") as file:
                    url = await self.store.add_upload(self.task_id, RESCUE_PATCH, file, size=size)
            uploaded = UploadedFile(original_path=RESCUE_PATCH, gcs_path=url, size_bytes=size)
            self.result.uploaded = [*(self.result.uploaded or ()), uploaded]
            if not is_complete:
                self.result.fail(
                    "rescue", f"The patch of the changes was cut at {self.max_bytes} bytes; the rest is lost."
                )
            await self.log_line(worker_line("rescue", content=f"The changes are stored as {uploaded.gcs_path}."))

    async def _write_patch(self, found: Changes, path: Path) -> bool:
        """Write the patch, with secrets redacted. Return whether it is complete."""
        with await asyncio.to_thread(path.open, "x+b") as file:
            is_complete = await found.patch(file, max_bytes=self.max_bytes)
            await asyncio.to_thread(_finish_patch, file, self.redactor, is_complete=is_complete)
        return is_complete


def _finish_patch(file: IO[bytes], redactor: Redactor, *, is_complete: bool) -> None:
    """Redact the secrets in a patch. Cut an incomplete one after its last complete file."""
    file.seek(0)
    content = file.read()
    if not is_complete:
        content = content[: content.rfind(_FILE_HEADER) + 1]
    file.seek(0)
    file.truncate()
    file.write(redactor.text(content.decode(errors="surrogateescape")).encode(errors="surrogateescape"))

"""Uploads of files from a workspace."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import pytest

from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.spec import UploadAction
from ccrun.store import Store
from ccrun.task import TaskId
from ccrun.worker.dependencies import MAX_UPLOAD_BYTES
from ccrun.worker.uploads import Uploads, upload_files

TASK: Final = TaskId("a-task")


SECRET: Final = b"content outside the workspace"


class UploadSetup:
    """A workspace, a storage, and a directory outside the workspace with a secret file."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "repository"
        self.outside = directory / "outside"
        self.data = directory / "data"
        self.store = Store(DirectoryBlobs(self.data))
        self.root.mkdir()
        self.outside.mkdir()
        (self.outside / "secret").write_bytes(SECRET)

    def write(self, *paths: str) -> None:
        """Write files, each with its path as its content."""
        for path in paths:
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_bytes(os.fsencode(path))

    async def upload(self, *patterns: str, prefix: str = "", **options: Any) -> Uploads:
        """Upload the files that match these patterns, by default all."""
        action = UploadAction(glob_patterns=patterns or ("**",), gcs_prefix=prefix)
        return await upload_files(self.store, TASK, self.root, action, **{"max_bytes": MAX_UPLOAD_BYTES, **options})

    def objects(self) -> dict[str, bytes]:
        """Return the contents of all objects, by name."""
        return {
            str(path.relative_to(self.data)): path.read_bytes()
            for path in self.data.rglob("*")
            if path.is_file() and ".scratch" not in path.parts
        }


@pytest.fixture
def setup(tmp_path: Path) -> UploadSetup:
    """An empty workspace."""
    return UploadSetup(tmp_path)


def paths(result: Uploads) -> list[str]:
    """Return the paths of the uploaded files."""
    return [file.original_path for file in result.files]


def open_descriptors() -> int:
    """Return the number of open file descriptors of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())

"""Fixtures that start shell scripts as child processes."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers.process import Shell

from ccrun.process.child import spawn


@pytest.fixture
def marker() -> str:
    """Return a text that only the processes of this test have in their environment."""
    return uuid.uuid4().hex


@pytest.fixture
def shell(tmp_path: Path, marker: str) -> Iterator[Shell]:
    """Return a function that runs a shell script in `tmp_path`. Afterwards, kill the processes that ccrun did not stop."""

    def start(script: str, *, stdin: bytes = b"", grace: float = 0.2, env: dict[str, str] | None = None) -> object:
        environment = {"PATH": os.environ["PATH"], "FOR_TEST": marker, **(env or {})}
        return spawn(["bash", "-c", script], env=environment, cwd=tmp_path, stdin=stdin, term_grace_seconds=grace)

    yield start  # type: ignore[misc]
    for survivor in psutil.process_iter():
        try:
            if survivor.environ().get("FOR_TEST") == marker:
                survivor.kill()
        except psutil.Error:
            continue

"""A sandbox with the directory of a task, and programs that run in it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from ccrun.process.capture import ProcessResult, capture
from ccrun.process.confinement import Confinement
from ccrun.process.sandbox import Sandbox, find_sandbox
from helpers.service import WAIT_SECONDS

PATH = os.environ["PATH"]
#: A port in the sandbox.
PORT = 61234

#: Runs a shell script.
Run = Callable[..., Awaitable[ProcessResult]]


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """The directory of a task, beside one that must not be visible."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "secret").write_text("of another task")
    room = tmp_path / "room"
    room.mkdir()
    return room


@pytest.fixture
async def sandbox(room: Path) -> Confinement:
    """A sandbox with the directory, where bubblewrap works."""
    found = await asyncio.to_thread(
        lambda: find_sandbox(path=PATH, programs=[], hidden=[room.parent / "data"], user=None)
    )
    if not isinstance(found, Sandbox):
        pytest.skip(found)
    return Confinement(sandbox=found).within(room)


@pytest.fixture
def run(sandbox: Confinement, room: Path) -> Run:
    """Return a function that runs a shell script in the sandbox."""

    async def run(script: str, confinement: Confinement = sandbox) -> ProcessResult:
        return await capture(
            ["bash", "-c", script],
            env={"PATH": PATH},
            cwd=room,
            seconds=WAIT_SECONDS,
            confinement=confinement,
        )

    return run


@contextlib.asynccontextmanager
async def no_server(listener: socket.socket) -> AsyncIterator[None]:
    """Accept no connection."""
    with listener:
        yield

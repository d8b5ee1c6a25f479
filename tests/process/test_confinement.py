"""Servers that a program in a sandbox reaches, and a sandbox that does not start."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
from helpers.sandbox import PATH, PORT, Run, no_server, room, run, sandbox

from ccrun.errors import CcrunError
from ccrun.process.child import spawn
from ccrun.process.confinement import Confinement

__all__ = ["room", "run", "sandbox"]


async def test_servers_are_reached(run: Run, sandbox: Confinement) -> None:
    """A server that is given to the sandbox is reached on its port of loopback."""

    @contextlib.asynccontextmanager
    async def hello(listener: socket.socket) -> AsyncIterator[None]:
        def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello")
            writer.close()

        async with await asyncio.start_server(answer, sock=listener):
            yield

    served = attrs.evolve(sandbox, servers={PORT: hello, PORT + 1: hello})
    ran = await run(f"cat < /dev/tcp/127.0.0.1/{PORT}; cat < /dev/tcp/127.0.0.1/{PORT + 1}", served)
    assert b"hellohello" == ran.stdout, ran.stderr


async def test_sandbox_that_does_not_start_is_an_error(sandbox: Confinement, room: Path) -> None:
    """The error has the message of bubblewrap."""
    assert sandbox.sandbox is not None
    broken = attrs.evolve(
        sandbox,
        sandbox=attrs.evolve(sandbox.sandbox, readable=(room / "missing",)),
        servers={PORT: no_server},
    )
    with pytest.raises(CcrunError, match=r"^The sandbox could not be started\. bwrap: .*missing"):
        async with spawn(["true"], env={"PATH": PATH}, cwd=room, confinement=broken):
            pass

"""The first program in a sandbox, which becomes another one."""

from __future__ import annotations

from pathlib import Path

import attrs
from helpers.sandbox import PATH, PORT, no_server, room, sandbox
from helpers.service import WAIT_SECONDS

from ccrun.process.child import spawn
from ccrun.process.confinement import Confinement

__all__ = ["room", "sandbox"]


async def test_program_can_finish_after_sigterm(sandbox: Confinement, room: Path) -> None:
    """A program that handles SIGTERM has the grace period, though bubblewrap ends at it."""
    script = "trap 'echo finished > done; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    async with spawn(
        ["bash", "-c", script],
        env={"PATH": PATH},
        cwd=room,
        confinement=attrs.evolve(sandbox, servers={PORT: no_server}),
        term_grace_seconds=WAIT_SECONDS,
    ) as child:
        async for _ in child.lines():
            child.terminate()
        assert (await child.wait()).ok
    assert (room / "done").exists()

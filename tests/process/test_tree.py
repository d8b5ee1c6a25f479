from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from helpers.process import ON_LINUX, is_alive, pid_in

from ccrun.process import tree
from ccrun.process.tree import kill_marked


@ON_LINUX
async def test_only_marked_processes_and_descendants_are_killed(tmp_path: Path, marker: str) -> None:
    """`kill_marked` kills the processes with exactly this marker, and their descendants without one."""

    def start(task_id: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        environment = {"PATH": os.environ["PATH"], tree.MARKER_VARIABLE: task_id}
        return subprocess.Popen(argv, env=environment, cwd=tmp_path, start_new_session=True)

    with start(marker, ["bash", "-c", "env -i setsid sleep 1000 & echo $! > pid; wait"]) as marked:
        with start(f"{marker}0", ["sleep", "1000"]) as longer:
            pid = await pid_in(tmp_path / "pid")
            assert await kill_marked(marker)
            assert (is_alive(marked.pid), is_alive(pid), is_alive(longer.pid)) == (False, False, True)
            longer.kill()
        assert marked.wait() == -signal.SIGKILL
    assert await kill_marked(marker)

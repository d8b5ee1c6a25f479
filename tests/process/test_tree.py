from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from helpers.process import ON_LINUX, is_alive, pid_in, run_python

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


@ON_LINUX
def test_orphans_are_killed_and_known_children_are_not(tmp_path: Path) -> None:
    """`kill_orphans` kills what a killed child has left, also without marker and session, and no child that is known."""
    code = """
import subprocess, sys, time
from pathlib import Path
from ccrun.process import linux, tree

def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

linux.become_subreaper()
pid_file = Path(sys.argv[1])
script = f"env -i setsid bash -c 'setsid sleep 1000 & echo $! > {pid_file}; wait' & wait"
lost = subprocess.Popen(["bash", "-c", script], start_new_session=True)
known = subprocess.Popen(["sleep", "1000"], start_new_session=True)
while not pid_file.exists() or not pid_file.read_text().endswith("\\n"):
    time.sleep(0.01)
orphan = int(pid_file.read_text())
lost.kill()
lost.wait()
before = is_alive(orphan)
tree.kill_orphans({known.pid})
print(before, is_alive(orphan), is_alive(known.pid))
known.kill()
known.wait()
"""
    assert run_python(code, str(tmp_path / "pid")) == "True False True\n"

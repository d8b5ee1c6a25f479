"""The process that kills what a killed worker has left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers.process import WAIT_SECONDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no subreapers")

#: Starts a process without its environment in a session of its own, writes all process IDs, and behaves as the test needs it.
SCRIPT = """
import os, pathlib, signal, subprocess, sys, time
from ccrun.process.guardian import run_guarded

def work():
    # Its parent exits at once.
    orphan = "env -i setsid sleep 600 >/dev/null 2>&1 & echo $!"
    pid = subprocess.run(["sh", "-c", orphan], start_new_session=True, stdout=subprocess.PIPE).stdout.decode().strip()
    file = pathlib.Path(sys.argv[1])
    file.with_suffix(".new").write_text(f"{os.getpid()} {pid}")
    file.with_suffix(".new").rename(file)
    if sys.argv[2] == "exit":
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    time.sleep(600)

sys.exit(run_guarded(work))
"""


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Guarded:
    """The script, running."""

    def __init__(self, file: Path, behaviour: str) -> None:
        self._file = file
        self.guardian = subprocess.Popen([sys.executable, "-c", SCRIPT, str(file), behaviour])
        until(file.exists)
        self.child, self.orphan = map(int, file.read_text().split())

    def close(self) -> None:
        """Kill what is left."""
        for pid in (self.guardian.pid, self.child, self.orphan):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.guardian.wait()


@pytest.mark.parametrize(
    ("behaviour", "number", "code"),
    [("exit", None, 3), ("sleep", signal.SIGKILL, 128 + signal.SIGKILL), ("sleep", signal.SIGTERM, 7)],
    ids=["exit", "killed", "stopped"],
)
def test_nothing_outlives_the_child(tmp_path: Path, behaviour: str, number: signal.Signals | None, code: int) -> None:
    """However the child ends, a process that cleared its environment and left its session is killed. The exit status is kept."""
    with contextlib.closing(Guarded(tmp_path / "pids", behaviour)) as guarded:
        if number is not None:
            os.kill(guarded.child, number)
        assert code == guarded.guardian.wait(WAIT_SECONDS)
        assert not psutil.pid_exists(guarded.orphan)


def test_signal_to_stop_is_forwarded(tmp_path: Path) -> None:
    """Who starts a worker knows only the guardian, and sends SIGTERM to it."""
    with contextlib.closing(Guarded(tmp_path / "pids", "sleep")) as guarded:
        guarded.guardian.terminate()
        assert 7 == guarded.guardian.wait(WAIT_SECONDS)
        assert not psutil.pid_exists(guarded.child)

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ccrun.backends.local.pidfile import AlreadyHeld, hold, holder_pid

HOLD = """
import sys
from pathlib import Path
from ccrun.backends.local.pidfile import hold

print("started", flush=True)
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
print("released", flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a PID file in a directory that does not exist yet."""
    return tmp_path / "pids" / "t-1"


class Holder:
    """A process that holds a PID file."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def wait_for(self, word: bytes) -> None:
        """Wait until the process prints a word."""
        assert self.process.stdout is not None
        assert word + b"\n" == self.process.stdout.readline()

    def stop(self) -> None:
        """Make the process release the PID file and exit."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.wait_for(b"released")


@contextlib.contextmanager
def start_holder(path: Path) -> Iterator[Holder]:
    """Start a process that holds a PID file."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            holder = Holder(process)
            holder.wait_for(b"started")
            yield holder
        finally:
            process.kill()


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_missing_file_has_no_holder(path: Path) -> None:
    """Without a PID file there is no holder, and querying it creates nothing."""
    assert holder_pid(path) is None
    assert not path.parent.exists()


def test_holder_is_the_process_that_holds_the_file(path: Path) -> None:
    """`holder_pid` returns the holder's process ID until it releases the file, which is removed then."""
    with start_holder(path) as holder:
        holder.wait_for(b"held")
        assert holder.process.pid == holder_pid(path)
        holder.stop()
        assert holder_pid(path) is None
        assert list(path.parent.iterdir()) == []


def test_killed_process_is_not_a_holder(path: Path) -> None:
    """After the holder was killed, the file exists but has no holder, and another process can hold it."""
    with start_holder(path) as holder:
        holder.wait_for(b"held")
        holder.process.send_signal(signal.SIGKILL)
        holder.process.wait()
        assert path.exists()
        assert holder_pid(path) is None
        with hold(path):
            assert os.getpid() == holder_pid(path)
        assert holder_pid(path) is None


def test_suspended_process_is_still_the_holder(path: Path) -> None:
    """A process that is suspended by SIGSTOP still holds the file."""
    with start_holder(path) as holder:
        holder.wait_for(b"held")
        holder.process.send_signal(signal.SIGSTOP)
        until(lambda: psutil.Process(holder.process.pid).status() == psutil.STATUS_STOPPED)
        assert holder.process.pid == holder_pid(path)


def test_file_has_one_holder(path: Path) -> None:
    """While a process holds the file, `hold` raises `AlreadyHeld` in others, and the holder stays the same."""
    with start_holder(path) as holder:
        holder.wait_for(b"held")
        with pytest.raises(AlreadyHeld), hold(path):
            pass
        assert holder.process.pid == holder_pid(path)


def test_waiting_process_holds_the_new_file(path: Path) -> None:
    """A process that waited while the previous holder removed the file holds a file that other processes see."""
    with contextlib.ExitStack() as first:
        first.enter_context(hold(path))
        with start_holder(path) as waiting:
            # Its open file is the one that is removed below.
            until(lambda: str(path) in [file.path for file in psutil.Process(waiting.process.pid).open_files()])
            first.close()
            waiting.wait_for(b"held")
            assert waiting.process.pid == holder_pid(path)
            with pytest.raises(AlreadyHeld), hold(path):
                pass


def test_querying_does_not_prevent_holding(path: Path) -> None:
    """A process can hold the file while another one queries the holder all the time."""
    with start_holder(path) as holder:
        until(lambda: holder_pid(path) is not None)
        assert [holder.process.pid] * 50 == [holder_pid(path) for _ in range(50)]


def test_child_process_does_not_hold_the_file(path: Path) -> None:
    """A child process that outlives the holder does not hold the file."""
    with hold(path):
        child = subprocess.Popen(["sleep", "60"])
    try:
        assert holder_pid(path) is None
    finally:
        child.kill()
        child.wait()


def test_file_is_private(path: Path) -> None:
    """Other users cannot see which tasks run, independently of the umask."""
    before = os.umask(0)
    try:
        with hold(path):
            modes = (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777)
    finally:
        os.umask(before)
    assert modes == (0o700, 0o600)

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

print("open", flush=True)
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
print("over", flush=True)
"""


@pytest.fixture
def sign(tmp_path: Path) -> Path:
    """Where a sign of life is, in a folder that is not there yet."""
    return tmp_path / "signs" / "t-1"


class Worker:
    """Another process that holds the sign until it is told to end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def wait_for(self, word: bytes) -> None:
        """Wait until it says that it is so far."""
        assert self.process.stdout is not None
        assert word + b"\n" == self.process.stdout.readline()

    def end(self) -> None:
        """Let it end in good order."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.wait_for(b"over")


@contextlib.contextmanager
def worker(sign: Path) -> Iterator[Worker]:
    """Start another process that takes the sign."""
    command = [sys.executable, "-c", HOLD, str(sign)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            running = Worker(process)
            running.wait_for(b"open")
            yield running
        finally:
            process.kill()


def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so, within a bound."""
    give_up_at = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.001)


def test_nobody_holds_what_was_never_held(sign: Path) -> None:
    """Where there is no sign, nobody lives; looking makes none."""
    assert holder_pid(sign) is None
    assert not sign.parent.exists()


def test_holder_is_told_from_the_first_to_the_last_moment(sign: Path) -> None:
    """While a process holds the sign its number is told, and afterwards nobody's; nothing stays on the disk."""
    with worker(sign) as one:
        one.wait_for(b"held")
        assert one.process.pid == holder_pid(sign)
        one.end()
        assert holder_pid(sign) is None
        assert list(sign.parent.iterdir()) == []


def test_sign_of_a_killed_process_is_gone(sign: Path) -> None:
    """A process that is killed holds nothing any more, though its file is still there, and another can take the sign."""
    with worker(sign) as one:
        one.wait_for(b"held")
        one.process.send_signal(signal.SIGKILL)
        one.process.wait()
        assert sign.exists()
        assert holder_pid(sign) is None
        with hold(sign):
            assert os.getpid() == holder_pid(sign)
        assert holder_pid(sign) is None


def test_stopped_process_still_holds_its_sign(sign: Path) -> None:
    """A process that does not run just now is not dead."""
    with worker(sign) as one:
        one.wait_for(b"held")
        one.process.send_signal(signal.SIGSTOP)
        until(lambda: psutil.Process(one.process.pid).status() == psutil.STATUS_STOPPED)
        assert one.process.pid == holder_pid(sign)


def test_sign_is_held_once(sign: Path) -> None:
    """While a process holds the sign, others are refused within a bound, and the holder stays the same."""
    with worker(sign) as one:
        one.wait_for(b"held")
        with pytest.raises(AlreadyHeld), hold(sign):
            pass
        assert one.process.pid == holder_pid(sign)


def test_who_waited_for_a_sign_really_has_it(sign: Path) -> None:
    """A process that gets the sign as another one ends holds it for all to see, and nobody can take it beside it."""
    with contextlib.ExitStack() as first:
        first.enter_context(hold(sign))
        with worker(sign) as waiting:
            # It has the file open, so it waits for the lock of this very file.
            until(lambda: str(sign) in [file.path for file in psutil.Process(waiting.process.pid).open_files()])
            first.close()
            waiting.wait_for(b"held")
            assert waiting.process.pid == holder_pid(sign)
            with pytest.raises(AlreadyHeld), hold(sign):
                pass


def test_looking_does_not_keep_anybody_from_the_sign(sign: Path) -> None:
    """However often somebody looks, a process can take the sign, and looking from many sides at once sees the same."""
    with worker(sign) as one:
        until(lambda: holder_pid(sign) is not None)
        assert [one.process.pid] * 50 == [holder_pid(sign) for _ in range(50)]


def test_child_of_the_holder_does_not_hold_the_sign(sign: Path) -> None:
    """What the holder has started and left behind keeps nothing alive."""
    with hold(sign):
        child = subprocess.Popen(["sleep", "60"])
    try:
        assert holder_pid(sign) is None
    finally:
        child.kill()
        child.wait()


def test_sign_is_its_owners_alone(sign: Path) -> None:
    """Nobody else can see which tasks run here, whatever the umask."""
    before = os.umask(0)
    try:
        with hold(sign):
            modes = (sign.parent.stat().st_mode & 0o777, sign.stat().st_mode & 0o777)
    finally:
        os.umask(before)
    assert modes == (0o700, 0o600)

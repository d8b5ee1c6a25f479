from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from helpers.process import ON_LINUX, WAIT_SECONDS, Shell, is_alive, pid_in, run_python, until

from ccrun.process import tree
from ccrun.process.child import Child
from ccrun.process.exit import Exit

# --- the child -------------------------------------------------------------------------------------------------------


async def test_child_gets_time_after_sigterm(shell: Shell, tmp_path: Path) -> None:
    """Leaving the context sends SIGTERM, and does not kill a child that exits within the grace period."""
    script = "trap 'sleep 0.1; echo stopped > result; exit 5' TERM; echo up; while :; do sleep 0.01; done"
    async with shell(script, grace=10.0) as child:
        await anext(child.lines())
    assert ("stopped\n", Exit(code=5)) == ((tmp_path / "result").read_text(), await child.wait())


async def test_child_that_ignores_sigterm_is_killed(shell: Shell) -> None:
    """SIGKILL follows when the grace period is over."""
    async with shell("trap '' TERM; echo up; while :; do sleep 0.01; done", grace=0.2) as child:
        await anext(child.lines())
        began = time.monotonic()
    assert 0.2 <= time.monotonic() - began < 30
    assert Exit(code=137, signal=9) == await child.wait()


async def test_exception_of_the_caller_kills_the_child(shell: Shell) -> None:
    """When the body of the context raises, the child is stopped and the exception is passed on."""
    with pytest.raises(RuntimeError, match="made-up"):
        async with shell("sleep 1000") as child:
            raise RuntimeError("made-up")
    assert not is_alive(child.pid)


async def test_cancellation_kills_the_child(shell: Shell) -> None:
    """When a reader is cancelled, its child is stopped and `CancelledError` is passed on."""
    children: list[Child] = []

    async def read() -> None:
        async with shell("echo up; sleep 1000") as child:
            async for _ in child.lines():
                children[:] = [child]

    reading = asyncio.create_task(read())
    await until(lambda: children)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert not is_alive(children[0].pid)


async def test_cancellation_ends_the_grace_period(shell: Shell) -> None:
    """A cancellation while the context waits for the child kills the child immediately."""
    up = asyncio.Event()

    async def run() -> Child:
        async with shell("trap '' TERM; echo up; while :; do sleep 0.01; done", grace=1000.0) as child:
            children.append(child)
            await anext(child.lines())
            up.set()
        return child

    children: list[Child] = []
    running = asyncio.create_task(run())
    await up.wait()
    # The context is being left, so this cancellation falls into the grace period.
    running.cancel()
    async with asyncio.timeout(WAIT_SECONDS):
        with pytest.raises(asyncio.CancelledError):
            await running
    assert not is_alive(children[0].pid)


async def test_terminate_can_be_repeated(shell: Shell) -> None:
    """`terminate` returns immediately, also when called again; then `lines` ends and `wait` returns."""
    async with shell("echo up; sleep 1000") as child:
        lines = child.lines()
        await anext(lines)
        child.terminate()
        child.terminate()
        assert [line async for line in lines] == []
        assert Exit(code=143, signal=15) == await child.wait()
        child.terminate()


# --- its descendants -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "then"),
    [
        pytest.param("sleep 1000 &", "sleep 1000", id="in-the-group"),
        pytest.param("sleep 1000 &", "exit 0", id="in-the-group-of-an-exited-child"),
        pytest.param("(trap '' TERM HUP; sleep 1000) &", "exit 0", id="ignores-sigterm"),
        pytest.param("setsid sleep 1000 &", "sleep 1000", id="in-a-new-session", marks=ON_LINUX),
        pytest.param(
            "setsid env -i bash -c 'trap \"\" TERM; sleep 1000; :' &",
            "sleep 1000",
            id="in-a-new-session-ignores-sigterm",
            marks=ON_LINUX,
        ),
    ],
)
async def test_grandchildren_are_killed_with_the_child(shell: Shell, tmp_path: Path, start: str, then: str) -> None:
    """Processes in the group of the child, and its own children in any session, are killed when the context is left."""
    async with shell(f"{start} echo $! > pid; {then}") as child:
        pid = await pid_in(tmp_path / "pid")
        if then == "exit 0":
            await child.wait()
        assert is_alive(pid)
    assert not is_alive(pid)


DAEMON = "(setsid bash -c 'trap \"\" TERM HUP; echo $$ > pid; while :; do sleep 0.1; done' </dev/null &>/dev/null &)"


@ON_LINUX
async def test_daemon_with_the_marker_is_killed(shell: Shell, tmp_path: Path, marker: str) -> None:
    """A process that forked twice and has a new session is found by its marker."""
    async with shell(DAEMON, env={tree.MARKER_VARIABLE: marker}) as child:
        await child.wait()
        pid = await pid_in(tmp_path / "pid")
        assert is_alive(pid)
    assert not is_alive(pid)


@ON_LINUX
def test_subreaper_kills_the_daemons_of_its_children(tmp_path: Path) -> None:
    """A daemon without the marker is killed with the last child that may have started it; other processes are not."""
    code = """
import asyncio, os, subprocess, sys
from pathlib import Path
from ccrun.process.child import spawn
from ccrun.process.linux import become_subreaper
directory = Path(sys.argv[1])
DAEMON = sys.argv[2]
ENV = {"PATH": os.environ["PATH"]}

def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

async def main():
    assert become_subreaper()
    foreign = subprocess.Popen(["sleep", "1000"])
    async with spawn(["sleep", "1000"], env=ENV, cwd=directory) as other:
        async with spawn(["env", "-i", "bash", "-c", DAEMON], env=ENV, cwd=directory) as child:
            await child.wait()
            while not (directory / "pid").exists() or not (directory / "pid").read_text():
                await asyncio.sleep(0.01)
            pid = int((directory / "pid").read_text())
        print(is_alive(pid), is_alive(other.pid), is_alive(foreign.pid))
    print(is_alive(pid), is_alive(other.pid), is_alive(foreign.pid), Path(f"/proc/{pid}").exists())
    foreign.kill()
    foreign.wait()

asyncio.run(main())
"""
    assert run_python(code, str(tmp_path), DAEMON) == "True True True\nFalse False True False\n"


@ON_LINUX
def test_subreaper_kills_a_process_that_keeps_forking(tmp_path: Path) -> None:
    """A process that moves to a fork in a new session every few milliseconds is killed too."""
    code = """
import asyncio, os, sys, time
from pathlib import Path
from ccrun.process.child import spawn
from ccrun.process.linux import become_subreaper
directory = Path(sys.argv[1])
KEEP_FORKING = '''
import os, time
if os.fork(): os._exit(0)
deadline = time.monotonic() + 30
while time.monotonic() < deadline:
    os.setsid()
    with open("trace", "a") as trace: trace.write("x")
    time.sleep(0.003)
    if os.fork(): os._exit(0)
'''

async def main():
    become_subreaper()
    async with spawn([sys.executable, "-c", KEEP_FORKING], env={}, cwd=directory) as child:
        await child.wait()
        while not (directory / "trace").exists():
            await asyncio.sleep(0.01)
    size = (directory / "trace").stat().st_size
    time.sleep(0.2)
    print((directory / "trace").stat().st_size == size)

asyncio.run(main())
"""
    assert run_python(code, str(tmp_path)) == "True\n"


async def test_other_children_are_not_killed(shell: Shell, tmp_path: Path, marker: str) -> None:
    """Another child with the same marker and its descendants keep running."""
    env = {tree.MARKER_VARIABLE: marker}
    async with shell("setsid sleep 1000 & echo $! > pid; sleep 1000", env=env) as other:
        pid = await pid_in(tmp_path / "pid")
        async with shell("true", env=env) as child:
            await child.wait()
        assert (is_alive(other.pid), is_alive(pid)) == (True, True)

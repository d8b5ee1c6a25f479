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


async def test_leaving_asks_first_and_waits(shell: Shell, tmp_path: Path) -> None:
    """SIGTERM comes first, and a child that ends by itself within the grace is not killed."""
    script = "trap 'sleep 0.1; echo asked > said; exit 5' TERM; echo up; while :; do sleep 0.01; done"
    async with shell(script, grace=10.0) as child:
        await anext(child.lines())
    assert ("asked\n", Exit(code=5)) == ((tmp_path / "said").read_text(), await child.wait())


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(shell: Shell) -> None:
    """The grace has an end."""
    async with shell("trap '' TERM; echo up; while :; do sleep 0.01; done", grace=0.2) as child:
        await anext(child.lines())
        began = time.monotonic()
    assert 0.2 <= time.monotonic() - began < 3
    assert Exit(code=137, signal=9) == await child.wait()


async def test_an_error_ends_the_child(shell: Shell) -> None:
    """A fault of the caller does not leave the child behind."""
    with pytest.raises(RuntimeError, match="of ours"):
        async with shell("sleep 1000") as child:
            raise RuntimeError("of ours")
    assert not is_alive(child.pid)


async def test_a_cancellation_ends_the_child(shell: Shell) -> None:
    """A reader that is cancelled takes the child with it, and the cancellation goes on."""
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


async def test_a_cancellation_cuts_the_grace_short(shell: Shell) -> None:
    """Whoever cancels twice gets a dead child at once, not after the grace."""
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
    # The context is being left by now; this cancellation meets the grace.
    running.cancel()
    async with asyncio.timeout(WAIT_SECONDS):
        with pytest.raises(asyncio.CancelledError):
            await running
    assert not is_alive(children[0].pid)


async def test_terminate_can_be_called_again_and_again(shell: Shell) -> None:
    """It returns at once; the lines and the wait then end by themselves."""
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
        pytest.param("sleep 1000 &", "sleep 1000", id="in the group"),
        pytest.param("sleep 1000 &", "exit 0", id="in the group of a child that has ended"),
        pytest.param("(trap '' TERM HUP; sleep 1000) &", "exit 0", id="ignoring SIGTERM"),
        pytest.param("setsid sleep 1000 &", "sleep 1000", id="in a session of its own", marks=ON_LINUX),
        pytest.param("setsid env -i bash -c 'trap \"\" TERM; sleep 1000; :' &", "sleep 1000", id="all", marks=ON_LINUX),
    ],
)
async def test_grandchildren_end_with_the_child(shell: Shell, tmp_path: Path, start: str, then: str) -> None:
    """What the child has started in its group, also before it ended by itself, or still has as a child, is gone."""
    async with shell(f"{start} echo $! > pid; {then}") as child:
        pid = await pid_in(tmp_path / "pid")
        if then == "exit 0":
            await child.wait()
        assert is_alive(pid)
    assert not is_alive(pid)


DAEMON = "(setsid bash -c 'trap \"\" TERM HUP; echo $$ > pid; while :; do sleep 0.1; done' </dev/null &>/dev/null &)"


@ON_LINUX
async def test_a_daemon_that_carries_the_marker_ends_with_the_child(shell: Shell, tmp_path: Path, marker: str) -> None:
    """Two forks and a new session hide nothing from the marker."""
    async with shell(DAEMON, env={tree.MARKER_VARIABLE: marker}) as child:
        await child.wait()
        pid = await pid_in(tmp_path / "pid")
        assert is_alive(pid)
    assert not is_alive(pid)


@ON_LINUX
def test_a_subreaper_ends_whatever_stems_from_its_child(tmp_path: Path) -> None:
    """Daemons without the marker end with the last child they can stem from; other children of the process live on."""
    code = """
import asyncio, os, subprocess, sys
from pathlib import Path
from ccrun.process.child import spawn
from ccrun.process.linux import become_subreaper
folder = Path(sys.argv[1])
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
    async with spawn(["sleep", "1000"], env=ENV, cwd=folder) as other:
        async with spawn(["env", "-i", "bash", "-c", DAEMON], env=ENV, cwd=folder) as child:
            await child.wait()
            while not (folder / "pid").exists() or not (folder / "pid").read_text():
                await asyncio.sleep(0.01)
            pid = int((folder / "pid").read_text())
        print(is_alive(pid), is_alive(other.pid), is_alive(foreign.pid))
    print(is_alive(pid), is_alive(other.pid), is_alive(foreign.pid), Path(f"/proc/{pid}").exists())
    foreign.kill()
    foreign.wait()

asyncio.run(main())
"""
    assert run_python(code, str(tmp_path), DAEMON) == "True True True\nFalse False True False\n"


@ON_LINUX
def test_a_subreaper_catches_what_forks_and_flees(tmp_path: Path) -> None:
    """A process that forks into a new session every few milliseconds and ends its former self is caught all the same."""
    code = """
import asyncio, os, sys, time
from pathlib import Path
from ccrun.process.child import spawn
from ccrun.process.linux import become_subreaper
folder = Path(sys.argv[1])
FLEE = '''
import os, time
if os.fork(): os._exit(0)
until = time.monotonic() + 30
while time.monotonic() < until:
    os.setsid()
    with open("trace", "a") as trace: trace.write("x")
    time.sleep(0.003)
    if os.fork(): os._exit(0)
'''

async def main():
    become_subreaper()
    async with spawn([sys.executable, "-c", FLEE], env={}, cwd=folder) as child:
        await child.wait()
        while not (folder / "trace").exists():
            await asyncio.sleep(0.01)
    size = (folder / "trace").stat().st_size
    time.sleep(0.2)
    print((folder / "trace").stat().st_size == size)

asyncio.run(main())
"""
    assert run_python(code, str(tmp_path)) == "True\n"


async def test_one_child_ends_without_the_others(shell: Shell, tmp_path: Path, marker: str) -> None:
    """Neither another child nor what it started is touched, not even under the same marker."""
    env = {tree.MARKER_VARIABLE: marker}
    async with shell("setsid sleep 1000 & echo $! > pid; sleep 1000", env=env) as other:
        pid = await pid_in(tmp_path / "pid")
        async with shell("true", env=env) as child:
            await child.wait()
        assert (is_alive(other.pid), is_alive(pid)) == (True, True)

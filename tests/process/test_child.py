from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeAlias

import psutil
import pytest

from ccrun.errors import CcrunError, ConfigError
from ccrun.process import tree
from ccrun.process.capture import OutputTooLarge, ProcessTimeout, capture
from ccrun.process.child import DRAIN_SECONDS, STDERR_TAIL_BYTES, Child, spawn
from ccrun.process.exit import Exit, exit_from_returncode
from ccrun.process.tree import kill_marked
from ccrun.process.user import find_user

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prctl")
#: Far more than any condition of these tests takes on a busy machine.
PATIENCE_SECONDS = 20.0

Shell: TypeAlias = Callable[..., AbstractAsyncContextManager[Child]]


@pytest.fixture
def marker() -> str:
    """What the processes of this test carry and no others."""
    return uuid.uuid4().hex


@pytest.fixture
def shell(tmp_path: Path, marker: str) -> Iterator[Shell]:
    """Spawns a shell script in `tmp_path`; afterwards kills what the product has left alive."""

    def start(script: str, *, stdin: bytes = b"", grace: float = 0.2, env: dict[str, str] | None = None) -> object:
        environment = {"PATH": os.environ["PATH"], "FOR_TEST": marker, **(env or {})}
        return spawn(["bash", "-c", script], env=environment, cwd=tmp_path, stdin=stdin, term_grace_seconds=grace)

    yield start  # type: ignore[misc]
    for survivor in psutil.process_iter():
        try:
            if survivor.environ().get("FOR_TEST") == marker:
                survivor.kill()
        except psutil.Error:
            continue


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition, but not for ever."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # processes set no event
            await asyncio.sleep(0.01)


async def pid_in(path: Path) -> int:
    """Wait until a script has written a process ID, and return it."""
    texts: list[str] = []

    def is_written() -> bool:
        texts.append(path.read_text() if path.exists() else "")
        return texts[-1].endswith("\n")

    await until(is_written)
    return int(texts[-1])


def is_alive(pid: int) -> bool:
    """Whether a process can still do something."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def run_python(code: str, *arguments: str) -> str:
    """Run code in an interpreter of its own and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# --- what an exit means ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returncode", "expected", "ok"),
    [
        (0, Exit(code=0), True),
        (3, Exit(code=3), False),
        (137, Exit(code=137), False),
        (-9, Exit(code=137, signal=9), False),
        (-15, Exit(code=143, signal=15), False),
    ],
)
def test_an_exit_is_told_as_a_shell_tells_it(returncode: int, expected: Exit, ok: bool) -> None:
    """Signal n is 128 + n, and only a plain 0 is a success."""
    assert (expected, ok) == (exit_from_returncode(returncode), expected.ok)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 0", Exit(code=0)),
        ("exit 7", Exit(code=7)),
        ("kill -SEGV $$", Exit(code=139, signal=11)),
        ("kill -KILL $$", Exit(code=137, signal=9)),
    ],
)
async def test_wait_tells_how_the_child_ended(shell: Shell, script: str, expected: Exit) -> None:
    """Both a code and a signal reach the caller, as often as it asks."""
    async with shell(script) as child:
        assert expected == await child.wait()
        assert expected == await child.wait()


# --- lines -----------------------------------------------------------------------------------------------------------


async def test_lines_are_what_the_child_wrote(shell: Shell) -> None:
    """Blank lines, carriage returns, characters of several bytes and a last line without a newline all stay."""
    async with shell(r"printf 'a\n\n\xc3'; sleep 0.05; printf '\xa9\r\nend'") as child:
        assert [bytes(line) async for line in child.lines()] == [b"a", b"", b"\xc3\xa9\r", b"end"]


async def test_a_hundred_thousand_lines_arrive_in_order(shell: Shell) -> None:
    """Nothing is lost, doubled or moved at the seams of the reads."""
    async with shell("seq 100000") as child:
        assert [b"%d" % n for n in range(1, 100_001)] == [bytes(line) async for line in child.lines()]


@ON_LINUX
def test_a_line_of_64_mib_costs_little_more_than_itself(tmp_path: Path) -> None:
    """The line arrives whole, and the memory for it stays below two copies."""
    code = """
import asyncio, hashlib, os, resource, sys
from pathlib import Path
from ccrun.process.child import spawn
SIZE = 64 * 1024 * 1024
WRITE = "import sys; block = bytes(range(32, 96)) * 1024; [sys.stdout.buffer.write(block) for _ in range(1024)]; print()"

async def main():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with spawn([sys.executable, "-c", WRITE], env=dict(os.environ), cwd=Path(sys.argv[1])) as child:
        async for line in child.lines():
            digest = hashlib.sha256()
            block = bytes(range(32, 96)) * 1024
            for _ in range(1024):
                digest.update(block)
            same = digest.digest() == hashlib.sha256(line).digest()
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(len(line) == SIZE, same, grown // 1024)

asyncio.run(main())
"""
    length, content, grown_mib = run_python(code, str(tmp_path)).split()
    assert (length, content) == ("True", "True")
    assert int(grown_mib) < 100


async def test_a_caller_that_does_not_read_slows_the_child(shell: Shell, tmp_path: Path) -> None:
    """Output that nobody takes stays with the child and not in our memory."""
    async with shell("for n in {1..200}; do head -c 65535 /dev/zero; echo; echo $n > count; done") as child:
        lines = child.lines()
        await anext(lines)
        seen: list[str] = []

        def stands_still() -> bool:
            with contextlib.suppress(FileNotFoundError):
                seen.append((tmp_path / "count").read_text())
            return len(seen) > 30 and len(set(seen[-30:])) == 1

        await until(stands_still)
        assert int(seen[-1]) < 40


async def test_a_grandchild_that_holds_stdout_does_not_hold_us(shell: Shell) -> None:
    """The end of the process is told at once, and its lines end soon after."""
    async with shell("echo first; sleep 1000 & printf last") as child:
        began = time.monotonic()
        assert Exit(code=0) == await child.wait()
        assert [line async for line in child.lines()] == [b"first", b"last"]
        assert time.monotonic() - began < DRAIN_SECONDS + 2


async def test_a_reader_that_waits_learns_of_the_end(shell: Shell) -> None:
    """Also a read that began before the process ended does not wait for the grandchild that holds the pipe."""
    async with asyncio.timeout(PATIENCE_SECONDS), shell("echo first; sleep 1000 & exit 0") as child:
        assert [line async for line in child.lines()] == [b"first"]
        assert await child.wait() == Exit(code=0)


@pytest.mark.parametrize("chatter", ["yes", "while sleep 0.1; do echo y; done"])
async def test_a_grandchild_that_keeps_talking_does_not_hold_us(shell: Shell, chatter: str) -> None:
    """Neither a flood nor a trickle into the pipe of a process that is gone is read for ever."""
    async with asyncio.timeout(PATIENCE_SECONDS), shell(f"echo first; ({chatter}) & exit 0") as child:
        lines = [line async for line in child.lines()]
    assert (b"first", {b"y"}) == (lines[0], set(lines[1:-1]))


async def test_lines_that_are_read_after_the_end_are_all_there(shell: Shell) -> None:
    """A caller that was busy when the child ended misses nothing."""
    async with shell("seq 8000") as child:
        await child.wait()
        assert [b"%d" % n for n in range(1, 8001)] == [line async for line in child.lines()]


# --- stdin, stderr, environment --------------------------------------------------------------------------------------


async def test_stdin_reaches_the_child_and_is_closed(shell: Shell) -> None:
    """All bytes arrive, far more than a pipe holds, and then the end of the file."""
    async with shell("wc -c", stdin=b"x" * 1_000_000) as child:
        assert [line.strip() async for line in child.lines()] == [b"1000000"]


async def test_a_child_that_does_not_read_its_stdin_is_no_error(shell: Shell) -> None:
    """It may end without having read a byte, or live on with its stdin closed."""
    async with shell("exit 0", stdin=b"x" * 1_000_000) as child:
        assert Exit(code=0) == await child.wait()
    async with shell("exec 0<&-; echo on", stdin=b"x" * 1_000_000) as child:
        assert [line async for line in child.lines()] == [b"on"]


async def test_a_child_that_never_reads_its_stdin_can_be_ended(shell: Shell) -> None:
    """Bytes that wait for a reader do not outlive the child."""
    async with shell("echo up; sleep 1000", stdin=b"x" * 1_000_000) as child:
        assert await anext(child.lines()) == b"up"
    assert not is_alive(child.pid)


async def test_stderr_never_blocks_the_child_and_its_end_is_kept(shell: Shell) -> None:
    """A flood of megabytes passes, and what remains is its last part."""
    async with shell("head -c 5000000 /dev/zero >&2; echo last words >&2; echo done") as child:
        assert [line async for line in child.lines()] == [b"done"]
        await child.wait()
        assert len(child.stderr_tail) == STDERR_TAIL_BYTES
        assert child.stderr_tail.endswith(b"\0last words\n")


async def test_a_child_gets_the_given_environment_and_nothing_else(tmp_path: Path) -> None:
    """No variable of ours leaks, and no file descriptor either."""
    async with spawn(["/usr/bin/env"], env={"ONLY": "this"}, cwd=tmp_path) as child:
        assert [line async for line in child.lines()] == [b"ONLY=this"]
    if sys.platform == "linux":
        async with spawn(["/bin/ls", "/proc/self/fd"], env={}, cwd=tmp_path) as child:
            # 3 is the folder that ls reads.
            assert [line async for line in child.lines()] == [b"0", b"1", b"2", b"3"]


@ON_LINUX
async def test_children_leave_no_file_descriptor_behind(shell: Shell) -> None:
    """However many children run one after the other, the process keeps none of their pipes."""
    async with shell("true") as child:
        await child.wait()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # instant, and only the number matters
    for _ in range(5):
        async with shell("echo x; sleep 1000 &", stdin=b"x" * 1_000_000) as child:
            await anext(child.lines())
        with pytest.raises(CcrunError):
            async with spawn(["no-such-program"], env={}, cwd=Path("/")):
                pass
    await asyncio.sleep(0)
    assert before == len(os.listdir("/proc/self/fd"))  # noqa: PTH208


# --- what cannot be started ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("/secret/place/claude", "The program claude was not found."),
        ("claude-is-not-here", "The program claude-is-not-here was not found."),
        ("{folder}/plain", "The program plain may not be executed."),
        ("{folder}/garbage", "garbage cannot be started: Exec format error."),
    ],
)
async def test_a_program_that_cannot_be_started_is_named(tmp_path: Path, program: str, expected: str) -> None:
    """The sentence has the name of the program and no local path."""
    (tmp_path / "plain").write_text("no program")
    (tmp_path / "garbage").write_bytes(b"\0\1\2\3")
    (tmp_path / "garbage").chmod(0o755)
    with pytest.raises(CcrunError, match=re.escape(expected)):
        async with spawn([program.format(folder=tmp_path)], env={"PATH": "/usr/bin:/bin"}, cwd=tmp_path):
            pass


@pytest.mark.parametrize(
    ("argument", "variable", "folder", "expected"),
    [
        ("x", "x", "missing", "its working directory does not exist"),
        ("x" * 200_000, "x", ".", "its arguments or its environment are too large"),
        ("x", "x" * 200_000, ".", "its arguments or its environment are too large"),
        ("a\0b", "x", ".", "contains a character that the system does not allow"),
        ("x", "a\0b", ".", "contains a character that the system does not allow"),
    ],
)
async def test_what_the_system_does_not_take_is_told(
    tmp_path: Path, argument: str, variable: str, folder: str, expected: str
) -> None:
    """Neither the value nor a local path is in the sentence."""
    with pytest.raises(CcrunError, match="true cannot be started: ") as caught:
        async with spawn(["true", argument], env={"PATH": "/usr/bin:/bin", "V": variable}, cwd=tmp_path / folder):
            pass
    assert expected in caught.value.message
    assert len(caught.value.message) < 200


# --- nothing outlives its context ------------------------------------------------------------------------------------


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
    async with asyncio.timeout(PATIENCE_SECONDS):
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


@ON_LINUX
async def test_the_marked_are_killed_and_nobody_else(tmp_path: Path, marker: str) -> None:
    """After the worker's death its task's processes are found by the marker, and what they started by descent."""

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
def test_a_hardened_process_hides_its_environment_from_its_children() -> None:
    """A child of the same user reads the parent's environment before, and no more after."""
    code = """
import asyncio, concurrent.futures.thread, ctypes, os
from pathlib import Path
from ccrun.process.child import spawn
from ccrun.process.linux import harden

async def read_ours():
    environ = f"/proc/{os.getpid()}/environ"
    async with spawn(["head", "-c", "5", environ], env={"PATH": os.environ["PATH"]}, cwd=Path("/")) as child:
        return [bytes(line) async for line in child.lines()], (await child.wait()).ok

if os.geteuid() == 0:
    # Root may read everything. A process that changes its user is hardened by the kernel: undo that for the first look.
    os.setgid(65534)
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
print(asyncio.run(read_ours()), harden(), asyncio.run(read_ours()))
"""
    assert run_python(code) == "([b'PATH='], True) True ([], False)\n"


PATH = "/usr/local/bin:/usr/bin:/bin"

# --- run to the end ----------------------------------------------------------------------------------------------------------


async def test_what_a_program_prints_is_captured() -> None:
    """Its output, its complaints and how it ended."""
    ran = await capture(
        ["sh", "-c", "cat; echo oh >&2; exit 3"],
        env={"PATH": PATH},
        cwd=Path("/"),
        stdin=b"in",
        seconds=PATIENCE_SECONDS,
    )
    assert (Exit(code=3), b"in", b"oh\n") == (ran.exit, ran.stdout, ran.stderr)


async def test_a_program_over_its_time_is_ended() -> None:
    """With all that it has started."""
    marker = f"sleeper-{os.getpid()}"
    with pytest.raises(ProcessTimeout):
        await capture(
            ["bash", "-c", f"(exec -a {marker} sleep 600) & wait"], env={"PATH": PATH}, cwd=Path("/"), seconds=0.2
        )
    assert not [process for process in psutil.process_iter(["cmdline"]) if marker in (process.info["cmdline"] or ())]


async def test_a_program_that_prints_too_much_is_ended() -> None:
    """Memory stays bounded."""
    with pytest.raises(OutputTooLarge):
        await capture(["yes"], env={"PATH": PATH}, cwd=Path("/"), seconds=PATIENCE_SECONDS, max_bytes=1000)


async def test_stderr_may_come_with_stdout() -> None:
    """In the order in which it was written."""
    async with spawn(
        ["sh", "-c", "echo a; echo b >&2; echo c"], env={"PATH": PATH}, cwd=Path("/"), joins_stderr=True
    ) as child:
        assert [b"a", b"b", b"c"] == [bytes(line) async for line in child.lines()]
        assert b"" == child.stderr_tail


# --- another user ---------------------------------------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start processes as another user")


@needs_root
async def test_a_child_may_run_as_another_user() -> None:
    """Without our groups and capabilities, and without a way to get new ones."""
    user = await asyncio.to_thread(find_user, "61234", PATH)
    script = "id -u; id -g; id -G; grep -E '^(Cap(Inh|Prm|Eff|Amb)|NoNewPrivs):' /proc/self/status"
    ran = await capture(["sh", "-c", script], env={"PATH": PATH}, cwd=Path("/"), seconds=PATIENCE_SECONDS, user=user)
    nothing = [f"Cap{kind}:\t{0:016x}" for kind in ("Inh", "Prm", "Eff", "Amb")]
    assert ["61234", "61234", "61234", *nothing, "NoNewPrivs:\t1"] == ran.stdout.decode().splitlines()


@needs_root
async def test_what_another_user_leaves_is_ended() -> None:
    """Also what has made a session of its own."""
    user = await asyncio.to_thread(find_user, "61236", PATH)
    script = "setsid sleep 600 & sleep 600 & echo $! ; sleep 600"
    async with spawn(
        ["sh", "-c", script], env={"PATH": PATH}, cwd=Path("/"), user=user, term_grace_seconds=0.1
    ) as child:
        async for _ in child.lines():
            break
    left = [found for found in psutil.process_iter(["uids", "status"]) if found.info["uids"].real == 61236]
    assert not [found for found in left if found.info["status"] != psutil.STATUS_ZOMBIE]


@needs_root
def test_a_user_is_known_by_name_or_number() -> None:
    """A number that passwd does not know is the group's too."""
    assert (65534, 65534) == (find_user("nobody", PATH).uid, find_user("nobody", PATH).gid)
    assert (61234, 61234) == (find_user("61234", PATH).uid, find_user("61234", PATH).gid)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("nobody-of-that-name", "must name a user of this machine, not nobody-of-that-name"),
        ("4294967295", "must name a user of this machine, not 4294967295"),
        ("root", "may not be root"),
        ("0", "may not be root"),
    ],
)
def test_a_user_that_will_not_do_is_told(name: str, fault: str) -> None:
    """Missing, no user at all, or root."""
    with pytest.raises(ConfigError, match=f"^CCRUN_AGENT_USER {fault}"):
        find_user(name, PATH)


def test_a_machine_without_setpriv_is_told(tmp_path: Path) -> None:
    """What starts the others as that user."""
    with pytest.raises(ConfigError, match=r"^CCRUN_AGENT_USER needs the program setpriv"):
        find_user("nobody", str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may start processes as anybody")
def test_a_process_that_may_not_switch_is_told() -> None:
    """At the start, not when the first task comes."""
    with pytest.raises(ConfigError, match="may not start others as that user"):
        find_user("61234", PATH)

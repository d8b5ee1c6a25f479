from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest
from helpers.process import ON_LINUX, WAIT_SECONDS, Shell, is_alive, run_python, until

from ccrun.process.child import DRAIN_SECONDS, STDERR_TAIL_BYTES, spawn
from ccrun.process.exit import Exit

# --- stdout ----------------------------------------------------------------------------------------------------------


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
    async with asyncio.timeout(WAIT_SECONDS), shell("echo first; sleep 1000 & exit 0") as child:
        assert [line async for line in child.lines()] == [b"first"]
        assert await child.wait() == Exit(code=0)


@pytest.mark.parametrize("chatter", ["yes", "while sleep 0.1; do echo y; done"])
async def test_a_grandchild_that_keeps_talking_does_not_hold_us(shell: Shell, chatter: str) -> None:
    """Neither a flood nor a trickle into the pipe of a process that is gone is read for ever."""
    async with asyncio.timeout(WAIT_SECONDS), shell(f"echo first; ({chatter}) & exit 0") as child:
        lines = [line async for line in child.lines()]
    assert (b"first", {b"y"}) == (lines[0], set(lines[1:-1]))


async def test_lines_that_are_read_after_the_end_are_all_there(shell: Shell) -> None:
    """A caller that was busy when the child ended misses nothing."""
    async with shell("seq 8000") as child:
        await child.wait()
        assert [b"%d" % n for n in range(1, 8001)] == [line async for line in child.lines()]


# --- stdin and stderr ------------------------------------------------------------------------------------------------


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


async def test_stderr_may_come_with_stdout() -> None:
    """In the order in which it was written."""
    async with spawn(
        ["sh", "-c", "echo a; echo b >&2; echo c"], env={"PATH": "/usr/bin:/bin"}, cwd=Path("/"), joins_stderr=True
    ) as child:
        assert [b"a", b"b", b"c"] == [bytes(line) async for line in child.lines()]
        assert b"" == child.stderr_tail

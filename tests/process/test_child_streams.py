from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest
from helpers.process import ON_LINUX, WAIT_SECONDS, Shell, is_alive, run_python, until

from ccrun.process.child import DRAIN_SECONDS, PIPE_READ_BYTES, STDERR_TAIL_BYTES, spawn
from ccrun.process.exit import Exit

# --- stdout ----------------------------------------------------------------------------------------------------------


async def test_lines_equal_the_output(shell: Shell) -> None:
    """`lines` yields empty lines, carriage returns, split multibyte characters and a last line without newline unchanged."""
    async with shell(r"printf 'a\n\n\xc3'; sleep 0.05; printf '\xa9\r\nend'") as child:
        assert [bytes(line) async for line in child.lines()] == [b"a", b"", b"\xc3\xa9\r", b"end"]


async def test_many_lines_arrive_in_order(shell: Shell) -> None:
    """No line is lost, repeated or moved where one read ends and the next begins."""
    async with shell("seq 100000") as child:
        assert [b"%d" % n for n in range(1, 100_001)] == [bytes(line) async for line in child.lines()]


@ON_LINUX
def test_line_of_64_mib_needs_less_memory_than_two_copies(tmp_path: Path) -> None:
    """The line arrives complete, and the memory of the process grows by less than 100 MiB."""
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


async def test_long_line_is_cut(shell: Shell) -> None:
    """Of a line over the limit, the beginning and the number of the other bytes remain; the lines around it are whole."""
    limit = PIPE_READ_BYTES
    zeros = "head -c {} /dev/zero".format
    script = f"echo a; {zeros(limit)}; echo; {zeros(10 * limit + 7)}; echo; echo b; {zeros(limit + 1)}"
    async with shell(script) as child:
        lines = [(len(line), getattr(line, "omitted_bytes", 0)) async for line in child.lines(limit)]
    assert [(1, 0), (limit, 0), (limit, 9 * limit + 7), (1, 0), (limit, 1)] == lines


async def test_child_waits_for_a_slow_reader(shell: Shell, tmp_path: Path) -> None:
    """While the caller does not read, the child blocks and the output does not fill the memory of ccrun."""
    async with shell("for n in {1..200}; do head -c 65535 /dev/zero; echo; echo $n > count; done") as child:
        lines = child.lines()
        await anext(lines)
        seen: list[str] = []

        def has_stopped() -> bool:
            with contextlib.suppress(FileNotFoundError):
                seen.append((tmp_path / "count").read_text())
            return len(seen) > 30 and len(set(seen[-30:])) == 1

        await until(has_stopped)
        assert int(seen[-1]) < 40


async def test_lines_end_although_a_grandchild_holds_stdout(shell: Shell) -> None:
    """`wait` returns when the child exits, and `lines` ends soon after, although a grandchild has the pipe open."""
    async with shell("echo first; sleep 1000 & printf last") as child:
        began = time.monotonic()
        assert Exit(code=0) == await child.wait()
        assert [line async for line in child.lines()] == [b"first", b"last"]
        assert time.monotonic() - began < DRAIN_SECONDS + 60


async def test_waiting_reader_stops_when_the_child_exits(shell: Shell) -> None:
    """A read that began before the child exited does not wait for a grandchild that has the pipe open."""
    async with asyncio.timeout(WAIT_SECONDS), shell("echo first; sleep 1000 & exit 0") as child:
        assert [line async for line in child.lines()] == [b"first"]
        assert await child.wait() == Exit(code=0)


@pytest.mark.parametrize("output", ["yes", "while sleep 0.1; do echo y; done"])
async def test_lines_end_although_a_grandchild_writes(shell: Shell, output: str) -> None:
    """`lines` ends after the child has exited, whether a grandchild writes to the pipe fast or slowly."""
    async with asyncio.timeout(WAIT_SECONDS), shell(f"echo first; ({output}) & exit 0") as child:
        lines = [line async for line in child.lines()]
    assert (b"first", {b"y"}) == (lines[0], set(lines[1:-1]))


async def test_lines_can_be_read_after_the_exit(shell: Shell) -> None:
    """A caller that starts to read after the child has exited gets all lines."""
    async with shell("seq 8000") as child:
        await child.wait()
        assert [b"%d" % n for n in range(1, 8001)] == [line async for line in child.lines()]


# --- stdin and stderr ------------------------------------------------------------------------------------------------


async def test_child_reads_stdin_to_its_end(shell: Shell) -> None:
    """The child reads all bytes, far more than a pipe holds, and then the end of the file."""
    async with shell("wc -c", stdin=b"x" * 1_000_000) as child:
        assert [line.strip() async for line in child.lines()] == [b"1000000"]


async def test_unread_stdin_is_not_an_error(shell: Shell) -> None:
    """A child may exit without reading its stdin, or close it and continue."""
    async with shell("exit 0", stdin=b"x" * 1_000_000) as child:
        assert Exit(code=0) == await child.wait()
    async with shell("exec 0<&-; echo on", stdin=b"x" * 1_000_000) as child:
        assert [line async for line in child.lines()] == [b"on"]


async def test_child_that_never_reads_its_stdin_is_killed(shell: Shell) -> None:
    """Unread stdin does not prevent that leaving the context kills the child."""
    async with shell("echo up; sleep 1000", stdin=b"x" * 1_000_000) as child:
        assert await anext(child.lines()) == b"up"
    assert not is_alive(child.pid)


async def test_tail_of_stderr_is_retained(shell: Shell) -> None:
    """A child can write any amount to stderr without blocking, and `stderr_tail` has the last part, after `…`."""
    async with shell("head -c 5000000 /dev/zero >&2; echo last line >&2; echo done") as child:
        assert [line async for line in child.lines()] == [b"done"]
        await child.wait()
        assert len(child.stderr_tail.removeprefix("…".encode())) == STDERR_TAIL_BYTES
        assert child.stderr_tail.startswith("…".encode())
        assert child.stderr_tail.endswith(b"\0last line\n")


async def test_stderr_can_be_joined_to_stdout() -> None:
    """The lines of both are in the order in which they were written."""
    async with spawn(
        ["sh", "-c", "echo a; echo b >&2; echo c"], env={"PATH": "/usr/bin:/bin"}, cwd=Path("/"), joins_stderr=True
    ) as child:
        assert [b"a", b"b", b"c"] == [bytes(line) async for line in child.lines()]
        assert b"" == child.stderr_tail

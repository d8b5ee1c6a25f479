from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest
from helpers.process import ON_LINUX, Shell

from ccrun.errors import CcrunError
from ccrun.process.child import spawn
from ccrun.process.exit import Exit, exit_from_returncode

# --- exit codes ------------------------------------------------------------------------------------------------------


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
def test_exit_code_is_that_of_a_shell(returncode: int, expected: Exit, ok: bool) -> None:
    """The exit code of signal n is 128 + n, and only code 0 is a success."""
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
async def test_wait_returns_the_exit(shell: Shell, script: str, expected: Exit) -> None:
    """`wait` returns the exit code or the signal, also in later calls."""
    async with shell(script) as child:
        assert expected == await child.wait()
        assert expected == await child.wait()


# --- environment and file descriptors --------------------------------------------------------------------------------


async def test_child_has_only_the_given_environment(tmp_path: Path) -> None:
    """The child inherits no environment variable and no file descriptor except stdin, stdout and stderr."""
    async with spawn(["/usr/bin/env"], env={"ONLY": "this"}, cwd=tmp_path) as child:
        assert [line async for line in child.lines()] == [b"ONLY=this"]
    if sys.platform == "linux":
        async with spawn(["/bin/ls", "/proc/self/fd"], env={}, cwd=tmp_path) as child:
            # 3 is the directory that ls reads.
            assert [line async for line in child.lines()] == [b"0", b"1", b"2", b"3"]


@ON_LINUX
async def test_file_descriptors_are_closed_after_each_child(shell: Shell) -> None:
    """The pipes of a child are closed when its context is left, and when it cannot be started."""
    async with shell("true") as child:
        await child.wait()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # does not block, and only the count matters
    for _ in range(5):
        async with shell("echo x; sleep 1000 &", stdin=b"x" * 1_000_000) as child:
            await anext(child.lines())
        with pytest.raises(CcrunError):
            async with spawn(["no-such-program"], env={}, cwd=Path("/")):
                pass
    await asyncio.sleep(0)
    assert before == len(os.listdir("/proc/self/fd"))  # noqa: PTH208


# --- programs that cannot be started ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("/secret/directory/claude", "The program claude was not found."),
        ("no-such-claude", "The program no-such-claude was not found."),
        ("{directory}/plain", "The program plain may not be executed."),
        ("{directory}/garbage", "garbage cannot be started: Exec format error."),
    ],
)
async def test_error_names_the_program_that_cannot_be_started(tmp_path: Path, program: str, expected: str) -> None:
    """The error has the name of the program, without its directory."""
    (tmp_path / "plain").write_text("no program")
    (tmp_path / "garbage").write_bytes(b"\0\1\2\3")
    (tmp_path / "garbage").chmod(0o755)
    with pytest.raises(CcrunError, match=re.escape(expected)):
        async with spawn([program.format(directory=tmp_path)], env={"PATH": "/usr/bin:/bin"}, cwd=tmp_path):
            pass


@pytest.mark.parametrize(
    ("argument", "variable", "directory", "expected"),
    [
        ("x", "x", "missing", "its working directory does not exist"),
        ("x" * 200_000, "x", ".", "its arguments or its environment are too large"),
        ("x", "x" * 200_000, ".", "its arguments or its environment are too large"),
        ("a\0b", "x", ".", "contains a character that the system does not allow"),
        ("x", "a\0b", ".", "contains a character that the system does not allow"),
    ],
)
async def test_error_says_why_the_system_rejects_a_program(
    tmp_path: Path, argument: str, variable: str, directory: str, expected: str
) -> None:
    """The error has the reason, and neither the rejected value nor a path."""
    with pytest.raises(CcrunError, match="true cannot be started: ") as caught:
        async with spawn(["true", argument], env={"PATH": "/usr/bin:/bin", "V": variable}, cwd=tmp_path / directory):
            pass
    assert expected in caught.value.message
    assert len(caught.value.message) < 200

"""What is visible in a sandbox, with the real bubblewrap."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path

import pytest
from helpers.sandbox import PATH, Run, room, run, sandbox

from ccrun.errors import ConfigError
from ccrun.process.child import spawn
from ccrun.process.confinement import Confinement
from ccrun.process.sandbox import Sandbox, find_sandbox
from ccrun.process.user import find_user

__all__ = ["room", "run", "sandbox"]


async def test_only_the_directory_of_the_task_is_visible(run: Run, room: Path) -> None:
    """What is written there stays; nothing else of the machine's data is there, and all else is read-only."""
    ran = await run(
        f"echo x > made; echo x > /dev/null; cat {room.parent}/data/secret; ls {room.parent} ~root /home; touch /usr/x /x"
    )
    assert b"made" not in ran.stdout
    assert "x\n" == (room / "made").read_text()
    assert "of another task" not in str(ran)
    assert b"data" not in ran.stdout.replace(b"data/secret", b"")
    assert ran.stderr.count(b"Read-only file system") == 2
    assert b"/dev/null" not in ran.stderr


async def test_processes_are_alone(run: Run) -> None:
    """The sandbox shows no process of the machine, has no capability and cannot gain privileges."""
    ran = await run("ls /proc | grep -c '^[0-9]'; grep -E '^(Cap(Prm|Eff|Bnd)|NoNewPrivs|Seccomp):' /proc/self/status")
    number, *status = ran.stdout.decode().splitlines()
    assert int(number) < 10
    assert [f"Cap{kind}:\t{0:016x}" for kind in ("Prm", "Eff", "Bnd")] + ["NoNewPrivs:\t1", "Seccomp:\t2"] == status


async def test_network_is_empty(run: Run) -> None:
    """A server of the machine cannot be reached, not even on loopback or by an abstract socket."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0ccrun-test-{os.getpid()}")
        abstract.listen()
        ran = await run(
            f"exec 3<>/dev/tcp/127.0.0.1/{server.getsockname()[1]} && echo reached;"
            f"{sys.executable} -c 'import socket; socket.socket(socket.AF_UNIX).connect(\"\\0ccrun-test-{os.getpid()}\")'"
            " && echo reached; cat /proc/net/dev | tail -n +3 | cut -d: -f1"
        )
    assert b"lo" == ran.stdout.strip()


async def test_all_processes_end(sandbox: Confinement, room: Path) -> None:
    """When the program ends, all that it has started ends, also with sessions of their own and without an environment."""
    script = "for i in $(seq 200); do setsid env -i sleep 987.654 & done; echo ready; exec sleep 987.654"
    async with spawn(
        ["bash", "-c", script], env={"PATH": PATH}, cwd=room, confinement=sandbox, term_grace_seconds=0.1
    ) as child:
        async for _ in child.lines():
            break
    commands = await asyncio.to_thread(lambda: [_content(path) for path in Path("/proc").glob("[0-9]*/cmdline")])
    assert not [command for command in commands if command.startswith(b"sleep\x00987.654")]


def _content(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


async def test_exit_code_is_that_of_the_program(run: Run) -> None:
    """The exit code passes through; a signal counts as in a shell."""
    assert 7 == (await run("exit 7")).exit.code
    assert 137 == (await run("kill -9 $$")).exit.code


def test_missing_bubblewrap_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed, the sentence says so."""
    monkeypatch.setenv("PATH", "/nonexistent")
    found = find_sandbox(path=PATH, programs=[], hidden=[], user=None)
    assert "bubblewrap (the program bwrap) is not installed." == found


def test_directory_of_programs_is_visible_without_its_secrets(tmp_path: Path) -> None:
    """Programs in `bin` get the directory that it is in, unless something hidden is in it or around it."""
    for name in ("tools/bin", "home/bin", "home/data", "user/.tool/bin", "user/.versions/1/bin"):
        (tmp_path / name).mkdir(parents=True)
    path = os.pathsep.join(str(directory) for directory in tmp_path.rglob("bin")) + ":relative"
    hidden = [tmp_path / "home" / "data", tmp_path / "user"]
    found = find_sandbox(path=path, programs=[], hidden=hidden, user=None)
    if not isinstance(found, Sandbox):
        pytest.skip(found)
    shown = {entry for entry in found.readable if entry.is_relative_to(tmp_path)}
    assert {tmp_path / name for name in ("tools", "home/bin", "user/.tool/bin", "user/.versions/1")} == shown


def test_root_is_never_visible() -> None:
    """Though `/bin` is on PATH, and nothing is hidden."""
    found = find_sandbox(path="/bin:/usr/bin", programs=[], hidden=[], user=None)
    if not isinstance(found, Sandbox):
        pytest.skip(found)
    assert Path("/") not in found.readable


def test_what_the_user_cannot_read_is_left_out(tmp_path: Path) -> None:
    """A private directory on PATH does not prevent the sandbox of another user."""
    try:
        user = find_user("61238", PATH)
    except ConfigError as error:
        pytest.skip(error.message)
    (tmp_path / "private" / "bin").mkdir(parents=True)
    (tmp_path / "private").chmod(0o700)
    found = find_sandbox(path=f"{tmp_path}/private/bin:{PATH}", programs=[], hidden=[], user=user)
    if not isinstance(found, Sandbox):
        pytest.skip(found)
    assert not [entry for entry in found.readable if entry.is_relative_to(tmp_path)]


def test_script_gets_its_interpreter(tmp_path: Path) -> None:
    """The directory of the interpreter that a script names is visible."""
    (tmp_path / "node" / "bin").mkdir(parents=True)
    script = tmp_path / "cli.js"
    script.write_text(f"#!{tmp_path}/node/bin/node --flag\n")
    found = find_sandbox(path="", programs=[script], hidden=[], user=None)
    if not isinstance(found, Sandbox):
        pytest.skip(found)
    assert {script, tmp_path / "node"} <= set(found.readable)

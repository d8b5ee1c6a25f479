"""Attacks of an agent at every level of isolation that this machine allows, and at none, where each must succeed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
from containment.attacks import Targets, attacks
from helpers.service import WAIT_SECONDS
from helpers.worker import Agent, WorkerSetup, agent, worker_setup

from ccrun.errors import ConfigError
from ccrun.process.sandbox import Sandbox, find_sandbox
from ccrun.process.user import find_user
from ccrun.removal import remove_tree
from ccrun.worker.git.run import SYSTEM_PATH
from ccrun.worker.isolation import IsolationPolicy

__all__ = ["agent", "worker_setup"]

CANARY: Final = "canary-ofanothertask"
#: What a user of its own does not close.
OPEN_TO_ANOTHER_USER: Final = {
    "abstract socket",
    "arguments of all processes",
    "server on loopback",
    "server on loopback by 0.0.0.0",
    "server on loopback by IPv6",
    "server on loopback by its name",
    "server on loopback by a tunnel",
    "server on loopback by the proxy",
}
#: A process of another task: the canary is in its environment, its arguments, its memory and an open file.
_VICTIM: Final = (
    "import sys; kept = sys.argv[1] * 1000; held = open('held'); print('ready', flush=True); sys.stdin.read()"
)


@contextlib.asynccontextmanager
async def targets_of(root: Path) -> AsyncIterator[Targets]:
    """Make what an agent must not reach."""
    async with contextlib.AsyncExitStack() as stack:
        for name in ("other", "data", "home"):
            (root / name).mkdir(mode=0o700)
        for name in ("other/.env", "other/held", "data/secret", "home/secret"):
            (root / name).write_text(f"{CANARY}\n")
        shared = Path(tempfile.mkstemp(prefix="ccrun-test-", dir="/dev/shm")[1])
        shared.write_text(CANARY)
        stack.callback(shared.unlink)

        def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            body = f"{CANARY}\n"
            writer.write(f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            writer.close()

        server = await stack.enter_async_context(await asyncio.start_server(answer, "127.0.0.1", 0))
        port = server.sockets[0].getsockname()[1]
        await stack.enter_async_context(await asyncio.start_server(answer, "::1", port))
        abstract = f"ccrun-test-{os.getpid()}"
        path = root / "other" / "socket"
        for address in (f"\0{abstract}", str(path)):
            bound = socket.socket(socket.AF_UNIX)
            bound.bind(address)
            await stack.enter_async_context(await asyncio.start_unix_server(answer, sock=bound))
        victim = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _VICTIM, CANARY),
            cwd=root / "other",
            env={"SECRET": CANARY},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert victim.stdout is not None
        await victim.stdout.readline()
        yield Targets(
            directory=root / "other",
            data=root / "data",
            home=root / "home",
            shared=shared,
            pid=victim.pid,
            port=port,
            abstract=abstract,
            path=path,
            python=shutil.which("python3", path=os.defpath) or sys.executable,
        )
        victim.kill()
        await victim.wait()


def policy_of(level: str, root: Path, cli: Path) -> IsolationPolicy:
    """Return how agents are isolated at a level, or skip the test."""
    user = None
    if level in ("user", "sandbox and user"):
        try:
            user = find_user("61238", SYSTEM_PATH)
        except ConfigError as error:
            pytest.skip(error.message)
    if level in ("process", "user"):
        return IsolationPolicy(user=user)
    path = os.environ["PATH"]
    found = find_sandbox(path=path, programs=[cli], hidden=[root], user=user)
    if not isinstance(found, Sandbox):
        pytest.skip(found)
    return IsolationPolicy(user=user, find_sandbox=lambda: found)


@pytest.mark.parametrize("level", ["process", "user", "sandbox", "sandbox and user"])
async def test_agent_reaches_its_own_task_alone(worker_setup: WorkerSetup, agent: Agent, level: str) -> None:
    """In a sandbox, no attack finds the canary; as another user, only those on the network and on arguments do.

    Without isolation, each attack finds it, which shows that the others are real.
    """
    root = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="ccrun-test-"))
    try:
        # Another user can enter it, but none of the directories in it.
        root.chmod(0o755)
        async with targets_of(root) as targets:
            scripts = attacks(targets)
            for index, name in enumerate(scripts):
                # The agent reports by numbers, so that no name of an attack is taken for a finding.
                assert CANARY not in name, index
            body = "\n".join(
                f"found=$(timeout {WAIT_SECONDS:g} bash -c {shlex.quote(script)} 2>/dev/null | tr -d '\\0')\n"
                f"""case $found in *{CANARY[:8]}""*{CANARY[8:]}*) echo '{{"type":"found","attack":{index}}}';; esac"""
                for index, script in enumerate(scripts.values())
            )
            await worker_setup.submit()
            cli = agent(body)
            policy = await asyncio.to_thread(policy_of, level, root, cli())
            await worker_setup.run(cli=cli, isolation=policy)
        names = list(scripts)
        succeeded = {names[line["attack"]] for line in await worker_setup.log() if line["type"] == "found"}
    finally:
        await asyncio.to_thread(remove_tree, root)
    expected = {
        "process": set(scripts) - ({"namespaces of another process"} if os.geteuid() != 0 else set()),
        "user": OPEN_TO_ANOTHER_USER,
    }.get(level, set())
    assert expected == succeeded

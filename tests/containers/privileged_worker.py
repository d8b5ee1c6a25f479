"""What a worker does with its rights: starts an agent as another user, ends it, clears away. Prints what it saw, as JSON.

Run by test_privileges.py behind the entry point of the worker's image; it is no test itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from ccrun import removal
from ccrun.process import linux
from ccrun.process.child import spawn

#: How a worker turns what it starts into the agent's user: no group, no capability, no way back to any.
AS_AGENT = (
    "setpriv --reuid={0} --regid={0} --clear-groups "
    "--inh-caps=-all --ambient-caps=-all --bounding-set=-all --no-new-privs --"
)

#: Says what it is, then what it can do, line by line. A shell's, since the agent may not be able to read Python.
AGENT = r"""
worker=$1 worker_user=$2 secret=../secret
sed -n 's/^\(Cap...\|NoNewPrivs\|Uid\|Gid\|Groups\):[[:space:]]*/has \1 /p' /proc/self/status
try() { name=$1; shift; if "$@" >/dev/null 2>&1; then echo "could $name"; else echo "tried $name"; fi; }
try "read its own environment" cat /proc/self/environ
try "signal itself" kill -0 $$
try "read a file that is for all" cat ../open
try "read the worker's environment" cat "/proc/$worker/environ"
try "read the worker's memory" dd if="/proc/$worker/mem" bs=1 count=1
try "list the worker's memory" cat "/proc/$worker/maps"
try "list the worker's files" ls "/proc/$worker/fd/"
try "read a file of the worker" cat "$secret"
try "write a file of the worker" sh -c ': >>"$1"' - "$secret"
try "remove a file of the worker" rm "$secret"
try "signal the worker" kill -0 "$worker"
try "become the worker" setpriv --reuid="$worker_user" --clear-groups true
try "become root" setpriv --reuid=0 --clear-groups true
# What clearing away has to cope with: a locked folder, a file for nobody, a process that has left and does not listen.
mkdir -p kept/deep && echo x >kept/deep/file && chmod 0 kept/deep/file kept/deep kept
setsid sh -c 'trap "" TERM; while :; do sleep 1; done' >/dev/null 2>&1 &
echo ready
sleep 1000
"""


def status() -> dict[str, str]:
    """Return what the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: " ".join(value.split()) for name, _, value in (line.partition(":") for line in lines)}


def processes_of(user: int) -> list[int]:
    """Return the processes of a user."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal() and _owner(path) == user]


def _owner(path: Path) -> int | None:
    try:
        lines = (path / "status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("Uid:"))


async def main(root: Path, agent_user: int) -> None:
    """Run one agent in a room below `root`, to its end."""
    linux.harden()
    linux.become_subreaper()
    secret, room = root / "secret", root / "room"
    secret.write_text("made up")
    secret.chmod(0o600)
    (root / "open").touch(0o644)
    room.mkdir(mode=0o700)
    os.chown(room, agent_user, agent_user)
    argv = [*AS_AGENT.format(agent_user).split(), "sh", "-c", AGENT, "agent", str(os.getpid()), str(os.getuid())]
    seen: list[str] = []
    async with spawn(argv, env={"PATH": os.environ["PATH"]}, cwd=room, term_grace_seconds=0.2) as child:
        async for line in child.lines():
            if line == b"ready":
                break
            seen.append(line.decode())
        running = len(processes_of(agent_user))
    report = {
        "pid": os.getpid(),
        "worker": status(),
        "agent": dict(line.removeprefix("has ").split(" ", 1) for line in seen if line.startswith("has ")),
        "could": [line.removeprefix("could ") for line in seen if line.startswith("could ")],
        "tried": [line.removeprefix("tried ") for line in seen if line.startswith("tried ")],
        "stderr": child.stderr_tail.decode(),
        "running": running,
        "left": len(processes_of(agent_user)),
        "secret": secret.read_text(),
    }
    removal.remove_tree(room)
    print(json.dumps({**report, "room is left": room.exists()}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))

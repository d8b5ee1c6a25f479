"""A small worker: starts an agent as another user, kills it, deletes its files, and prints a report as JSON.

The entry point of the worker's image starts this program for test_privileges.py. It contains no tests.
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

#: Run a command as the agent's user, as a worker does: without groups and capabilities, and without a way to gain any.
AS_AGENT = (
    "setpriv --reuid={0} --regid={0} --clear-groups "
    "--inh-caps=-all --ambient-caps=-all --bounding-set=-all --no-new-privs --"
)

#: Prints its identity, then what it can do, line by line. A shell script, since the agent may not have access to Python.
AGENT = r"""
worker=$1 worker_user=$2 secret=../secret
sed -n 's/^\(Cap...\|NoNewPrivs\|Uid\|Gid\|Groups\):[[:space:]]*/has \1 /p' /proc/self/status
try() { name=$1; shift; if "$@" >/dev/null 2>&1; then echo "succeeded $name"; else echo "failed $name"; fi; }
try "read its own environment" cat /proc/self/environ
try "signal itself" kill -0 $$
try "read a public file" cat ../open
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
# What the worker has to clean up: directories and a file without permissions, a process in another session that ignores SIGTERM.
mkdir -p locked/deep && echo x >locked/deep/file && chmod 0 locked/deep/file locked/deep locked
setsid sh -c 'trap "" TERM; while :; do sleep 1; done' >/dev/null 2>&1 &
echo ready
sleep 1000
"""


def status() -> dict[str, str]:
    """Return the fields of this process in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: " ".join(value.split()) for name, _, value in (line.partition(":") for line in lines)}


def processes_of(user: int) -> list[int]:
    """Return the process IDs of a user."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal() and _owner(path) == user]


def _owner(path: Path) -> int | None:
    try:
        lines = (path / "status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("Uid:"))


async def main(root: Path, agent_user: int) -> None:
    """Run one agent in a directory in `root`, stop it, and print the report."""
    linux.harden()
    linux.become_subreaper()
    secret, workspace = root / "secret", root / "workspace"
    secret.write_text("made up")
    secret.chmod(0o600)
    (root / "open").touch(0o644)
    workspace.mkdir(mode=0o700)
    os.chown(workspace, agent_user, agent_user)
    argv = [*AS_AGENT.format(agent_user).split(), "sh", "-c", AGENT, "agent", str(os.getpid()), str(os.getuid())]
    printed: list[str] = []
    async with spawn(argv, env={"PATH": os.environ["PATH"]}, cwd=workspace, term_grace_seconds=0.2) as child:
        async for line in child.lines():
            if line == b"ready":
                break
            printed.append(line.decode())
        running = len(processes_of(agent_user))
    report = {
        "pid": os.getpid(),
        "worker": status(),
        "agent": dict(line.removeprefix("has ").split(" ", 1) for line in printed if line.startswith("has ")),
        "succeeded": [line.removeprefix("succeeded ") for line in printed if line.startswith("succeeded ")],
        "failed": [line.removeprefix("failed ") for line in printed if line.startswith("failed ")],
        "stderr": child.stderr_tail.decode(),
        "running": running,
        "remaining": len(processes_of(agent_user)),
        "secret": secret.read_text(),
    }
    removal.remove_tree(workspace)
    print(json.dumps({**report, "directory exists": workspace.exists()}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))

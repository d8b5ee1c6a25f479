"""Users and capabilities in the worker's image, tested with its entry point and users that exist only as numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from helpers.dockerfile import CONTAINERS, ROOT

ENTRYPOINT: Final = CONTAINERS / "worker-entrypoint.sh"
#: <linux/capability.h>
CAPABILITIES: Final = {"chown": 0, "dac_override": 1, "fowner": 3, "kill": 5, "setgid": 6, "setuid": 7, "setpcap": 8}
#: Used by this test process only, so that parallel test processes do not see each other's processes.
WORKER_USER: Final = 50_000 + 2 * (os.getpid() % 5_000)
AGENT_USER: Final = WORKER_USER + 1
#: Run a command in a new process namespace, as in a container: it is process 1.
AS_PROCESS_1: Final = ("unshare", "--pid", "--fork", "--mount-proc", "--")

Report = dict[str, Any]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has capabilities"),
    pytest.mark.skipif(os.getuid() != 0, reason="only root can switch users"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed"),
]


def entrypoint(directory: Path) -> Path:
    """Write a copy of the entry point with user numbers instead of names, which do not exist on this machine."""
    script = ENTRYPOINT.read_text()
    named = "--reuid=ccrun --regid=ccrun --init-groups"
    assert named in script
    path = directory / "entrypoint"
    path.write_text(script.replace(named, f"--reuid={WORKER_USER} --regid={WORKER_USER} --clear-groups"))
    return path


@pytest.fixture(scope="module", params=[(), AS_PROCESS_1], ids=["another process", "process 1"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a worker that ran an agent."""
    prefix = request.param
    if prefix and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("process namespaces cannot be created here")
    directory = tmp_path_factory.mktemp("privileges")
    # The agent must reach its own directory, which is in this one.
    directory.chmod(0o711)
    os.chown(directory, WORKER_USER, WORKER_USER)
    program = Path(__file__).with_name("privileged_worker.py")
    worker = [sys.executable, "-P", str(program), str(directory), str(AGENT_USER)]
    ran = subprocess.run(
        [*prefix, "sh", entrypoint(directory), *worker],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "SECRET": "made up", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert 0 == ran.returncode, ran.stderr
    found: Report = json.loads(ran.stdout)
    return found


def test_the_worker_has_only_the_capabilities_it_needs(report: Report) -> None:
    """The worker is not root, has no other groups, and has in each set the capabilities that the entry point names."""
    expected = f"{sum(1 << bit for bit in CAPABILITIES.values()):016x}"
    worker = report["worker"]
    assert [expected] * 5 == [worker[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
    assert [" ".join([str(WORKER_USER)] * 4)] * 2 == [worker["Uid"], worker["Gid"]]
    assert "" == worker["Groups"]


def test_the_agent_has_no_capabilities(report: Report) -> None:
    """The agent is a third user with no groups and no capabilities in any set. Programs that it executes cannot gain any."""
    agent = report["agent"]
    assert ["0" * 16] * 5 == [agent[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
    assert ["\t".join([str(AGENT_USER)] * 4)] * 2 == [agent["Uid"], agent["Gid"]]
    assert ("1", "") == (agent["NoNewPrivs"], agent.get("Groups", "").strip())


def test_the_agent_cannot_access_the_worker(report: Report) -> None:
    """The agent cannot read, signal or become the worker, or access its files. It can read and signal itself."""
    assert ["read its own environment", "signal itself", "read a public file"] == report["succeeded"]
    assert 10 == len(report["failed"])
    assert "made up" == report["secret"]


def test_the_worker_kills_the_agent(report: Report) -> None:
    """The worker kills all processes of the agent, including one that has left its session and ignores SIGTERM."""
    assert report["running"] >= 2
    assert 0 == report["remaining"]


def test_the_worker_deletes_locked_files(report: Report) -> None:
    """The worker deletes files and directories for which the agent has removed all permissions."""
    assert report["directory exists"] is False


def test_a_container_has_the_capabilities_by_default() -> None:
    """The capabilities that the entry point retains are among those that a container has by default."""
    # https://docs.docker.com/engine/containers/run/#runtime-privilege-and-linux-capabilities
    default = (
        "audit_write chown dac_override fowner fsetid kill mknod net_bind_service net_raw setfcap setgid setpcap setuid"
    )
    lines = ENTRYPOINT.read_text().splitlines()
    (retained,) = [line.partition("=")[2] for line in lines if line.startswith("capabilities=")]
    names = {name.removeprefix("+") for name in retained.split(",") if name != "-all"}
    assert set(CAPABILITIES) == names
    assert names <= {*default.split(), "sys_chroot"}


def test_the_entry_point_requires_root() -> None:
    """If the user is not root, the entry point reports that in one line and runs nothing."""
    command = [
        "setpriv",
        f"--reuid={AGENT_USER}",
        "--clear-groups",
        "sh",
        "-c",
        ENTRYPOINT.read_text(),
        "-",
        "echo",
        "ran",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (1, "") == (ran.returncode, ran.stdout)
    assert "The worker's container must start as root: it runs agents as another user.\n" == ran.stderr

"""Users and rights in the worker's image, tried with its own entry point and users that exist by number alone."""

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
#: Of this test process alone, so that tests at the same time keep apart.
WORKER_USER: Final = 50_000 + 2 * (os.getpid() % 5_000)
AGENT_USER: Final = WORKER_USER + 1
#: A process namespace of its own, as a container has: what runs is process 1.
AS_PROCESS_1: Final = ("unshare", "--pid", "--fork", "--mount-proc", "--")

Report = dict[str, Any]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's"),
    pytest.mark.skipif(os.getuid() != 0, reason="only root can become other users"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="there is no setpriv here"),
]


def entrypoint(folder: Path) -> Path:
    """Write the image's entry point with numbers for the names of users, which this machine does not know."""
    script = ENTRYPOINT.read_text()
    named = "--reuid=ccrun --regid=ccrun --init-groups"
    assert named in script
    path = folder / "entrypoint"
    path.write_text(script.replace(named, f"--reuid={WORKER_USER} --regid={WORKER_USER} --clear-groups"))
    return path


@pytest.fixture(scope="module", params=[(), AS_PROCESS_1], ids=["some process", "process 1"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What a worker saw that ran an agent."""
    before = request.param
    if before and subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process namespace can be made here")
    folder = tmp_path_factory.mktemp("privileges")
    # Whoever is inside may look around.
    folder.chmod(0o711)
    os.chown(folder, WORKER_USER, WORKER_USER)
    program = Path(__file__).with_name("privileged_worker.py")
    worker = [sys.executable, "-P", str(program), str(folder), str(AGENT_USER)]
    ran = subprocess.run(
        [*before, "sh", entrypoint(folder), *worker],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "SECRET": "made up", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert 0 == ran.returncode, ran.stderr
    found: Report = json.loads(ran.stdout)
    return found


def test_worker_keeps_what_it_needs(report: Report) -> None:
    """The worker is no root, has no other groups, and of root's rights those that the entry point names, in every set."""
    expected = f"{sum(1 << bit for bit in CAPABILITIES.values()):016x}"
    worker = report["worker"]
    assert [expected] * 5 == [worker[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
    assert [" ".join([str(WORKER_USER)] * 4)] * 2 == [worker["Uid"], worker["Gid"]]
    assert "" == worker["Groups"]


def test_agent_has_no_rights(report: Report) -> None:
    """The agent is a third user, without groups, without capabilities in any set, and nothing it executes can gain any."""
    agent = report["agent"]
    assert ["0" * 16] * 5 == [agent[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
    assert ["\t".join([str(AGENT_USER)] * 4)] * 2 == [agent["Uid"], agent["Gid"]]
    assert ("1", "") == (agent["NoNewPrivs"], agent.get("Groups", "").strip())


def test_agent_cannot_reach_the_worker(report: Report) -> None:
    """The agent can neither read, signal nor become the worker, nor touch its files; of itself it can all of that."""
    assert ["read its own environment", "signal itself", "read a file that is for all"] == report["could"]
    assert 10 == len(report["tried"])
    assert "made up" == report["secret"]


def test_worker_ends_the_agent(report: Report) -> None:
    """The worker ends all processes of the agent, also one that has left its session and ignores SIGTERM."""
    assert report["running"] >= 2
    assert 0 == report["left"]


def test_worker_clears_away(report: Report) -> None:
    """The worker removes what the agent has made and locked."""
    assert report["room is left"] is False


def test_rights_work_in_a_plain_container() -> None:
    """Every right that the entry point keeps is among those that a container has unless told otherwise."""
    # https://docs.docker.com/engine/containers/run/#runtime-privilege-and-linux-capabilities
    default = (
        "audit_write chown dac_override fowner fsetid kill mknod net_bind_service net_raw setfcap setgid setpcap setuid"
    )
    (kept,) = [line.partition("=")[2] for line in ENTRYPOINT.read_text().splitlines() if line.startswith("kept=")]
    names = {name.removeprefix("+") for name in kept.split(",") if name != "-all"}
    assert set(CAPABILITIES) == names
    assert names <= {*default.split(), "sys_chroot"}


def test_refuses_to_start_as_another_user() -> None:
    """Started as anybody but root, the entry point says in one line what is wrong, and runs nothing."""
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
    assert "The worker's container must start as root: agents run as a user of their own.\n" == ran.stderr

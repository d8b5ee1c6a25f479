from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest
from helpers.process import WAIT_SECONDS

from ccrun.errors import ConfigError
from ccrun.process.capture import capture
from ccrun.process.child import spawn
from ccrun.process.user import find_user

PATH = "/usr/local/bin:/usr/bin:/bin"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start processes as another user")


@needs_root
async def test_a_child_may_run_as_another_user() -> None:
    """Without our groups and capabilities, and without a way to get new ones."""
    user = await asyncio.to_thread(find_user, "61234", PATH)
    script = "id -u; id -g; id -G; grep -E '^(Cap(Inh|Prm|Eff|Amb)|NoNewPrivs):' /proc/self/status"
    ran = await capture(["sh", "-c", script], env={"PATH": PATH}, cwd=Path("/"), seconds=WAIT_SECONDS, user=user)
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

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest
from helpers.process import PATH, WAIT_SECONDS

from ccrun.errors import ConfigError
from ccrun.process.capture import capture
from ccrun.process.child import spawn
from ccrun.process.confinement import Confinement
from ccrun.process.user import find_user

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start processes as another user")


@needs_root
async def test_child_runs_as_another_user() -> None:
    """The child has the user and group, no further groups, no capabilities, and cannot gain privileges."""
    user = await asyncio.to_thread(find_user, "61234", PATH)
    script = "id -u; id -g; id -G; grep -E '^(Cap(Inh|Prm|Eff|Amb)|NoNewPrivs):' /proc/self/status"
    as_user = Confinement(user=user)
    ran = await capture(
        ["sh", "-c", script], env={"PATH": PATH}, cwd=Path("/"), seconds=WAIT_SECONDS, confinement=as_user
    )
    no_capabilities = [f"Cap{kind}:\t{0:016x}" for kind in ("Inh", "Prm", "Eff", "Amb")]
    assert ["61234", "61234", "61234", *no_capabilities, "NoNewPrivs:\t1"] == ran.stdout.decode().splitlines()


@needs_root
async def test_processes_of_another_user_are_killed() -> None:
    """When the context is left, no process of the user runs, not even one in a new session."""
    user = await asyncio.to_thread(find_user, "61236", PATH)
    script = "setsid sleep 600 & sleep 600 & echo $! ; sleep 600"
    async with spawn(
        ["sh", "-c", script],
        env={"PATH": PATH},
        cwd=Path("/"),
        confinement=Confinement(user=user),
        term_grace_seconds=0.1,
    ) as child:
        async for _ in child.lines():
            break
    left = [found for found in psutil.process_iter(["uids", "status"]) if found.info["uids"].real == 61236]
    assert not [found for found in left if found.info["status"] != psutil.STATUS_ZOMBIE]


@needs_root
def test_user_is_found_by_name_or_number() -> None:
    """A number that is not in the passwd database is also the number of the group."""
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
def test_unusable_user_is_a_configuration_error(name: str, fault: str) -> None:
    """A user that does not exist, an invalid number and root are rejected."""
    with pytest.raises(ConfigError, match=f"^CCRUN_AGENT_USER {fault}"):
        find_user(name, PATH)


def test_missing_setpriv_is_a_configuration_error(tmp_path: Path) -> None:
    """Without the program that changes the user, no user is accepted."""
    with pytest.raises(ConfigError, match=r"^CCRUN_AGENT_USER needs the program setpriv"):
        find_user("nobody", str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may start processes as any user")
def test_missing_privilege_is_a_configuration_error() -> None:
    """A process that may not change its user learns it from `find_user`, before any task runs."""
    with pytest.raises(ConfigError, match="may not start others as that user"):
        find_user("61234", PATH)

"""Running processes as another user of this machine."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs

from ccrun.errors import ConfigError

#: Seconds for killing the processes of a user.
KILL_SECONDS: Final = 10.0
#: `(uid_t) -1` and above mean "no user".
MAX_USER_ID: Final = 2**32 - 2


@attrs.frozen(kw_only=True)
class User:
    """Another user of this machine, and the program that switches to it (setpriv(1))."""

    uid: int
    gid: int
    setpriv: Path

    def argv(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs `argv` as this user, permanently and without the groups and capabilities of the caller."""
        dropped = ("--clear-groups", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs")
        return [str(self.setpriv), f"--reuid={self.uid}", f"--regid={self.gid}", *dropped, "--", *argv]

    def kill_all(self) -> None:
        """Kill all processes of this user at once, however fast they fork. Blocks. See kill(2), where the process ID is -1."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                self.argv(["sh", "-c", "kill -KILL -1"]),
                env={"PATH": os.defpath},
                capture_output=True,
                check=False,
                timeout=KILL_SECONDS,
            )


def find_user(name: str, path: str) -> User:
    """Return a user by name or number. Reads the disk, so it blocks.

    Args:
        name: A name of passwd(5), or a number. A number that passwd(5) does not have is the number of the group too.
        path: The PATH on which setpriv is searched.

    Raises:
        ConfigError: There is no such user, it is root, or this process may not switch to it.
    """
    setpriv = shutil.which("setpriv", path=path)
    if setpriv is None:
        raise ConfigError("CCRUN_AGENT_USER needs the program setpriv, which is not on the PATH.")
    try:
        known = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
        uid, gid = known.pw_uid, known.pw_gid
    except (KeyError, OverflowError):
        if not name.isdecimal() or int(name) > MAX_USER_ID:
            raise ConfigError(f"CCRUN_AGENT_USER must name a user of this machine, not {name}.") from None
        uid = gid = int(name)
    if 0 in (uid, gid):
        raise ConfigError("CCRUN_AGENT_USER may not be root, who can read everything.")
    user = User(uid=uid, gid=gid, setpriv=Path(setpriv).absolute())
    if subprocess.run(user.argv(["true"]), env={"PATH": path}, capture_output=True, check=False).returncode != 0:
        raise ConfigError(f"CCRUN_AGENT_USER is {name}, but this process may not start others as that user.")
    return user

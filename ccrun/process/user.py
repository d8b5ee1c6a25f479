"""Another user of this machine, as whom processes are started."""

from __future__ import annotations

import pwd
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs

from ccrun.errors import ConfigError

#: `(uid_t) -1` and above mean "no user".
MAX_USER_ID: Final = 2**32 - 2


# --- who runs --------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class User:
    """Another user of this machine whom processes are started as, and the program that makes them so (setpriv(1))."""

    uid: int
    gid: int
    setpriv: Path

    def argv(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs this one as that user: without its caller's groups and capabilities, and for good."""
        dropped = ("--clear-groups", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs")
        return [str(self.setpriv), f"--reuid={self.uid}", f"--regid={self.gid}", *dropped, "--", *argv]


def find_user(name: str, path: str) -> User:
    """Return the user of that name or number. Blocks while it looks at the disk.

    Args:
        name: As in passwd(5), or a whole number, which is the group's too where passwd does not know it.
        path: A PATH, on which setpriv is.

    Raises:
        ConfigError: There is no such user, it is root, or this process may not start others as it.
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
        raise ConfigError("CCRUN_AGENT_USER may not be root, from whom nothing can be kept.")
    user = User(uid=uid, gid=gid, setpriv=Path(setpriv).absolute())
    if subprocess.run(user.argv(["true"]), env={"PATH": path}, capture_output=True, check=False).returncode != 0:
        raise ConfigError(f"CCRUN_AGENT_USER is {name}, but this process may not start others as that user.")
    return user

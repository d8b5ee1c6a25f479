"""The git hosts whose SSH host keys ccrun has, in the file `known_hosts` beside this module."""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: The file for OpenSSH's `UserKnownHostsFile`. It must be quoted there, since the option takes several files.
FILE: Final = Path(__file__).with_name("known_hosts")

#: The hosts in that file, in lower case and without ports. All other keys of these hosts are rejected.
WELL_KNOWN: Final = frozenset(
    {
        "github.com",
        "ssh.github.com",
        "gitlab.com",
        "altssh.gitlab.com",
        "bitbucket.org",
        "ssh.bitbucket.org",
    }
)

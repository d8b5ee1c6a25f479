"""The git hosts whose SSH host keys ccrun brings along. The keys are in the file `known_hosts` beside this module."""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: For OpenSSH's `UserKnownHostsFile`, in quotes: that option takes several files, with blanks between them.
FILE: Final = Path(__file__).with_name("known_hosts")

#: The hosts in that file, in lower case and without ports: another key than those in the file is not theirs.
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

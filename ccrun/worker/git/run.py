"""One run of git: with settings and an environment of ours alone, in bounded time; and what its complaints mean.

Nothing that stands in a repository, in a home or in the system's own configuration decides what runs here. Knows no task, and
of secrets only that somebody may put some into the environment of a run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs

from ccrun.errors import CcrunError
from ccrun.process import capture
from ccrun.process.capture import OutputTooLarge, ProcessResult, ProcessTimeout
from ccrun.process.tree import MARKER_VARIABLE
from ccrun.process.user import User

#: Seconds for what needs no network: `git add` of some gigabytes takes a minute.
LOCAL_SECONDS: Final = 120.0
#: Of what a server says, in an error for a person.
MAX_QUOTED_CHARS: Final = 500

#: Where the system's own programs are. A PATH that a task's user can write to is none for a process that holds secrets.
SYSTEM_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
#: How a machine reaches the network, from the worker's own environment.
_NETWORK: Final = frozenset(
    {
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
        *("GIT_SSL_CAINFO", "GIT_SSL_CAPATH", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    }
)
#: Each of these switches off what a repository could have run, or what could ask a person.
_SETTINGS: Final = (
    "advice.detachedHead=false",
    "commit.gpgSign=false",
    "core.askPass=",
    "core.attributesFile=/dev/null",
    "core.editor=false",
    "core.excludesFile=/dev/null",
    "core.fsmonitor=false",
    "core.hooksPath=/dev/null",
    "core.pager=cat",
    "core.sshCommand=",
    "credential.helper=",
    # A repository of the task lives for minutes: whatever runs in the background outlives its use.
    "gc.auto=0",
    "gc.autoDetach=false",
    "init.defaultBranch=main",
    "maintenance.auto=false",
    "protocol.ext.allow=never",
    "submodule.recurse=false",
    # What is fetched stays one pack: see `ccrun.worker.push.Keepsake`.
    "fetch.unpackLimit=1",
    "transfer.unpackLimit=1",
)


class GitError(CcrunError):
    """git could not do what it was asked to."""


@attrs.frozen(kw_only=True)
class Git:
    """git as one user, in one folder."""

    program: Path
    environment: Mapping[str, str] = attrs.field(repr=False)
    cwd: Path
    user: User | None = None
    settings: tuple[str, ...] = ()

    async def __call__(
        self,
        *arguments: str | bytes,
        stdin: bytes = b"",
        seconds: float | None = LOCAL_SECONDS,
        max_bytes: int | None = None,
    ) -> bytes:
        """Return what a run of git prints. `arguments` begin with the command.

        Raises:
            GitError: It failed, or was not done in time.
        """
        ran = await self.run(*arguments, stdin=stdin, seconds=seconds, max_bytes=max_bytes)
        if not ran.exit.ok:
            raise GitError(
                f"git {_command(arguments)} failed: {last_error(ran.stderr) or f'exit code {ran.exit.code}'}"
            )
        return ran.stdout

    async def run(
        self,
        *arguments: str | bytes,
        stdin: bytes = b"",
        seconds: float | None = LOCAL_SECONDS,
        max_bytes: int | None = None,
    ) -> ProcessResult:
        """Run git to its end, however it ends. Raises `GitError` when it is not done in time."""
        try:
            return await capture.capture(
                self.argv(*arguments),
                env=self.environment,
                cwd=self.cwd,
                stdin=stdin,
                seconds=seconds,
                user=self.user,
                **({} if max_bytes is None else {"max_bytes": max_bytes}),
            )
        except ProcessTimeout:
            raise GitError(f"git {_command(arguments)} did not finish within {seconds:g} s.") from None
        except OutputTooLarge:
            raise GitError(f"git {_command(arguments)} printed too much.") from None

    def argv(self, *arguments: str | bytes) -> list[str]:
        """Return the whole command."""
        settings = (part for setting in (*_SETTINGS, *self.settings) for part in ("-c", setting))
        return [str(self.program), *settings, *(os.fsdecode(argument) for argument in arguments)]

    def at(self, cwd: Path, *settings: str, **environment: str) -> Git:
        """Return the same in another folder, with more settings and variables."""
        return attrs.evolve(
            self, cwd=cwd, settings=(*self.settings, *settings), environment={**self.environment, **environment}
        )


def find_git(path: str) -> Path:
    """Return where git is. Blocks while it looks at the disk.

    Raises:
        CcrunError: It is not on that PATH.
    """
    if (found := shutil.which("git", path=path)) is None:
        raise CcrunError("git was not found on the PATH of the worker, which a task with a repository needs.")
    return Path(found).absolute()


def environment(
    *, program: Path, inherited: Mapping[str, str], home: Path, marker: str, protocols: str = ""
) -> dict[str, str]:
    """Return all of git's environment.

    Args:
        program: git itself; ssh, and what else it starts, is looked for beside it and where the system keeps its programs.
        inherited: The worker's environment, of which it gets how to reach the network.
        home: A folder in which nobody has left anything for it.
        marker: By which all processes of the task are found.
        protocols: Those that it may use, with colons between them; none by default.
    """
    return {
        **{name: value for name, value in inherited.items() if name in _NETWORK},
        "PATH": f"{program.parent}:{SYSTEM_PATH}",
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home),
        "TMPDIR": str(home),
        # Its complaints are read here.
        "LC_ALL": "C",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "SSH_ASKPASS_REQUIRE": "never",
        "GIT_ALLOW_PROTOCOL": protocols or "none",
        "GIT_PROTOCOL_FROM_USER": "0",
        # A folder above the workspace is not for it.
        "GIT_CEILING_DIRECTORIES": str(home.parent),
        MARKER_VARIABLE: marker,
    }


def _command(arguments: tuple[str | bytes, ...]) -> str:
    return os.fsdecode(arguments[0])


_PREFIX: Final = re.compile(r"(?:(?:remote|fatal|error):\s*)+", re.IGNORECASE)


def last_error(stderr: bytes) -> str:
    """Return what git complained of last, on one line; empty when it said nothing."""
    return _complaints(stderr)[-1]


def first_error(stderr: bytes) -> str:
    """Return what git complained of first, which often tells more than that it gives up."""
    return _complaints(stderr)[0]


def _complaints(stderr: bytes) -> list[str]:
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines()]
    told = [line for line in lines if line and not line.startswith(("hint:", "warning:", "Cloning into"))]
    errors = [line for line in told if line.startswith(("fatal:", "error:"))]
    return [shortened(_PREFIX.sub("", line)) for line in errors or told or [""]]


def shortened(text: str) -> str:
    """Return the text, or as much of it as an error for a person bears."""
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[: MAX_QUOTED_CHARS - 1]}…"

"""Running git with its own settings and environment, and with a timeout.

No configuration of a repository, a home or the system decides what runs here.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs

from ccrun.errors import CcrunError
from ccrun.process import capture
from ccrun.process.capture import OutputTooLarge, ProcessResult, ProcessTimeout
from ccrun.process.confinement import Confinement
from ccrun.process.tree import MARKER_VARIABLE

#: Seconds for a command without network. `git add` of some gigabytes takes a minute.
LOCAL_SECONDS: Final = 120.0
#: Characters of a message of git that an error quotes.
MAX_QUOTED_CHARS: Final = 500

#: The directories of system programs. A process with secrets must not use a PATH that the agent can write to.
SYSTEM_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
#: The variables of the worker's environment that configure certificates.
_NETWORK: Final = frozenset({"GIT_SSL_CAINFO", "GIT_SSL_CAPATH", "SSL_CERT_FILE", "SSL_CERT_DIR"})
#: Settings that disable what a repository could run, and interactive questions.
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
    # A repository is used for minutes, and background maintenance would outlive that.
    "gc.auto=0",
    "gc.autoDetach=false",
    "init.defaultBranch=main",
    "maintenance.auto=false",
    "protocol.ext.allow=never",
    "submodule.recurse=false",
    # A fetch stays one pack: see `PackSnapshot`.
    "fetch.unpackLimit=1",
    "transfer.unpackLimit=1",
)


class GitError(CcrunError):
    """A git command failed."""


@attrs.frozen(kw_only=True)
class Git:
    """git as one user, in one directory."""

    program: Path
    environment: Mapping[str, str] = attrs.field(repr=False)
    cwd: Path
    confinement: Confinement | None = None
    settings: tuple[str, ...] = ()

    async def __call__(
        self,
        *arguments: str | bytes,
        stdin: bytes = b"",
        seconds: float | None = LOCAL_SECONDS,
        max_bytes: int | None = None,
    ) -> bytes:
        """Run a git command and return its output.

        Raises:
            GitError: It failed or timed out.
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
        """Run a git command and return its result, whatever the exit status.

        Raises:
            GitError: It timed out.
        """
        try:
            return await capture.capture(
                self.argv(*arguments),
                env=self.environment,
                cwd=self.cwd,
                stdin=stdin,
                seconds=seconds,
                confinement=self.confinement,
                **({} if max_bytes is None else {"max_bytes": max_bytes}),
            )
        except ProcessTimeout:
            raise GitError(f"git {_command(arguments)} did not finish within {seconds:g} s.") from None
        except OutputTooLarge:
            raise GitError(f"git {_command(arguments)} printed too much.") from None

    def argv(self, *arguments: str | bytes) -> list[str]:
        """Return the complete command."""
        settings = (part for setting in (*_SETTINGS, *self.settings) for part in ("-c", setting))
        return [str(self.program), *settings, *(os.fsdecode(argument) for argument in arguments)]

    def at(self, cwd: Path, *settings: str, **environment: str) -> Git:
        """Return git in another directory, with additional settings and variables."""
        return attrs.evolve(
            self, cwd=cwd, settings=(*self.settings, *settings), environment={**self.environment, **environment}
        )


def find_git(path: str) -> Path:
    """Return the path of git. Reads the disk, so it blocks.

    Raises:
        CcrunError: It is not on this PATH.
    """
    if (found := shutil.which("git", path=path)) is None:
        raise CcrunError("git was not found on the PATH of the worker, which a task with a repository needs.")
    return Path(found).absolute()


def environment(
    *,
    program: Path,
    inherited: Mapping[str, str],
    home: Path,
    marker: str,
    protocols: str = "",
    network: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return all environment variables of git.

    Args:
        program: The path of git. ssh and other programs are searched in its directory and in those of the system.
        inherited: The environment of the worker, of which git gets the certificates.
        home: A directory without files for git.
        marker: The marker by which the processes of the task are found.
        protocols: The protocols that git may use, separated by colons.
        network: More variables, for proxies and certificates.
    """
    return {
        **{name: value for name, value in inherited.items() if name in _NETWORK},
        **(network or {}),
        "PATH": f"{program.parent}:{SYSTEM_PATH}",
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home),
        "TMPDIR": str(home),
        # Its messages are parsed here.
        "LC_ALL": "C",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "SSH_ASKPASS_REQUIRE": "never",
        "GIT_ALLOW_PROTOCOL": protocols or "none",
        "GIT_PROTOCOL_FROM_USER": "0",
        # git must not search repositories above the workspace.
        "GIT_CEILING_DIRECTORIES": str(home.parent),
        MARKER_VARIABLE: marker,
    }


def _command(arguments: tuple[str | bytes, ...]) -> str:
    return os.fsdecode(arguments[0])


#: Directories of a task. They say nothing to a caller.
_OUR_PATHS: Final = re.compile(
    rf"{re.escape(tempfile.gettempdir())}/(?:ws-|ccrun-)[^/\s'\"]*(?:/repository(?![^/\s'\"]))?/?"
)
_PREFIX: Final = re.compile(r"^(?:(?:remote|fatal|error):\s*)+", re.IGNORECASE)


def last_error(stderr: bytes) -> str:
    """Return the last error message of git on one line, empty when there is none."""
    return _error_messages(stderr)[-1]


def first_error(stderr: bytes) -> str:
    """Return the first error message of git, which often has the cause."""
    return _error_messages(stderr)[0]


def _error_messages(stderr: bytes) -> list[str]:
    lines = [line.strip() for line in _OUR_PATHS.sub("", stderr.decode(errors="replace")).splitlines()]
    messages = [line for line in lines if line and not line.startswith(("hint:", "warning:", "Cloning into"))]
    errors = [line for line in messages if line.startswith(("fatal:", "error:"))]
    return [shortened(_PREFIX.sub("", line)) for line in errors or messages or [""]]


def shortened(text: str) -> str:
    """Return the text, shortened for an error."""
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[: MAX_QUOTED_CHARS - 1]}…"

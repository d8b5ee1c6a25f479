from __future__ import annotations

from pathlib import Path

import pytest
from helpers.git import MARKER, PROGRAM, git_at

from ccrun.errors import CcrunError
from ccrun.process.tree import MARKER_VARIABLE as MARK
from ccrun.worker.git import run
from ccrun.worker.git.run import MAX_QUOTED_CHARS, GitError, first_error, last_error


def test_environment_is_minimal(tmp_path: Path) -> None:
    """Of the worker's variables, it has only those of certificates. Prompts and, by default, all protocols are disabled."""
    inherited = {
        "PATH": "/other",
        "HTTPS_PROXY": "http://user:password@proxy",
        "GIT_SSL_CAINFO": "/etc/company.pem",
        "GIT_SSH_COMMAND": "other",
        "ANTHROPIC_API_KEY": "k",
        "HOME": "/root",
    }
    environment = run.environment(program=Path("/opt/git/bin/git"), inherited=inherited, home=tmp_path, marker="m")
    assert {
        "GIT_SSL_CAINFO": "/etc/company.pem",
        "PATH": "/opt/git/bin:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
    } == {name: environment[name] for name in ("GIT_SSL_CAINFO", "PATH", "HOME")}
    assert not {"GIT_SSH_COMMAND", "ANTHROPIC_API_KEY", "HTTPS_PROXY"} & set(environment)
    assert ("none", "0", "1", "/dev/null", "m") == tuple(
        environment[name]
        for name in ("GIT_ALLOW_PROTOCOL", "GIT_TERMINAL_PROMPT", "GIT_CONFIG_NOSYSTEM", "GIT_CONFIG_GLOBAL", MARK)
    )


async def test_output_is_returned(tmp_path: Path) -> None:
    """The command reads the given standard input."""
    assert b"ce013625030ba8dba906f756967f9e9ca394464a\n" == await git_at(tmp_path)(
        "hash-object", "--stdin", stdin=b"hello\n"
    )


async def test_error_of_a_failed_command(tmp_path: Path) -> None:
    """It has the subcommand and the message, but not the arguments, which may be confidential."""
    with pytest.raises(GitError, match=r"^git rev-parse failed: not a git repository"):
        await git_at(tmp_path)("rev-parse", "HEAD")


async def test_command_is_stopped_after_its_timeout(tmp_path: Path) -> None:
    """The error has the subcommand and the timeout."""
    waiting = git_at(tmp_path).at(tmp_path, "alias.wait=!sleep 600")
    with pytest.raises(GitError, match=r"^git wait did not finish within 0\.2 s\.$"):
        await waiting("wait", seconds=0.2)


async def test_command_with_too_much_output_is_stopped(tmp_path: Path) -> None:
    """The memory for the output is limited."""
    with pytest.raises(GitError, match=r"^git yes printed too much\.$"):
        await git_at(tmp_path).at(tmp_path, "alias.yes=!yes")("yes", max_bytes=1000)


async def test_at_adds_settings_and_variables(tmp_path: Path) -> None:
    """The original object is unchanged."""
    first = git_at(tmp_path)
    second = first.at(tmp_path / "x", "a.b=c", EXTRA="1").at(tmp_path / "y", "d.e=f")
    assert ((), ("a.b=c", "d.e=f")) == (first.settings, second.settings)
    assert ("1", MARKER) == (second.environment["EXTRA"], second.environment[MARK])
    assert "EXTRA" not in first.environment


@pytest.mark.parametrize(
    ("stderr", "first", "last"),
    [
        (b"", "", ""),
        (b"warning: x\nhint: y\n", "", ""),
        (b"Cloning into 'x'...\nfatal: one\nfatal: two\n", "one", "two"),
        (b"remote: hello\nerror: bad\nplain\n", "bad", "bad"),
        (b"plain\nwords\n", "plain", "words"),
        (b"error: fatal: nested\n", "nested", "nested"),
        (b"fatal: \xff\n", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_first_and_last_error(stderr: bytes, first: str, last: str) -> None:
    """Errors are preferred to other lines, and their prefixes are removed."""
    assert (first, last) == (first_error(stderr), last_error(stderr))


def test_long_error_is_truncated() -> None:
    """It becomes part of the error of a task."""
    assert MAX_QUOTED_CHARS == len(last_error(b"fatal: " + b"x" * 10_000))


def test_missing_git_is_an_error(tmp_path: Path) -> None:
    """`find_git` finds the program in the given PATH only."""
    assert PROGRAM == run.find_git(run.SYSTEM_PATH)
    with pytest.raises(CcrunError, match="git was not found"):
        run.find_git(str(tmp_path))

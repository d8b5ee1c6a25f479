from __future__ import annotations

from pathlib import Path

import pytest
from helpers.git import MARKER, PROGRAM, git_at

from ccrun.errors import CcrunError
from ccrun.process.tree import MARKER_VARIABLE as MARK
from ccrun.worker.git import run
from ccrun.worker.git.run import MAX_QUOTED_CHARS, GitError, first_error, last_error


def test_the_environment_is_ours_alone(tmp_path: Path) -> None:
    """Nothing of the worker's but how to reach the network; nobody is asked for anything; no protocol unless named."""
    inherited = {
        "PATH": "/evil",
        "HTTPS_PROXY": "http://proxy",
        "GIT_SSH_COMMAND": "evil",
        "ANTHROPIC_API_KEY": "k",
        "HOME": "/root",
    }
    environment = run.environment(program=Path("/opt/git/bin/git"), inherited=inherited, home=tmp_path, marker="m")
    assert {
        "HTTPS_PROXY": "http://proxy",
        "PATH": "/opt/git/bin:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
    } == {name: environment[name] for name in ("HTTPS_PROXY", "PATH", "HOME")}
    assert not {"GIT_SSH_COMMAND", "ANTHROPIC_API_KEY"} & set(environment)
    assert ("none", "0", "1", "/dev/null", "m") == tuple(
        environment[name]
        for name in ("GIT_ALLOW_PROTOCOL", "GIT_TERMINAL_PROMPT", "GIT_CONFIG_NOSYSTEM", "GIT_CONFIG_GLOBAL", MARK)
    )


async def test_what_git_prints_is_given_back(tmp_path: Path) -> None:
    """And what goes into it."""
    assert b"ce013625030ba8dba906f756967f9e9ca394464a\n" == await git_at(tmp_path)(
        "hash-object", "--stdin", stdin=b"hello\n"
    )


async def test_a_git_that_fails_is_told_in_its_last_words(tmp_path: Path) -> None:
    """With the command, and without its arguments, which may hold anything."""
    with pytest.raises(GitError, match=r"^git rev-parse failed: not a git repository"):
        await git_at(tmp_path)("rev-parse", "HEAD")


async def test_a_git_over_its_time_is_ended(tmp_path: Path) -> None:
    """In bounded time, whatever it waits for."""
    waiting = git_at(tmp_path).at(tmp_path, "alias.wait=!sleep 600")
    with pytest.raises(GitError, match=r"^git wait did not finish within 0\.2 s\.$"):
        await waiting("wait", seconds=0.2)


async def test_a_git_that_prints_too_much_is_ended(tmp_path: Path) -> None:
    """Memory stays bounded."""
    with pytest.raises(GitError, match=r"^git yes printed too much\.$"):
        await git_at(tmp_path).at(tmp_path, "alias.yes=!yes")("yes", max_bytes=1000)


async def test_another_place_keeps_what_there_was(tmp_path: Path) -> None:
    """Settings and variables are added, and the first one stays as it was."""
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
def test_complaints_become_a_sentence(stderr: bytes, first: str, last: str) -> None:
    """Faults before other words, and without what git puts in front."""
    assert (first, last) == (first_error(stderr), last_error(stderr))


def test_a_long_complaint_is_cut() -> None:
    """It goes into an error for a person."""
    assert MAX_QUOTED_CHARS == len(last_error(b"fatal: " + b"x" * 10_000))


def test_a_machine_without_git_is_told(tmp_path: Path) -> None:
    """Where git is, is looked up before anything of a task runs."""
    assert PROGRAM == run.find_git(run.SYSTEM_PATH)
    with pytest.raises(CcrunError, match="git was not found"):
        run.find_git(str(tmp_path))

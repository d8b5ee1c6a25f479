"""scripts/check.sh, in a small repository whose .venv has programs that only record how they are started."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import attrs
import pytest

ROOT: Final = Path(__file__).parents[2]
#: Seconds. A run takes less than one.
TIMEOUT: Final = 60.0
#: A program that records its arguments and exits with the status that a file names. `python -I` checks .venv in lib.sh.
PROGRAM: Final = """#!/bin/sh
[ "$1" = -I ] && exit
echo "$*" >>"$0.started"
echo "output of ${0##*/}"
exit "$(cat "$0.status" 2>/dev/null || echo 0)"
"""
PROGRAMS: Final = ("python", "ruff", "mypy", "lint-imports", "shellcheck")
FILES: Final = (
    "ccrun/__init__.py",
    "ccrun/task.py",
    "ccrun/worker/clone.py",
    "ccrun/worker/lines.py",
    "ccrun/worker/deep/inner.py",
    "docs/api.md",
    "tests/conftest.py",
    "tests/harness.py",
    "tests/test_task.py",
    "tests/standins/repos.py",
    "tests/worker/conftest.py",
    "tests/worker/test_clone.py",
    "tests/worker/test_push.py",
    "tests/scripts/test_check.py",
)


@attrs.frozen(kw_only=True)
class Repository:
    """A repository with the script in it."""

    directory: Path

    def git(self, *arguments: str) -> None:
        """Run git in the repository."""
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.com")
        subprocess.run(["git", *identity, *arguments], cwd=self.directory, check=True, capture_output=True)

    def commit(self) -> None:
        """Commit every change."""
        self.git("add", "--all")
        self.git("commit", "--message", "Change")

    def change(self, *names: str) -> None:
        """Change files, or create them."""
        for name in names:
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write("# Changed.\n")

    def program(self, name: str) -> Path:
        """Return the path of a program of .venv."""
        return self.directory / ".venv" / "bin" / name

    def check(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the script."""
        return subprocess.run(
            [self.directory / "scripts" / "check.sh", *arguments],
            cwd=self.directory.parent,
            env={"PATH": os.environ["PATH"], "HOME": str(self.directory)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    def started(self, name: str) -> list[str]:
        """Return the arguments that a program was started with, one string for each start."""
        path = self.program(f"{name}.started")
        return sorted(path.read_text().splitlines()) if path.exists() else []

    def tested(self) -> list[str]:
        """Return the test files that the script gave to pytest."""
        started = self.started("python")
        assert len(started) <= 1
        return sorted(word for run in started for word in run.split() if word.startswith("tests"))


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A repository of one commit, with a .venv that is up to date."""
    directory = tmp_path / "repository"
    repository = Repository(directory=directory)
    repository.change(*FILES)
    (directory / "tests/worker/test_push.py").write_text("from standins.repos import Repository\n")
    (directory / "tests/test_task.py").write_text("import harness\n")
    (directory / ".gitignore").write_text(".venv/\n")
    (directory / "scripts").mkdir()
    for name in ("check.sh", "lib.sh", "requirements.txt", "requirements-build.txt"):
        shutil.copy(ROOT / "scripts" / name, directory / "scripts")
    shutil.copy(ROOT / "pyproject.toml", directory)
    (directory / ".venv" / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        repository.program(name).write_text(PROGRAM)
        repository.program(name).chmod(0o755)
    stamp = ". scripts/lib.sh && installed_from >$STAMP"
    subprocess.run(["bash", "-c", stamp], cwd=directory, check=True)
    repository.git("init", "--initial-branch=main")
    repository.commit()
    return repository


@pytest.mark.parametrize(
    ("changed", "tested"),
    [
        pytest.param(["ccrun/task.py"], ["tests/test_task.py"], id="module"),
        pytest.param(["ccrun/worker/clone.py"], ["tests/worker/test_clone.py"], id="module of a package"),
        pytest.param(
            ["ccrun/worker/lines.py"],
            ["tests/worker/test_clone.py", "tests/worker/test_push.py"],
            id="module without a test file of its name",
        ),
        pytest.param(
            ["ccrun/worker/deep/inner.py"],
            ["tests/worker/test_clone.py", "tests/worker/test_push.py"],
            id="package without a directory of tests",
        ),
        pytest.param(["ccrun/__init__.py"], ["tests/test_task.py"], id="top-level package"),
        pytest.param(["tests/worker/test_push.py"], ["tests/worker/test_push.py"], id="test file"),
        pytest.param(["tests/test_new.py"], ["tests/test_new.py"], id="untracked test file"),
        pytest.param(
            ["tests/worker/conftest.py"],
            ["tests/worker/test_clone.py", "tests/worker/test_push.py"],
            id="conftest",
        ),
        pytest.param(["tests/harness.py"], ["tests/test_task.py"], id="helper module"),
        pytest.param(["tests/standins/repos.py"], ["tests/worker/test_push.py"], id="helper module of a package"),
        pytest.param(["scripts/check.sh"], ["tests/scripts/test_check.py"], id="script"),
        pytest.param(
            ["ccrun/task.py", "tests/test_task.py", "ccrun/worker/clone.py"],
            ["tests/test_task.py", "tests/worker/test_clone.py"],
            id="several, each test file once",
        ),
    ],
)
def test_a_changed_file_selects_its_tests(repository: Repository, changed: list[str], tested: list[str]) -> None:
    """Pytest runs the test files of what changed and no others."""
    repository.change(*changed)
    run = repository.check()
    assert 0 == run.returncode, run.stdout
    assert tested == repository.tested()


def test_a_file_without_tests_is_named(repository: Repository) -> None:
    """The output says which changed files no test was run for, and pytest does not run without a file."""
    repository.change("docs/api.md")
    run = repository.check()
    assert 0 == run.returncode
    assert "Without tests here: docs/api.md" in run.stdout
    assert [] == repository.started("python")


def test_a_deleted_file_selects_nothing(repository: Repository) -> None:
    """A deleted test file is not given to pytest."""
    (repository.directory / "tests/worker/test_push.py").unlink()
    assert 0 == repository.check().returncode
    assert [] == repository.tested()


def test_changes_are_counted_from_the_upstream_branch(repository: Repository) -> None:
    """Commits that the upstream branch does not have count; commits that only the upstream branch has do not."""
    repository.git("checkout", "-b", "change", "--track", "main")
    repository.change("ccrun/task.py")
    repository.commit()
    repository.git("checkout", "main")
    repository.change("ccrun/worker/clone.py")
    repository.commit()
    repository.git("checkout", "change")
    assert 0 == repository.check().returncode
    assert ["tests/test_task.py"] == repository.tested()


def test_changes_are_counted_from_a_given_revision(repository: Repository) -> None:
    """Commits after the revision count, and so do changes without a commit."""
    repository.change("ccrun/task.py")
    repository.commit()
    repository.change("ccrun/worker/clone.py")
    assert 0 == repository.check("HEAD~1").returncode
    assert ["tests/test_task.py", "tests/worker/test_clone.py"] == repository.tested()


def test_an_unknown_revision_is_an_error(repository: Repository) -> None:
    """The script names the revision and runs no check."""
    run = repository.check("no-such-revision")
    assert 0 != run.returncode
    assert "no-such-revision" in run.stdout
    assert [[]] * len(PROGRAMS) == [repository.started(name) for name in PROGRAMS]


def test_every_check_runs_on_the_whole_project(repository: Repository) -> None:
    """Lint, format, types and import contracts do not depend on what changed; shellcheck gets the changed scripts."""
    repository.change("scripts/lib.sh", "pyproject.toml")
    stamp = ". scripts/lib.sh && installed_from >$STAMP"
    subprocess.run(["bash", "-c", stamp], cwd=repository.directory, check=True)
    assert 0 == repository.check().returncode
    assert ["check", "format --check"] == repository.started("ruff")
    assert ([""], [""]) == (repository.started("mypy"), repository.started("lint-imports"))
    assert ["--external-sources scripts/lib.sh"] == repository.started("shellcheck")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_check_that_fails_fails_the_script(repository: Repository, name: str) -> None:
    """Its output is shown, and the other checks run nevertheless."""
    repository.change("ccrun/task.py", "scripts/check.sh")
    repository.program(f"{name}.status").write_text("1")
    run = repository.check()
    assert 1 == run.returncode
    assert f"output of {name}" in run.stdout
    assert all(repository.started(each) for each in PROGRAMS)


def test_a_file_of_slow_tests_only_passes(repository: Repository) -> None:
    """Pytest exits with 5 when it selects no test of the files."""
    repository.change("tests/test_task.py")
    repository.program("python.status").write_text("5")
    assert 0 == repository.check().returncode

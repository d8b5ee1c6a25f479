"""The options of the soak tests, and the directories in which they run."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs
import pytest
from soak import agent

#: With the defaults, two test processes finish within 90 seconds on two idle cores. A worker needs almost a second of a core.
DEFAULT_TASKS: Final = 24
DEFAULT_KILLS: Final = 6
DEFAULT_SECONDS: Final = 10.0
DEFAULT_LEAK_TASKS: Final = 50


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the options."""
    group = parser.getgroup("soak")
    group.addoption("--soak-tasks", type=int, help=f"tasks of a run with kills (default {DEFAULT_TASKS})")
    group.addoption("--soak-kills", type=int, help=f"kills of the service and of workers (default {DEFAULT_KILLS})")
    group.addoption(
        "--soak-seconds",
        type=float,
        help=f"seconds in which tasks are submitted and killed (default {DEFAULT_SECONDS:g})",
    )
    group.addoption("--soak-seed", type=int, help="the seed of a run with kills (default random)")
    group.addoption("--soak-leak-tasks", type=int, help=f"tasks of the search for leaks (default {DEFAULT_LEAK_TASKS})")
    group.addoption("--soak-figures", action="store_true", help="also measure stops and orphans, which takes minutes")


@pytest.fixture
def only_for_figures(request: pytest.FixtureRequest) -> None:
    """Skip a test that takes minutes, unless `--soak-figures` is given."""
    if not request.config.getoption("soak_figures", default=False):
        pytest.skip("only with --soak-figures")


@attrs.frozen(kw_only=True)
class SoakOptions:
    """How long and how much."""

    tasks: int
    kills: int
    seconds: float
    seed: int
    leak_tasks: int


@pytest.fixture
def soak_options(request: pytest.FixtureRequest) -> SoakOptions:
    """Return the options of the command line, or the defaults."""

    def option(name: str, default: float) -> float:
        # Not registered if the path of these tests was not an argument.
        given = request.config.getoption(name, default=None)
        return float(default if given is None else given)

    return SoakOptions(
        tasks=int(option("soak_tasks", DEFAULT_TASKS)),
        kills=int(option("soak_kills", DEFAULT_KILLS)),
        seconds=option("soak_seconds", DEFAULT_SECONDS),
        seed=int(option("soak_seed", secrets.randbits(32))),
        leak_tasks=int(option("soak_leak_tasks", DEFAULT_LEAK_TASKS)),
    )


@attrs.frozen(kw_only=True)
class SoakDirectories:
    """Where a soak test stores what it checks.

    Args:
        data: The data directory of the service.
        oracle: What the agents printed.
        temporary: TMPDIR of the service.
        cli: The fake CLI.
        logs: The logs of the services.
    """

    data: Path
    oracle: Path
    temporary: Path
    cli: Path
    logs: Path


@pytest.fixture
def soak_directories(tmp_path: Path, fake_cli: Callable[[str], Path]) -> Iterator[SoakDirectories]:
    """Return new directories."""
    oracle, logs = tmp_path / "oracle", tmp_path / "logs"
    oracle.mkdir()
    logs.mkdir()
    # By this path, processes that an agent has started are found whatever they do.
    (oracle / "orphan").symlink_to("/bin/sleep")
    # The workspace of a task has sockets, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        yield SoakDirectories(
            data=tmp_path / "data",
            oracle=oracle,
            temporary=Path(temporary),
            cli=fake_cli(Path(agent.__file__).read_text(encoding="utf-8")),
            logs=logs,
        )

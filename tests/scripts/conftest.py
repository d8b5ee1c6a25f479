from __future__ import annotations

from pathlib import Path

import pytest
from helpers.deploy import IN_ORDER, Clone, FullRun, make_clone


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """The scripts and an empty project."""
    return make_clone(tmp_path / "clone")


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> FullRun:
    """One run of each script, in order."""
    clone = make_clone(tmp_path_factory.mktemp("full-run") / "clone")
    runs, states = {}, {}
    for script in IN_ORDER:
        runs[script] = clone.run(script)
        states[script] = clone.state
    return FullRun(runs=runs, states=states)


@pytest.fixture
def prepared(clone: Clone, full_run: FullRun) -> Clone:
    """The scripts and a project after the first script."""
    clone.change(**full_run.after(IN_ORDER[0]))
    return clone


@pytest.fixture
def deployed(clone: Clone, full_run: FullRun) -> Clone:
    """The scripts and a project after all scripts."""
    clone.change(**full_run.state)
    return clone

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.deploy import IN_ORDER, Clone, Walk, make_clone


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """The scripts, and a project with nothing in it."""
    return make_clone(tmp_path / "clone")


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """All scripts, run once."""
    clone = make_clone(tmp_path_factory.mktemp("walk") / "clone")
    runs, states = {}, {}
    for script in IN_ORDER:
        runs[script] = clone.run(script)
        states[script] = clone.state
    return Walk(runs=runs, states=states)


@pytest.fixture
def prepared(clone: Clone, walk: Walk) -> Clone:
    """The scripts, and a project after the first of them."""
    clone.change(**walk.after(IN_ORDER[0]))
    return clone


@pytest.fixture
def deployed(clone: Clone, walk: Walk) -> Clone:
    """The scripts, and a project in which all is deployed."""
    clone.change(**walk.state)
    return clone

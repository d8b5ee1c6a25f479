"""What the images install is part of what the tests ran with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from helpers.dockerfile import CONTAINERS, ROOT

WHOLE = ROOT / "scripts" / "requirements.txt"
API = CONTAINERS / "requirements-api.txt"
WORKER = CONTAINERS / "requirements-worker.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

each_file = pytest.mark.parametrize("path", [API, WORKER], ids=["api", "worker"])


def pins(path: Path) -> dict[str, set[str]]:
    """Return each pin (name, version, marker) with its hashes."""
    pins: dict[str, set[str]] = {}
    for requirement in path.read_text().replace("\\\n", "").splitlines():
        pin, *hashes = requirement.split("--hash=")
        pins[pin.strip()] = {each.strip() for each in hashes}
    return pins


def names(requirements: list[str]) -> set[str]:
    """Return the names of the packages that these requirements are for."""
    return {re.split(r"[^A-Za-z0-9._-]", each)[0].lower() for each in requirements}


@each_file
def test_versions_are_those_of_the_tests(path: Path) -> None:
    """An image installs versions that the tests ran with, of the same hashes."""
    tested: dict[str, set[str]] = {}
    for pin, hashes in pins(WHOLE).items():
        tested.setdefault(pin.split(" ")[0], set()).update(hashes)
    strange = {
        pin: hashes
        for pin, hashes in pins(path).items()
        if not hashes or not hashes <= tested.get(pin.split(" ")[0], set())
    }
    assert {} == strange


@pytest.mark.parametrize(("path", "extras"), [(API, ["gcp"]), (WORKER, ["gcp", "claude"])], ids=["api", "worker"])
def test_everything_needed_is_there(path: Path, extras: list[str]) -> None:
    """An image installs each dependency of ccrun and of the extras that it is for."""
    project = PROJECT["project"]
    needed = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    assert set() == names(needed) - names(list(pins(path)))


@each_file
def test_nothing_of_development_is_there(path: Path) -> None:
    """No image installs what only tests and checks need."""
    development = names(PROJECT["dependency-groups"]["dev"])
    assert set() == development & names(list(pins(path)))


def test_api_has_no_cli() -> None:
    """The API's image has neither the CLI nor what came with it; the worker's has all that the API's has."""
    assert "claude-agent-sdk" not in names(list(pins(API)))
    assert pins(API).items() <= pins(WORKER).items()

"""The images install a subset of the packages that the tests ran with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from helpers.dockerfile import CONTAINERS, ROOT

TESTED = ROOT / "scripts" / "requirements.txt"
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
    """Return the package names of requirements."""
    return {re.split(r"[^A-Za-z0-9._-]", each)[0].lower() for each in requirements}


@each_file
def test_images_install_tested_versions(path: Path) -> None:
    """An image installs versions that the tests ran with, with the same hashes."""
    tested: dict[str, set[str]] = {}
    for pin, hashes in pins(TESTED).items():
        tested.setdefault(pin.split(" ")[0], set()).update(hashes)
    untested = {
        pin: hashes
        for pin, hashes in pins(path).items()
        if not hashes or not hashes <= tested.get(pin.split(" ")[0], set())
    }
    assert {} == untested


@pytest.mark.parametrize(("path", "extras"), [(API, ["gcp"]), (WORKER, ["gcp", "claude"])], ids=["api", "worker"])
def test_images_install_all_dependencies(path: Path, extras: list[str]) -> None:
    """An image installs the dependencies of ccrun and of the extras that the image uses."""
    project = PROJECT["project"]
    needed = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    assert set() == names(needed) - names(list(pins(path)))


@each_file
def test_images_install_no_development_tools(path: Path) -> None:
    """No image installs packages that only tests and checks need."""
    development = names(PROJECT["dependency-groups"]["dev"])
    assert set() == development & names(list(pins(path)))


def test_the_api_image_has_no_cli() -> None:
    """The image of the API does not install the CLI. The worker's installs all packages of the API's and more."""
    assert "claude-agent-sdk" not in names(list(pins(API)))
    assert pins(API).items() <= pins(WORKER).items()

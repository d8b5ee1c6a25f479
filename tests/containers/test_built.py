"""The images, built as far as that goes without an engine: see scratch_root. Slow: `scripts/test.sh -m slow` runs it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import aiohttp
import pytest
from helpers import dockerfile, scratch_root
from helpers.dockerfile import CONTAINERS, ROOT
from helpers.scratch_root import Built

from ccrun import __version__

#: Seconds for a service to end, on a machine that does much else.
WAIT_SECONDS: Final = 30.0
#: As the worker starts an agent.
AS_AGENT: Final = (
    *("setpriv", "--reuid=agent", "--regid=agent", "--clear-groups"),
    *("--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    # One process builds both.
    pytest.mark.xdist_group("images"),
    pytest.mark.skipif(scratch_root.why_not() is not None, reason=scratch_root.why_not() or ""),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Built]]:
    """Both images."""
    folder = tmp_path_factory.mktemp("images")
    stage = dockerfile.read(CONTAINERS / "api.Dockerfile")[-1]
    version = re.match(r"python:(3\.\d+)", stage.base)
    assert version
    base = scratch_root.debian(stage, folder)
    built = {}
    for image in ("api", "worker"):
        place = folder / image
        wheels = place / "wheels"
        wheels.mkdir(parents=True)
        needed = [ROOT / "scripts/requirements-build.txt", CONTAINERS / f"requirements-{image}.txt"]
        scratch_root.fetch(needed, version[1], wheels)
        built[image] = scratch_root.build(image, base, wheels, place)
    yield built
    subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=False)


@pytest.fixture
def api(images: dict[str, Built]) -> Built:
    """Return the API's image."""
    return images["api"]


@pytest.fixture
def worker(images: dict[str, Built]) -> Built:
    """Return the worker's image."""
    return images["worker"]


def said(ran: subprocess.CompletedProcess[str]) -> str:
    """Return what a command that succeeded has printed."""
    assert 0 == ran.returncode, ran.stdout + ran.stderr
    return ran.stdout.strip()


def test_api_runs_ccrun(api: Built) -> None:
    """The API's image runs ccrun, of this version, as its own user."""
    assert __version__ == said(api.run(*api.command[:1], "--version"))
    assert "serve" in said(api.run(*api.command[:1], "--help"))
    assert "10001:10001" == said(api.run("sh", "-c", "echo $(id -u):$(id -g)"))


async def test_api_serves(api: Built) -> None:
    """The command of the API's image serves; its health check passes then, and fails when it has heeded SIGTERM."""
    # Addresses where nobody is: a start asks nobody, and with them it needs no credentials of Google's.
    nobody = "127.0.0.1:9"
    environment = {
        "PORT": "0",
        "PROJECT_ID": "project",
        "GCS_LOGS_BUCKET": "bucket",
        "STORAGE_EMULATOR_HOST": f"http://{nobody}",
        "KMS_EMULATOR_HOST": nobody,
        "CLOUD_RUN_EMULATOR_HOST": nobody,
    }
    with subprocess.Popen(api.argv(api.command, environment), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = next(line["url"] for line in map(json.loads, process.stdout) if "url" in line)
        port = {"PORT": url.rpartition(":")[2]}
        async with aiohttp.ClientSession() as http, http.get(url) as response:
            assert __version__ == (await response.json())["version"]
        assert 0 == api.run(*api.health, environment=port).returncode
        # What is started here only waits for process 1, which an engine would tell to end.
        (process_1,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(process_1), signal.SIGTERM)
        assert 0 == await asyncio.to_thread(process.wait, WAIT_SECONDS)
    assert 0 != api.run(*api.health, environment=port).returncode


@pytest.mark.parametrize("module", ["claude_agent_sdk", "pip", "hatchling", "pytest"])
def test_api_has_only_what_it_needs(api: Built, module: str) -> None:
    """The API's image has neither the CLI, nor pip, nor what builds or tests."""
    for python in ("/opt/ccrun/bin/python", "python"):
        assert "ModuleNotFoundError" in api.run(python, "-c", f"import {module}").stderr


@pytest.mark.parametrize("module", ["pip", "hatchling", "pytest"])
def test_worker_has_only_what_it_needs(worker: Built, module: str) -> None:
    """The worker's image has neither pip, nor what builds or tests."""
    for python in ("/opt/ccrun/bin/python", "python"):
        assert "ModuleNotFoundError" in worker.run(python, "-c", f"import {module}").stderr


def test_worker_runs_ccrun(worker: Built) -> None:
    """The worker's image runs ccrun as process 1, as its own user; without a task it says that there is none."""
    entrypoint = worker.command[0]
    assert "1 10001 10001" == said(worker.run(entrypoint, "sh", "-c", "echo $$ $(id -u) $(id -G)"))
    assert __version__ == said(worker.run(entrypoint, "ccrun", "--version"))
    ran = worker.run(*worker.command)
    assert 0 != ran.returncode
    assert "TASK_ID must be set" in ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("command", "version"),
    [
        ("claude --version", r"2\.\d+"),
        ("git --version", r"git version 2\.\d+"),
        ("ssh -V", "OpenSSH"),
        ("ssh-agent -V || command -v ssh-agent", "ssh-agent|OpenSSH"),
        ("command -v ssh-add", "ssh-add"),
        ("node --version", r"v(2[0-9]|[3-9][0-9])\."),
        ("npx --version", r"\d+\.\d+"),
        ("rg --version", "ripgrep"),
        ("python3 --version", r"Python 3\."),
    ],
)
def test_agent_has_its_tools(worker: Built, command: str, version: str) -> None:
    """In the worker's image the agent's user, with a fresh home, runs the CLI and what agents use."""
    home = "HOME=$(mktemp -d); export HOME; "
    ran = worker.run(worker.command[0], *AS_AGENT, "sh", "-c", f"{home}{command} 2>&1")
    assert re.search(version, said(ran)), ran.stdout


def test_worker_runs_a_task(worker: Built) -> None:
    """In the worker's image a task runs from request to callback, with the real CLI and a scripted model."""
    environment = {"CCRUN_BACKEND": "local", "CCRUN_DATA_DIR": "/tmp/data", "TMPDIR": "/tmp"}
    ran = worker.run(worker.command[0], "ccrun", "demo", environment=environment)
    assert "completed" in said(ran)


@pytest.mark.parametrize("image", ["api", "worker"])
def test_nobody_can_change_ccrun(images: dict[str, Built], image: str) -> None:
    """What is installed belongs to root, and nobody else may write to it."""
    root = images[image].root
    program = [root / "usr/local/bin/worker-entrypoint"] if image == "worker" else []
    paths = [path for path in [*(root / "opt/ccrun").rglob("*"), *program] if not path.is_symlink()]
    assert len(paths) > 1000
    assert [] == [path for path in paths if path.stat().st_uid != 0 or path.stat().st_mode & 0o022]


@pytest.mark.parametrize("image", ["api", "worker"])
def test_starts_compile_nothing(images: dict[str, Built], image: str) -> None:
    """All of ccrun's modules are there as bytecode."""
    (package,) = images[image].root.glob("opt/ccrun/lib/python3.*/site-packages/ccrun")
    modules = {path.stem for path in package.glob("*.py")}
    compiled = {path.name.partition(".")[0] for path in package.glob("__pycache__/*.pyc")}
    assert modules == compiled

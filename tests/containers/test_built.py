"""The images, built without a container engine (see scratch_root). These tests are slow: `scripts/test.sh -m slow` runs them."""

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
from helpers.scratch_root import Image

from ccrun import __version__

#: Seconds for a service to exit on a busy machine.
WAIT_SECONDS: Final = 30.0
#: Run a command as the agent's user, as the worker does.
AS_AGENT: Final = (
    *("setpriv", "--reuid=agent", "--regid=agent", "--clear-groups"),
    *("--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    # One test process builds both images and runs all tests of this file.
    pytest.mark.xdist_group("images"),
    pytest.mark.skipif(scratch_root.unmet_requirement() is not None, reason=scratch_root.unmet_requirement() or ""),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Image]]:
    """Build both images."""
    directory = tmp_path_factory.mktemp("images")
    stage = dockerfile.read(CONTAINERS / "api.Dockerfile")[-1]
    version = re.match(r"python:(3\.\d+)", stage.base)
    assert version
    base = scratch_root.create_base(stage, directory)
    built = {}
    for image in ("api", "worker"):
        image_directory = directory / image
        wheels = image_directory / "wheels"
        wheels.mkdir(parents=True)
        requirements = [ROOT / "scripts/requirements-build.txt", CONTAINERS / f"requirements-{image}.txt"]
        scratch_root.download(requirements, version[1], wheels)
        built[image] = scratch_root.build(image, base, wheels, image_directory)
    yield built
    subprocess.run(["rm", "-rf", "--one-file-system", str(directory)], check=False)


@pytest.fixture
def api(images: dict[str, Image]) -> Image:
    """Return the image of the API."""
    return images["api"]


@pytest.fixture
def worker(images: dict[str, Image]) -> Image:
    """Return the image of the worker."""
    return images["worker"]


def output_of(ran: subprocess.CompletedProcess[str]) -> str:
    """Check that a command succeeded and return its standard output."""
    assert 0 == ran.returncode, ran.stdout + ran.stderr
    return ran.stdout.strip()


def test_the_api_image_runs_ccrun(api: Image) -> None:
    """The image of the API runs this version of ccrun as the user 10001."""
    assert __version__ == output_of(api.run(*api.command[:1], "--version"))
    assert "serve" in output_of(api.run(*api.command[:1], "--help"))
    assert "10001:10001" == output_of(api.run("sh", "-c", "echo $(id -u):$(id -g)"))


async def test_the_api_image_serves(api: Image) -> None:
    """The command of the API's image starts the service. The health check passes until the service exits after SIGTERM."""
    # Nothing listens at this address. The service sends no request at its start, and needs no Google credentials for emulators.
    unused = "127.0.0.1:9"
    environment = {
        "PORT": "0",
        "PROJECT_ID": "project",
        "GCS_LOGS_BUCKET": "bucket",
        "STORAGE_EMULATOR_HOST": f"http://{unused}",
        "KMS_EMULATOR_HOST": unused,
        "CLOUD_RUN_EMULATOR_HOST": unused,
    }
    with subprocess.Popen(api.argv(api.command, environment), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = next(line["url"] for line in map(json.loads, process.stdout) if "url" in line)
        port = {"PORT": url.rpartition(":")[2]}
        async with aiohttp.ClientSession() as http, http.get(url) as response:
            assert __version__ == (await response.json())["version"]
        assert 0 == api.run(*api.health, environment=port).returncode
        # The started process only waits for process 1, to which a container engine would send the signal.
        (process_1,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(process_1), signal.SIGTERM)
        assert 0 == await asyncio.to_thread(process.wait, WAIT_SECONDS)
    assert 0 != api.run(*api.health, environment=port).returncode


@pytest.mark.parametrize("module", ["claude_agent_sdk", "pip", "hatchling", "pytest"])
def test_the_api_image_has_no_cli_and_no_tools(api: Image, module: str) -> None:
    """The image of the API has neither the CLI nor pip, build tools or test tools."""
    for python in ("/opt/ccrun/bin/python", "python"):
        assert "ModuleNotFoundError" in api.run(python, "-c", f"import {module}").stderr


@pytest.mark.parametrize("module", ["pip", "hatchling", "pytest"])
def test_the_worker_image_has_no_tools(worker: Image, module: str) -> None:
    """The image of the worker has no pip, build tools or test tools."""
    for python in ("/opt/ccrun/bin/python", "python"):
        assert "ModuleNotFoundError" in worker.run(python, "-c", f"import {module}").stderr


def test_the_worker_image_runs_ccrun(worker: Image) -> None:
    """The image of the worker runs ccrun as process 1 and as the user 10001. Without a task ID it reports that."""
    entrypoint = worker.command[0]
    assert "1 10001 10001" == output_of(worker.run(entrypoint, "sh", "-c", "echo $$ $(id -u) $(id -G)"))
    assert __version__ == output_of(worker.run(entrypoint, "ccrun", "--version"))
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
        ("git lfs version", "git-lfs"),
        ("python3 --version", r"Python 3\."),
    ],
)
def test_the_agent_has_its_tools(worker: Image, command: str, version: str) -> None:
    """In the image of the worker, the agent's user can run the CLI and the other tools with a new home directory."""
    home = "HOME=$(mktemp -d); export HOME; "
    ran = worker.run(worker.command[0], *AS_AGENT, "sh", "-c", f"{home}{command} 2>&1")
    assert re.search(version, output_of(ran)), ran.stdout


def test_the_worker_image_runs_a_task(worker: Image) -> None:
    """The image of the worker runs a task from request to callback, with the real CLI and a scripted model."""
    environment = {"CCRUN_BACKEND": "local", "CCRUN_DATA_DIR": "/tmp/data", "TMPDIR": "/tmp"}
    ran = worker.run(worker.command[0], "ccrun", "demo", environment=environment)
    assert "completed" in output_of(ran)


@pytest.mark.parametrize("image", ["api", "worker"])
def test_only_root_can_change_ccrun(images: dict[str, Image], image: str) -> None:
    """The installed files belong to root, and no other user may write to them."""
    root = images[image].root
    programs = [root / "usr/local/bin/worker-entrypoint"] if image == "worker" else []
    paths = [path for path in [*(root / "opt/ccrun").rglob("*"), *programs] if not path.is_symlink()]
    assert len(paths) > 1000
    assert [] == [path for path in paths if path.stat().st_uid != 0 or path.stat().st_mode & 0o022]


@pytest.mark.parametrize("image", ["api", "worker"])
def test_a_start_compiles_no_module(images: dict[str, Image], image: str) -> None:
    """The images contain the bytecode of all modules of ccrun."""
    (package,) = images[image].root.glob("opt/ccrun/lib/python3.*/site-packages/ccrun")
    modules = {path.stem for path in package.glob("*.py")}
    compiled = {path.name.partition(".")[0] for path in package.glob("__pycache__/*.pyc")}
    assert modules == compiled

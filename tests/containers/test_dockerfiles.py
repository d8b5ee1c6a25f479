"""The Dockerfiles, read but not built: what they start as, what they copy, what they are made of."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import dockerfile
from helpers.dockerfile import CONTAINERS, ROOT
from helpers.service import Service, StartService

HADOLINT = Path(sys.executable).with_name("hadolint")
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
DOCKERFILES = sorted(CONTAINERS.glob("*.Dockerfile"))
API = dockerfile.read(CONTAINERS / "api.Dockerfile")
WORKER = dockerfile.read(CONTAINERS / "worker.Dockerfile")

each_image = pytest.mark.parametrize("stages", [API, WORKER], ids=["api", "worker"])


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint comes as a program for Linux alone")
def test_hadolint_finds_nothing() -> None:
    """The Dockerfiles keep the rules of hadolint, but for those that .hadolint.yaml takes out with a reason."""
    ran = subprocess.run([HADOLINT, *DOCKERFILES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (0, "") == (ran.returncode, ran.stdout + ran.stderr)


def test_shellcheck_finds_nothing() -> None:
    """The entry point keeps the rules of shellcheck."""
    ran = subprocess.run([SHELLCHECK, *CONTAINERS.glob("*.sh")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (0, "") == (ran.returncode, ran.stdout + ran.stderr)


@each_image
def test_bases_are_pinned_and_one(stages: list[dockerfile.Stage]) -> None:
    """Every stage stands on the same base, named by version and digest."""
    bases = {stage.base for stages_ in (API, WORKER) for stage in stages_}
    assert 1 == len(bases)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+@sha256:[0-9a-f]{64}", stages[-1].base)


@each_image
def test_what_is_copied_is_there(stages: list[dockerfile.Stage]) -> None:
    """Each COPY finds its sources: they are in the repository, .dockerignore lets them through, stages are named."""
    names = {stage.name for stage in stages}
    copies = [copy for stage in stages for copy in stage.all("COPY")]
    sources = [source for copy in copies if "from" not in copy.flags for source in copy.words[:-1]]
    assert [] == [source for source in sources if not (ROOT / source).exists()]
    assert [] == [source for source in sources if not dockerfile.reaches_builder(source.rstrip("/"))]
    assert {copy.flags["from"] for copy in copies if "from" in copy.flags} <= names


def test_nothing_else_reaches_the_builder() -> None:
    """Of the files that git knows, the builder gets those that some COPY names; of others none."""
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    copied = {
        source.rstrip("/")
        for stage in (*API, *WORKER)
        for copy in stage.all("COPY")
        if "from" not in copy.flags
        for source in copy.words[:-1]
    }
    reaching = {name for name in known if name and dockerfile.reaches_builder(name)}
    assert {name for name in known if name in copied or name.split("/")[0] in copied} == reaching
    kept_out = [
        ".git/config",
        ".env",
        ".ccrun/key",
        "ccrun/__pycache__/log.cpython-313.pyc",
        "a.pyo",
        ".venv/pyvenv.cfg",
    ]
    assert [] == [name for name in kept_out if dockerfile.reaches_builder(name)]


def test_api_is_not_root() -> None:
    """The API's image runs as a user by number, and not as root."""
    assert ["10001:10001"] == API[-1].last("USER").words
    assert ["ccrun"] == API[-1].last("ENTRYPOINT").words
    assert ["serve"] == API[-1].last("CMD").words


def test_worker_drops_root_first() -> None:
    """The worker's image starts as root with its entry point, and with nothing else."""
    assert [] == WORKER[-1].all("USER")
    assert ["worker-entrypoint"] == WORKER[-1].last("ENTRYPOINT").words
    assert ["ccrun", "worker"] == WORKER[-1].last("CMD").words
    (entrypoint,) = [copy for copy in WORKER[-1].all("COPY") if "from" not in copy.flags]
    assert ["containers/worker-entrypoint.sh", "/usr/local/bin/worker-entrypoint"] == entrypoint.words
    assert "agent" == WORKER[-1].environment["CCRUN_AGENT_USER"]


def test_cli_is_where_the_link_points() -> None:
    """`claude` on the PATH of the worker's image is the one that the claude-agent-sdk carries, under the image's Python."""
    version = re.match(r"python:(3\.\d+)", WORKER[-1].base)
    assert version
    (link,) = re.findall(r"ln -s (\S+) /usr/local/bin/claude", " ".join(run.value for run in WORKER[-1].all("RUN")))
    package = f"/opt/ccrun/lib/python{version[1]}/site-packages/claude_agent_sdk"
    assert link.startswith(package)
    spec = importlib.util.find_spec("claude_agent_sdk")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).with_name("_bundled").joinpath("claude").is_file()
    assert f"{package}/_bundled/claude" == link


@each_image
def test_images_say_what_they_are(stages: list[dockerfile.Stage]) -> None:
    """Each image has OCI labels, with version, revision and time given by whoever builds it."""
    labels = stages[-1].last("LABEL").variables
    prefix = "org.opencontainers.image."
    assert {"title", "description", "licenses", "version", "revision", "created"} == {
        name.removeprefix(prefix) for name in labels
    }
    arguments = {name for argument in stages[-1].all("ARG") for name in argument.variables}
    assert {labels[prefix + name] for name in ("version", "revision", "created")} == {
        f"${{{name}}}" for name in arguments
    }


@each_image
def test_nothing_is_fetched_without_a_hash(stages: list[dockerfile.Stage]) -> None:
    """What pip installs is checked by hash or comes from the build itself; nothing is piped into a shell."""
    steps = [step for stage in stages for run in stage.all("RUN") for step in run.value.split("&&")]
    installs = [step for step in steps if re.search(r"\bpip\b.* install\b", step)]
    assert 3 == len(installs)
    assert [] == [step for step in installs if "--require-hashes" not in step and "--no-index" not in step]
    assert [] == [step for step in installs if "--no-deps" not in step]
    assert [] == [step for step in steps if re.search(r"\b(curl|wget)\b", step)]


@each_image
def test_pip_is_gone(stages: list[dockerfile.Stage]) -> None:
    """The image that is left has no pip: neither Python's nor that of ccrun's own environment."""
    assert "pip uninstall" in stages[-1].last("RUN").value
    assert ["python -m venv --without-pip /opt/ccrun"] == re.findall(
        r"python -m venv .*?/opt/ccrun", stages[0].all("RUN")[0].value
    )


async def asked_health(port: int) -> int:
    """Return the exit status of the API image's health check, for a service at that port."""
    check = API[-1].last("HEALTHCHECK")
    command, *arguments = dockerfile.Instruction(
        name="CMD", flags={}, value=check.value.removeprefix("CMD").strip()
    ).words
    assert "python" == command
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env={"PORT": str(port)}, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait()


async def test_health_check_passes(service: Service) -> None:
    """The health check of the API's image passes while the service answers."""
    port = int(service.url.rpartition(":")[2])
    assert 0 == await asked_health(port)


async def test_health_check_fails(start_service: StartService) -> None:
    """The health check of the API's image fails when the service has ended."""
    async with start_service() as service:
        port = int(service.url.rpartition(":")[2])
    assert 0 != await asked_health(port)


def test_worker_has_no_health_check() -> None:
    """The worker's image says that there is nothing to ask."""
    assert ["NONE"] == WORKER[-1].last("HEALTHCHECK").words

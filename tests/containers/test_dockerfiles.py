"""The Dockerfiles, parsed but not built: users, commands, copied files, base images, health checks."""

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


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint is available for Linux only")
def test_hadolint_reports_nothing() -> None:
    """The Dockerfiles comply with the rules of hadolint, except those that .hadolint.yaml disables with a reason."""
    ran = subprocess.run([HADOLINT, *DOCKERFILES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (0, "") == (ran.returncode, ran.stdout + ran.stderr)


def test_shellcheck_reports_nothing() -> None:
    """The entry point complies with the rules of shellcheck."""
    ran = subprocess.run([SHELLCHECK, *CONTAINERS.glob("*.sh")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (0, "") == (ran.returncode, ran.stdout + ran.stderr)


@each_image
def test_all_stages_have_one_pinned_base(stages: list[dockerfile.Stage]) -> None:
    """All stages use the same base image, pinned by version and digest."""
    bases = {stage.base for stages_ in (API, WORKER) for stage in stages_}
    assert 1 == len(bases)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+@sha256:[0-9a-f]{64}", stages[-1].base)


@each_image
def test_each_copy_finds_its_sources(stages: list[dockerfile.Stage]) -> None:
    """The sources of each COPY exist in the repository and in the build context, and its stage exists."""
    names = {stage.name for stage in stages}
    copies = [copy for stage in stages for copy in stage.all("COPY")]
    sources = [source for copy in copies if "from" not in copy.flags for source in copy.words[:-1]]
    assert [] == [source for source in sources if not (ROOT / source).exists()]
    assert [] == [source for source in sources if not dockerfile.in_build_context(source.rstrip("/"))]
    assert {copy.flags["from"] for copy in copies if "from" in copy.flags} <= names


def test_the_build_context_has_only_copied_files() -> None:
    """The build context has the tracked files that a COPY names, and no others."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    copied = {
        source.rstrip("/")
        for stage in (*API, *WORKER)
        for copy in stage.all("COPY")
        if "from" not in copy.flags
        for source in copy.words[:-1]
    }
    context = {name for name in tracked if name and dockerfile.in_build_context(name)}
    assert {name for name in tracked if name in copied or name.split("/")[0] in copied} == context
    ignored = [
        ".git/config",
        ".env",
        ".ccrun/key",
        "ccrun/__pycache__/log.cpython-313.pyc",
        "a.pyo",
        ".venv/pyvenv.cfg",
    ]
    assert [] == [name for name in ignored if dockerfile.in_build_context(name)]


def test_the_api_is_not_root() -> None:
    """The image of the API runs as a user who is not root and is given by number."""
    assert ["10001:10001"] == API[-1].last("USER").words
    assert ["ccrun"] == API[-1].last("ENTRYPOINT").words
    assert ["serve"] == API[-1].last("CMD").words


def test_the_worker_starts_with_its_entry_point() -> None:
    """The image of the worker starts as root and always with its entry point."""
    assert [] == WORKER[-1].all("USER")
    assert ["worker-entrypoint"] == WORKER[-1].last("ENTRYPOINT").words
    assert ["ccrun", "worker"] == WORKER[-1].last("CMD").words
    (entrypoint,) = [copy for copy in WORKER[-1].all("COPY") if "from" not in copy.flags]
    assert ["containers/worker-entrypoint.sh", "/usr/local/bin/worker-entrypoint"] == entrypoint.words
    assert "agent" == WORKER[-1].environment["CCRUN_AGENT_USER"]


def test_the_link_to_the_cli_is_correct() -> None:
    """`claude` on the PATH of the worker's image links to the CLI in the package claude-agent-sdk of the image's Python."""
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
def test_images_have_labels(stages: list[dockerfile.Stage]) -> None:
    """Each image has the OCI labels. Version, revision and time are arguments of the build."""
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
def test_all_downloads_are_checked_by_hash(stages: list[dockerfile.Stage]) -> None:
    """Packages that pip installs are checked by hash or built in the image; curl and wget are not used."""
    steps = [step for stage in stages for run in stage.all("RUN") for step in run.value.split("&&")]
    installs = [step for step in steps if re.search(r"\bpip\b.* install\b", step)]
    assert 3 == len(installs)
    assert [] == [step for step in installs if "--require-hashes" not in step and "--no-index" not in step]
    assert [] == [step for step in installs if "--no-deps" not in step]
    assert [] == [step for step in steps if re.search(r"\b(curl|wget)\b", step)]


@each_image
def test_the_final_image_has_no_pip(stages: list[dockerfile.Stage]) -> None:
    """The final image has no pip, neither in its Python nor in the virtual environment of ccrun."""
    assert "pip uninstall" in stages[-1].last("RUN").value
    assert ["python -m venv --without-pip /opt/ccrun"] == re.findall(
        r"python -m venv .*?/opt/ccrun", stages[0].all("RUN")[0].value
    )


async def health_check(port: int) -> int:
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


async def test_the_health_check_passes(service: Service) -> None:
    """The health check of the API's image passes while the service responds."""
    port = int(service.url.rpartition(":")[2])
    assert 0 == await health_check(port)


async def test_the_health_check_fails(start_service: StartService) -> None:
    """The health check of the API's image fails after the service has stopped."""
    async with start_service() as service:
        port = int(service.url.rpartition(":")[2])
    assert 0 != await health_check(port)


def test_the_worker_has_no_health_check() -> None:
    """The image of the worker disables the health check."""
    assert ["NONE"] == WORKER[-1].last("HEALTHCHECK").words

"""Builds a Dockerfile in directories of this machine, without a container engine. Needs root and debootstrap.

A stand-in replaces the base image: a new installation of the same Debian release, with Debian's Python of the same version in the
place of the image's. Everything else is real: each RUN runs as written, with the directory as its root. Debian packages come from
the mirror that this machine uses. Python packages are downloaded before, so that pip finds only those.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs

from helpers import dockerfile
from helpers.dockerfile import CONTAINERS, ROOT, Instruction, Stage

#: The variables that configure pip on this machine, read before the tests remove them.
_PIP_VARIABLES: Final = {
    name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.lower().endswith("_proxy")
}
_HOME: Final = os.environ.get("HOME", "/")
#: The PATH that a container engine sets if no ENV does.
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: The directory in the root with the packages for pip.
_WHEELS: Final = "/wheels"
#: Minor version of glibc 2 in Debian 13, which wheels may require at most.
_NEWEST_GLIBC: Final = 41


def unmet_requirement() -> str | None:
    """Return why images cannot be built on this machine, or None if they can."""
    if sys.platform != "linux" or os.getuid() != 0:
        return "building in a directory needs root on Linux"
    for program in ("debootstrap", "apt-get", "unshare", "chroot"):
        if shutil.which(program) is None:
            return f"building in a directory needs {program}"
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False).returncode:
        return "building in a directory needs namespaces, which cannot be created here"
    return None


@attrs.frozen(kw_only=True)
class Image:
    """A built stage: its root directory, and how its processes are started."""

    root: Path
    environment: Mapping[str, str]
    cwd: str
    user: str | None
    command: Sequence[str]
    health: Sequence[str]

    def argv(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
        """Return the arguments that run a command as in a container of the image: as process 1, in its root, as its user."""
        variables = {"PATH": _PATH, "HOME": "/root", **self.environment, **(environment or {})}
        return [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={self.root}/proc"),
            *("chroot", *(() if self.user is None else (f"--userspec={self.user}",)), str(self.root)),
            *("env", "-i", f"--chdir={self.cwd}", *(f"{name}={value}" for name, value in variables.items())),
            *command,
        ]

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command as in a container of the image."""
        argv = self.argv(command, environment)
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def create_base(stage: Stage, directory: Path) -> Path:
    """Create the stand-in for the base image of a stage."""
    base = re.match(r"python:(3\.\d+)\.\d+-slim-([a-z]+)", stage.base)
    assert base
    python, release = base.groups()
    targets = _output("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian")
    root = directory / "base"
    packages = f"ca-certificates,python{python}-venv,python3-venv"
    _output("debootstrap", "--variant=minbase", f"--include={packages}", release, str(root), targets.split()[0])
    shutil.copyfile("/etc/resolv.conf", root / "etc/resolv.conf")
    # In the real image, `python` is in /usr/local and has pip.
    _output("chroot", str(root), f"python{python}", "-m", "venv", "/usr/local")
    return root


def download(requirements: Sequence[Path], python: str, directory: Path) -> None:
    """Download packages for the Python of the image, and check the hash of each."""
    machine = sysconfig.get_platform().rpartition("-")[2]
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(5, _NEWEST_GLIBC + 1)]
    platforms += [f"manylinux2014_{machine}", f"linux_{machine}"]
    flags = [f"--platform={platform}" for platform in platforms]
    flags += [f"--python-version={python}", "--implementation=cp", "--abi=cp" + python.replace(".", ""), "--abi=abi3"]
    for path in requirements:
        _output(
            *(
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--require-hashes",
            ),
            *(*flags, "--abi=none", "--dest", str(directory), "--requirement", str(path)),
            environment={"PATH": os.environ["PATH"], "HOME": _HOME, **_PIP_VARIABLES},
        )


def build(image: str, base: Path, wheels: Path, directory: Path) -> Image:
    """Build the stages of an image's Dockerfile in order, and return the last."""
    built: dict[str | None, Image] = {}
    for stage in dockerfile.read(CONTAINERS / f"{image}.Dockerfile"):
        root = directory / (stage.name or "image")
        _output("cp", "--archive", str(base), str(root))
        built[stage.name] = _build(stage, root, wheels, {name: each.root for name, each in built.items() if name})
    return built[None]


def _build(stage: Stage, root: Path, wheels: Path, others: Mapping[str, Path]) -> Image:
    image = Image(root=root, environment={}, cwd="/", user=None, command=(), health=())
    for instruction in stage.instructions:
        match instruction.name:
            case "RUN":
                shutil.copytree(wheels, root / _WHEELS.strip("/"), dirs_exist_ok=True)
                offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": _WHEELS, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
                ran = image.run("sh", "-c", instruction.value, environment=offline)
                assert 0 == ran.returncode, f"{instruction.value}\n{ran.stdout[-4000:]}{ran.stderr[-4000:]}"
                shutil.rmtree(root / _WHEELS.strip("/"))
            case "COPY":
                _copy(instruction, root, image.cwd, others)
            case "WORKDIR":
                image = attrs.evolve(image, cwd=instruction.value)
                (root / image.cwd.strip("/")).mkdir(parents=True, exist_ok=True)
            case "ENV":
                image = attrs.evolve(image, environment={**image.environment, **instruction.variables})
            case "USER":
                image = attrs.evolve(image, user=instruction.value)
            case "ENTRYPOINT" | "CMD":
                image = attrs.evolve(image, command=(*image.command, *instruction.words))
            case "HEALTHCHECK" if instruction.value.startswith("CMD"):
                check = Instruction(name="CMD", flags={}, value=instruction.value.removeprefix("CMD").strip())
                image = attrs.evolve(image, health=check.words)
    return image


def _copy(copy: Instruction, root: Path, cwd: str, others: Mapping[str, Path]) -> None:
    *sources, target = copy.words
    destination = root / os.path.normpath(f"{cwd}/{target}" if not target.startswith("/") else target).strip("/")
    for source in sources:
        if "from" in copy.flags:
            destination.parent.mkdir(parents=True, exist_ok=True)
            _output("cp", "--archive", str(others[copy.flags["from"]] / source.strip("/")), str(destination))
            continue
        for path in [ROOT / source, *(ROOT / source).rglob("*")]:
            name = str(path.relative_to(ROOT))
            if path.is_file() and dockerfile.in_build_context(name):
                into_directory = target.endswith("/") and path == ROOT / source
                copied = destination / path.name if into_directory else destination / path.relative_to(ROOT / source)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copied)
                copied.chmod(int(copy.flags.get("chmod", "0644"), 8))


def _output(*argv: str, environment: Mapping[str, str] | None = None) -> str:
    ran = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment)
    assert 0 == ran.returncode, f"{argv[0]} failed:\n{ran.stdout[-4000:]}{ran.stderr[-4000:]}"
    return ran.stdout

"""Builds what a Dockerfile says in folders of this machine, where no container engine runs. Needs root and debootstrap.

The base image is stood in for: a fresh Debian of the same release, with Debian's own Python of the same version where the
image has one. Everything else is taken by its word: each RUN runs as it is written, in the folder as its root, with Debian's
packages from the mirror that this machine uses, and with Python's packages fetched beforehand, so that pip finds those alone.
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

#: As pip is set up on this machine, before the tests take such variables away.
_SETTINGS: Final = {
    name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.lower().endswith("_proxy")
}
_HOME: Final = os.environ.get("HOME", "/")
#: What an engine gives a process that no ENV speaks of.
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Where a root keeps the packages for pip.
_WHEELS: Final = "/wheels"
#: glibc of Debian 13, whose wheels fit.
_NEWEST_GLIBC: Final = 41


def why_not() -> str | None:
    """Return why nothing can be built here, if so."""
    if sys.platform != "linux" or os.getuid() != 0:
        return "building in a folder takes root, on Linux"
    for program in ("debootstrap", "apt-get", "unshare", "chroot"):
        if shutil.which(program) is None:
            return f"building in a folder takes {program}"
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False).returncode:
        return "building in a folder takes namespaces, which cannot be made here"
    return None


@attrs.frozen(kw_only=True)
class Built:
    """A stage that was built: its folder, and what its processes start with."""

    root: Path
    environment: Mapping[str, str]
    cwd: str
    user: str | None
    command: Sequence[str]
    health: Sequence[str]

    def argv(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
        """Return what runs a command as a container of the image would: as process 1, in its root, as its user."""
        variables = {"PATH": _PATH, "HOME": "/root", **self.environment, **(environment or {})}
        return [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={self.root}/proc"),
            *("chroot", *(() if self.user is None else (f"--userspec={self.user}",)), str(self.root)),
            *("env", "-i", f"--chdir={self.cwd}", *(f"{name}={value}" for name, value in variables.items())),
            *command,
        ]

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command as a container of the image would."""
        argv = self.argv(command, environment)
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def debian(stage: Stage, folder: Path) -> Path:
    """Make what stands in for the base image of a stage."""
    base = re.match(r"python:(3\.\d+)\.\d+-slim-([a-z]+)", stage.base)
    assert base
    python, release = base.groups()
    targets = _output("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian")
    root = folder / "base"
    packages = f"ca-certificates,python{python}-venv,python3-venv"
    _output("debootstrap", "--variant=minbase", f"--include={packages}", release, str(root), targets.split()[0])
    shutil.copyfile("/etc/resolv.conf", root / "etc/resolv.conf")
    # The image has its Python in /usr/local, as `python`, with pip.
    _output("chroot", str(root), f"python{python}", "-m", "venv", "/usr/local")
    return root


def fetch(requirements: Sequence[Path], python: str, folder: Path) -> None:
    """Fetch packages for the image's Python, each checked by its hash."""
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
            *(*flags, "--abi=none", "--dest", str(folder), "--requirement", str(path)),
            environment={"PATH": os.environ["PATH"], "HOME": _HOME, **_SETTINGS},
        )


def build(image: str, base: Path, wheels: Path, folder: Path) -> Built:
    """Do what an image's Dockerfile says, stage by stage; return the last."""
    built: dict[str | None, Built] = {}
    for stage in dockerfile.read(CONTAINERS / f"{image}.Dockerfile"):
        root = folder / (stage.name or "image")
        _output("cp", "--archive", str(base), str(root))
        built[stage.name] = _build(stage, root, wheels, {name: each.root for name, each in built.items() if name})
    return built[None]


def _build(stage: Stage, root: Path, wheels: Path, others: Mapping[str, Path]) -> Built:
    now = Built(root=root, environment={}, cwd="/", user=None, command=(), health=())
    for instruction in stage.instructions:
        match instruction.name:
            case "RUN":
                shutil.copytree(wheels, root / _WHEELS.strip("/"), dirs_exist_ok=True)
                offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": _WHEELS, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
                ran = now.run("sh", "-c", instruction.value, environment=offline)
                assert 0 == ran.returncode, f"{instruction.value}\n{ran.stdout[-4000:]}{ran.stderr[-4000:]}"
                shutil.rmtree(root / _WHEELS.strip("/"))
            case "COPY":
                _copy(instruction, root, now.cwd, others)
            case "WORKDIR":
                now = attrs.evolve(now, cwd=instruction.value)
                (root / now.cwd.strip("/")).mkdir(parents=True, exist_ok=True)
            case "ENV":
                now = attrs.evolve(now, environment={**now.environment, **instruction.variables})
            case "USER":
                now = attrs.evolve(now, user=instruction.value)
            case "ENTRYPOINT" | "CMD":
                now = attrs.evolve(now, command=(*now.command, *instruction.words))
            case "HEALTHCHECK" if instruction.value.startswith("CMD"):
                check = Instruction(name="CMD", flags={}, value=instruction.value.removeprefix("CMD").strip())
                now = attrs.evolve(now, health=check.words)
    return now


def _copy(copy: Instruction, root: Path, cwd: str, others: Mapping[str, Path]) -> None:
    *sources, target = copy.words
    place = root / os.path.normpath(f"{cwd}/{target}" if not target.startswith("/") else target).strip("/")
    for source in sources:
        if "from" in copy.flags:
            place.parent.mkdir(parents=True, exist_ok=True)
            _output("cp", "--archive", str(others[copy.flags["from"]] / source.strip("/")), str(place))
            continue
        for path in [ROOT / source, *(ROOT / source).rglob("*")]:
            name = str(path.relative_to(ROOT))
            if path.is_file() and dockerfile.reaches_builder(name):
                into_folder = target.endswith("/") and path == ROOT / source
                copied = place / path.name if into_folder else place / path.relative_to(ROOT / source)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copied)
                copied.chmod(int(copy.flags.get("chmod", "0644"), 8))


def _output(*argv: str, environment: Mapping[str, str] | None = None) -> str:
    ran = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment)
    assert 0 == ran.returncode, f"{argv[0]} failed:\n{ran.stdout[-4000:]}{ran.stderr[-4000:]}"
    return ran.stdout

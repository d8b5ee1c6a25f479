"""The scripts of the deployment in a clone of their own, with a stand-in for gcloud that keeps a project in a file."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import attrs

ROOT: Final = Path(__file__).parents[2]
STANDIN: Final = ROOT / "tests" / "standins" / "gcloud.py"
PROJECT: Final = "made-up-project"
OPERATOR: Final = "operator@example.com"
#: All that the scripts call beside gcloud; nothing else is on their PATH.
TOOLS: Final = (
    *("bash", "sh", "dirname", "mktemp", "rm", "cat", "grep", "sed", "tr", "sort", "head", "tail", "sleep", "ls"),
    *("git", "gzip", "openssl", "env"),
)
#: In the order of the documents.
IN_ORDER: Final = (
    "setup-project.sh",
    "create-secrets.sh",
    "build-and-push.sh",
    "deploy-job.sh",
    "deploy-service.sh",
    "setup-scheduler.sh",
)
#: Seconds. A script takes one or two.
WAIT_SECONDS: Final = 60.0
SETTINGS: Final = {
    "PROJECT_ID": PROJECT,
    "CLOUDRUN_CALLBACK_SECRET": "made-up-callback-secret",
    "ANTHROPIC_API_KEY": "made-up-key",
    "CALLERS": "user:ann@example.com,serviceAccount:app@other-project.iam.gserviceaccount.com",
    "ALLOWED_TOOLS": "'Bash(git log:*, git diff:*),Read'",
}


def fresh_project() -> dict[str, Any]:
    """Return a project with billing and nothing else, and somebody who may do all."""
    return {
        "account": OPERATOR,
        "project": PROJECT,
        "services": [],
        "resources": {f"project/{PROJECT}": {"lifecycleState": "ACTIVE", "billed": True}},
        "policies": {},
        #: Permissions that are refused, by command.
        "denied": {},
        #: So many grants fail until a new account is known everywhere.
        "unseen": 0,
    }


@attrs.frozen(kw_only=True)
class Run:
    """A script that is over. `calls` are those of gcloud, `changes` the ones of them that change something."""

    code: int
    output: str
    complaints: str
    calls: list[dict[str, Any]]

    @property
    def changes(self) -> list[list[str]]:
        """The words of the calls that change something."""
        return [call["argv"] for call in self.calls if not call["reads"]]


@attrs.frozen(kw_only=True)
class Clone:
    """The scripts in a folder of their own, and the project that they see."""

    folder: Path

    @property
    def file(self) -> Path:
        """Where the stand-in keeps the project."""
        return self.folder / "project.json"

    @property
    def state(self) -> dict[str, Any]:
        """The project as it is."""
        state: dict[str, Any] = json.loads(self.file.read_text())
        return state

    def change(self, **parts: Any) -> None:
        """Change parts of the project past the scripts."""
        self.file.write_text(json.dumps({**self.state, **parts}))

    def settle(self, **settings: str) -> None:
        """Write `.env`: the settings of all tests, with changes; a blank one is left out."""
        lines = [f"{name}={value}" for name, value in {**SETTINGS, **settings}.items() if value]
        (self.folder / ".env").write_text("\n".join(lines) + "\n")

    def run(self, script: str, *arguments: str, given: str = "", **environment: str) -> Run:
        """Run a script of the clone, with that as its standard input."""
        calls = self.file.with_suffix(".calls")
        calls.write_text("")
        ended = subprocess.run(
            [self.folder / "scripts" / script, *arguments],
            input=given,
            env={
                "PATH": str(self.folder / "bin"),
                "HOME": str(self.folder),
                "TMPDIR": str(self.folder / "tmp"),
                "GCLOUD_STANDIN": str(self.file),
                "SETTLE_SECONDS": "0",
                **environment,
            },
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        assert [] == list((self.folder / "tmp").iterdir()), "a script left files behind"
        return Run(
            code=ended.returncode,
            output=ended.stdout,
            complaints=ended.stderr,
            calls=[json.loads(line) for line in calls.read_text().splitlines()],
        )


def make_clone(folder: Path) -> Clone:
    """Copy what a deployment needs, make it a repository of one commit, and put the stand-in on the PATH."""
    (folder / "bin").mkdir(parents=True)
    (folder / "tmp").mkdir()
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("terraform"))
    for name in TOOLS:
        where = shutil.which(name)
        assert where is not None, name
        (folder / "bin" / name).symlink_to(where)
    # As a module, so that its bytecode is kept.
    start = f"import sys; sys.path.insert(0, {str(STANDIN.parent)!r}); import {STANDIN.stem}"
    put_command(folder, "gcloud", f'exec "{Path(sys.executable).resolve()}" -I -S -c "{start}" "$@"')
    (folder / ".gitignore").write_text("/*\n!/scripts/\n")
    git = ("git", "-c", "user.name=Somebody", "-c", "user.email=somebody@example.com", "-C", str(folder))
    for words in (("init", "--quiet"), ("add", "scripts"), ("commit", "--quiet", "-m", "All"), ("tag", "v1.2.3")):
        subprocess.run([*git, *words], check=True, env={"PATH": str(folder / "bin"), "HOME": str(folder)})
    clone = Clone(folder=folder)
    clone.file.write_text(json.dumps(fresh_project()))
    clone.settle()
    return clone


def put_command(folder: Path, name: str, line: str) -> None:
    """Put a command on the PATH of the scripts."""
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


@attrs.frozen(kw_only=True)
class Walk:
    """All scripts, run once in the order of the documents: how each ended, and the project after it."""

    runs: dict[str, Run]
    states: dict[str, dict[str, Any]]

    @property
    def state(self) -> dict[str, Any]:
        """The project at the end."""
        return self.after(IN_ORDER[-1])

    def after(self, script: str) -> dict[str, Any]:
        """Return the project after that script."""
        return copy.deepcopy(self.states[script])

    def before(self, script: str) -> dict[str, Any]:
        """Return the project before that script."""
        place = IN_ORDER.index(script)
        return self.after(IN_ORDER[place - 1]) if place else fresh_project()

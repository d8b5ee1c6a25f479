"""The deployment scripts in a clone of the repository, with a stand-in for gcloud that stores a project in a file."""

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
PROJECT: Final = "made-up-project"
OPERATOR: Final = "operator@example.com"
#: The only commands on the PATH of the scripts, in addition to gcloud.
TOOLS: Final = (
    *("bash", "sh", "dirname", "mktemp", "rm", "cat", "grep", "sed", "tr", "sort", "head", "tail", "sleep", "ls"),
    *("git", "gzip", "openssl", "env"),
)
#: The scripts of a deployment, in the order that the documents give.
IN_ORDER: Final = (
    "setup-project.sh",
    "create-secrets.sh",
    "build-and-push.sh",
    "deploy-job.sh",
    "deploy-service.sh",
    "setup-scheduler.sh",
)
#: All deployment scripts, in an order in which they can run.
ALL_SCRIPTS: Final = (*IN_ORDER, "setup-kms.sh", "setup-service-account.sh", "grant-job-permissions.sh", "teardown.sh")
#: Seconds. A script takes one or two.
WAIT_SECONDS: Final = 60.0
SETTINGS: Final = {
    "PROJECT_ID": PROJECT,
    "CLOUDRUN_CALLBACK_SECRET": "made-up-callback-secret",
    "ANTHROPIC_API_KEY": "made-up-key",
    "CALLERS": "user:ann@example.com,serviceAccount:app@other-project.iam.gserviceaccount.com",
    "ALLOWED_TOOLS": "'Bash(git log:*, git diff:*),Read'",
}

# Keys of resources in the state of the stand-in.
BUCKET_NAME: Final = f"{PROJECT}-claude-logs"
BUCKET: Final = f"bucket/{BUCKET_NAME}"
JOB: Final = "job/us-central1/claude-code-job"
SWEEP: Final = "job/us-central1/claude-code-sweep"
SERVICE: Final = "service/us-central1/claude-code-service"
SCHEDULE: Final = "schedule/us-central1/claude-code-sweep"
KEY: Final = "key/global/claude-code/payload-encryption"


def account(name: str) -> str:
    """Return the email address of a service account of the project."""
    return f"{name}@{PROJECT}.iam.gserviceaccount.com"


def empty_project() -> dict[str, Any]:
    """Return the state of a project with billing and no resources, whose operator has all permissions."""
    return {
        "account": OPERATOR,
        "project": PROJECT,
        "services": [],
        "resources": {f"project/{PROJECT}": {"lifecycleState": "ACTIVE", "billed": True}},
        "policies": {},
        #: Denied permissions, by command.
        "denied": {},
        #: Number of grants that fail until a new service account is known to all of Google Cloud.
        "unseen": 0,
    }


@attrs.frozen(kw_only=True)
class Run:
    """The result of a script: exit status, standard output, standard error, and its calls of gcloud."""

    code: int
    output: str
    complaints: str
    calls: list[dict[str, Any]]

    @property
    def changes(self) -> list[list[str]]:
        """The arguments of the calls that change something."""
        return [call["argv"] for call in self.calls if not call["reads"]]


@attrs.frozen(kw_only=True)
class Clone:
    """A directory with the scripts, and the project that they deploy to."""

    directory: Path

    @property
    def file(self) -> Path:
        """The file in which the stand-in stores the project."""
        return self.directory / "project.json"

    @property
    def state(self) -> dict[str, Any]:
        """The current state of the project."""
        state: dict[str, Any] = json.loads(self.file.read_text())
        return state

    def change(self, **parts: Any) -> None:
        """Replace parts of the state without a script."""
        self.file.write_text(json.dumps({**self.state, **parts}))

    def configure(self, **settings: str) -> None:
        """Write `.env` with `SETTINGS` and changes to them. Empty values are left out."""
        lines = [f"{name}={value}" for name, value in {**SETTINGS, **settings}.items() if value]
        (self.directory / ".env").write_text("\n".join(lines) + "\n")

    def run(self, script: str, *arguments: str, stdin: str = "", **environment: str) -> Run:
        """Run a script."""
        calls = self.file.with_suffix(".calls")
        calls.write_text("")
        result = subprocess.run(
            [self.directory / "scripts" / script, *arguments],
            input=stdin,
            env={
                "PATH": str(self.directory / "bin"),
                "HOME": str(self.directory),
                "TMPDIR": str(self.directory / "tmp"),
                "GCLOUD_STANDIN": str(self.file),
                "GRANT_RETRY_SECONDS": "0",
                **environment,
            },
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        assert [] == list((self.directory / "tmp").iterdir()), "a script did not delete its temporary files"
        return Run(
            code=result.returncode,
            output=result.stdout,
            complaints=result.stderr,
            calls=[json.loads(line) for line in calls.read_text().splitlines()],
        )

    def add_command(self, name: str, line: str) -> None:
        """Add a command to the PATH of the scripts: one line of shell."""
        path = self.directory / "bin" / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)


def make_clone(directory: Path) -> Clone:
    """Create a repository with the scripts in one commit, the stand-in on the PATH, and an empty project."""
    (directory / "bin").mkdir(parents=True)
    (directory / "tmp").mkdir()
    shutil.copytree(ROOT / "scripts", directory / "scripts", ignore=shutil.ignore_patterns("terraform"))
    for name in TOOLS:
        path = shutil.which(name)
        assert path is not None, name
        (directory / "bin" / name).symlink_to(path)
    clone = Clone(directory=directory)
    # Python caches the bytecode of imported modules, but not of a script.
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from standins.gcloud.main import main; main()"
    clone.add_command("gcloud", f'exec "{Path(sys.executable).resolve()}" -I -S -c "{program}" "$@"')
    (directory / ".gitignore").write_text("/*\n!/scripts/\n")
    git = ("git", "-c", "user.name=Ann", "-c", "user.email=ann@example.com", "-C", str(directory))
    for words in (("init", "--quiet"), ("add", "scripts"), ("commit", "--quiet", "-m", "All"), ("tag", "v1.2.3")):
        subprocess.run([*git, *words], check=True, env={"PATH": str(directory / "bin"), "HOME": str(directory)})
    clone.file.write_text(json.dumps(empty_project()))
    clone.configure()
    return clone


@attrs.frozen(kw_only=True)
class FullRun:
    """One run of each script in order: the results, and the state of the project after each script."""

    runs: dict[str, Run]
    states: dict[str, dict[str, Any]]

    @property
    def state(self) -> dict[str, Any]:
        """The state after the last script."""
        return self.after(IN_ORDER[-1])

    def after(self, script: str) -> dict[str, Any]:
        """Return the state after this script."""
        return copy.deepcopy(self.states[script])

    def before(self, script: str) -> dict[str, Any]:
        """Return the state before this script."""
        index = IN_ORDER.index(script)
        return self.after(IN_ORDER[index - 1]) if index else empty_project()

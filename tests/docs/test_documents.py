"""The documents are correct: their links have targets, and their commands are run, run with `--dry-run`, or parsed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
import pytest
from helpers.deploy import make_clone
from helpers.service import CALLBACK_SECRET, MADE_UP_KEY, WAIT_SECONDS, StartService

ROOT: Final = Path(__file__).resolve().parents[2]
DOCUMENTS: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
#: Commands that are not tested, and why.
ALLOWED: Final = {
    r"(\./)?scripts/(check|demo|test)\.sh( .*)?": "the test suite itself, or tested by other modules",
    r"pre-commit install": "pre-commit is not installed here",
    r"\.venv/bin/ccrun serve": "run by every test of a service",
    r"\.venv/bin/python tests/bench/.*": "benchmarks are run manually",
    r"cp \.env\.example \.env|chmod 600 \.env|set -a; \. \./\.env; set \+a": "files of the reader",
    r"[A-Z_]+=[^ ]*": "a setting",
    r"AUTH_TOKEN=\$\(gcloud auth print-identity-token\)": "its gcloud command is tested separately",
    r"SERVICE_URL=\$\(gcloud .*\)": "its gcloud command is tested separately",
    r"git (pull|clone .*|diff .*|apply .*)": "a command of git",
    r"openssl rand -hex 32 \| tr .* \| gcloud secrets versions add .*": "its last part is tested manually",
    r"terraform .*": "needs a provider, which is not available offline",
    r"cat >.*|\{\"title\".*|END": "the input file of a gcloud command",
}


def prose(document: Path) -> str:
    """Return a document without its code blocks."""
    return re.sub(r"(?ms)^```.*?^```", "", document.read_text())


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", prose(document))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_have_targets(document: Path) -> None:
    """Each relative link has an existing file and, with a fragment, an existing heading as its target."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert [] == broken


@pytest.mark.parametrize("document", DOCUMENTS[1:], ids=lambda path: path.name)
def test_index_has_every_document(document: Path) -> None:
    """The index of the documents has a link to each document."""
    assert f"({document.name})" in (ROOT / "docs" / "README.md").read_text() or document.name == "README.md"


@attrs.frozen
class Command:
    """A command of a document."""

    document: str
    text: str


def commands() -> Iterator[Command]:
    """Yield the commands of all shell code blocks. A command on several lines is one command."""
    for document in DOCUMENTS:
        for block in re.findall(r"(?ms)^```bash\n(.*?)^```", document.read_text()):
            text = re.sub(r"\\\n\s*", " ", block)
            pending = ""
            for line in text.splitlines():
                pending = f"{pending}\n{line}" if pending else line
                command = re.sub(r"(?m)(^|\s)# .*$", "", pending).strip()
                try:
                    shlex.split(command)
                except ValueError:
                    # A quoted string continues on the next line.
                    continue
                pending = ""
                if command:
                    yield Command(document.name, command)


def matching(pattern: str) -> list[str]:
    """Return the distinct commands that match a pattern."""
    return list(dict.fromkeys(each.text for each in commands() if re.fullmatch(pattern, each.text, re.DOTALL)))


GCLOUD: Final = matching(r"gcloud .*")
CURL: Final = matching(r"curl .*")
DEPLOYING: Final = matching(r"([A-Z_]+=\S+ )?\./scripts/(?!check|demo|test|lock).*")


def test_every_command_is_tested_or_allowed() -> None:
    """A command that no test covers needs an entry with a reason in `ALLOWED`."""
    tested = {*GCLOUD, *CURL, *DEPLOYING}
    untested = [
        each
        for each in commands()
        if each.text not in tested and not any(re.fullmatch(rule, each.text, re.DOTALL) for rule in ALLOWED)
    ]
    assert [] == untested


@pytest.mark.parametrize("command", DEPLOYING)
def test_script_runs_with_dry_run(command: str, tmp_path: Path) -> None:
    """Each script of the documents succeeds with `--dry-run` on an empty project, and changes nothing."""
    clone = make_clone(tmp_path / "clone")
    *settings, script = command.removesuffix(" --dry-run").split("./scripts/")
    variables = dict(setting.strip().split("=", 1) for setting in settings if setting.strip())
    name, *arguments = shlex.split(script)
    before = clone.state
    run = clone.run(name, *arguments, "--dry-run", **variables)
    assert (0, "") == (run.code, run.complaints)
    assert before == clone.state


@pytest.mark.parametrize("command", CURL)
async def test_curl_command_succeeds(
    command: str, start_service: StartService, quick_cli: Path, tmp_path: Path
) -> None:
    """Each curl command succeeds with a running service when its placeholders are replaced."""
    async with start_service(ANTHROPIC_API_KEY=MADE_UP_KEY, CLAUDE_CLI=str(quick_cli)) as service:
        submitted = await service.submit(taskId="deploy-1")
        await service.until_final(submitted["taskId"])
        text = command.replace("http://127.0.0.1:8080", service.url)
        # The receivers of the documents do not exist.
        text = re.sub(r"https://(your-app\.)?example\.com/[\w/-]+", "http://127.0.0.1:9/", text)
        text = re.sub(r"\$\(gcloud [^)]*\)", "made-up-identity-token", text)
        variables = {
            "SERVICE_URL": service.url,
            "AUTH_TOKEN": "made-up-token",
            "CCRUN_TOKEN": "made-up-token",
            "TASK_ID": "deploy-1",
            "ANTHROPIC_API_KEY": MADE_UP_KEY,
            "GIT_TOKEN": "made-up-token",
            "CLOUDRUN_CALLBACK_SECRET": CALLBACK_SECRET,
        }
        script = f'curl() {{ command curl --fail-with-body --silent --show-error --max-time 60 "$@"; }}\n{text}\n'
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", script),
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **variables},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(WAIT_SECONDS):
            output, _ = await process.communicate()
        assert 0 == process.returncode, output.decode()


PARSE: Final = """
import contextlib, io, json, os, sys
root = os.environ["GCLOUD_ROOT"]
sys.path[:0] = [f"{root}/lib", f"{root}/lib/third_party"]
from googlecloudsdk import gcloud_main
parser = gcloud_main.CreateCLI([])._CLI__parser
errors = {}
for argv in json.load(sys.stdin):
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            parser.parse_args(argv)
    except SystemExit:
        errors[" ".join(argv)] = output.getvalue()[-300:]
json.dump(errors, sys.stdout)
"""


def test_gcloud_parses_every_command(tmp_path: Path) -> None:
    """The parser of gcloud accepts each command with its flags, without a network."""
    root = Path("/usr/lib/google-cloud-sdk")
    python = root / "platform" / "bundledpythonunix" / "bin" / "python3"
    if not python.exists():
        pytest.skip("gcloud is not installed from its package")
    calls = []
    for command in (
        *GCLOUD,
        *re.findall(r"\$\((gcloud (?:'[^']*'|[^)'])+)\)", "\n".join(each.text for each in commands())),
    ):
        filled = re.sub(r"\$\{?[A-Z_]+\}?", "made-up-name", command)
        calls.append([word for word in shlex.split(filled)[1:] if not word.startswith(">")])
    environment = {"GCLOUD_ROOT": str(root), "CLOUDSDK_CONFIG": str(tmp_path), "HOME": str(tmp_path)}
    # The input of a command, which the command before it creates.
    (tmp_path / "not-logs.json").write_text('{"title": "t", "expression": "true"}')
    finished = subprocess.run(
        [python, "-c", PARSE],
        cwd=tmp_path,
        input=json.dumps(calls),
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert 0 == finished.returncode, finished.stderr
    assert {} == json.loads(finished.stdout)

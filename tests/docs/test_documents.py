"""The documents tell the truth: their links lead somewhere, and their commands are run, or rehearsed, or taken by a parser."""

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
#: What is neither run nor rehearsed, and why.
ALLOWED: Final = {
    r"(\./)?scripts/(check|demo|test)\.sh( .*)?": "the suite itself, and what it tests elsewhere",
    r"pre-commit install": "pre-commit is not installed here",
    r"\.venv/bin/ccrun serve": "every test that has a service runs it",
    r"\.venv/bin/python tests/bench/.*": "benchmarks are run by hand",
    r"cp \.env\.example \.env|chmod 600 \.env|set -a; \. \./\.env; set \+a": "files of the reader's own",
    r"[A-Z_]+=[^ ]*": "a setting",
    r"AUTH_TOKEN=\$\(gcloud auth print-identity-token\)": "see the commands of gcloud",
    r"SERVICE_URL=\$\(gcloud .*\)": "see the commands of gcloud",
    r"git (pull|clone .*|diff .*|apply .*)": "git's own",
    r"openssl rand -hex 32 \| tr .* \| gcloud secrets versions add .*": "its last part is tried by hand",
    r"terraform .*": "needs a provider, which is not had offline",
    r"cat >.*|\{\"title\".*|END": "a file that a command of gcloud takes",
}


def prose(document: Path) -> str:
    """Return a document without its blocks of code."""
    return re.sub(r"(?ms)^```.*?^```", "", document.read_text())


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", prose(document))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Each relative link names a file that is there, and a heading of it."""
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
def test_the_index_names_every_document(document: Path) -> None:
    """Whoever looks for something finds it there."""
    assert f"({document.name})" in (ROOT / "docs" / "README.md").read_text() or document.name == "README.md"


@attrs.frozen
class Command:
    """A command of a document."""

    document: str
    text: str


def commands() -> Iterator[Command]:
    """Yield the commands of all blocks for a shell, those over several lines as one."""
    for document in DOCUMENTS:
        for block in re.findall(r"(?ms)^```bash\n(.*?)^```", document.read_text()):
            text = re.sub(r"\\\n\s*", " ", block)
            pending = ""
            for line in text.splitlines():
                pending = f"{pending}\n{line}" if pending else line
                whole = re.sub(r"(?m)(^|\s)# .*$", "", pending).strip()
                try:
                    shlex.split(whole)
                except ValueError:
                    # A quote goes on in the next line.
                    continue
                pending = ""
                if whole:
                    yield Command(document.name, whole)


def of_kind(pattern: str) -> list[str]:
    """Return the commands of one kind, each once."""
    return list(dict.fromkeys(each.text for each in commands() if re.fullmatch(pattern, each.text, re.DOTALL)))


GCLOUD: Final = of_kind(r"gcloud .*")
CURL: Final = of_kind(r"curl .*")
DEPLOYING: Final = of_kind(r"([A-Z_]+=\S+ )?\./scripts/(?!check|demo|test|lock).*")


def test_every_command_is_of_a_kind_that_is_tried() -> None:
    """Another one needs a rule of its own, with a reason."""
    tried = {*GCLOUD, *CURL, *DEPLOYING}
    left = [
        each
        for each in commands()
        if each.text not in tried and not any(re.fullmatch(rule, each.text, re.DOTALL) for rule in ALLOWED)
    ]
    assert [] == left


@pytest.mark.parametrize("command", DEPLOYING)
def test_a_script_can_be_rehearsed_on_an_empty_project(command: str, tmp_path: Path) -> None:
    """As the documents name it, with `--dry-run`: it changes nothing and has no questions."""
    clone = make_clone(tmp_path / "clone")
    *settings, script = command.removesuffix(" --dry-run").split("./scripts/")
    variables = dict(setting.strip().split("=", 1) for setting in settings if setting.strip())
    name, *arguments = shlex.split(script)
    before = clone.state
    run = clone.run(name, *arguments, "--dry-run", **variables)
    assert (0, "") == (run.code, run.complaints)
    assert before == clone.state


@pytest.mark.parametrize("command", CURL)
async def test_a_call_is_answered(command: str, start_service: StartService, tmp_path: Path) -> None:
    """By a running service, with what the document leaves to the reader filled in."""
    async with start_service(ANTHROPIC_API_KEY=MADE_UP_KEY) as service:
        submitted = await service.submit(taskId="deploy-1")
        await service.until_final(submitted["taskId"])
        text = command.replace("http://127.0.0.1:8080", service.url)
        # The receivers of the documents are nobody's.
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
faults = {}
for argv in json.load(sys.stdin):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args(argv)
    except SystemExit:
        faults[" ".join(argv)] = said.getvalue()[-300:]
json.dump(faults, sys.stdout)
"""


def test_gcloud_takes_every_command(tmp_path: Path) -> None:
    """Each command and flag is real, by the parser of the real one, offline."""
    root = Path("/usr/lib/google-cloud-sdk")
    python = root / "platform" / "bundledpythonunix" / "bin" / "python3"
    if not python.exists():
        pytest.skip("gcloud is not installed here, or not by its package")
    calls = []
    for command in (
        *GCLOUD,
        *re.findall(r"\$\((gcloud (?:'[^']*'|[^)'])+)\)", "\n".join(each.text for each in commands())),
    ):
        filled = re.sub(r"\$\{?[A-Z_]+\}?", "made-up-name", command)
        calls.append([word for word in shlex.split(filled)[1:] if not word.startswith(">")])
    environment = {"GCLOUD_ROOT": str(root), "CLOUDSDK_CONFIG": str(tmp_path), "HOME": str(tmp_path)}
    # What a command reads, and the command before it writes.
    (tmp_path / "not-logs.json").write_text('{"title": "t", "expression": "true"}')
    ended = subprocess.run(
        [python, "-c", PARSE],
        cwd=tmp_path,
        input=json.dumps(calls),
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert 0 == ended.returncode, ended.stderr
    assert {} == json.loads(ended.stdout)

"""No secret of a task is in its log, its record or the names of its files, also where a text was cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.git import GitSetup, git_setup
from helpers.worker import PRELUDE, FakeCli, WorkerSetup, worker_setup

from ccrun import codec
from ccrun.process.child import STDERR_TAIL_BYTES
from ccrun.redaction import MIN_SECRET_CHARS
from ccrun.spec import PostRunActions, UploadAction
from ccrun.task import Secret
from ccrun.worker.commands import TAIL_BYTES

__all__ = ["git_setup", "worker_setup"]
SECRET = "0123456789abcdefghijklmnopqrstuv"


def shown_parts(value: Any) -> list[str]:
    """Return the parts of the secret that a JSON value shows."""
    text = json.dumps(value)
    starts = range(len(SECRET) - MIN_SECRET_CHARS + 1)
    return [part for start in starts if (part := SECRET[start : start + MIN_SECRET_CHARS]) in text]


@pytest.mark.parametrize("before", range(4070, 4100, 6))
async def test_texts_of_the_cli_are_masked_before_they_are_cut(
    worker_setup: WorkerSetup, fake_cli: FakeCli, before: int
) -> None:
    """No part of a secret is in the record, wherever it is in the result, the error, or another text."""
    await worker_setup.submit(environment_secrets={"A": Secret(SECRET)})
    script = f"""
secret = os.environ["A"]
say(type="system", subtype="init", mcp_servers=[dict(name="x" * {before - 3900} + secret, status=secret)])
result(result="x" * {before} + secret, is_error={before % 4 == 0}, session_id=secret, usage={{secret: 1, "a": secret}})
"""
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + script))
    public = codec.record_to_public(record)
    assert [] == shown_parts(public) + shown_parts(await worker_setup.log())
    assert record.summary is not None
    assert ("***", {"***": 1, "a": "***"}) == (record.summary.session_id, record.summary.usage)


@pytest.mark.parametrize("kept", [6, 20, 31])
async def test_start_of_stderr_is_masked(worker_setup: WorkerSetup, fake_cli: FakeCli, kept: int) -> None:
    """The log has the end of stderr. If that begins within a secret, the rest of the secret is masked."""
    await worker_setup.submit(environment_secrets={"A": Secret(SECRET)})
    script = f'sys.stderr.write("first" + os.environ["A"] + "x" * ({STDERR_TAIL_BYTES} - {kept})); result()'
    await worker_setup.run(cli=lambda: fake_cli(PRELUDE + script))
    (line,) = [line for line in await worker_setup.log() if line["type"] == "stderr"]
    assert line["content"].startswith("…***xxx")


@pytest.mark.parametrize("kept", [6, 20, 31])
async def test_output_of_a_failed_command_is_masked(worker_setup: WorkerSetup, fake_cli: FakeCli, kept: int) -> None:
    """The error has the end of the output. If that begins within a secret, the rest of the secret is masked."""
    command = f"printf %s \"$A\"; head -c {TAIL_BYTES - kept - 1} /dev/zero | tr '\\0' x; exit 3"
    await worker_setup.submit(environment_secrets={"A": Secret(SECRET)}, pre_execution_commands=(command,))
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE))
    assert record.error is not None
    assert "the end of its output: …***xxx" in record.error


async def test_names_of_uploads_are_masked(worker_setup: WorkerSetup, fake_cli: FakeCli) -> None:
    """The record, the object and the errors have the masked name. Two files with one masked name are not mixed up."""
    await worker_setup.submit(
        environment_secrets={"A": Secret(SECRET), "B": Secret("another-secret")},
        post_execution_actions=PostRunActions(upload_files=UploadAction(glob_patterns=("*.txt", "missing-*"))),
    )
    script = """
for name in ("A", "B"):
    with open(f"of-{os.environ[name]}.txt", "w") as file:
        file.write(name)
result()
"""
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + script))
    public = codec.record_to_public(record)
    assert ["of-***.txt"] == [file["originalPath"] for file in public["uploadedFiles"]]
    assert public["uploadedFiles"][0]["gcsPath"].endswith("/uploads/of-%2A%2A%2A.txt")
    assert ["of-***.txt: an upload with this name already exists."] == [
        error["error"] for error in public["actionErrors"]
    ]
    assert [] == shown_parts(public)


async def test_branch_in_the_name_of_a_patch_is_masked(
    worker_setup: WorkerSetup, git_setup: GitSetup, fake_cli: FakeCli
) -> None:
    """An agent that names a branch after a secret does not name the upload after it."""
    repository = await git_setup.repos.create("demo", {"a.txt": "a"})
    await worker_setup.submit(
        git_repo=f"file://{repository.path}", environment_secrets={"A": Secret(SECRET), "B": Secret("secret of B")}
    )
    script = """
run = lambda *command: subprocess.run(command, check=True, capture_output=True)
run("git", "checkout", "-b", os.environ["A"])
open("b.txt", "w").write("b")
run("git", "add", "b.txt")
run("git", "commit", "-m", "b")
run("git", "checkout", "main")
sys.exit(1)
"""
    record = await worker_setup.run(cli=lambda: fake_cli(PRELUDE + script))
    public = codec.record_to_public(record)
    assert ["rescue/branch.patch"] == [file["originalPath"] for file in public["uploadedFiles"]]
    assert [] == shown_parts(public) + shown_parts(await worker_setup.log())

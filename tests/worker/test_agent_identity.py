"""The identity with which the agent itself commits."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.worker import PRELUDE, FakeCli, WorkerSetup, serve_model, worker_setup
from standins.repos import Repos

from ccrun.task import Secret, Status

__all__ = ["serve_model", "worker_setup"]

#: An agent that commits, and prints who the author and the committer are.
COMMIT = (
    PRELUDE
    + """
BEFORE
subprocess.run(["git", "commit", "--quiet", "--allow-empty", "-m", "by the agent"], check=True)
shown = subprocess.run(["git", "log", "-1", "--format=%an <%ae>/%cn <%ce>"], check=True, capture_output=True, text=True)
result(result=shown.stdout.strip())
"""
)
CONFIG = 'subprocess.run(["git", "config", "user.name", "Local"], check=True)'


@pytest.mark.parametrize(
    ("before", "secrets", "name"),
    [("", {}, "Claude Code"), (CONFIG, {}, "Local"), ("", {"GIT_AUTHOR_NAME": Secret("Given")}, "Given")],
    ids=["default", "repository", "request"],
)
async def test_agent_can_commit(
    worker_setup: WorkerSetup, fake_cli: FakeCli, tmp_path: Path, before: str, secrets: dict[str, Secret], name: str
) -> None:
    """Without any setting, the agent has an identity; those of the repository and of the request override it."""
    repository = await Repos(tmp_path / "remote").create("demo", {"a.txt": "a"})
    await worker_setup.submit(git_repo=f"file://{repository.path}", environment_secrets=secrets)
    cli = fake_cli(COMMIT.replace("BEFORE", before))
    record = await worker_setup.run(cli=lambda: cli)
    assert (Status.COMPLETED, None) == (record.status, record.error)
    assert record.summary is not None
    assert f"{name} <noreply@anthropic.com>" == str(record.summary.result).partition("/")[0].replace("***", "Given")

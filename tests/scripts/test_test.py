from __future__ import annotations

import json
import os

import pytest
from helpers.check import TOKEN, CheckResult, RunCheck, run_command
from helpers.deploy import PROJECT, ROOT, Clone
from helpers.service import StartService


@pytest.fixture
def run_script(clone: Clone) -> RunCheck:
    """Run scripts/test.sh with the stand-in for gcloud on the PATH."""
    if not (ROOT / ".venv" / "installed-from").exists():
        pytest.skip("ccrun was not installed by scripts/test.sh")

    async def run(*words: str, **environment: str) -> CheckResult:
        (clone.directory / ".env").write_text(f"PROJECT_ID={PROJECT}\nCCRUN_API_TOKENS={TOKEN},another-made-up-token\n")
        return await run_command(
            ROOT / "scripts" / "test.sh",
            *words,
            ENV_FILE=str(clone.directory / ".env"),
            GCLOUD_STANDIN=str(clone.file),
            PATH=f"{clone.directory / 'bin'}:{os.environ['PATH']}",
            **environment,
        )

    return run


async def test_the_script_finds_the_deployed_service(
    run_script: RunCheck, clone: Clone, start_service: StartService
) -> None:
    """Without SERVICE_URL, the script gets the URL from gcloud. Settings are read from `.env`."""
    async with start_service(CCRUN_API_TOKENS=TOKEN) as service:
        state = clone.state
        state["services"] = ["run.googleapis.com"]
        state["resources"]["service/us-central1/claude-code-service"] = {"status": {"url": service.url}}
        clone.change(**state)
        result = await run_script("auth")
    assert (0, "") == (result.code, result.stderr)
    assert result.rows[-1].endswith("accepted with the right one")


async def test_the_script_sends_an_identity_token(
    run_script: RunCheck, clone: Clone, start_service: StartService
) -> None:
    """A remote service gets the identity token of the active account; without one, the script fails."""
    async with start_service() as service:
        # The service has no TLS, so the check fails after the script has requested the token.
        result = await run_script("auth", SERVICE_URL=service.url.replace("http:", "https:"))
    calls = [json.loads(line)["argv"][:2] for line in clone.file.with_suffix(".calls").read_text().splitlines()]
    assert (1, [["auth", "list"], ["auth", "print-identity-token"]]) == (result.code, calls)
    clone.change(account=None)
    result = await run_script("auth", SERVICE_URL="https://service.example")
    assert (1, "gcloud has no active account: run gcloud auth login.\n") == (result.code, result.stderr)


async def test_the_script_reports_a_missing_service(run_script: RunCheck, clone: Clone) -> None:
    """Without a deployed service, the script names the script that deploys it."""
    clone.change(services=["run.googleapis.com"])
    result = await run_script("remote")
    assert (
        1,
        "The service claude-code-service does not exist: run scripts/deploy-service.sh first, or set SERVICE_URL.\n",
    ) == (result.code, result.stderr)

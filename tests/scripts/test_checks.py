from __future__ import annotations

import json
import os

import pytest
from helpers.check import TOKEN, CheckResult, RunCheck, run_command
from helpers.deploy import PROJECT, ROOT, Clone
from helpers.service import StartService


@pytest.fixture
def script(clone: Clone) -> RunCheck:
    """Run scripts/test.sh beside the stand-in for gcloud."""
    if not (ROOT / ".venv" / "installed-from").exists():
        pytest.skip("ccrun was not installed by scripts/test.sh")

    async def check(*words: str, **environment: str) -> CheckResult:
        (clone.folder / ".env").write_text(f"PROJECT_ID={PROJECT}\nCCRUN_API_TOKENS={TOKEN},another-made-up-token\n")
        return await run_command(
            ROOT / "scripts" / "test.sh",
            *words,
            ENV_FILE=str(clone.folder / ".env"),
            GCLOUD_STANDIN=str(clone.file),
            PATH=f"{clone.folder / 'bin'}:{os.environ['PATH']}",
            **environment,
        )

    return check


async def test_the_script_finds_the_deployed_service(
    script: RunCheck, clone: Clone, start_service: StartService
) -> None:
    """Without SERVICE_URL, gcloud is asked where it is; settings come from `.env`."""
    async with start_service(CCRUN_API_TOKENS=TOKEN) as service:
        state = clone.state
        state["services"] = ["run.googleapis.com"]
        state["resources"]["service/us-central1/claude-code-service"] = {"status": {"url": service.url}}
        clone.change(**state)
        checked = await script("auth")
    assert (0, "") == (checked.code, checked.stderr)
    assert checked.rows[-1].endswith("accepted with the right one")


async def test_the_script_brings_an_identity_token(script: RunCheck, clone: Clone, start_service: StartService) -> None:
    """A service elsewhere gets the token of whoever is logged in; nobody is, it says so."""
    async with start_service() as service:
        # No TLS is spoken there, so the check fails; by then the token was asked for.
        checked = await script("auth", SERVICE_URL=service.url.replace("http:", "https:"))
    calls = [json.loads(line)["argv"][:2] for line in clone.file.with_suffix(".calls").read_text().splitlines()]
    assert (1, [["auth", "list"], ["auth", "print-identity-token"]]) == (checked.code, calls)
    clone.change(account=None)
    checked = await script("auth", SERVICE_URL="https://service.example")
    assert (1, "Nobody is logged in: run gcloud auth login.\n") == (checked.code, checked.stderr)


async def test_the_script_says_that_nothing_is_deployed(script: RunCheck, clone: Clone) -> None:
    """One sentence."""
    clone.change(services=["run.googleapis.com"])
    checked = await script("remote")
    assert (
        1,
        "The service claude-code-service is not there: run scripts/deploy-service.sh first, or set SERVICE_URL.\n",
    ) == (checked.code, checked.stderr)

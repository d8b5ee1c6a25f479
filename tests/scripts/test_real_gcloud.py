"""Compare the stand-in for gcloud with the installed gcloud."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pytest
from helpers.deploy import JOB, SERVICE, SWEEP, Clone, FullRun
from helpers.drift import (
    bucket_with_defaults,
    key_not_rotated,
    role_deleted,
    role_with_more_permissions,
    schedule_with_other_account,
)

#: The Python of gcloud, in its directory.
PYTHON: Final = "platform/bundledpythonunix/bin/python3"


def sdk() -> Path:
    """Return the directory of the installed gcloud."""
    found = shutil.which("gcloud")
    root = Path(found).resolve().parents[1] if found else Path("/nonexistent")
    if not (root / PYTHON).exists():
        pytest.skip("gcloud is not installed, or has no bundled Python")
    return root


def all_calls(deployed: Clone, full_run: FullRun) -> Iterable[dict[str, Any]]:
    """Yield calls of every kind that the scripts make."""
    for run in full_run.runs.values():
        yield from run.calls
    state = deployed.state
    for drift in (
        role_deleted,
        role_with_more_permissions,
        bucket_with_defaults,
        key_not_rotated,
        schedule_with_other_account,
    ):
        drift(state)
    deployed.change(**state)
    yield from deployed.run("setup-project.sh").calls
    yield from deployed.run("setup-scheduler.sh").calls
    yield from deployed.run("deploy-service.sh", SERVICE_CPU_ALWAYS="yes", SERVICE_MIN_INSTANCES="1").calls
    yield from deployed.run("teardown.sh", "--yes").calls
    yield from deployed.run("teardown.sh", "--yes", "--data").calls
    yield from deployed.run("setup-kms.sh").calls


def test_gcloud_accepts_every_call(deployed: Clone, full_run: FullRun) -> None:
    """The real gcloud accepts each command line, creates the same jobs and services, and formats output like the stand-in."""
    root = sdk()
    result = subprocess.run(
        [root / PYTHON, Path(__file__).with_name("real_gcloud.py")],
        input="".join(json.dumps(call) + "\n" for call in all_calls(deployed, full_run)),
        env={
            "GCLOUD_ROOT": str(root),
            "CLOUDSDK_CONFIG": str(deployed.directory / "config"),
            "HOME": str(deployed.directory),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (0, "") == (result.returncode, result.stderr)
    reports = json.loads(result.stdout)
    assert [] == [report for report in reports if "fault" in report]
    # The first deployment of each job and service.
    deployed_first = {report["resource"]["metadata"]["name"]: report["resource"] for report in reversed(reports)}
    for name in (JOB, SWEEP, SERVICE):
        expected = full_run.state["resources"][name]
        actual = deployed_first[expected["metadata"]["name"]]
        for part in ("spec", "metadata"):
            assert expected[part] == common_part(actual[part], like=expected[part])


def common_part(value: Any, *, like: Any) -> Any:
    """Return the parts of a value that the other value has as well."""
    if isinstance(like, dict) and isinstance(value, dict):
        return {name: common_part(value[name], like=each) for name, each in like.items() if name in value}
    if isinstance(like, list) and isinstance(value, list) and len(like) == len(value):
        return [common_part(each, like=other) for each, other in zip(value, like, strict=True)]
    return value

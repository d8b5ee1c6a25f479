"""The deployment scripts on a project that is already deployed, partly deployed or changed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from helpers.deploy import ALL_SCRIPTS, BUCKET, BUCKET_NAME, IN_ORDER, SERVICE, Clone, FullRun, account, empty_project
from helpers.drift import (
    Drift,
    bucket_with_defaults,
    grants_removed,
    image_deleted,
    job_with_retries,
    key_not_rotated,
    role_deleted,
    role_with_more_permissions,
    schedule_with_other_account,
    service_with_other_ingress,
    service_with_other_variable,
    sweep_with_other_account,
)
from helpers.grants import grants


def test_a_second_run_changes_nothing(deployed: Clone) -> None:
    """Each script succeeds on a complete deployment without a change."""
    before = deployed.state
    runs = [deployed.run(script) for script in IN_ORDER]
    assert [(0, [], "")] * len(IN_ORDER) == [(run.code, run.changes, run.complaints) for run in runs]
    assert before == deployed.state


def test_a_dry_run_changes_nothing(clone: Clone) -> None:
    """On an empty project, every script succeeds with `--dry-run`, changes nothing and prints the commands that it would run."""
    runs = {script: clone.run(script, "--dry-run") for script in ALL_SCRIPTS}
    assert [(0, [])] * len(ALL_SCRIPTS) == [(run.code, run.changes) for run in runs.values()]
    assert empty_project() == clone.state
    commands = [re.findall(r"(?m)^would run: gcloud (\S+ \S+)", run.output) for run in runs.values()]
    assert ["services enable", "storage buckets", "artifacts repositories"] == commands[0][:3]
    assert "made-up-callback-secret" not in "".join(run.output + run.complaints for run in runs.values())


@pytest.mark.parametrize(
    ("script", "drift"),
    [
        ("setup-service-account.sh", role_deleted),
        ("setup-service-account.sh", role_with_more_permissions),
        ("setup-project.sh", bucket_with_defaults),
        ("setup-project.sh", grants_removed),
        ("setup-kms.sh", key_not_rotated),
        ("deploy-job.sh", job_with_retries),
        ("deploy-job.sh", sweep_with_other_account),
        ("deploy-service.sh", service_with_other_variable),
        ("deploy-service.sh", service_with_other_ingress),
        ("setup-scheduler.sh", schedule_with_other_account),
        ("build-and-push.sh", image_deleted),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_drift_is_undone(deployed: Clone, script: str, drift: Drift) -> None:
    """The script that manages a resource restores its settings."""
    expected, changed = deployed.state, deployed.state
    drift(changed)
    deployed.change(**changed)
    run = deployed.run(script)
    assert (0, expected) == (run.code, with_order_of(deployed.state, like=expected))
    assert [] != run.changes


def with_order_of(state: dict[str, Any], *, like: dict[str, Any]) -> dict[str, Any]:
    """Return the state with the policies of the other state, if both have the same grants."""
    return {**state, "policies": like["policies"]} if grants(state) == grants(like) else state


def test_a_failed_run_is_completed_by_the_next(clone: Clone, full_run: FullRun) -> None:
    """After a run that failed halfway, a second run reaches the same state as a single one."""
    clone.change(denied={"iam roles create": "iam.roles.create"})
    assert 1 == clone.run("setup-project.sh").code
    clone.change(denied={})
    assert 0 == clone.run("setup-project.sh").code
    assert full_run.after("setup-project.sh") == clone.state


def test_a_grant_to_a_new_account_is_retried(clone: Clone) -> None:
    """A grant is retried while Google Cloud does not know the new service account."""
    clone.change(unseen=3)
    run = clone.run("setup-project.sh")
    assert (0, "") == (run.code, run.complaints)


def test_other_grants_are_reported(deployed: Clone) -> None:
    """A grant that no script makes, to a ccrun account or to all users, is reported but not removed."""
    state = deployed.state
    leftover = {"role": "roles/storage.objectAdmin", "members": [f"serviceAccount:{account('ccrun-api')}"]}
    state["policies"][BUCKET]["bindings"].append(leftover)
    state["policies"][SERVICE]["bindings"].append({"role": "roles/run.invoker", "members": ["allUsers"]})
    deployed.change(**state)
    run = deployed.run("setup-service-account.sh")
    assert (0, []) == (run.code, run.changes)
    assert [
        f"Not granted by ccrun: {account('ccrun-api')} has roles/storage.objectAdmin on gs://{BUCKET_NAME}",
        "Not granted by ccrun: allUsers has roles/run.invoker on claude-code-service",
    ] == [line.partition(". Remove it")[0] for line in run.complaints.splitlines()]

"""The errors of the deployment scripts: one sentence each, and exit status 1."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.deploy import ALL_SCRIPTS, OPERATOR, PROJECT, Clone, FullRun


@pytest.mark.parametrize("script", ALL_SCRIPTS)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"account": None}, "gcloud has no active account: run gcloud auth login."),
        ({"project": "another"}, f"{OPERATOR} lacks a permission in {PROJECT}: "),
    ],
    ids=["no login", "another project"],
)
def test_missing_login_or_project_is_reported(clone: Clone, script: str, change: dict[str, Any], sentence: str) -> None:
    """Without a login or a project, every script fails with one sentence and changes nothing."""
    clone.change(**change)
    run = clone.run(script, "--yes") if script == "teardown.sh" else clone.run(script)
    assert (1, []) == (run.code, run.changes)
    assert run.complaints.startswith(sentence)
    assert len(run.complaints.splitlines()) <= 2


def test_missing_gcloud_is_reported(clone: Clone) -> None:
    """Without gcloud, a script fails with the URL of the installation guide."""
    (clone.directory / "bin" / "gcloud").unlink()
    run = clone.run("setup-project.sh")
    assert (
        1,
        "gcloud is not installed: install the Google Cloud CLI, https://cloud.google.com/sdk/docs/install.\n",
    ) == (
        run.code,
        run.complaints,
    )


def test_missing_billing_is_reported(clone: Clone) -> None:
    """On a project without billing, the first script fails before it changes anything."""
    resources = clone.state["resources"]
    resources[f"project/{PROJECT}"]["billed"] = False
    clone.change(resources=resources)
    run = clone.run("setup-project.sh")
    assert (1, []) == (run.code, run.changes)
    assert (
        f"The project {PROJECT} has no billing account: link one with gcloud billing projects link.\n" == run.complaints
    )


@pytest.mark.parametrize(
    ("name", "value", "meaning"),
    [
        ("PROJECT_ID", "Made Up", "the ID of a project: 6 to 30 lower-case letters, digits and hyphens"),
        ("REGION", "us-central1; rm -rf /", "a region, such as us-central1"),
        ("GCS_LOGS_BUCKET", "gs://b/c", "the name of a bucket, without gs:// and without a path"),
        ("JOB_CPU", "--help", "1, 2, 4 or 8"),
        ("CLOUDRUN_JOB_NAME", "-job", "a name of lower-case letters, digits and hyphens"),
        ("LOG_RETENTION_DAYS", "0", "a number of days"),
    ],
)
def test_an_invalid_setting_is_reported(clone: Clone, name: str, value: str, meaning: str) -> None:
    """The message has the name of the setting, the allowed values and the value. No call of gcloud is made."""
    clone.configure(**{name: value})
    run = clone.run("deploy-job.sh")
    assert (1, [], f'{name} must be {meaning}, not "{value}".\n') == (run.code, run.calls, run.complaints)


def test_an_invalid_secret_is_not_shown(clone: Clone) -> None:
    """The message has the name of the secret and the allowed characters, but not its value."""
    clone.configure(ANTHROPIC_API_KEY="a b")
    run = clone.run("deploy-job.sh")
    assert (1, "ANTHROPIC_API_KEY must be printable ASCII characters without blanks.\n") == (run.code, run.complaints)


def test_a_missing_setting_is_reported(clone: Clone) -> None:
    """Without PROJECT_ID, a script fails before any call of gcloud."""
    clone.configure(PROJECT_ID="")
    run = clone.run("deploy-job.sh")
    assert (1, [], "PROJECT_ID is not set: copy .env.example to .env and set it there.\n") == (
        run.code,
        run.calls,
        run.complaints,
    )


@pytest.mark.parametrize(
    ("script", "command", "permission", "role"),
    [
        ("setup-project.sh", "services enable", "serviceusage.services.enable", "roles/serviceusage.serviceUsageAdmin"),
        ("setup-project.sh", "storage buckets create", "storage.buckets.create", "roles/storage.admin"),
        ("setup-project.sh", "artifacts repositories create", "artifactregistry.create", "roles/artifactregistry.admin"),
        ("setup-project.sh", "kms keys create", "cloudkms.cryptoKeys.create", "roles/cloudkms.admin"),
        ("setup-project.sh", "iam service-accounts create", "iam.serviceAccounts.create", "roles/iam.serviceAccountAdmin"),
        ("setup-project.sh", "iam roles create", "iam.roles.create", "roles/iam.roleAdmin"),
        ("setup-project.sh", "storage buckets add-iam-policy-binding", "storage.buckets.setIamPolicy", "roles/storage.admin"),
        ("create-secrets.sh", "secrets versions add", "secretmanager.versions.add", "roles/secretmanager.admin"),
        ("build-and-push.sh", "builds submit", "cloudbuild.builds.create", "roles/cloudbuild.builds.editor"),
        ("deploy-job.sh", "run jobs deploy", "run.jobs.create", "roles/run.admin"),
        ("deploy-service.sh", "run deploy", "run.services.create", "roles/run.admin"),
        ("setup-scheduler.sh", "scheduler jobs create http", "cloudscheduler.jobs.create", "roles/cloudscheduler.admin"),
    ],
)  # fmt: skip
def test_a_denied_permission_is_reported(
    clone: Clone, full_run: FullRun, script: str, command: str, permission: str, role: str
) -> None:
    """The message names the role that the operator lacks, followed by the last line of gcloud's error."""
    clone.change(**{**full_run.before(script), "denied": {command: permission}})
    run = clone.run(script)
    first, last = run.complaints.splitlines()
    assert 1 == run.code
    assert first.startswith(
        f"{OPERATOR} lacks a permission in {PROJECT}: gcloud {' '.join(command.split()[:2])} needs {role}"
    )
    assert first.endswith(f"({permission}).")
    assert f"PERMISSION_DENIED: Permission '{permission}' denied on resource (or it may not exist)." == last


@pytest.mark.parametrize(
    "script",
    [
        "create-secrets.sh",
        "build-and-push.sh",
        "deploy-job.sh",
        "deploy-service.sh",
        "setup-scheduler.sh",
        "setup-kms.sh",
        "setup-service-account.sh",
    ],
)
def test_a_script_on_an_empty_project_names_the_first_script(clone: Clone, script: str) -> None:
    """On an empty project, a script fails and names the script that prepares the project."""
    run = clone.run(script)
    assert 1 == run.code
    if script == "create-secrets.sh":
        # This script enables the API that it needs, but does not create the service accounts that read secrets.
        assert "does not exist" in run.complaints
    else:
        assert f"An API is disabled in {PROJECT}: run scripts/setup-project.sh." == run.complaints.splitlines()[0]


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("deploy-job.sh", "There is no image api:v1.2.3: run scripts/build-and-push.sh first."),
        ("deploy-service.sh", "There is no image api:v1.2.3: run scripts/build-and-push.sh first."),
        ("setup-scheduler.sh", "The job claude-code-sweep does not exist: run scripts/deploy-job.sh first."),
        ("grant-job-permissions.sh", "The job claude-code-job does not exist: run scripts/deploy-job.sh first."),
    ],
)
def test_a_script_names_the_script_it_depends_on(prepared: Clone, script: str, sentence: str) -> None:
    """On a prepared project without images or jobs, a script fails and names the script to run first."""
    run = prepared.run(script)
    assert (1, sentence + "\n") == (run.code, run.complaints)


def test_unknown_options_are_rejected_and_help_is_printed(clone: Clone) -> None:
    """Every script rejects unknown options, and prints its help without a call of gcloud."""
    for script in ALL_SCRIPTS:
        assert (1, f'{script} has no option "--force": see --help.\n') == (
            clone.run(script, "--force").code,
            clone.run(script, "--force").complaints,
        )
        run = clone.run(script, "--help")
        assert (0, "", []) == (run.code, run.complaints, run.calls)
        assert f"  scripts/{script} [--dry-run]" in run.output

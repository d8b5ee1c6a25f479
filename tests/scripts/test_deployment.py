"""What the deployment scripts create when they run in the documented order."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest
from helpers.deploy import (
    BUCKET,
    BUCKET_NAME,
    IN_ORDER,
    JOB,
    KEY,
    PROJECT,
    SERVICE,
    SETTINGS,
    SWEEP,
    Clone,
    FullRun,
    account,
)
from helpers.grants import documented_grants, documented_roles, grants


def test_the_scripts_deploy_everything(full_run: FullRun) -> None:
    """On an empty project, every script succeeds without a warning, and all resources exist afterwards."""
    assert [(0, "")] * len(IN_ORDER) == [(run.code, run.complaints) for run in full_run.runs.values()]
    kinds = [name.split("/")[0] for name in full_run.state["resources"]]
    expected = {"project": 1, "bucket": 1, "ring": 1, "key": 1, "repository": 1, "image": 2, "account": 4, "role": 6}
    expected |= {"secret": 2, "job": 2, "service": 1, "schedule": 1}
    assert expected == {kind: kinds.count(kind) for kind in kinds}


def test_grants_are_the_documented_ones(full_run: FullRun) -> None:
    """The grants and roles are those of docs/permissions.md, plus those on secrets, on the sweep and for callers."""
    state = full_run.state
    schedule = (f"serviceAccount:{account('ccrun-scheduler')}", f"projects/{PROJECT}/roles/ccrunStart", SWEEP, "")
    accessor = "roles/secretmanager.secretAccessor"
    secrets = {
        (f"serviceAccount:{account('ccrun-worker')}", accessor, "secret/CLOUDRUN_CALLBACK_SECRET", ""),
        (f"serviceAccount:{account('ccrun-sweep')}", accessor, "secret/CLOUDRUN_CALLBACK_SECRET", ""),
        (f"serviceAccount:{account('ccrun-worker')}", accessor, "secret/ANTHROPIC_API_KEY", ""),
    }
    callers = {(member, "roles/run.invoker", SERVICE, "") for member in SETTINGS["CALLERS"].split(",")}
    assert 13 == len(documented_grants())
    assert documented_grants() | {schedule} | secrets | callers == grants(state)
    roles = {
        name.removeprefix("role/"): role["includedPermissions"]
        for name, role in state["resources"].items()
        if name.startswith("role/")
    }
    assert {**documented_roles(), "ccrunStart": ["run.jobs.run"]} == roles


def test_no_grant_is_broader_than_a_resource(full_run: FullRun) -> None:
    """No script grants a role on the project, an admin role, or a role to all users."""
    runs = full_run.runs
    words = [word for run in runs.values() for call in run.calls for word in call["argv"]]
    assert not any(word in ("projects", "organizations", "folders") for word in words if "iam" in word)
    assert [] == [
        word for word in words if re.search(r"[Aa]dmin|allUsers|allAuthenticatedUsers|roles/(owner|editor)", word)
    ]
    assert [] == [
        call["argv"] for run in runs.values() for call in run.calls if call["argv"][:2] == ["projects", "add"]
    ]


def test_the_bucket_is_private_and_deletes_old_objects(full_run: FullRun) -> None:
    """The bucket has no public access and no soft delete. It deletes payloads after one day and all objects after 30 days."""
    bucket = full_run.state["resources"][BUCKET]
    rules = [
        {"action": {"type": "Delete"}, "condition": {"age": 30}},
        {"action": {"type": "Delete"}, "condition": {"age": 1, "matchesSuffix": ["/encrypted-payload.bin"]}},
    ]
    assert {
        "name": BUCKET_NAME,
        "location": "US-CENTRAL1",
        "uniform_bucket_level_access": True,
        "public_access_prevention": "enforced",
        "soft_delete_policy": {"retentionDurationSeconds": "0"},
        "lifecycle_config": {"rule": rules},
    } == bucket


def test_the_key_is_rotated(full_run: FullRun) -> None:
    """The key is rotated every 90 days."""
    key = full_run.state["resources"][KEY]
    assert ("7776000s", "+P90D") == (key["rotationPeriod"], key["nextRotationTime"])


@pytest.mark.parametrize(("longest", "seconds"), [("60", "4500"), ("1440", "87300"), ("0.5", "960")])
def test_the_job_times_out_after_its_longest_task(deployed: Clone, longest: str, seconds: str) -> None:
    """The timeout of the job is 15 minutes longer than that of the longest task, and an execution is never retried."""
    assert 0 == deployed.run("deploy-job.sh", MAX_TIMEOUT_MINUTES=longest).code
    execution = deployed.state["resources"][JOB]["spec"]["template"]["spec"]
    task = execution["template"]["spec"]
    assert (0, seconds, 1, 1) == (
        task["maxRetries"],
        task["timeoutSeconds"],
        execution["taskCount"],
        execution["parallelism"],
    )


def environment(container: dict[str, Any]) -> dict[str, str]:
    """Return the environment of a container; a secret is shown as `secret NAME:VERSION`."""
    return {
        each["name"]: each.get("value") or "secret {name}:{key}".format(**each["valueFrom"]["secretKeyRef"])
        for each in container["env"]
    }


def test_each_container_has_only_its_settings_and_secrets(full_run: FullRun) -> None:
    """The API gets the names of the worker's secrets but no secret. The sweep gets the callback secret only."""
    resources = full_run.state["resources"]
    common = {
        "CCRUN_BACKEND": "gcp",
        "PROJECT_ID": PROJECT,
        "REGION": "us-central1",
        "GCS_LOGS_BUCKET": BUCKET_NAME,
        "KMS_LOCATION": "global",
        "KMS_KEY_RING": "claude-code",
        "KMS_KEY_NAME": "payload-encryption",
        "CLOUDRUN_JOB_NAME": "claude-code-job",
    }
    api = common | {
        "CCRUN_WORKER_HAS": "CLOUDRUN_CALLBACK_SECRET,ANTHROPIC_API_KEY",
        "MAX_TIMEOUT_MINUTES": "60",
        "ALLOWED_TOOLS": "Bash(git log:*, git diff:*),Read",
    }
    callback = {"CLOUDRUN_CALLBACK_SECRET": "secret CLOUDRUN_CALLBACK_SECRET:latest"}
    worker = common | callback | {"MAX_TIMEOUT_MINUTES": "60", "ANTHROPIC_API_KEY": "secret ANTHROPIC_API_KEY:latest"}
    spec = resources[SERVICE]["spec"]["template"]["spec"]
    tasks = [resources[name]["spec"]["template"]["spec"]["template"]["spec"] for name in (JOB, SWEEP)]
    assert [api, worker, common | callback] == [environment(each["containers"][0]) for each in (spec, *tasks)]
    assert [account(f"ccrun-{name}") for name in ("api", "worker", "sweep")] == [
        each["serviceAccountName"] for each in (spec, *tasks)
    ]


def test_images_are_deployed_by_digest(full_run: FullRun) -> None:
    """The jobs and the service run the images that were built, even if the tags move; the sweep runs the API's image."""
    runs = full_run.runs
    built = runs["build-and-push.sh"].output
    deployed = [
        word.removeprefix("--image=")
        for run in runs.values()
        for call in run.calls
        for word in call["argv"]
        if word.startswith("--image=")
    ]
    assert [True, True, True] == [
        re.search(r"/(api|worker)@sha256:[0-9a-f]{64}$", image) is not None for image in deployed
    ]
    assert [("worker", True), ("api", True), ("api", True)] == [
        (image.partition("@")[0].rpartition("/")[2], image in built) for image in deployed
    ]
    assert {f"image/us-central1-docker.pkg.dev/{PROJECT}/claude-code/{name}:v1.2.3" for name in ("api", "worker")} == {
        name for name in full_run.state["resources"] if name.startswith("image/")
    }


def test_the_service_requires_authentication(full_run: FullRun) -> None:
    """The service is deployed without unauthenticated access, with probes on a path that Cloud Run does not reserve."""
    deploy = next(words for words in full_run.runs["deploy-service.sh"].changes if words[:2] == ["run", "deploy"])
    assert {
        "--no-allow-unauthenticated",
        "--ingress=all",
        "--timeout=3600s",
        "--cpu-throttling",
        "--clear-secrets",
    } <= set(deploy)
    assert 2 == sum("-probe=httpGet.path=/health," in word for word in deploy)


@pytest.mark.parametrize(
    "member", ["allUsers", "allAuthenticatedUsers", "ann@example.com", "user:ann@example.com, user:b@c"]
)
def test_callers_must_be_named_principals(clone: Clone, member: str) -> None:
    """Values of CALLERS for all users, without a type or with spaces are rejected."""
    clone.configure(CALLERS=member)
    run = clone.run("deploy-service.sh")
    assert (1, []) == (run.code, run.calls)
    assert run.complaints.startswith("CALLERS must be members separated by commas")


def test_images_are_built_by_local_docker(prepared: Clone) -> None:
    """With `--local`, docker builds from the files of the commit only, and pushes the images."""
    clone = prepared
    (clone.directory / "scripts" / "uncommitted.txt").write_text("not committed")
    clone.add_command(
        "docker", f'[ "$1" = push ] || tar -tz >>"{clone.directory}/context"; echo "$@" >>"{clone.directory}/commands"'
    )
    (clone.directory / "bin" / "tar").symlink_to(shutil.which("tar") or "")
    run = clone.run("build-and-push.sh", "--local")
    commands = (clone.directory / "commands").read_text().splitlines()
    assert ["build", "push", "build", "push"] == [line.split()[0] for line in commands]
    assert "--file=containers/api.Dockerfile" in commands[0]
    assert "scripts/deploy/cloud.sh" in (clone.directory / "context").read_text()
    assert "uncommitted" not in (clone.directory / "context").read_text()
    assert "Uncommitted changes are not in the images." == run.complaints.splitlines()[0]
    # This docker pushes nothing.
    assert (1, "The image api:v1.2.3 does not exist after the build: see the output of the build.") == (
        run.code,
        run.complaints.splitlines()[-1],
    )


def test_secrets_are_not_on_command_lines_or_in_output(full_run: FullRun) -> None:
    """Secrets are passed to gcloud on standard input; no command line and no output contains one."""
    runs = full_run.runs
    shown = "".join(json.dumps(call["argv"]) for run in runs.values() for call in run.calls)
    shown += "".join(run.output + run.complaints for run in runs.values())
    resources = full_run.state["resources"]
    assert ["made-up-callback-secret"] == resources["secret/CLOUDRUN_CALLBACK_SECRET"]["versions"]
    assert [] == [value for value in ("made-up-callback-secret", "made-up-key") if value in shown]


def test_a_changed_secret_becomes_a_new_version(deployed: Clone) -> None:
    """An unchanged secret gets no new version, and a secret that is no longer set keeps its value."""
    deployed.configure(CLOUDRUN_CALLBACK_SECRET="another made-up secret", ANTHROPIC_API_KEY="")
    assert 1 == len(deployed.run("create-secrets.sh").changes)
    assert [] == deployed.run("create-secrets.sh").changes
    resources = deployed.state["resources"]
    assert ["made-up-callback-secret", "another made-up secret"] == resources["secret/CLOUDRUN_CALLBACK_SECRET"][
        "versions"
    ]
    assert ["made-up-key"] == resources["secret/ANTHROPIC_API_KEY"]["versions"]


def test_a_missing_callback_secret_is_generated(prepared: Clone) -> None:
    """The secret has 256 bits, is stored in Secret Manager only, and is not generated again."""
    clone = prepared
    clone.configure(CLOUDRUN_CALLBACK_SECRET="", ANTHROPIC_API_KEY="")
    run = clone.run("create-secrets.sh")
    assert "gcloud secrets versions access latest --secret=CLOUDRUN_CALLBACK_SECRET" in run.output
    (secret,) = clone.state["resources"]["secret/CLOUDRUN_CALLBACK_SECRET"]["versions"]
    assert re.fullmatch(r"[0-9a-f]{64}", secret)
    assert secret not in run.output
    assert [] == clone.run("create-secrets.sh").changes
    assert "secret/ANTHROPIC_API_KEY" not in clone.state["resources"]

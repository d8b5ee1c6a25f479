"""The scripts of the deployment, against a stand-in for gcloud."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import pytest
from helpers.deploy import IN_ORDER, OPERATOR, PROJECT, ROOT, SETTINGS, Clone, Walk, fresh_project, put_command

DOCUMENT: Final = ROOT / "docs" / "permissions.md"
BUCKET: Final = f"{PROJECT}-claude-logs"
JOB: Final = "job/us-central1/claude-code-job"
SWEEP: Final = "job/us-central1/claude-code-sweep"
SERVICE: Final = "service/us-central1/claude-code-service"
KEY: Final = "key/global/claude-code/payload-encryption"
#: All that take part in a deployment, in an order in which each can be run.
ALL: Final = (*IN_ORDER, "setup-kms.sh", "setup-service-account.sh", "grant-job-permissions.sh", "teardown.sh")
#: Where the real gcloud has its Python.
PYTHON: Final = "platform/bundledpythonunix/bin/python3"

Grant = tuple[str, str, str, str]


def address(name: str) -> str:
    """Return the address of one of our accounts."""
    return f"{name}@{PROJECT}.iam.gserviceaccount.com"


def grants(state: dict[str, Any]) -> set[Grant]:
    """Return who may do what: member, role, resource, condition."""
    return {
        (member, binding["role"], resource, binding.get("condition", {}).get("expression", ""))
        for resource, policy in state["policies"].items()
        for binding in policy["bindings"]
        for member in binding["members"]
    }


def documented_roles() -> dict[str, list[str]]:
    """Return the custom roles of the document and their permissions."""
    rows = re.findall(r"(?m)^\| `(ccrun[A-Z]\w+)` \| ([^|]+) \|$", DOCUMENT.read_text())
    return {role: sorted(re.findall(r"`([^`]+)`", permissions)) for role, permissions in rows}


def documented_grants() -> set[Grant]:
    """Return the grants of the document, as `grants` does."""
    text = DOCUMENT.read_text()
    conditions = dict(re.findall(r"(?m)^([A-Z]+_[A-Z]+) +(\S.*)$", text))
    places = {"the bucket": f"bucket/{BUCKET}", "the key": KEY, "the job": JOB}
    found, identity = set(), ""
    section = text.partition("\n## Grants\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| (?:`(ccrun-\w+)`)? ?\| `([\w./]+)` \| (the \w+) \| (.+) \|$", section)
    for name, role, place, condition in rows:
        identity = name or identity
        full = role if "/" in role else f"projects/{PROJECT}/roles/{role}"
        names = [] if condition == "none" else condition.strip("`").split(" && ")
        expression = " && ".join(conditions[each] for each in names).replace("BUCKET", BUCKET)
        found.add((f"serviceAccount:{address(identity)}", full, places[place], expression))
    return found


# --- the whole way ------------------------------------------------------------------------------------------------------


def test_the_scripts_deploy_all_in_the_order_of_the_documents(walk: Walk) -> None:
    """Every script does its part on a project in which there is nothing, and complains of nothing."""
    assert [(0, "")] * len(IN_ORDER) == [(run.code, run.complaints) for run in walk.runs.values()]
    kinds = [name.split("/")[0] for name in walk.state["resources"]]
    expected = {"project": 1, "bucket": 1, "ring": 1, "key": 1, "repository": 1, "image": 2, "account": 4, "role": 6}
    expected |= {"secret": 2, "job": 2, "service": 1, "schedule": 1}
    assert expected == {kind: kinds.count(kind) for kind in kinds}


def test_who_may_do_what_is_what_the_document_says(walk: Walk) -> None:
    """The grants are those of docs/permissions.md, and beside them only what it names: secrets, schedule, callers."""
    state = walk.state
    schedule = (f"serviceAccount:{address('ccrun-scheduler')}", f"projects/{PROJECT}/roles/ccrunStart", SWEEP, "")
    reads = "roles/secretmanager.secretAccessor"
    secrets = {
        (f"serviceAccount:{address('ccrun-worker')}", reads, "secret/CLOUDRUN_CALLBACK_SECRET", ""),
        (f"serviceAccount:{address('ccrun-sweep')}", reads, "secret/CLOUDRUN_CALLBACK_SECRET", ""),
        (f"serviceAccount:{address('ccrun-worker')}", reads, "secret/ANTHROPIC_API_KEY", ""),
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


def test_nobody_may_do_anything_in_the_whole_project(walk: Walk) -> None:
    """No grant is on the project, none is of a role that may change who has access, none is for everybody."""
    runs = walk.runs
    words = [word for run in runs.values() for call in run.calls for word in call["argv"]]
    assert not any(word in ("projects", "organizations", "folders") for word in words if "iam" in word)
    assert [] == [
        word for word in words if re.search(r"[Aa]dmin|allUsers|allAuthenticatedUsers|roles/(owner|editor)", word)
    ]
    assert [] == [
        call["argv"] for run in runs.values() for call in run.calls if call["argv"][:2] == ["projects", "add"]
    ]


def test_a_second_run_changes_nothing(deployed: Clone) -> None:
    """Every script can be run again at any time: it looks, and finds all as it should be."""
    before = deployed.state
    runs = [deployed.run(script) for script in IN_ORDER]
    assert [(0, [], "")] * len(IN_ORDER) == [(run.code, run.changes, run.complaints) for run in runs]
    assert before == deployed.state


def test_a_dry_run_changes_nothing_and_says_what_it_would_do(clone: Clone) -> None:
    """On a project in which there is nothing, every script comes to its end without a change."""
    runs = {script: clone.run(script, "--dry-run") for script in ALL}
    assert [(0, [])] * len(ALL) == [(run.code, run.changes) for run in runs.values()]
    assert fresh_project() == clone.state
    would = [re.findall(r"(?m)^would run: gcloud (\S+ \S+)", run.output) for run in runs.values()]
    assert ["services enable", "storage buckets", "artifacts repositories"] == would[0][:3]
    assert "made-up-callback-secret" not in "".join(run.output + run.complaints for run in runs.values())


# --- half-done and changed ------------------------------------------------------------------------------------------------


def without_role(state: dict[str, Any]) -> None:
    """A role has been deleted, which leaves it to be brought back."""
    state["resources"]["role/ccrunAdd"]["deleted"] = True


def with_more_permissions(state: dict[str, Any]) -> None:
    """A role may do more than it should."""
    state["resources"]["role/ccrunList"]["includedPermissions"].append("storage.objects.delete")


def with_open_bucket(state: dict[str, Any]) -> None:
    """The bucket is as one that was made by hand."""
    bucket = state["resources"][f"bucket/{BUCKET}"]
    for name in ("public_access_prevention", "lifecycle_config"):
        del bucket[name]
    bucket |= {"uniform_bucket_level_access": False, "soft_delete_policy": {"retentionDurationSeconds": "604800"}}


def without_grants(state: dict[str, Any]) -> None:
    """The grants on the bucket and the key are gone."""
    state["policies"] = {name: policy for name, policy in state["policies"].items() if name[:3] not in ("buc", "key")}


def without_rotation(state: dict[str, Any]) -> None:
    """The key is not rotated."""
    del state["resources"][KEY]["rotationPeriod"], state["resources"][KEY]["nextRotationTime"]


def with_retries(state: dict[str, Any]) -> None:
    """The job tries again."""
    state["resources"][JOB]["spec"]["template"]["spec"]["template"]["spec"]["maxRetries"] = 3


def with_other_account(state: dict[str, Any]) -> None:
    """The sweep has been given another identity."""
    task = state["resources"][SWEEP]["spec"]["template"]["spec"]["template"]["spec"]
    task["serviceAccountName"] = f"1-compute@developer.gserviceaccount.com{PROJECT}"


def with_other_variable(state: dict[str, Any]) -> None:
    """A variable of the service has been changed."""
    state["resources"][SERVICE]["spec"]["template"]["spec"]["containers"][0]["env"][2]["value"] = "other-project"


def without_ingress(state: dict[str, Any]) -> None:
    """The service has been given another way in, and no probe."""
    service = state["resources"][SERVICE]
    service["metadata"]["annotations"]["run.googleapis.com/ingress"] = "internal"
    del service["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]


def with_other_schedule(state: dict[str, Any]) -> None:
    """The schedule runs under the identity of the worker."""
    target = state["resources"]["schedule/us-central1/claude-code-sweep"]["httpTarget"]
    target["oauthToken"]["serviceAccountEmail"] = address("ccrun-worker")


def without_images(state: dict[str, Any]) -> None:
    """One of the images has been deleted."""
    image = next(name for name in state["resources"] if name.startswith("image/") and "/worker:" in name)
    del state["resources"][image]


@pytest.mark.parametrize(
    ("script", "damage"),
    [
        ("setup-service-account.sh", without_role),
        ("setup-service-account.sh", with_more_permissions),
        ("setup-project.sh", with_open_bucket),
        ("setup-project.sh", without_grants),
        ("setup-kms.sh", without_rotation),
        ("deploy-job.sh", with_retries),
        ("deploy-job.sh", with_other_account),
        ("deploy-service.sh", with_other_variable),
        ("deploy-service.sh", without_ingress),
        ("setup-scheduler.sh", with_other_schedule),
        ("build-and-push.sh", without_images),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_differs_is_put_right(deployed: Clone, script: str, damage: Callable[[dict[str, Any]], None]) -> None:
    """Whatever somebody has changed or taken away, the script in charge brings it back to what it should be."""
    good, damaged = deployed.state, deployed.state
    damage(damaged)
    deployed.change(**damaged)
    run = deployed.run(script)
    assert (0, good) == (run.code, sorted_policies(deployed.state, like=good))
    assert [] != run.changes


def sorted_policies(state: dict[str, Any], *, like: dict[str, Any]) -> dict[str, Any]:
    """Return the state with the policies of the other one, if both grant the same."""
    return {**state, "policies": like["policies"]} if grants(state) == grants(like) else state


def test_a_script_goes_on_where_another_run_was_broken_off(clone: Clone, walk: Walk) -> None:
    """A run that ended halfway is completed by the next one, to the same result."""
    clone.change(denied={"iam roles create": "iam.roles.create"})
    assert 1 == clone.run("setup-project.sh").code
    clone.change(denied={})
    assert 0 == clone.run("setup-project.sh").code
    assert walk.after("setup-project.sh") == clone.state


def test_a_new_account_may_take_a_while_to_be_known(clone: Clone) -> None:
    """A grant to an account that has just been made is tried again until Google knows the account."""
    clone.change(unseen=3)
    run = clone.run("setup-project.sh")
    assert (0, "") == (run.code, run.complaints)


def test_what_ccrun_did_not_grant_is_named(deployed: Clone) -> None:
    """A leftover grant to one of the accounts, or one to everybody, is told of, and left to the operator."""
    state = deployed.state
    left = {"role": "roles/storage.objectAdmin", "members": [f"serviceAccount:{address('ccrun-api')}"]}
    state["policies"][f"bucket/{BUCKET}"]["bindings"].append(left)
    state["policies"][SERVICE]["bindings"].append({"role": "roles/run.invoker", "members": ["allUsers"]})
    deployed.change(**state)
    run = deployed.run("setup-service-account.sh")
    assert (0, []) == (run.code, run.changes)
    assert [
        f"Not of ccrun's doing: {address('ccrun-api')} has roles/storage.objectAdmin on gs://{BUCKET}",
        "Not of ccrun's doing: allUsers has roles/run.invoker on claude-code-service",
    ] == [line.partition(". Take it away")[0] for line in run.complaints.splitlines()]


# --- what is deployed -----------------------------------------------------------------------------------------------------


def test_the_bucket_is_closed_and_forgets(walk: Walk) -> None:
    """Uniform access, no public access, no deleted object kept; tasks go after 30 days, sealed requests after one."""
    bucket = walk.state["resources"][f"bucket/{BUCKET}"]
    rules = [
        {"action": {"type": "Delete"}, "condition": {"age": 30}},
        {"action": {"type": "Delete"}, "condition": {"age": 1, "matchesSuffix": ["/encrypted-payload.bin"]}},
    ]
    assert {
        "name": BUCKET,
        "location": "US-CENTRAL1",
        "uniform_bucket_level_access": True,
        "public_access_prevention": "enforced",
        "soft_delete_policy": {"retentionDurationSeconds": "0"},
        "lifecycle_config": {"rule": rules},
    } == bucket


def test_the_key_is_rotated(walk: Walk) -> None:
    """Every 90 days."""
    key = walk.state["resources"][KEY]
    assert ("7776000s", "+P90D") == (key["rotationPeriod"], key["nextRotationTime"])


@pytest.mark.parametrize(("longest", "seconds"), [("60", "4500"), ("1440", "87300"), ("0.5", "960")])
def test_a_job_outlives_its_longest_task_and_never_retries(deployed: Clone, longest: str, seconds: str) -> None:
    """The platform ends a task a quarter of an hour after the watchdog would have, and never runs it again."""
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
    """Return what a container has in its environment; a secret is written as the place it comes from."""
    return {
        each["name"]: each.get("value") or "secret {name}:{key}".format(**each["valueFrom"]["secretKeyRef"])
        for each in container["env"]
    }


def test_each_part_gets_its_settings_and_the_secrets_that_it_uses(walk: Walk) -> None:
    """The API holds no secret, but knows what the worker has; the sweep holds the callback secret alone."""
    resources = walk.state["resources"]
    common = {
        "CCRUN_BACKEND": "gcp",
        "PROJECT_ID": PROJECT,
        "REGION": "us-central1",
        "GCS_LOGS_BUCKET": BUCKET,
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
    assert [address(f"ccrun-{name}") for name in ("api", "worker", "sweep")] == [
        each["serviceAccountName"] for each in (spec, *tasks)
    ]


def test_images_are_deployed_by_digest(walk: Walk) -> None:
    """What runs is what was built, whatever becomes of the tag; the sweep runs the image of the API."""
    runs = walk.runs
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
        name for name in walk.state["resources"] if name.startswith("image/")
    }


def test_nobody_calls_the_service_without_being_named(walk: Walk) -> None:
    """The service is deployed closed, with probes on a path that Cloud Run does not answer itself."""
    deploy = next(words for words in walk.runs["deploy-service.sh"].changes if words[:2] == ["run", "deploy"])
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
def test_callers_are_named_members(clone: Clone, member: str) -> None:
    """Everybody is nobody's name."""
    clone.settle(CALLERS=member)
    run = clone.run("deploy-service.sh")
    assert (1, []) == (run.code, run.calls)
    assert run.complaints.startswith("CALLERS must be members separated by commas")


def test_images_can_be_built_by_the_docker_of_this_machine(prepared: Clone) -> None:
    """With --local docker builds from the commit and pushes; of the folder nothing else is sent."""
    clone = prepared
    (clone.folder / "scripts" / "of-nobody.txt").write_text("not committed")
    put_command(
        clone.folder, "docker", f'[ "$1" = push ] || tar -tz >>"{clone.folder}/sent"; echo "$@" >>"{clone.folder}/said"'
    )
    (clone.folder / "bin" / "tar").symlink_to(shutil.which("tar") or "")
    run = clone.run("build-and-push.sh", "--local")
    said = (clone.folder / "said").read_text().splitlines()
    assert ["build", "push", "build", "push"] == [line.split()[0] for line in said]
    assert "--file=containers/api.Dockerfile" in said[0]
    assert "scripts/deploy/cloud.sh" in (clone.folder / "sent").read_text()
    assert "of-nobody" not in (clone.folder / "sent").read_text()
    assert "What is not committed will not be in the images." == run.complaints.splitlines()[0]
    # The stand-in for docker pushes nothing.
    assert (1, "The image api:v1.2.3 is still not there: look at what the build said.") == (
        run.code,
        run.complaints.splitlines()[-1],
    )


# --- secrets --------------------------------------------------------------------------------------------------------------


def test_a_secret_is_never_on_a_command_line_nor_shown(walk: Walk) -> None:
    """Values go to gcloud by standard input; neither a command line nor an output holds one."""
    runs = walk.runs
    seen = "".join(json.dumps(call["argv"]) for run in runs.values() for call in run.calls)
    seen += "".join(run.output + run.complaints for run in runs.values())
    resources = walk.state["resources"]
    assert ["made-up-callback-secret"] == resources["secret/CLOUDRUN_CALLBACK_SECRET"]["versions"]
    assert [] == [value for value in ("made-up-callback-secret", "made-up-key") if value in seen]


def test_a_value_that_differs_becomes_a_new_version(deployed: Clone) -> None:
    """One that does not, does not; one that is no longer set stays as it is."""
    deployed.settle(CLOUDRUN_CALLBACK_SECRET="another made-up secret", ANTHROPIC_API_KEY="")
    assert 1 == len(deployed.run("create-secrets.sh").changes)
    assert [] == deployed.run("create-secrets.sh").changes
    resources = deployed.state["resources"]
    assert ["made-up-callback-secret", "another made-up secret"] == resources["secret/CLOUDRUN_CALLBACK_SECRET"][
        "versions"
    ]
    assert ["made-up-key"] == resources["secret/ANTHROPIC_API_KEY"]["versions"]


def test_a_callback_secret_is_made_when_there_is_none(prepared: Clone) -> None:
    """It has 256 bits, is kept in Secret Manager alone, and is not made again."""
    clone = prepared
    clone.settle(CLOUDRUN_CALLBACK_SECRET="", ANTHROPIC_API_KEY="")
    run = clone.run("create-secrets.sh")
    assert "gcloud secrets versions access latest --secret=CLOUDRUN_CALLBACK_SECRET" in run.output
    (secret,) = clone.state["resources"]["secret/CLOUDRUN_CALLBACK_SECRET"]["versions"]
    assert re.fullmatch(r"[0-9a-f]{64}", secret)
    assert secret not in run.output
    assert [] == clone.run("create-secrets.sh").changes
    assert "secret/ANTHROPIC_API_KEY" not in clone.state["resources"]


# --- what is wrong, in one sentence -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ALL)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"account": None}, "Nobody is logged in: run gcloud auth login."),
        ({"project": "another"}, f"{OPERATOR} may not do this in {PROJECT}: "),
    ],
    ids=["no login", "another project"],
)
def test_a_missing_login_or_project_is_told(clone: Clone, script: str, change: dict[str, Any], sentence: str) -> None:
    """One sentence, status 1, and nothing changed."""
    clone.change(**change)
    run = clone.run(script, "--yes") if script == "teardown.sh" else clone.run(script)
    assert (1, []) == (run.code, run.changes)
    assert run.complaints.startswith(sentence)
    assert len(run.complaints.splitlines()) <= 2


def test_without_gcloud_it_is_said_where_to_get_it(clone: Clone) -> None:
    """One sentence."""
    (clone.folder / "bin" / "gcloud").unlink()
    run = clone.run("setup-project.sh")
    assert (1, "gcloud is not here: install the Google Cloud CLI, https://cloud.google.com/sdk/docs/install.\n") == (
        run.code,
        run.complaints,
    )


def test_a_project_without_billing_is_told_before_anything_is_made(clone: Clone) -> None:
    """One sentence."""
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
def test_a_wrong_setting_is_told(clone: Clone, name: str, value: str, meaning: str) -> None:
    """One sentence with the variable and what is allowed, before gcloud is asked anything."""
    clone.settle(**{name: value})
    run = clone.run("deploy-job.sh")
    assert (1, [], f'{name} must be {meaning}, not "{value}".\n') == (run.code, run.calls, run.complaints)


def test_a_wrong_secret_is_not_shown(clone: Clone) -> None:
    """Only which one it is, and what is allowed."""
    clone.settle(ANTHROPIC_API_KEY="a b")
    run = clone.run("deploy-job.sh")
    assert (1, "ANTHROPIC_API_KEY must be printable ASCII characters without blanks.\n") == (run.code, run.complaints)


def test_a_missing_setting_is_told(clone: Clone) -> None:
    """Without a project there is nothing to do."""
    clone.settle(PROJECT_ID="")
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
def test_a_refused_permission_is_told(
    clone: Clone, walk: Walk, script: str, command: str, permission: str, role: str
) -> None:
    """One sentence says which role the operator lacks, then the last line that gcloud said; status 1."""
    clone.change(**{**walk.before(script), "denied": {command: permission}})
    run = clone.run(script)
    first, last = run.complaints.splitlines()
    assert 1 == run.code
    assert first.startswith(
        f"{OPERATOR} may not do this in {PROJECT}: gcloud {' '.join(command.split()[:2])} needs {role}"
    )
    assert first.endswith(f"({permission}).")
    assert f"PERMISSION_DENIED: Permission '{permission}' denied on resource (or it may not exist)." == last


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("create-secrets.sh", "An API is off"),
        ("build-and-push.sh", "An API is off"),
        ("deploy-job.sh", "An API is off"),
        ("deploy-service.sh", "An API is off"),
        ("setup-scheduler.sh", "An API is off"),
        ("setup-kms.sh", "An API is off"),
        ("setup-service-account.sh", "An API is off"),
    ],
)
def test_a_script_that_comes_too_early_says_what_comes_first(clone: Clone, script: str, sentence: str) -> None:
    """On a project that is not prepared, each names the script to begin with."""
    run = clone.run(script)
    assert 1 == run.code
    if script == "create-secrets.sh":
        # It prepares what it needs, but for the identities that may read.
        assert "does not exist" in run.complaints
    else:
        assert f"An API is off in {PROJECT}: run scripts/setup-project.sh." == run.complaints.splitlines()[0]


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("deploy-job.sh", "There is no image api:v1.2.3: run scripts/build-and-push.sh first."),
        ("deploy-service.sh", "There is no image api:v1.2.3: run scripts/build-and-push.sh first."),
        ("setup-scheduler.sh", "The job claude-code-sweep is not there: run scripts/deploy-job.sh first."),
        ("grant-job-permissions.sh", "The job claude-code-job is not there: run scripts/deploy-job.sh first."),
    ],
)
def test_a_script_names_the_one_that_comes_first(prepared: Clone, script: str, sentence: str) -> None:
    """On a project that is prepared, but in which nothing is built."""
    run = prepared.run(script)
    assert (1, sentence + "\n") == (run.code, run.complaints)


def test_an_unknown_option_is_told_and_help_is_given(clone: Clone) -> None:
    """Every script explains itself, and takes only the options that it knows."""
    for script in ALL:
        assert (1, f'{script} does not know "--force": try --help.\n') == (
            clone.run(script, "--force").code,
            clone.run(script, "--force").complaints,
        )
        shown = clone.run(script, "--help")
        assert (0, "", []) == (shown.code, shown.complaints, shown.calls)
        assert f"  scripts/{script} [--dry-run]" in shown.output


# --- .env -----------------------------------------------------------------------------------------------------------------


def key_of(clone: Clone, line: str, **given: str) -> tuple[str, str]:
    """Return the key that a script would make when `.env` has that line, and what it complains of."""
    (clone.folder / ".env").write_text(f"# A comment.\n\nPROJECT_ID={PROJECT}\n{line}\n")
    run = clone.run("setup-kms.sh", "--dry-run", **given)
    made = re.search(r"keys create (\S+)", run.output)
    return (made[1] if made else "", run.complaints)


@pytest.mark.parametrize(
    "line",
    [
        "KMS_KEY_NAME=my-key",
        "  export KMS_KEY_NAME=my-key  ",
        'KMS_KEY_NAME="my-key"',
        "KMS_KEY_NAME='my-key' # mine",
        "KMS_KEY_NAME=my-key # it's mine",
        "KMS_KEY_NAME=my-key\r",
    ],
)
def test_lines_of_the_file_are_read_as_people_write_them(clone: Clone, line: str) -> None:
    """With or without quotes, `export`, a comment, or the line ends of Windows."""
    assert ("my-key", "") == key_of(clone, line)


def test_the_environment_wins_over_the_file(clone: Clone) -> None:
    """And the file over the default; a name that is not set falls back to it."""
    assert ("of-environment", "") == key_of(clone, "KMS_KEY_NAME=of-file", KMS_KEY_NAME="of-environment")
    assert ("payload-encryption", "") == key_of(clone, "KMS_KEY_NAME=")


def test_the_file_is_data(prepared: Clone) -> None:
    """Nothing in it is run or expanded, and it sets nothing that is not a setting."""
    clone = prepared
    secret = "$(touch here) `touch here` $HOME \\ ; touch here"
    (clone.folder / ".env").write_text(
        f"PROJECT_ID={PROJECT}\nCLOUDRUN_CALLBACK_SECRET='{secret}'\nPATH=/nowhere\nBASH_ENV=.env\nIFS=-\n"
    )
    run = clone.run("create-secrets.sh")
    assert (0, [secret]) == (run.code, clone.state["resources"]["secret/CLOUDRUN_CALLBACK_SECRET"]["versions"])
    assert ["PATH", "BASH_ENV", "IFS"] == [line.split()[0] for line in run.complaints.splitlines()[:3]]
    assert not (clone.folder / "here").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("GCS_LOGS_BUCKET", "Line 4 of {file} is not NAME=VALUE."),
        ("my bucket=b", "Line 4 of {file} is not NAME=VALUE."),
        ('GCS_LOGS_BUCKET="b', "Line 4 of {file} has a quote too few or too many."),
        ("GCS_LOGS_BUCKET='b' c'", "Line 4 of {file} has a quote too few or too many."),
    ],
)
def test_a_line_that_cannot_be_read_is_told_without_being_shown(clone: Clone, line: str, sentence: str) -> None:
    """It may hold a secret."""
    assert ("", sentence.format(file=clone.folder / ".env") + "\n") == key_of(clone, line)


def test_another_file_can_be_named(clone: Clone) -> None:
    """One for each project, say."""
    (clone.folder / "other.env").write_text("PROJECT_ID=another-project\n")
    clone.change(project="another-project")
    run = clone.run("grant-job-permissions.sh", "--dry-run", ENV_FILE="other.env")
    assert "--project=another-project" in run.calls[-1]["argv"]
    run = clone.run("grant-job-permissions.sh", ENV_FILE="no.env")
    assert (1, "There is no file no.env, which ENV_FILE names.\n") == (run.code, run.complaints)


def test_the_example_explains_every_setting() -> None:
    """Every variable that the scripts or ccrun read stands in .env.example, commented or not, below what it means."""
    explained = re.findall(r"(?m)^#? ?([A-Z][A-Z_]+)=", (ROOT / ".env.example").read_text())
    read = set(re.findall(r'"\$1" ([A-Z_]+) ', (ROOT / "scripts" / "deploy" / "settings.sh").read_text()))
    read |= set(re.findall(r'_setting\(\s*"([A-Z_]+)"', (ROOT / "ccrun" / "config.py").read_text()))
    # Set by Cloud Run, by ccrun for its worker, or by deploy-service.sh.
    read -= {
        "K_SERVICE",
        "CLOUD_RUN_JOB",
        "CLOUD_RUN_EXECUTION",
        "TASK_ID",
        "ENCRYPTED_PAYLOAD_PATH",
        "CCRUN_WORKER_HAS",
    }
    assert sorted(read) == sorted(explained)


def test_the_example_is_a_file_that_the_scripts_take(clone: Clone) -> None:
    """Copied as it is, it lacks the project alone; every name that it has commented out is one that may be set."""
    example = (ROOT / ".env.example").read_text()
    for text in (example, re.sub(r"(?m)^# ([A-Z][A-Z_]+=).*$", r"\1", example)):
        (clone.folder / ".env").write_text(text)
        run = clone.run("setup-project.sh")
        assert "PROJECT_ID is not set: copy .env.example to .env and set it there.\n" == run.complaints


# --- the end --------------------------------------------------------------------------------------------------------------


def test_teardown_deletes_all_but_the_data(deployed: Clone) -> None:
    """It says first what it will delete and asks; bucket and key stay, and nobody of ours may touch them any more."""
    before = deployed.state["resources"]
    run = deployed.run("teardown.sh", given=f"{PROJECT}\n")
    assert 0 == run.code
    listed = run.output.partition("These stay: ")[0]
    assert listed.index("service claude-code-service") > listed.index("schedule claude-code-sweep")
    left = deployed.state["resources"]
    assert {"project", "bucket", "ring", "key", "role"} == {name.split("/")[0] for name in left}
    assert before[f"bucket/{BUCKET}"] == left[f"bucket/{BUCKET}"]
    assert all(role["deleted"] for name, role in left.items() if name.startswith("role/"))
    assert set() == grants(deployed.state)


def test_teardown_with_data_deletes_the_bucket_and_what_can_be_deleted_of_the_key(deployed: Clone) -> None:
    """Versions of the key are scheduled for destruction; a new deployment after it works."""
    run = deployed.run("teardown.sh", "--data", "--yes")
    assert 0 == run.code
    assert "the key itself can never be deleted" in run.output
    assert ["DESTROY_SCHEDULED"] == deployed.state["resources"][KEY]["versions"]
    assert f"bucket/{BUCKET}" not in deployed.state["resources"]
    assert 0 == deployed.run("setup-project.sh").code
    assert ["DESTROY_SCHEDULED", "ENABLED"] == deployed.state["resources"][KEY]["versions"]
    assert documented_grants() >= grants(deployed.state)


@pytest.mark.parametrize("answer", ["", "\n", "yes\n", "another-project\n"])
def test_teardown_needs_the_name_of_the_project(deployed: Clone, answer: str) -> None:
    """Nothing is deleted on any other answer, and none on none."""
    run = deployed.run("teardown.sh", given=answer)
    assert (1, []) == (run.code, run.changes)
    assert f"That is not {PROJECT}: nothing was deleted." == run.complaints.splitlines()[-1]


def test_teardown_of_nothing_is_no_error(clone: Clone) -> None:
    """It says that there is nothing, and asks nothing."""
    run = clone.run("teardown.sh")
    assert (0, []) == (run.code, run.changes)
    assert run.output.endswith("nothing: there is nothing left.\n")


# --- the real thing ---------------------------------------------------------------------------------------------------------


def sdk() -> Path:
    """Return where the real gcloud is installed."""
    found = shutil.which("gcloud")
    root = Path(found).resolve().parents[1] if found else Path("nowhere")
    if not (root / PYTHON).exists():
        pytest.skip("there is no gcloud here with a Python of its own")
    return root


def all_calls(deployed: Clone, walk: Walk) -> Iterable[dict[str, Any]]:
    """Yield calls of every kind that the scripts make."""
    for run in walk.runs.values():
        yield from run.calls
    state = deployed.state
    for damage in (without_role, with_more_permissions, with_open_bucket, without_rotation, with_other_schedule):
        damage(state)
    deployed.change(**state)
    yield from deployed.run("setup-project.sh").calls
    yield from deployed.run("setup-scheduler.sh").calls
    yield from deployed.run("deploy-service.sh", SERVICE_CPU_ALWAYS="yes", SERVICE_MIN_INSTANCES="1").calls
    yield from deployed.run("teardown.sh", "--yes").calls
    yield from deployed.run("teardown.sh", "--yes", "--data").calls
    yield from deployed.run("setup-kms.sh").calls


def test_the_real_gcloud_takes_every_call_and_shows_what_the_stand_in_shows(deployed: Clone, walk: Walk) -> None:
    """Each command and flag is real, what is made of the flags is what the stand-in makes, and it is printed alike."""
    root = sdk()
    ended = subprocess.run(
        [root / PYTHON, Path(__file__).with_name("real_gcloud.py")],
        input="".join(json.dumps(call) + "\n" for call in all_calls(deployed, walk)),
        env={
            "GCLOUD_ROOT": str(root),
            "CLOUDSDK_CONFIG": str(deployed.folder / "config"),
            "HOME": str(deployed.folder),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (0, "") == (ended.returncode, ended.stderr)
    found = json.loads(ended.stdout)
    assert [] == [each for each in found if "fault" in each]
    made = [each["made"] for each in found]
    resources = walk.state["resources"]
    first = {each["metadata"]["name"]: each for each in reversed(made)}
    for name in (JOB, SWEEP, SERVICE):
        ours = resources[name]
        assert ours["spec"] == kept(first[ours["metadata"]["name"]]["spec"], like=ours["spec"])
        assert ours["metadata"] == kept(first[ours["metadata"]["name"]]["metadata"], like=ours["metadata"])


def kept(theirs: Any, *, like: Any) -> Any:
    """Return of a value what the other one has too."""
    if isinstance(like, dict) and isinstance(theirs, dict):
        return {name: kept(theirs[name], like=each) for name, each in like.items() if name in theirs}
    if isinstance(like, list) and isinstance(theirs, list) and len(like) == len(theirs):
        return [kept(each, like=other) for each, other in zip(theirs, like, strict=True)]
    return theirs


# --- the scripts themselves -------------------------------------------------------------------------------------------------


def test_the_scripts_pass_shellcheck() -> None:
    """Without a remark."""
    shellcheck = ROOT / ".venv" / "bin" / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed")
    scripts = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
    ended = subprocess.run(
        [shellcheck, "--external-sources", *scripts], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (0, "") == (ended.returncode, ended.stdout)


def test_the_scripts_keep_to_what_the_bash_of_macos_knows() -> None:
    """Bash 3.2: no associative arrays, no case changes, no mapfile, no references by name; and nothing is evaluated."""
    newer = r"declare -[An]|local -[An]|mapfile|readarray|\$\{\w+[,^]|\|&|&>>|\beval\b|\bcoproc\b"
    texts = {path.name: path.read_text() for path in (ROOT / "scripts").glob("*.sh")}
    assert {} == {name: found for name, text in texts.items() if (found := re.findall(newer, text))}
    assert [] == [name for name in texts if name in ALL and "set -euo pipefail" not in texts[name]]

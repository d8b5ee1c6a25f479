"""What Terraform itself makes of scripts/deploy/terraform: a plan, against the schema of Google's provider. Nothing is made."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from standins import terraform

from ccrun import config

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / "scripts" / "deploy" / "terraform"
PROVIDER: Final = json.loads(Path(__file__).with_name("google.json").read_text())
PROJECT: Final = "some-project"
GIVEN: Final = {"project_id": PROJECT, "image_tag": "v1"}

pytestmark = pytest.mark.skipif(shutil.which("terraform") is None, reason="there is no terraform here")

Resource = dict[str, Any]


@attrs.frozen(kw_only=True)
class Terraform:
    """Terraform in a copy of the folder, with the provider's stand-in."""

    folder: Path
    environment: dict[str, str]

    def run(self, *arguments: str, **variables: object) -> subprocess.CompletedProcess[str]:
        """Run a command of Terraform's with these variables."""
        given = {
            f"TF_VAR_{name}": value if isinstance(value, str) else json.dumps(value)
            for name, value in variables.items()
        }
        return subprocess.run(
            ["terraform", *arguments],
            cwd=self.folder,
            env={**os.environ, **self.environment, **given},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def plan(self, **variables: object) -> dict[str, Resource]:
        """Return what would be made, by its address."""
        ran = self.run("plan", "-input=false", "-no-color", "-out=plan", **variables)
        assert 0 == ran.returncode, ran.stdout + ran.stderr
        shown = json.loads(self.run("show", "-json", "plan").stdout)
        return {each["address"]: each["values"] for each in shown["planned_values"]["root_module"]["resources"]}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Terraform]]:
    """Return what makes another copy of the folder, ready for Terraform."""
    with terraform.google(PROVIDER["resources"], project=PROJECT) as found:

        def make() -> Terraform:
            folder = tmp_path_factory.mktemp("terraform")
            for path in FOLDER.glob("*.tf"):
                shutil.copyfile(path, folder / path.name)
            environment = {**found, "HOME": str(folder), "CHECKPOINT_DISABLE": "1"}
            made = Terraform(folder=folder, environment=environment)
            ran = made.run("init", "-backend=false", "-input=false", "-no-color")
            assert 0 == ran.returncode, ran.stdout + ran.stderr
            return made

        yield make


@pytest.fixture(scope="module")
def deployment(start: Callable[[], Terraform]) -> Terraform:
    """The folder as it is."""
    return start()


@pytest.fixture(scope="module")
def plan(deployment: Terraform) -> dict[str, Resource]:
    """What would be made with as few variables as can be."""
    return deployment.plan(**GIVEN)


def only(plan: dict[str, Resource], kind: str) -> list[Resource]:
    """Return the resources of a type."""
    return [values for address, values in plan.items() if address.startswith(f"{kind}.")]


def container(values: Resource) -> Resource:
    """Return the one container of a job or a service."""
    template = values["template"][0]
    (found,) = (template["template"][0] if "template" in template else template)["containers"]
    return dict(found)


def test_provider_is_the_one_that_was_looked_at() -> None:
    """The version that Terraform takes begins with the one whose schema is used here."""
    (wanted,) = re.findall(r'version = "~> ([\d.]+)"', (FOLDER / "versions.tf").read_text())
    assert PROVIDER["version"].startswith(f"{wanted}.")


def test_configuration_is_valid(deployment: Terraform) -> None:
    """Terraform finds nothing wrong or doubtful, with the provider's schema."""
    found = json.loads(deployment.run("validate", "-json").stdout)
    assert (True, []) == (found["valid"], found["diagnostics"])


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("job.tf", "max_retries           = 0", "max_retry = 0"),
        ("job.tf", "args  = [", "arguments = ["),
        ("kms.tf", "key_ring        = google_kms_key_ring.ring.id", ""),
        ("storage.tf", "lifecycle_rule", "life_cycle_rule"),
        ("outputs.tf", "api.uri", "api.url"),
        ("secrets.tf", "auto {}", "auto = true"),
    ],
)
def test_mistakes_are_found(start: Callable[[], Terraform], file: str, right: str, wrong: str) -> None:
    """A name that the provider does not have, or a missing argument, would not be taken: the check is real."""
    broken = start()
    text = (broken.folder / file).read_text()
    assert right in text
    (broken.folder / file).write_text(text.replace(right, wrong))
    assert 0 != broken.run("validate").returncode


def test_grants_come_out_whole(plan: dict[str, Resource]) -> None:
    """Each member of the bucket's, key's and jobs' policies is an identity of ccrun's, its roles and conditions spelled out."""
    grants = {
        (
            values["member"].removeprefix("serviceAccount:").partition("@")[0],
            values["role"].rpartition("/")[2],
            *(each["expression"] for each in values.get("condition") or ()),
        )
        for kind in (
            "google_storage_bucket_iam_member",
            "google_kms_crypto_key_iam_member",
            "google_cloud_run_v2_job_iam_member",
        )
        for values in only(plan, kind)
    }
    no_logs = '!resource.name.endsWith(".jsonl")'
    no_index = f'!resource.name.startsWith("projects/_/buckets/{PROJECT}-claude-logs/objects/index/")'
    active = 'api.getAttribute("storage.googleapis.com/objectListPrefix", "").startsWith("active/")'
    assert {
        ("ccrun-api", "ccrunAdd"),
        ("ccrun-api", "ccrunReplace", no_logs),
        ("ccrun-api", "ccrunList"),
        ("ccrun-api", "cloudkms.cryptoKeyEncrypter"),
        ("ccrun-api", "ccrunLaunch"),
        ("ccrun-worker", "ccrunAdd", no_index),
        ("ccrun-worker", "ccrunReplace", f"{no_logs} && {no_index}"),
        ("ccrun-worker", "cloudkms.cryptoKeyDecrypter"),
        ("ccrun-sweep", "ccrunAdd", no_index),
        ("ccrun-sweep", "ccrunReplace", f"{no_logs} && {no_index}"),
        ("ccrun-sweep", "ccrunList", active),
        ("ccrun-sweep", "cloudkms.cryptoKeyDecrypter"),
        ("ccrun-sweep", "ccrunRelaunch"),
        ("ccrun-scheduler", "ccrunStart"),
    } == grants


def test_nobody_may_call_unless_named(deployment: Terraform, plan: dict[str, Resource]) -> None:
    """Without callers nobody may call the service; with some, they and nobody else; everybody is refused."""
    assert [] == only(plan, "google_cloud_run_v2_service_iam_member")
    caller = "serviceAccount:app@other.iam.gserviceaccount.com"
    grants = only(deployment.plan(**GIVEN, callers=[caller]), "google_cloud_run_v2_service_iam_member")
    assert [(caller, "roles/run.invoker")] == [(grant["member"], grant["role"]) for grant in grants]
    for everybody in ("allUsers", "allAuthenticatedUsers"):
        assert 0 != deployment.run("plan", "-input=false", **GIVEN, callers=[everybody]).returncode


@pytest.mark.parametrize(("minutes", "seconds"), [(60, "4500s"), (1440, "87300s"), (1.5, "1020s")])
def test_job_outlasts_the_longest_task(deployment: Terraform, minutes: float, seconds: str) -> None:
    """A job has a quarter of an hour beside the longest task, and is never run again."""
    plan = deployment.plan(**GIVEN, max_timeout_minutes=minutes)
    template = plan["google_cloud_run_v2_job.worker"]["template"][0]["template"][0]
    assert (seconds, 0) == (template["timeout"], template["max_retries"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_timeout_minutes": 1441},
        {"max_timeout_minutes": 0},
        {"project_id": "Some Project"},
        {"log_retention_days": 0},
    ],
)
def test_wrong_variables_are_refused(deployment: Terraform, wrong: dict[str, object]) -> None:
    """A variable out of range stops the plan."""
    assert 0 != deployment.run("plan", "-input=false", **{**GIVEN, **wrong}).returncode


def test_settings_are_ccruns(plan: dict[str, Resource]) -> None:
    """What service, job and sweep get as settings, ccrun takes as its configuration."""
    for address in (
        "google_cloud_run_v2_service.api",
        "google_cloud_run_v2_job.worker",
        "google_cloud_run_v2_job.sweep",
    ):
        settings = {each["name"]: each["value"] for each in container(plan[address])["env"] if not each["value_source"]}
        loaded = config.load(settings, on_terminal=False)
        assert (PROJECT, f"{PROJECT}-claude-logs") == (loaded.project_id, loaded.gcs_logs_bucket)
        assert [] == [name for name in settings if name not in (ROOT / "ccrun" / "config.py").read_text()]


def test_api_gets_no_secret(plan: dict[str, Resource]) -> None:
    """The service reads no secret, and only worker and sweep may."""
    assert [] == [each for each in container(plan["google_cloud_run_v2_service.api"])["env"] if each["value_source"]]
    readers = {values["member"] for values in only(plan, "google_secret_manager_secret_iam_member")}
    assert {f"serviceAccount:ccrun-{side}@{PROJECT}.iam.gserviceaccount.com" for side in ("worker", "sweep")} == readers


def test_every_side_has_its_identity(plan: dict[str, Resource]) -> None:
    """Service, job, sweep and schedule each run as the identity that is theirs."""
    service, worker, sweep = (
        plan[address]["template"][0]
        for address in (
            "google_cloud_run_v2_service.api",
            "google_cloud_run_v2_job.worker",
            "google_cloud_run_v2_job.sweep",
        )
    )
    (target,) = plan["google_cloud_scheduler_job.sweep"]["http_target"]
    accounts = {
        "api": service["service_account"],
        "worker": worker["template"][0]["service_account"],
        "sweep": sweep["template"][0]["service_account"],
        "scheduler": target["oauth_token"][0]["service_account_email"],
    }
    assert {side: f"ccrun-{side}@{PROJECT}.iam.gserviceaccount.com" for side in accounts} == accounts

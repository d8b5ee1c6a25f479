"""The text of the Terraform configuration agrees with the documents and scripts. tests/terraform runs `terraform plan`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
DIRECTORY: Final = ROOT / "scripts" / "deploy" / "terraform"
TEXT: Final = {
    path.name: re.sub(r"(?m)^\s*#.*$|\s# .*$", "", path.read_text()) for path in sorted(DIRECTORY.glob("*.tf"))
}
ALL_TEXT: Final = "\n".join(TEXT.values())
PERMISSIONS: Final = (ROOT / "docs" / "permissions.md").read_text().partition("\n## Grants\n")[2].partition("\n## ")[0]


def rows(columns: int) -> list[list[str]]:
    """Return the rows with this number of columns in the tables of the section on grants."""
    lines = [line for line in PERMISSIONS.splitlines() if line.startswith("|") and "`" in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) == columns]


def words(text: str) -> list[str]:
    """Return the words in quotes or backticks."""
    return re.findall(r'["`]([^"`]+)["`]', text)


def documented_grants() -> set[tuple[str, str, str, str]]:
    """Return identity, role, resource and condition of each documented grant."""
    grants, member = set(), ""
    for identity, role, resource, condition in rows(4):
        member = identity.strip("`").removeprefix("ccrun-") or member
        grants.add((member, role.strip("`"), resource.removeprefix("the "), condition.strip("`")))
    return grants


def test_grants_are_the_documented_ones() -> None:
    """Each identity has the roles of docs/permissions.md, on the same resources, with the same conditions, and no others."""
    grants = set()
    for member, role, conditions in re.findall(
        r'\{ who = "(\w+)", role = "(\w+)", conditions = \[(.*?)\] \}', TEXT["identities.tf"]
    ):
        grants.add((member, role, "bucket", " && ".join(words(conditions)) or "none"))
    on_key = re.search(r"(?s)on_key = \{(.*?)\}", TEXT["identities.tf"])
    assert on_key
    for member, role in re.findall(r'(\w+)\s*= "([\w./]+)"', on_key[1]):
        grants.add((member, role, "key", "none"))
    for member, role, _ in re.findall(r'\{ who = "(\w+)", role = "(\w+)", job = "(worker)" \}', TEXT["identities.tf"]):
        grants.add((member, role, "job", "none"))
    assert documented_grants() == grants


def test_only_the_scheduler_can_run_the_sweep() -> None:
    """The grant of the scheduler is the only one on the sweep job."""
    on_sweep = re.findall(r'\{ who = "(\w+)", role = "(\w+)", job = "sweep" \}', TEXT["identities.tf"])
    assert [("scheduler", "ccrunStart")] == on_sweep


def test_roles_have_the_documented_permissions() -> None:
    """Each custom role has the permissions of docs/permissions.md; the role of the scheduler has one."""
    roles = {
        name: set(words(listed)) for name, listed in re.findall(r"(ccrun\w+)\s*= \[(.*?)\]", TEXT["identities.tf"])
    }
    documented = {row[0].strip("`"): set(words(row[1])) for row in rows(2)}
    assert {**documented, "ccrunStart": {"run.jobs.run"}} == roles


def test_conditions_are_the_documented_ones() -> None:
    """The conditions are equal to those of docs/permissions.md, except for the name of the bucket."""
    documented = dict(re.findall(r"(?m)^([A-Z_]+) +(\S.*)$", PERMISSIONS))
    written = dict(re.findall(r'(?m)^    ([A-Z_]+) += "(.*)"$', TEXT["identities.tf"]))
    plain = {name: text.replace('\\"', '"').replace("${local.bucket}", "BUCKET") for name, text in written.items()}
    assert {name: documented[name] for name in plain} == plain
    assert {"NOT_LOGS", "NOT_INDEX", "ONLY_ACTIVE"} == set(plain)


def test_nothing_is_granted_on_the_project() -> None:
    """No role is granted on the project, no admin role is granted, and no role is granted to all users."""
    assert not re.findall(r"google_project_iam_(member|binding|policy)", ALL_TEXT)
    assert not re.findall(r"objectAdmin|roles/(owner|editor|storage\.admin)", ALL_TEXT)
    assert 2 == len(re.findall("allUsers|allAuthenticatedUsers", ALL_TEXT)), "both are in the validation of callers"


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        (
            "job.tf",
            ["max_retries = 0", "max_retries           = 0", "beside_minutes = 15", "EXECUTION_ENVIRONMENT_GEN2"],
        ),
        ("kms.tf", ['rotation_period = "7776000s"', "prevent_destroy = true", 'purpose         = "ENCRYPT_DECRYPT"']),
        (
            "storage.tf",
            [
                "uniform_bucket_level_access = true",
                'public_access_prevention    = "enforced"',
                "age = var.log_retention_days",
                'matches_suffix = ["/encrypted-payload.bin"]',
                "retention_duration_seconds = 0",
                "keep_count = 10",
                'older_than = "7776000s"',
            ],
        ),
        ("service.tf", ['timeout = "3600s"', 'path = "/health"']),
        ("scheduler.tf", ["retry_count = 0"]),
    ],
)
def test_security_settings_are_set(file: str, settings: list[str]) -> None:
    """Retries, timeouts, key rotation, retention and the access to the bucket have the required values."""
    assert [] == [setting for setting in settings if setting not in TEXT[file]]


def names_in(script: str) -> list[set[str]]:
    """Return the names of the variables that a script sets, one set for each deployment in it."""
    text = (ROOT / "scripts" / script).read_text()
    return [
        set(re.findall(r"[A-Z_]{4,}", listed)) for listed in re.findall(r'"\$\(variables (.*?)\)"', text, re.DOTALL)
    ]


def test_variables_are_those_of_the_scripts() -> None:
    """Jobs and service get the settings that the scripts give them, always or by the variables for more settings."""
    common = re.search(r"(?s)settings = \{(.*?)\}", TEXT["job.tf"])
    assert common
    always = set(re.findall(r"([A-Z_]+)\s*=", common[1]))

    def more(variable: str) -> set[str]:
        found = re.search(rf'variable "{variable}" \{{\s*description = "[^:]*: ([^"]*)\."', TEXT["variables.tf"])
        assert found
        return set(found[1].split(", "))

    worker, sweep = names_in("deploy-job.sh")
    (service,) = names_in("deploy-service.sh")
    assert worker == always | {"MAX_TIMEOUT_MINUTES"} | more("worker_settings")
    assert sweep == always | more("sweep_settings")
    assert service == always | {"CCRUN_WORKER_HAS", "MAX_TIMEOUT_MINUTES"} | more("service_settings")


def test_every_variable_is_documented() -> None:
    """Every variable has a description and a type."""
    variables = re.findall(r'(?ms)^variable "(\w+)" \{\n(.*?)^\}', TEXT["variables.tf"])
    assert [] == [name for name, body in variables if "description" not in body or "type " not in body]


def test_no_secret_value_is_configured() -> None:
    """Terraform does not manage the values of secrets, because its state would contain them."""
    assert "google_secret_manager_secret_version" not in ALL_TEXT


def test_the_configuration_is_formatted(tmp_path: Path) -> None:
    """`terraform fmt` changes nothing and can parse every file."""
    if shutil.which("terraform") is None:
        pytest.skip("terraform is not installed")
    environment = {**os.environ, "HOME": str(tmp_path), "CHECKPOINT_DISABLE": "1"}
    result = subprocess.run(
        ["terraform", "fmt", "-check", "-recursive", str(DIRECTORY)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (0, "") == (result.returncode, result.stdout)

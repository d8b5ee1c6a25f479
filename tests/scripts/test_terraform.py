"""The Terraform of the deployment says what documents and scripts say; read as text. tests/terraform has Terraform plan it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = ROOT / "scripts" / "deploy" / "terraform"
TEXT: Final = {path.name: re.sub(r"(?m)^\s*#.*$|\s# .*$", "", path.read_text()) for path in sorted(FOLDER.glob("*.tf"))}
EVERYTHING: Final = "\n".join(TEXT.values())
PERMISSIONS: Final = (ROOT / "docs" / "permissions.md").read_text().partition("\n## Grants\n")[2].partition("\n## ")[0]


def rows(columns: int) -> list[list[str]]:
    """Return the rows of the table of grants with so many columns."""
    lines = [line for line in PERMISSIONS.splitlines() if line.startswith("|") and "`" in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) == columns]


def words(text: str) -> list[str]:
    """Return what stands in quotes or backticks."""
    return re.findall(r'["`]([^"`]+)["`]', text)


def documented_grants() -> set[tuple[str, str, str, str]]:
    """Return who has which role on what, under which condition."""
    grants, who = set(), ""
    for identity, role, on, condition in rows(4):
        who = identity.strip("`").removeprefix("ccrun-") or who
        grants.add((who, role.strip("`"), on.removeprefix("the "), condition.strip("`")))
    return grants


def test_grants_are_those_of_the_document() -> None:
    """Each identity has the roles of docs/permissions.md, on the same things, under the same conditions, and no others."""
    grants = set()
    for who, role, conditions in re.findall(
        r'\{ who = "(\w+)", role = "(\w+)", conditions = \[(.*?)\] \}', TEXT["identities.tf"]
    ):
        grants.add((who, role, "bucket", " && ".join(words(conditions)) or "none"))
    on_key = re.search(r"(?s)on_key = \{(.*?)\}", TEXT["identities.tf"])
    assert on_key
    for who, role in re.findall(r'(\w+)\s*= "([\w./]+)"', on_key[1]):
        grants.add((who, role, "key", "none"))
    for who, role, _ in re.findall(r'\{ who = "(\w+)", role = "(\w+)", job = "(worker)" \}', TEXT["identities.tf"]):
        grants.add((who, role, "job", "none"))
    assert documented_grants() == grants


def test_the_scheduler_may_run_the_sweep_alone() -> None:
    """It is the only grant on the other job."""
    on_sweep = re.findall(r'\{ who = "(\w+)", role = "(\w+)", job = "sweep" \}', TEXT["identities.tf"])
    assert [("scheduler", "ccrunStart")] == on_sweep


def test_roles_hold_what_the_document_says() -> None:
    """Permission by permission; the scheduler's role holds one."""
    roles = {
        name: set(words(listed)) for name, listed in re.findall(r"(ccrun\w+)\s*= \[(.*?)\]", TEXT["identities.tf"])
    }
    documented = {row[0].strip("`"): set(words(row[1])) for row in rows(2)}
    assert {**documented, "ccrunStart": {"run.jobs.run"}} == roles


def test_conditions_are_those_of_the_document() -> None:
    """To the letter, but for the bucket's name."""
    documented = dict(re.findall(r"(?m)^([A-Z_]+) +(\S.*)$", PERMISSIONS))
    written = dict(re.findall(r'(?m)^    ([A-Z_]+) += "(.*)"$', TEXT["identities.tf"]))
    plain = {name: text.replace('\\"', '"').replace("${local.bucket}", "BUCKET") for name, text in written.items()}
    assert {name: documented[name] for name in plain} == plain
    assert {"NOT_LOGS", "NOT_INDEX", "ONLY_ACTIVE"} == set(plain)


def test_nothing_is_granted_on_the_project() -> None:
    """Nor a role that may change who has access, nor anything to everybody."""
    assert not re.findall(r"google_project_iam_(member|binding|policy)", EVERYTHING)
    assert not re.findall(r"objectAdmin|roles/(owner|editor|storage\.admin)", EVERYTHING)
    assert 2 == len(re.findall("allUsers|allAuthenticatedUsers", EVERYTHING)), "both stand where callers are refused"


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
def test_what_matters_is_set(file: str, settings: list[str]) -> None:
    """No retries, a bound above the longest task, rotation, retention, and a bucket that is never public."""
    assert [] == [setting for setting in settings if setting not in TEXT[file]]


def names_in(script: str) -> list[set[str]]:
    """Return the variables that a script sets, a set a deployment."""
    text = (ROOT / "scripts" / script).read_text()
    return [
        set(re.findall(r"[A-Z_]{4,}", listed)) for listed in re.findall(r'"\$\(variables (.*?)\)"', text, re.DOTALL)
    ]


def test_what_runs_gets_the_settings_that_the_scripts_give_it() -> None:
    """Those that are always there, and those that the variables for more settings name."""
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


def test_every_variable_is_explained() -> None:
    """With a description and a type."""
    variables = re.findall(r'(?ms)^variable "(\w+)" \{\n(.*?)^\}', TEXT["variables.tf"])
    assert [] == [name for name, body in variables if "description" not in body or "type " not in body]


def test_no_value_of_a_secret_is_in_it() -> None:
    """Its state is for many to read."""
    assert "google_secret_manager_secret_version" not in EVERYTHING


def test_it_is_formatted(tmp_path: Path) -> None:
    """As Terraform itself does; it also reads every file on the way."""
    if shutil.which("terraform") is None:
        pytest.skip("there is no terraform here")
    environment = {**os.environ, "HOME": str(tmp_path), "CHECKPOINT_DISABLE": "1"}
    ran = subprocess.run(
        ["terraform", "fmt", "-check", "-recursive", str(FOLDER)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (0, "") == (ran.returncode, ran.stdout)

"""The settings of the deployment scripts in `.env`."""

from __future__ import annotations

import re

import pytest
from helpers.deploy import PROJECT, ROOT, Clone


def key_name(clone: Clone, line: str, **environment: str) -> tuple[str, str]:
    """Return the key that a script would create when `.env` has this line, and the errors that it prints."""
    (clone.directory / ".env").write_text(f"# A comment.\n\nPROJECT_ID={PROJECT}\n{line}\n")
    run = clone.run("setup-kms.sh", "--dry-run", **environment)
    created = re.search(r"keys create (\S+)", run.output)
    return (created[1] if created else "", run.complaints)


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
def test_common_forms_of_a_line_are_accepted(clone: Clone, line: str) -> None:
    """Quotes, `export`, comments, indentation and Windows line endings are allowed."""
    assert ("my-key", "") == key_name(clone, line)


def test_the_environment_overrides_the_file(clone: Clone) -> None:
    """The environment takes precedence over the file, and the file over the default; an empty value means the default."""
    assert ("from-environment", "") == key_name(clone, "KMS_KEY_NAME=from-file", KMS_KEY_NAME="from-environment")
    assert ("payload-encryption", "") == key_name(clone, "KMS_KEY_NAME=")


def test_the_file_is_not_executed(prepared: Clone) -> None:
    """Nothing in the file is run or expanded, and variables that are not settings are ignored."""
    clone = prepared
    secret = "$(touch here) `touch here` $HOME \\ ; touch here"
    (clone.directory / ".env").write_text(
        f"PROJECT_ID={PROJECT}\nCLOUDRUN_CALLBACK_SECRET='{secret}'\nPATH=/nowhere\nBASH_ENV=.env\nIFS=-\n"
    )
    run = clone.run("create-secrets.sh")
    assert (0, [secret]) == (run.code, clone.state["resources"]["secret/CLOUDRUN_CALLBACK_SECRET"]["versions"])
    assert ["PATH", "BASH_ENV", "IFS"] == [line.split()[0] for line in run.complaints.splitlines()[:3]]
    assert not (clone.directory / "here").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("GCS_LOGS_BUCKET", "Line 4 of {file} is not NAME=VALUE."),
        ("my bucket=b", "Line 4 of {file} is not NAME=VALUE."),
        ('GCS_LOGS_BUCKET="b', "Line 4 of {file} has unbalanced quotes."),
        ("GCS_LOGS_BUCKET='b' c'", "Line 4 of {file} has unbalanced quotes."),
    ],
)
def test_an_invalid_line_is_reported_by_its_number(clone: Clone, line: str, sentence: str) -> None:
    """The message does not contain the line, because it may contain a secret."""
    assert ("", sentence.format(file=clone.directory / ".env") + "\n") == key_name(clone, line)


def test_another_file_can_be_used(clone: Clone) -> None:
    """ENV_FILE names another file, for example one for each project."""
    (clone.directory / "other.env").write_text("PROJECT_ID=another-project\n")
    clone.change(project="another-project")
    run = clone.run("grant-job-permissions.sh", "--dry-run", ENV_FILE="other.env")
    assert "--project=another-project" in run.calls[-1]["argv"]
    run = clone.run("grant-job-permissions.sh", ENV_FILE="no.env")
    assert (1, "ENV_FILE names no.env, which does not exist.\n") == (run.code, run.complaints)


def test_the_example_has_every_setting() -> None:
    """Every variable that the scripts or ccrun read is in .env.example, and no other."""
    documented = re.findall(r"(?m)^#? ?([A-Z][A-Z_]+)=", (ROOT / ".env.example").read_text())
    read = set(re.findall(r'"\$1" ([A-Z_]+) ', (ROOT / "scripts" / "deploy" / "settings.sh").read_text()))
    read |= set(re.findall(r'\bsetting\(\s*"([A-Z_]+)"', (ROOT / "ccrun" / "config.py").read_text()))
    # Set by Cloud Run, by ccrun for its worker, by deploy-service.sh, or for Google's libraries.
    read -= {
        "K_SERVICE",
        "CLOUD_RUN_JOB",
        "CLOUD_RUN_EXECUTION",
        "TASK_ID",
        "ENCRYPTED_PAYLOAD_PATH",
        "CCRUN_WORKER_HAS",
        "GCE_METADATA_HOST",
    }
    assert sorted(read) == sorted(documented)


def test_the_example_is_valid(clone: Clone) -> None:
    """A copy of .env.example lacks PROJECT_ID only, and every variable that it comments out is a setting."""
    example = (ROOT / ".env.example").read_text()
    for text in (example, re.sub(r"(?m)^# ([A-Z][A-Z_]+=).*$", r"\1", example)):
        (clone.directory / ".env").write_text(text)
        run = clone.run("setup-project.sh")
        assert "PROJECT_ID is not set: copy .env.example to .env and set it there.\n" == run.complaints

from __future__ import annotations

import base64
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ccrun import config
from ccrun.config import Backend, LogFormat, SandboxMode
from ccrun.errors import ConfigError
from ccrun.results import AgentNetwork
from ccrun.spec import PERMISSION_MODES
from ccrun.task import Secret


def load_error(**environment: str) -> str:
    """Return the message of the error that this environment raises."""
    with pytest.raises(ConfigError) as caught:
        config.load(environment)
    return caught.value.message


def test_empty_environment_gives_the_documented_defaults() -> None:
    """Without any variable, all settings have the defaults for one machine."""
    settings = config.load({}, on_terminal=False)
    expected: dict[str, Any] = {
        "backend": Backend.LOCAL,
        "port": 8080,
        "host": "127.0.0.1",
        "project_id": None,
        "region": "us-central1",
        "gcs_logs_bucket": None,
        "kms_location": "global",
        "kms_key_ring": "claude-code",
        "kms_key_name": "payload-encryption",
        "cloudrun_job_name": "claude-code-job",
        "callback_secret": None,
        "api_tokens": (),
        "allowed_tools": (),
        "permission_mode": None,
        "max_timeout_minutes": 60.0,
        "max_request_bytes": 10 * 1024 * 1024,
        "max_line_bytes": 64 * 1024 * 1024,
        "max_upload_bytes": 10 * 1024**3,
        "task_memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4,
        "task_pids": 4096,
        "task_disk": 50 * 1024**3,
        "max_concurrent_tasks": len(os.sched_getaffinity(0)),
        "flush_lines": 100,
        "flush_seconds": 1.0,
        "poll_seconds": 1.0,
        "callback_allowed_hosts": (),
        "google_oidc_audience": (),
        "metadata_host": "metadata.google.internal",
        "claude_cli": None,
        "sandbox": SandboxMode.AUTO,
        "agent_network": AgentNetwork.PUBLIC,
        "agent_allowed_hosts": (),
        "agent_private_hosts": (),
        "anthropic_base_url": "https://api.anthropic.com",
        "anthropic_auth_token": None,
        "callback_timeout_seconds": 10,
        "anthropic_custom_headers": (),
        "allowed_base_urls": (),
        "data_dir": Path.cwd() / ".ccrun",
        "log_level": "INFO",
        "log_format": LogFormat.JSON,
        "operator_has_credential": False,
    }

    assert expected == {name: getattr(settings, name) for name in expected}


def test_every_setting_is_read_from_its_variable() -> None:
    """Each documented variable changes its setting."""
    settings = config.load(
        {
            "PORT": "0",
            "HOST": "::1",
            "PROJECT_ID": "my-project",
            "REGION": "europe-west1",
            "GCS_LOGS_BUCKET": "my-project-claude-logs",
            "KMS_LOCATION": "europe",
            "KMS_KEY_RING": "ring",
            "KMS_KEY_NAME": "key",
            "CLOUDRUN_JOB_NAME": "job",
            "CLOUDRUN_CALLBACK_SECRET": "made up secret of callbacks\n",
            "CCRUN_API_TOKENS": "made-up-token-one, made-up-token-two,",
            "ALLOWED_TOOLS": "Bash(git log:*, git diff:*), Read,",
            "PERMISSION_MODE": "acceptEdits",
            "MAX_TIMEOUT_MINUTES": "1440",
            "MAX_REQUEST_BYTES": "2048",
            "MAX_LINE_BYTES": "65536",
            "MAX_UPLOAD_BYTES": "0",
            "TASK_MEMORY": "64Mi",
            "TASK_PIDS": "16",
            "TASK_DISK": "1Ti",
            "MAX_CONCURRENT_TASKS": "3",
            "FLUSH_LINES": "1",
            "FLUSH_SECONDS": "0.05",
            "POLL_SECONDS": "0.05",
            "CALLBACK_ALLOWED_HOSTS": "Hooks.internal, 10.0.0.7",
            "GOOGLE_OIDC_AUDIENCE": "https://Receiver.example/, https://iap.example:8443=1.apps.example",
            "CLAUDE_CLI": "/opt/claude",
            "CCRUN_AGENT_USER": "agent",
            "CCRUN_AGENT_USERS": "41000-41099",
            "CCRUN_SANDBOX": "required",
            "AGENT_NETWORK": "allowlist",
            "AGENT_ALLOWED_HOSTS": "Index.example, *.modules.example",
            "AGENT_PRIVATE_HOSTS": "mirror.internal",
            "ANTHROPIC_BASE_URL": "http://127.0.0.1:9/",
            "ANTHROPIC_API_KEY": "made-up-key",
            "ANTHROPIC_AUTH_TOKEN": "made-up-gateway-token",
            "ANTHROPIC_CUSTOM_HEADERS": "X-Team: a b\\nX-Other:c:d\n",
            "ALLOWED_BASE_URLS": "http://127.0.0.1:9/, https://gateway.example/v1",
            "CLAUDE_CODE_OAUTH_TOKEN": "made-up-oauth",
            "LOG_LEVEL": "debug",
            "LOG_FORMAT": "console",
            "CCRUN_BACKEND": "local",
            "CCRUN_DATA_DIR": "/var/lib/ccrun",
            "STORAGE_EMULATOR_HOST": "http://127.0.0.1:4443",
            "KMS_EMULATOR_HOST": "127.0.0.1:8085",
            "CLOUD_RUN_EMULATOR_HOST": "[::1]:8086",
            "TASK_ID": "task-1",
            "ENCRYPTED_PAYLOAD_PATH": "sessions/task-1/encrypted-payload.bin",
            "CLOUD_RUN_EXECUTION": "job-abc",
        }
    )
    expected: dict[str, Any] = {
        "port": 0,
        "host": "::1",
        "project_id": "my-project",
        "region": "europe-west1",
        "gcs_logs_bucket": "my-project-claude-logs",
        "kms_location": "europe",
        "kms_key_ring": "ring",
        "kms_key_name": "key",
        "cloudrun_job_name": "job",
        "callback_secret": Secret("made up secret of callbacks"),
        "api_tokens": (Secret("made-up-token-one"), Secret("made-up-token-two")),
        "allowed_tools": ("Bash(git log:*, git diff:*)", "Read"),
        "permission_mode": "acceptEdits",
        "max_timeout_minutes": 1440.0,
        "max_request_bytes": 2048,
        "max_line_bytes": 65536,
        "max_upload_bytes": 0,
        "task_memory": 64 * 1024**2,
        "task_pids": 16,
        "task_disk": 1024**4,
        "max_concurrent_tasks": 3,
        "flush_lines": 1,
        "flush_seconds": 0.05,
        "poll_seconds": 0.05,
        "callback_allowed_hosts": ("hooks.internal", "10.0.0.7"),
        "google_oidc_audience": (
            ("https://receiver.example", "https://receiver.example"),
            ("https://iap.example:8443", "1.apps.example"),
        ),
        "claude_cli": Path("/opt/claude"),
        "agent_user": "agent",
        "agent_users": range(41000, 41100),
        "sandbox": SandboxMode.REQUIRED,
        "agent_network": AgentNetwork.ALLOWLIST,
        "agent_allowed_hosts": ("index.example", "*.modules.example"),
        "agent_private_hosts": ("mirror.internal",),
        "anthropic_base_url": "http://127.0.0.1:9",
        "anthropic_api_key": Secret("made-up-key"),
        "anthropic_auth_token": Secret("made-up-gateway-token"),
        "anthropic_custom_headers": (("X-Team", Secret("a b")), ("X-Other", Secret("c:d"))),
        "allowed_base_urls": ("http://127.0.0.1:9", "https://gateway.example/v1"),
        "claude_code_oauth_token": Secret("made-up-oauth"),
        "log_level": "DEBUG",
        "log_format": LogFormat.CONSOLE,
        "backend": Backend.LOCAL,
        "is_local": True,
        "operator_has_credential": True,
        "data_dir": Path("/var/lib/ccrun"),
        "storage_emulator_host": "http://127.0.0.1:4443",
        "kms_emulator_host": "127.0.0.1:8085",
        "cloud_run_emulator_host": "[::1]:8086",
        "task_id": "task-1",
        "encrypted_payload_path": "sessions/task-1/encrypted-payload.bin",
        "cloud_run_execution": "job-abc",
    }

    assert expected == {name: getattr(settings, name) for name in expected}


@pytest.mark.parametrize("name", ["PORT", "ALLOWED_TOOLS", "CCRUN_API_TOKENS", "GCS_LOGS_BUCKET", "ANTHROPIC_API_KEY"])
@pytest.mark.parametrize("value", ["", " \n"])
def test_blank_variable_counts_as_not_set(name: str, value: str) -> None:
    """An empty or blank variable gives the default."""
    assert config.load({}) == config.load({name: value})


@pytest.mark.parametrize("name", ["K_SERVICE", "CLOUD_RUN_JOB", "GCS_LOGS_BUCKET", "PROJECT_ID"])
def test_variables_of_google_cloud_select_its_backend(name: str) -> None:
    """Each of these variables selects the backend `gcp`, unless `CCRUN_BACKEND` is set."""
    assert Backend.GCP is config.load({name: "some-name"}).backend
    assert Backend.LOCAL is config.load({name: "some-name", "CCRUN_BACKEND": "local"}).backend
    assert Backend.GCP is config.load({"CCRUN_BACKEND": "gcp"}).backend


def test_missing_bucket_is_not_an_error() -> None:
    """The settings of Google Cloud are valid without a bucket, which only requests need."""
    assert config.load({"K_SERVICE": "api"}).gcs_logs_bucket is None


def test_service_can_name_the_secrets_of_its_workers() -> None:
    """On Google Cloud, `CCRUN_WORKER_HAS` names the secrets that only workers have; the local backend ignores it."""
    names = {"CCRUN_WORKER_HAS": "CLOUDRUN_CALLBACK_SECRET, ANTHROPIC_API_KEY"}
    cloud, local = config.load({"K_SERVICE": "api", **names}), config.load(names)
    assert (True, True) == (cloud.signs_callbacks, cloud.operator_has_credential)
    assert (True, False) == (local.signs_callbacks, local.operator_has_credential)
    assert not config.load({"K_SERVICE": "api"}).signs_callbacks
    assert config.load({"K_SERVICE": "api", "CLOUDRUN_CALLBACK_SECRET": "made up secret of callbacks"}).signs_callbacks
    assert load_error(CCRUN_WORKER_HAS="PORT").startswith("CCRUN_WORKER_HAS must be some of ANTHROPIC_API_KEY, ")


def test_service_on_cloud_run_listens_on_all_interfaces() -> None:
    """A Cloud Run service listens on all interfaces, others on loopback, unless `HOST` is set."""
    assert "0.0.0.0" == config.load({"K_SERVICE": "api"}).host
    assert "127.0.0.1" == config.load({"CLOUD_RUN_JOB": "job"}).host
    assert "10.1.2.3" == config.load({"K_SERVICE": "api", "HOST": "10.1.2.3"}).host


@pytest.mark.parametrize(
    ("environment", "on_terminal", "expected"),
    [
        ({}, True, LogFormat.CONSOLE),
        ({}, False, LogFormat.JSON),
        ({"K_SERVICE": "api"}, True, LogFormat.JSON),
        ({"CLOUD_RUN_JOB": "job"}, True, LogFormat.JSON),
        ({"K_SERVICE": "api", "LOG_FORMAT": "console"}, False, LogFormat.CONSOLE),
        ({"LOG_FORMAT": "json"}, True, LogFormat.JSON),
    ],
)
def test_log_format_depends_on_the_output(environment: dict[str, str], on_terminal: bool, expected: LogFormat) -> None:
    """A terminal gets text, and Cloud Run and pipes get JSON, unless `LOG_FORMAT` is set."""
    assert expected is config.load(environment, on_terminal=on_terminal).log_format


def test_terminal_is_detected() -> None:
    """By default, `load` checks whether stdout is a terminal; a closed stdout is not an error."""
    program = "from ccrun import config; print(config.load({}).log_format)"
    piped = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    reader, terminal = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", program], check=True, stdout=terminal)
        printed = os.read(reader, 100)
    finally:
        os.close(reader)
        os.close(terminal)
    closed = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.stdout.close(); {program.replace('print', 'str')}"], check=False
    )

    assert (b"json\n", b"console\r\n", 0) == (piped.stdout, printed, closed.returncode)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PORT", "abc", 'PORT must be a whole number from 0 to 65535, not "abc".'),
        ("PORT", "65536", 'PORT must be a whole number from 0 to 65535, not "65536".'),
        ("PORT", "8_080", 'PORT must be a whole number from 0 to 65535, not "8_080".'),
        ("PORT", "8080 9090", 'PORT must be a whole number from 0 to 65535, not "8080 9090".'),
        ("PORT", "9" * 5000, f'PORT must be a whole number from 0 to 65535, not "{"9" * 60}".'),
        ("MAX_TIMEOUT_MINUTES", "abc", 'MAX_TIMEOUT_MINUTES must be a number from 1 to 1440, not "abc".'),
        ("MAX_TIMEOUT_MINUTES", "nan", 'MAX_TIMEOUT_MINUTES must be a number from 1 to 1440, not "nan".'),
        ("MAX_TIMEOUT_MINUTES", "1441", 'MAX_TIMEOUT_MINUTES must be a number from 1 to 1440, not "1441".'),
        ("MAX_CONCURRENT_TASKS", "0", 'MAX_CONCURRENT_TASKS must be a whole number from 1 to 1000, not "0".'),
        (
            "MAX_LINE_BYTES",
            "64",
            'MAX_LINE_BYTES must be a number of bytes from 65536 to 1073741824, such as 64Mi, not "64".',
        ),
        (
            "TASK_MEMORY",
            "4GB",
            'TASK_MEMORY must be a number of bytes from 67108864 to 1125899906842624, such as 64Mi, not "4GB".',
        ),
        *(
            (
                "CCRUN_AGENT_USERS",
                value,
                (
                    "CCRUN_AGENT_USERS must be the numbers of the first and the last user, such as 41000-41099, without 0, "
                    f'not "{value}".'
                ),
            )
            for value in ("41000", "0-9", "9-8", "-1-5", "a-b", "1-2-3")
        ),
        ("TASK_PIDS", "1", 'TASK_PIDS must be a whole number from 16 to 4194304, not "1".'),
        ("FLUSH_SECONDS", "-1", 'FLUSH_SECONDS must be a number from 0.01 to 60, not "-1".'),
        ("CCRUN_BACKEND", "aws", 'CCRUN_BACKEND must be one of local, gcp, not "aws".'),
        ("LOG_FORMAT", "x\ny", 'LOG_FORMAT must be one of json, console, not "x\\ny".'),
        ("LOG_LEVEL", "loud", 'LOG_LEVEL must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL, not "loud".'),
        (
            "PERMISSION_MODE",
            "yolo",
            f'PERMISSION_MODE must be one of {", ".join(PERMISSION_MODES)}, not "yolo".',
        ),
        (
            "GCS_LOGS_BUCKET",
            "gs://b/x",
            'GCS_LOGS_BUCKET must be the name of a bucket, without gs:// and without a path, not "gs://b/x".',
        ),
        (
            "ALLOWED_TOOLS",
            "Bash(git",
            'ALLOWED_TOOLS must be names of tools separated by commas, with balanced parentheses, not "Bash(git".',
        ),
        (
            "ALLOWED_TOOLS",
            "a),(b",
            'ALLOWED_TOOLS must be names of tools separated by commas, with balanced parentheses, not "a),(b".',
        ),
        (
            "ALLOWED_TOOLS",
            "--dangerously",
            'ALLOWED_TOOLS must be names of tools separated by commas, with balanced parentheses, not "--dangerously".',
        ),
        (
            "CALLBACK_ALLOWED_HOSTS",
            "https://a",
            'CALLBACK_ALLOWED_HOSTS must be host names separated by commas, without scheme or path, not "https://a".',
        ),
        (
            "GOOGLE_OIDC_AUDIENCE",
            "http://a.example",
            'GOOGLE_OIDC_AUDIENCE must be origins with https, each with or without =AUDIENCE, not "http://a.example".',
        ),
        ("CCRUN_SANDBOX", "on", 'CCRUN_SANDBOX must be one of auto, required, off, not "on".'),
        ("AGENT_NETWORK", "host", 'AGENT_NETWORK must be one of none, allowlist, public, not "host".'),
        ("ANTHROPIC_BASE_URL", "localhost", 'ANTHROPIC_BASE_URL must be an http or https URL, not "localhost".'),
        ("ANTHROPIC_BASE_URL", "http://[", 'ANTHROPIC_BASE_URL must be an http or https URL, not "http://[".'),
        ("KMS_EMULATOR_HOST", "http://a", 'KMS_EMULATOR_HOST must be host:port, not "http://a".'),
        ("HOST", "a b", 'HOST must be a word without blanks, not "a b".'),
        ("TASK_ID", "../x", 'TASK_ID must be a task ID, not "../x".'),
    ],
)
def test_invalid_value_is_an_error(name: str, value: str, expected: str) -> None:
    """The error is one line with the variable, the allowed values and the start of the invalid value."""
    assert expected == load_error(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CCRUN_API_TOKENS", "tooshort"),
        ("CCRUN_API_TOKENS", "made-up-token-one,tooshort"),
        ("CCRUN_API_TOKENS", ","),
        ("CLOUDRUN_CALLBACK_SECRET", "tooshort\x00 but long enough"),
        ("CLOUDRUN_CALLBACK_SECRET", "tooshort"),
        ("CLOUDRUN_CALLBACK_SECRET", "whsec_tooshort!!!!"),
        ("CLOUDRUN_CALLBACK_SECRET", "whsec_"),
        ("CLOUDRUN_CALLBACK_SECRET", "whsec_tooshort"),
        ("CLOUDRUN_CALLBACK_SECRET", "whsec_-_-_tooshort"),
        ("ANTHROPIC_API_KEY", "tooshort key"),
        ("CLAUDE_CODE_OAUTH_TOKEN", "tooshort\r\nX: y"),
        ("ANTHROPIC_BASE_URL", "ftp://me:tooshort@host"),
        ("ANTHROPIC_AUTH_TOKEN", "tooshort token"),
        ("ANTHROPIC_CUSTOM_HEADERS", "X-Team tooshort"),
        ("ANTHROPIC_CUSTOM_HEADERS", "X Team: tooshort"),
        ("ANTHROPIC_CUSTOM_HEADERS", "X-Team: tooshort\x07"),
        ("ANTHROPIC_CUSTOM_HEADERS", "Host: tooshort"),
    ],
)
def test_error_does_not_contain_an_invalid_secret(name: str, value: str) -> None:
    """The error has only the variable and the allowed values."""
    message = load_error(**{name: value})

    assert message.startswith(f"{name} must be ")
    assert "tooshort" not in message
    assert "\n" not in message


def test_repr_of_settings_has_no_secret() -> None:
    """Settings can be printed without revealing a secret."""
    names = ["CCRUN_API_TOKENS", "CLOUDRUN_CALLBACK_SECRET", "ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN"]

    assert "made-up" not in repr(config.load(dict.fromkeys(names, "made-up-secret-value")))


def test_settings_come_from_the_environment_of_the_process() -> None:
    """Without a mapping, `load` reads the environment of the process, which `environment` returns for workers."""
    program = "from ccrun import config; print(config.load().port, config.environment()['PORT'])"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env={**os.environ, "PORT": "81"}
    )

    assert "81 81\n" == done.stdout


@pytest.mark.parametrize("size", [24, 32, 64])
@pytest.mark.parametrize("padding", ["", "=="])
def test_secret_of_standard_webhooks_is_a_key_in_base64(size: int, padding: str) -> None:
    """Its padding may be missing."""
    value = f"whsec_{base64.b64encode(bytes(size)).decode().rstrip('=')}{padding}"
    assert Secret(value) == config.load({"CLOUDRUN_CALLBACK_SECRET": value}).callback_secret


@pytest.mark.parametrize("size", [0, 23, 65])
def test_length_of_a_key_is_checked(size: int) -> None:
    """A library of Standard Webhooks would not accept it, or sign with an empty key."""
    value = f"whsec_{base64.b64encode(bytes(size)).decode()}"
    expected = "CLOUDRUN_CALLBACK_SECRET must be 24 to 64 bytes in base64 after whsec_."
    assert expected == load_error(CLOUDRUN_CALLBACK_SECRET=value)

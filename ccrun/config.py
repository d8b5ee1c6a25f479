"""All settings, from environment variables: their types, defaults and ranges.

The only module that reads `os.environ`. It checks the form of values only; it opens no file and calls no service.
"""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs
import environ

from ccrun.results import AGENT_NETWORKS, AgentNetwork
from ccrun.setting import (
    MODEL_CREDENTIALS,
    as_address,
    as_agent_proxy,
    as_bucket,
    as_callback_secret,
    as_credential,
    as_flag,
    as_headers,
    as_host_label,
    as_hosts,
    as_log_level,
    as_number,
    as_oidc_audiences,
    as_one_of,
    as_path,
    as_permission_mode,
    as_proxy,
    as_secret_names,
    as_size,
    as_task_id,
    as_tokens,
    as_tools,
    as_url,
    as_urls,
    as_user_range,
    as_whole,
    setting,
)
from ccrun.task import Secret, TaskId

#: Minutes: the upper limit of `MAX_TIMEOUT_MINUTES`, a day.
LONGEST_TIMEOUT_MINUTES: Final = 24 * 60.0
DEFAULT_MAX_TIMEOUT_MINUTES: Final = 60.0
DEFAULT_REQUEST_BYTES: Final = 10 * 1024 * 1024
#: Bytes: the upper limit of `MAX_REQUEST_BYTES`. Several copies of a body are in memory while it is validated and sealed.
LARGEST_REQUEST_BYTES: Final = 100 * 1024 * 1024


class Backend(enum.StrEnum):
    """Where objects, keys and executions are."""

    LOCAL = "local"
    GCP = "gcp"


class SandboxMode(enum.StrEnum):
    """Whether agents run in a sandbox."""

    #: Where it works.
    AUTO = "auto"
    #: Else their tasks fail.
    REQUIRED = "required"
    OFF = "off"


class LogFormat(enum.StrEnum):
    """The format of log lines."""

    JSON = "json"
    CONSOLE = "console"


# --- the settings ------------------------------------------------------------------------------------------------------


def _default_backend(config: Config) -> Backend:
    on_gcp = config.k_service or config.cloud_run_job or config.gcs_logs_bucket or config.project_id
    return Backend.GCP if on_gcp else Backend.LOCAL


def _default_host(config: Config) -> str:
    return "0.0.0.0" if config.k_service else "127.0.0.1"  # noqa: S104 - Cloud Run controls access.


def _cores() -> int:
    """Return how many cores this process may use: in a container, possibly fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _task_memory() -> int:
    """Return three quarters of the memory of this machine, so that a task cannot take the service with it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4


@environ.config(prefix="", frozen=True)
class Config:
    """All settings, validated. Created by `load`."""

    #: Set by Cloud Run: for a service, for a job, and for an execution.
    k_service: str | None = setting("K_SERVICE")
    cloud_run_job: str | None = setting("CLOUD_RUN_JOB")
    cloud_run_execution: str | None = setting("CLOUD_RUN_EXECUTION")
    #: Set by what launches a worker.
    task_id: TaskId | None = setting("TASK_ID", as_task_id)
    encrypted_payload_path: str | None = setting("ENCRYPTED_PAYLOAD_PATH")

    project_id: str | None = setting("PROJECT_ID")
    region: str = setting("REGION", default="us-central1")
    gcs_logs_bucket: str | None = setting("GCS_LOGS_BUCKET", as_bucket)
    kms_location: str = setting("KMS_LOCATION", default="global")
    kms_key_ring: str = setting("KMS_KEY_RING", default="claude-code")
    kms_key_name: str = setting("KMS_KEY_NAME", default="payload-encryption")
    cloudrun_job_name: str = setting("CLOUDRUN_JOB_NAME", default="claude-code-job")
    storage_emulator_host: str | None = setting("STORAGE_EMULATOR_HOST", as_url)
    kms_emulator_host: str | None = setting("KMS_EMULATOR_HOST", as_address)
    cloud_run_emulator_host: str | None = setting("CLOUD_RUN_EMULATOR_HOST", as_address)

    backend: Backend = setting(
        "CCRUN_BACKEND",
        lambda value: Backend(as_one_of(*Backend)(value)),
        default=attrs.Factory(_default_backend, takes_self=True),
    )
    data_dir: Path = setting("CCRUN_DATA_DIR", as_path, default=".ccrun")
    max_concurrent_tasks: int = setting("MAX_CONCURRENT_TASKS", as_whole(1, 1000), default=attrs.Factory(_cores))

    host: str = setting("HOST", default=attrs.Factory(_default_host, takes_self=True))
    port: int = setting("PORT", as_whole(0, 65535), default=8080)
    #: Names of secrets that, in the cloud, the job has and the service does not, since the service does not use them.
    worker_has: frozenset[str] = setting("CCRUN_WORKER_HAS", as_secret_names, default=frozenset())
    #: Between two comments in a stream without events.
    heartbeat_seconds: float = setting("HEARTBEAT_SECONDS", as_number(1, 300), default=15.0)
    #: Whether other machines may call the API without a token.
    allow_anybody: bool = setting("CCRUN_ALLOW_ANYBODY", as_flag, default=False)
    api_tokens: tuple[Secret, ...] = setting("CCRUN_API_TOKENS", as_tokens, default=())
    max_request_bytes: int = setting(
        "MAX_REQUEST_BYTES", as_whole(1024, LARGEST_REQUEST_BYTES), default=DEFAULT_REQUEST_BYTES
    )
    max_timeout_minutes: float = setting(
        "MAX_TIMEOUT_MINUTES", as_number(1, LONGEST_TIMEOUT_MINUTES), default=DEFAULT_MAX_TIMEOUT_MINUTES
    )
    allowed_tools: tuple[str, ...] = setting("ALLOWED_TOOLS", as_tools, default=())
    permission_mode: str | None = setting("PERMISSION_MODE", as_permission_mode)
    poll_seconds: float = setting("POLL_SECONDS", as_number(0.01, 60), default=1.0)

    callback_secret: Secret | None = setting("CLOUDRUN_CALLBACK_SECRET", as_callback_secret)
    #: For a receiver to respond.
    callback_timeout_seconds: float = setting("CALLBACK_TIMEOUT_SECONDS", as_number(1, 60), default=10.0)
    #: The audience of identity tokens by the origin that gets them.
    google_oidc_audience: tuple[tuple[str, str], ...] = setting("GOOGLE_OIDC_AUDIENCE", as_oidc_audiences, default=())
    metadata_host: str = setting("GCE_METADATA_HOST", default="metadata.google.internal")
    callback_allowed_hosts: tuple[str, ...] = setting("CALLBACK_ALLOWED_HOSTS", as_hosts, default=())

    claude_cli: Path | None = setting("CLAUDE_CLI", as_path)
    agent_user: str | None = setting("CCRUN_AGENT_USER")
    agent_users: range | None = setting("CCRUN_AGENT_USERS", as_user_range)
    #: The least is what is read from a pipe at once.
    max_line_bytes: int = setting("MAX_LINE_BYTES", as_size(64 * 1024, 1024**3), default=64 * 1024**2)
    max_upload_bytes: int = setting("MAX_UPLOAD_BYTES", as_size(0, 1024**5), default=10 * 1024**3)
    task_memory: int = setting("TASK_MEMORY", as_size(64 * 1024**2, 1024**5), default=attrs.Factory(_task_memory))
    task_pids: int = setting("TASK_PIDS", as_whole(16, 4_194_304), default=4096)
    task_disk: int = setting("TASK_DISK", as_size(1024**2, 1024**5), default=50 * 1024**3)
    sandbox: SandboxMode = setting(
        "CCRUN_SANDBOX", lambda value: SandboxMode(as_one_of(*SandboxMode)(value)), default=SandboxMode.AUTO
    )
    agent_network: AgentNetwork = setting(
        "AGENT_NETWORK", lambda value: AgentNetwork(as_one_of(*AGENT_NETWORKS)(value)), default=AgentNetwork.PUBLIC
    )
    agent_allowed_hosts: tuple[str, ...] = setting("AGENT_ALLOWED_HOSTS", as_hosts, default=())
    agent_private_hosts: tuple[str, ...] = setting("AGENT_PRIVATE_HOSTS", as_hosts, default=())
    anthropic_base_url: str = setting("ANTHROPIC_BASE_URL", as_url, default="https://api.anthropic.com")
    anthropic_api_key: Secret | None = setting("ANTHROPIC_API_KEY", as_credential)
    claude_code_oauth_token: Secret | None = setting("CLAUDE_CODE_OAUTH_TOKEN", as_credential)
    anthropic_auth_token: Secret | None = setting("ANTHROPIC_AUTH_TOKEN", as_credential)
    anthropic_custom_headers: tuple[tuple[str, Secret], ...] = setting(
        "ANTHROPIC_CUSTOM_HEADERS", as_headers, default=()
    )
    #: Clouds with the model API, as the CLI reads them.
    use_vertex: bool = setting("CLAUDE_CODE_USE_VERTEX", as_flag, default=False)
    anthropic_vertex_project_id: str | None = setting("ANTHROPIC_VERTEX_PROJECT_ID")
    cloud_ml_region: str | None = setting("CLOUD_ML_REGION", as_host_label)
    anthropic_vertex_base_url: str | None = setting("ANTHROPIC_VERTEX_BASE_URL", as_url)
    use_bedrock: bool = setting("CLAUDE_CODE_USE_BEDROCK", as_flag, default=False)
    aws_region: str | None = setting("AWS_REGION", as_host_label)
    anthropic_bedrock_base_url: str | None = setting("ANTHROPIC_BEDROCK_BASE_URL", as_url)
    aws_bearer_token_bedrock: Secret | None = setting("AWS_BEARER_TOKEN_BEDROCK", as_credential)
    aws_access_key_id: str | None = setting("AWS_ACCESS_KEY_ID")
    aws_secret_access_key: Secret | None = setting("AWS_SECRET_ACCESS_KEY", as_credential)
    aws_session_token: Secret | None = setting("AWS_SESSION_TOKEN", as_credential)
    use_foundry: bool = setting("CLAUDE_CODE_USE_FOUNDRY", as_flag, default=False)
    anthropic_foundry_resource: str | None = setting("ANTHROPIC_FOUNDRY_RESOURCE", as_host_label)
    anthropic_foundry_base_url: str | None = setting("ANTHROPIC_FOUNDRY_BASE_URL", as_url)
    anthropic_foundry_api_key: Secret | None = setting("ANTHROPIC_FOUNDRY_API_KEY", as_credential)
    anthropic_foundry_auth_token: Secret | None = setting("ANTHROPIC_FOUNDRY_AUTH_TOKEN", as_credential)
    #: Whether the agent gets the credentials of a cloud that cannot be kept from it.
    expose_cloud_credentials: bool = setting("CCRUN_EXPOSE_CLOUD_CREDENTIALS", as_flag, default=False)
    #: Base URLs that requests may name instead.
    allowed_base_urls: tuple[str, ...] = setting("ALLOWED_BASE_URLS", as_urls, default=())
    flush_lines: int = setting("FLUSH_LINES", as_whole(1, 100_000), default=100)
    flush_seconds: float = setting("FLUSH_SECONDS", as_number(0.01, 60), default=1.0)

    http_proxy: Secret | None = setting("HTTP_PROXY", as_proxy)
    https_proxy: Secret | None = setting("HTTPS_PROXY", as_proxy)
    no_proxy: str = setting("NO_PROXY", str, default="")
    #: For the agent's own traffic: a URL, or `none`. By default the other two, unless they have a password.
    agent_proxy: str | None = setting("AGENT_PROXY", as_agent_proxy)
    ssl_cert_file: Path | None = setting("SSL_CERT_FILE", as_path)
    node_extra_ca_certs: Path | None = setting("NODE_EXTRA_CA_CERTS", as_path)

    log_level: str = setting("LOG_LEVEL", as_log_level, default="INFO")
    log_format: LogFormat = setting(
        "LOG_FORMAT", lambda value: LogFormat(as_one_of(*LogFormat)(value)), default=LogFormat.JSON
    )

    @property
    def is_local(self) -> bool:
        """Whether objects, keys and executions are on this machine."""
        return self.backend is Backend.LOCAL

    @property
    def operator_has_credential(self) -> bool:
        """Whether requests need no credential for the model API."""
        mine = self.anthropic_api_key or self.claude_code_oauth_token or self.anthropic_auth_token
        cloud = self.use_vertex or self.use_bedrock or self.use_foundry
        return bool(mine or cloud or self._of_workers & MODEL_CREDENTIALS)

    @property
    def signs_callbacks(self) -> bool:
        """Whether the processes that deliver callbacks have a secret to sign them."""
        return bool(self.is_local or self.callback_secret or "CLOUDRUN_CALLBACK_SECRET" in self._of_workers)

    @property
    def _of_workers(self) -> frozenset[str]:
        # On one machine, workers inherit the environment of the service.
        return frozenset() if self.is_local else self.worker_has


def load(environment: Mapping[str, str] = os.environ, *, on_terminal: bool | None = None) -> Config:
    """Return the settings. An empty or blank variable counts as not set; spaces around a value are removed.

    Args:
        on_terminal: Whether the log goes to a terminal. By default, whether standard output is one.

    Raises:
        ConfigError: A value is invalid. The message names the variable and what is allowed, and shows the value unless it is a
            secret.
    """
    values = {name: value.strip() for name, value in environment.items() if value.strip()}
    # Programs differ in which spelling they prefer; curl takes only the lower one for http.
    if "AWS_DEFAULT_REGION" in values:
        values.setdefault("AWS_REGION", values["AWS_DEFAULT_REGION"])
    values |= {name.upper(): values[name] for name in ("http_proxy", "https_proxy", "no_proxy") if name in values}
    if on_terminal is None:
        on_terminal = sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()
    if on_terminal and not values.keys() & {"K_SERVICE", "CLOUD_RUN_JOB"}:
        values.setdefault("LOG_FORMAT", LogFormat.CONSOLE)
    return environ.to_config(Config, values)


def environment() -> dict[str, str]:
    """Return a copy of this process's environment, for the workers that it starts."""
    return dict(os.environ)

"""All settings, from environment variables: their types, defaults and ranges.

The only module that reads `os.environ`. It checks the form of values only; it opens no file and calls no service.
"""

from __future__ import annotations

import enum
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs
import environ

from ccrun.errors import ConfigError
from ccrun.spec import PERMISSION_MODES
from ccrun.task import TASK_ID_PATTERN, Secret, TaskId

#: Minutes: the upper limit of `MAX_TIMEOUT_MINUTES`, a day.
LONGEST_TIMEOUT_MINUTES: Final = 24 * 60.0
DEFAULT_MAX_TIMEOUT_MINUTES: Final = 60.0
DEFAULT_REQUEST_BYTES: Final = 10 * 1024 * 1024
#: Bytes: the upper limit of `MAX_REQUEST_BYTES`. Several copies of a body are in memory while it is validated and sealed.
LARGEST_REQUEST_BYTES: Final = 100 * 1024 * 1024
#: Shorter tokens can be guessed. 16 hexadecimal digits have 64 bits.
MIN_API_TOKEN_CHARS: Final = 16
#: Characters of an invalid value that its error shows.
MAX_SHOWN_CHARS: Final = 60


class Backend(enum.StrEnum):
    """Where objects, keys and executions are."""

    LOCAL = "local"
    GCP = "gcp"


class LogFormat(enum.StrEnum):
    """The format of log lines."""

    JSON = "json"
    CONSOLE = "console"


# --- parsers: each returns the value, or raises ValueError with what follows "must be" -----------------------------------


def _word(value: str) -> str:
    if not re.fullmatch(r"[^\x00-\x20\x7f\ud800-\udfff]+", value):
        raise ValueError("a word without blanks")
    return value


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        # Longer literals are out of every range, and int() is slow for them.
        if not re.fullmatch(r"[0-9]{1,12}", value) or not low <= int(value) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(value)

    return read


def _number(low: float, high: float) -> Callable[[str], float]:
    def read(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", value) or not low <= float(value) <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")
        return float(value)

    return read


def _one_of(*allowed: str) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return read


def _log_level(value: str) -> str:
    return _one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")(value.upper())


def _bucket(value: str) -> str:
    # https://cloud.google.com/storage/docs/buckets#naming
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", value):
        raise ValueError("the name of a bucket, without gs:// and without a path")
    return value


def _url(value: str) -> str:
    try:
        parts = urlsplit(_word(value))
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError("an http or https URL")
    return value.rstrip("/")


def _address(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5}", value):
        raise ValueError("host:port")
    return value


def _hosts(value: str) -> tuple[str, ...]:
    hosts = tuple(host.strip().lower() for host in value.split(",") if host.strip())
    if not all(re.fullmatch(r"[^\x00-\x20/@,]+", host) for host in hosts):
        raise ValueError("host names separated by commas, without scheme or path")
    return hosts


def _tools(value: str) -> tuple[str, ...]:
    """Split at the commas outside parentheses: `Bash(git log:*, git diff:*),Read` is two tools."""
    tools, depth = [""], 0
    for char in value:
        depth += (char == "(") - (char == ")")
        if depth < 0:
            break
        if char == "," and depth == 0:
            tools.append("")
        else:
            tools[-1] += char
    tools = [tool.strip() for tool in tools if tool.strip()]
    # A leading hyphen would make it an option of the CLI.
    if depth != 0 or not all(re.fullmatch(r"(?!-)[^\x00-\x1f\x7f\ud800-\udfff]+", tool) for tool in tools):
        raise ValueError("names of tools separated by commas, with balanced parentheses")
    return tuple(tools)


def _secret_names(value: str) -> frozenset[str]:
    names = frozenset(name.strip() for name in value.split(",") if name.strip())
    if not names <= _WORKER_SECRETS:
        raise ValueError(f"some of {', '.join(sorted(_WORKER_SECRETS))}, separated by commas")
    return names


def _permission_mode(value: str) -> str:
    return _one_of(*PERMISSION_MODES)(value)


def _path(value: str) -> Path:
    return Path(value).absolute()


def _task_id(value: str) -> TaskId:
    if not TASK_ID_PATTERN.fullmatch(value):
        raise ValueError("a task ID")
    return TaskId(value)


def _secret(value: str) -> Secret:
    if not re.fullmatch(r"[^\x00-\x1f\x7f\ud800-\udfff]+", value):
        raise ValueError("text without control characters")
    return Secret(value)


def _credential(value: str) -> Secret:
    # It becomes part of an HTTP header.
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ValueError("printable ASCII characters without blanks")
    return Secret(value)


def _headers(value: str) -> tuple[tuple[str, Secret], ...]:
    """Parse lines `Name: value`, as the CLI does. Where a value has one line, a backslash and an n separate them."""
    headers = []
    for line in value.replace("\\n", "\n").split("\n"):
        name, colon, text = line.partition(":")
        if line.strip():
            # Field names and values of RFC 9110. Those of the connection are not the operator's to set.
            if not (colon and re.fullmatch(r"[!#-'*+.^_`|~0-9A-Za-z-]+", name.strip())) or not re.fullmatch(
                r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?", text.strip()
            ):
                raise ValueError("lines `Name: value` of printable ASCII characters")
            if name.strip().lower() in _CONNECTION_HEADERS:
                raise ValueError(f"headers other than {', '.join(sorted(_CONNECTION_HEADERS))}")
            headers.append((name.strip(), Secret(text.strip())))
    return tuple(headers)


def _proxy(value: str) -> Secret:
    try:
        url = _url(value if "://" in value else f"http://{value}")
        is_proxy = urlsplit(url).path in ("", "/") and not urlsplit(url).query
    except ValueError:
        is_proxy = False
    if not is_proxy:
        raise ValueError("the URL of an HTTP proxy, such as http://proxy.example:3128")
    return Secret(url)


def _agent_proxy(value: str) -> str:
    if value == "none":
        return value
    url = _proxy(value).reveal()
    if "@" in url:
        raise ValueError("the URL of an HTTP proxy without user and password, or none")
    return url


def _urls(value: str) -> tuple[str, ...]:
    return tuple(_url(item.strip()) for item in value.split(",") if item.strip())


def _tokens(value: str) -> tuple[Secret, ...]:
    tokens = [token.strip() for token in value.split(",") if token.strip()]
    if not tokens or not all(re.fullmatch(rf"[\x21-\x7e]{{{MIN_API_TOKEN_CHARS},}}", token) for token in tokens):
        raise ValueError(
            f"tokens of at least {MIN_API_TOKEN_CHARS} printable ASCII characters each, separated by commas"
        )
    return tuple(Secret(token) for token in tokens)


#: Settings that only the workers of a service in the cloud need.
_MODEL_CREDENTIALS: Final = frozenset({"ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN"})
_WORKER_SECRETS: Final = _MODEL_CREDENTIALS | {"ANTHROPIC_CUSTOM_HEADERS", "CLOUDRUN_CALLBACK_SECRET"}
#: Headers that an HTTP client sets itself.
_CONNECTION_HEADERS: Final = frozenset(
    {"accept-encoding", "connection", "content-length", "host", "te", "trailer", "transfer-encoding", "upgrade"}
)
#: Settings whose values no error shows.
_SECRET_READERS: Final = (_secret, _credential, _headers, _proxy, _tokens)


def _setting(name: str, read: Callable[[str], Any] = _word, *, default: Any = None) -> Any:
    def convert(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return read(value)
        except ValueError as error:
            # A URL may contain a password.
            is_secret = read in _SECRET_READERS or "@" in value
            shown = "" if is_secret else f", not {json.dumps(value[:MAX_SHOWN_CHARS])}"
            raise ConfigError(f"{name} must be {error}{shown}.") from None

    return environ.var(name=name, default=default, converter=convert)


# --- the settings ------------------------------------------------------------------------------------------------------


def _default_backend(config: Config) -> Backend:
    on_gcp = config.k_service or config.cloud_run_job or config.gcs_logs_bucket or config.project_id
    return Backend.GCP if on_gcp else Backend.LOCAL


def _default_host(config: Config) -> str:
    return "0.0.0.0" if config.k_service else "127.0.0.1"  # noqa: S104 - Cloud Run controls access.


def _cores() -> int:
    """Return how many cores this process may use: in a container, possibly fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@environ.config(prefix="", frozen=True)
class Config:
    """All settings, validated. Created by `load`."""

    #: Set by Cloud Run: for a service, for a job, and for an execution.
    k_service: str | None = _setting("K_SERVICE")
    cloud_run_job: str | None = _setting("CLOUD_RUN_JOB")
    cloud_run_execution: str | None = _setting("CLOUD_RUN_EXECUTION")
    #: Set by what launches a worker.
    task_id: TaskId | None = _setting("TASK_ID", _task_id)
    encrypted_payload_path: str | None = _setting("ENCRYPTED_PAYLOAD_PATH")

    project_id: str | None = _setting("PROJECT_ID")
    region: str = _setting("REGION", default="us-central1")
    gcs_logs_bucket: str | None = _setting("GCS_LOGS_BUCKET", _bucket)
    kms_location: str = _setting("KMS_LOCATION", default="global")
    kms_key_ring: str = _setting("KMS_KEY_RING", default="claude-code")
    kms_key_name: str = _setting("KMS_KEY_NAME", default="payload-encryption")
    cloudrun_job_name: str = _setting("CLOUDRUN_JOB_NAME", default="claude-code-job")
    storage_emulator_host: str | None = _setting("STORAGE_EMULATOR_HOST", _url)
    kms_emulator_host: str | None = _setting("KMS_EMULATOR_HOST", _address)
    cloud_run_emulator_host: str | None = _setting("CLOUD_RUN_EMULATOR_HOST", _address)

    backend: Backend = _setting(
        "CCRUN_BACKEND",
        lambda value: Backend(_one_of(*Backend)(value)),
        default=attrs.Factory(_default_backend, takes_self=True),
    )
    data_dir: Path = _setting("CCRUN_DATA_DIR", _path, default=".ccrun")
    max_concurrent_tasks: int = _setting("MAX_CONCURRENT_TASKS", _whole(1, 1000), default=attrs.Factory(_cores))

    host: str = _setting("HOST", default=attrs.Factory(_default_host, takes_self=True))
    port: int = _setting("PORT", _whole(0, 65535), default=8080)
    #: Names of secrets that, in the cloud, the job has and the service does not, since the service does not use them.
    worker_has: frozenset[str] = _setting("CCRUN_WORKER_HAS", _secret_names, default=frozenset())
    api_tokens: tuple[Secret, ...] = _setting("CCRUN_API_TOKENS", _tokens, default=())
    max_request_bytes: int = _setting(
        "MAX_REQUEST_BYTES", _whole(1024, LARGEST_REQUEST_BYTES), default=DEFAULT_REQUEST_BYTES
    )
    max_timeout_minutes: float = _setting(
        "MAX_TIMEOUT_MINUTES", _number(1, LONGEST_TIMEOUT_MINUTES), default=DEFAULT_MAX_TIMEOUT_MINUTES
    )
    allowed_tools: tuple[str, ...] = _setting("ALLOWED_TOOLS", _tools, default=())
    permission_mode: str | None = _setting("PERMISSION_MODE", _permission_mode)
    poll_seconds: float = _setting("POLL_SECONDS", _number(0.01, 60), default=1.0)

    callback_secret: Secret | None = _setting("CLOUDRUN_CALLBACK_SECRET", _secret)
    callback_allowed_hosts: tuple[str, ...] = _setting("CALLBACK_ALLOWED_HOSTS", _hosts, default=())

    claude_cli: Path | None = _setting("CLAUDE_CLI", _path)
    agent_user: str | None = _setting("CCRUN_AGENT_USER")
    anthropic_base_url: str = _setting("ANTHROPIC_BASE_URL", _url, default="https://api.anthropic.com")
    anthropic_api_key: Secret | None = _setting("ANTHROPIC_API_KEY", _credential)
    claude_code_oauth_token: Secret | None = _setting("CLAUDE_CODE_OAUTH_TOKEN", _credential)
    anthropic_auth_token: Secret | None = _setting("ANTHROPIC_AUTH_TOKEN", _credential)
    anthropic_custom_headers: tuple[tuple[str, Secret], ...] = _setting(
        "ANTHROPIC_CUSTOM_HEADERS", _headers, default=()
    )
    #: Base URLs that requests may name instead.
    allowed_base_urls: tuple[str, ...] = _setting("ALLOWED_BASE_URLS", _urls, default=())
    flush_lines: int = _setting("FLUSH_LINES", _whole(1, 100_000), default=100)
    flush_seconds: float = _setting("FLUSH_SECONDS", _number(0.01, 60), default=1.0)

    http_proxy: Secret | None = _setting("HTTP_PROXY", _proxy)
    https_proxy: Secret | None = _setting("HTTPS_PROXY", _proxy)
    no_proxy: str = _setting("NO_PROXY", str, default="")
    #: For the agent's own traffic: a URL, or `none`. By default the other two, unless they have a password.
    agent_proxy: str | None = _setting("AGENT_PROXY", _agent_proxy)
    ssl_cert_file: Path | None = _setting("SSL_CERT_FILE", _path)
    node_extra_ca_certs: Path | None = _setting("NODE_EXTRA_CA_CERTS", _path)

    log_level: str = _setting("LOG_LEVEL", _log_level, default="INFO")
    log_format: LogFormat = _setting(
        "LOG_FORMAT", lambda value: LogFormat(_one_of(*LogFormat)(value)), default=LogFormat.JSON
    )

    @property
    def is_local(self) -> bool:
        """Whether objects, keys and executions are on this machine."""
        return self.backend is Backend.LOCAL

    @property
    def operator_has_credential(self) -> bool:
        """Whether requests need no credential for the model API."""
        mine = self.anthropic_api_key or self.claude_code_oauth_token or self.anthropic_auth_token
        return bool(mine or self._of_workers & _MODEL_CREDENTIALS)

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
    values |= {name.upper(): values[name] for name in ("http_proxy", "https_proxy", "no_proxy") if name in values}
    if on_terminal is None:
        on_terminal = sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()
    if on_terminal and not values.keys() & {"K_SERVICE", "CLOUD_RUN_JOB"}:
        values.setdefault("LOG_FORMAT", LogFormat.CONSOLE)
    return environ.to_config(Config, values)


def environment() -> dict[str, str]:
    """Return a copy of this process's environment, for the workers that it starts."""
    return dict(os.environ)

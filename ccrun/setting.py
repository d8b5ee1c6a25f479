"""Settings of `ccrun.config`: how the value of an environment variable is parsed.

Each parser returns the value, or raises ValueError with what follows "must be".
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import environ

from ccrun.errors import ConfigError
from ccrun.spec import PERMISSION_MODES
from ccrun.task import TASK_ID_PATTERN, Secret, TaskId

#: Shorter tokens can be guessed. 16 hexadecimal digits have 64 bits.
MIN_API_TOKEN_CHARS: Final = 16
#: As of a token. A shorter secret of callbacks can be guessed from one of them.
MIN_CALLBACK_SECRET_CHARS: Final = 16
#: The prefix of a secret whose key is in base64, and the bytes of such a key: Standard Webhooks, section "Signature scheme".
KEY_PREFIX: Final = "whsec_"
MIN_KEY_BYTES: Final = 24
MAX_KEY_BYTES: Final = 64
#: Characters of an invalid value that its error shows.
MAX_SHOWN_CHARS: Final = 60
#: Settings that only the workers of a service in the cloud need.
MODEL_CREDENTIALS: Final = frozenset({"ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN"})
_WORKER_SECRETS: Final = MODEL_CREDENTIALS | {"ANTHROPIC_CUSTOM_HEADERS", "CLOUDRUN_CALLBACK_SECRET"}
#: Headers that an HTTP client sets itself.
_CONNECTION_HEADERS: Final = frozenset(
    {"accept-encoding", "connection", "content-length", "host", "te", "trailer", "transfer-encoding", "upgrade"}
)


def as_word(value: str) -> str:
    """Return a word."""
    if not re.fullmatch(r"[^\x00-\x20\x7f\ud800-\udfff]+", value):
        raise ValueError("a word without blanks")
    return value


def as_whole(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers in a range."""

    def read(value: str) -> int:
        # Longer literals are out of every range, and int() is slow for them.
        if not re.fullmatch(r"[0-9]{1,12}", value) or not low <= int(value) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(value)

    return read


def as_size(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of numbers of bytes in a range: whole numbers, also in Ki, Mi, Gi or Ti, such as 64Mi."""

    def read(value: str) -> int:
        match = re.fullmatch(r"([0-9]{1,15})(|Ki|Mi|Gi|Ti)", value)
        size = int(match[1]) * 1024 ** ("", "Ki", "Mi", "Gi", "Ti").index(match[2]) if match else -1
        if not low <= size <= high:
            raise ValueError(f"a number of bytes from {low} to {high}, such as 64Mi")
        return size

    return read


def as_number(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of numbers in a range."""

    def read(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", value) or not low <= float(value) <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")
        return float(value)

    return read


def as_one_of(*allowed: str) -> Callable[[str], str]:
    """Return a parser of these words."""

    def read(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return read


def as_flag(value: str) -> bool:
    """Return whether a setting is switched on, in the spellings of the CLI."""
    spellings = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if value.lower() not in spellings:
        raise ValueError("1 or 0")
    return spellings[value.lower()]


def as_log_level(value: str) -> str:
    """Return a log level, in any case."""
    return as_one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")(value.upper())


def as_bucket(value: str) -> str:
    """Return the name of a bucket."""
    # https://cloud.google.com/storage/docs/buckets#naming
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", value):
        raise ValueError("the name of a bucket, without gs:// and without a path")
    return value


def as_url(value: str) -> str:
    """Return a URL without a slash at its end."""
    try:
        parts = urlsplit(as_word(value))
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError("an http or https URL")
    return value.rstrip("/")


def as_host_label(value: str) -> str:
    """Return a word that becomes part of a host name, such as a region."""
    if not re.fullmatch(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", value):
        raise ValueError("lower-case letters, digits and hyphens")
    return value


def as_address(value: str) -> str:
    """Return a host with a port."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5}", value):
        raise ValueError("host:port")
    return value


def as_hosts(value: str) -> tuple[str, ...]:
    """Return host names in lower case."""
    hosts = tuple(host.strip().lower() for host in value.split(",") if host.strip())
    if not all(re.fullmatch(r"[^\x00-\x20/@,]+", host) for host in hosts):
        raise ValueError("host names separated by commas, without scheme or path")
    return hosts


def as_user_range(value: str) -> range:
    """Return numbers of users, from the first to the last."""
    match = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", value)
    users = range(int(match[1]), int(match[2]) + 1) if match else range(0)
    if not users or 0 in users:
        raise ValueError("the numbers of the first and the last user, such as 41000-41099, without 0")
    return users


def as_oidc_audiences(value: str) -> tuple[tuple[str, str], ...]:
    """Return pairs of an origin and the audience of its tokens: `https://a.example` is both, `https://a.example=b` is not."""
    entries = []
    for entry in filter(None, map(str.strip, value.split(","))):
        origin, _, audience = entry.partition("=")
        origin = origin.lower().removesuffix("/")
        if not re.fullmatch(r"https://[^\x00-\x20/@?#=]+|http://127\.0\.0\.1(:[0-9]+)?", origin) or re.search(
            r"[^\x21-\x7e]", audience
        ):
            raise ValueError("origins with https, each with or without =AUDIENCE")
        entries.append((origin, audience or origin))
    return tuple(entries)


def as_tools(value: str) -> tuple[str, ...]:
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


def as_secret_names(value: str) -> frozenset[str]:
    """Return names of secrets that workers have."""
    names = frozenset(name.strip() for name in value.split(",") if name.strip())
    if not names <= _WORKER_SECRETS:
        raise ValueError(f"some of {', '.join(sorted(_WORKER_SECRETS))}, separated by commas")
    return names


def as_permission_mode(value: str) -> str:
    """Return a permission mode of the CLI."""
    return as_one_of(*PERMISSION_MODES)(value)


def as_path(value: str) -> Path:
    """Return an absolute path."""
    return Path(value).absolute()


def as_task_id(value: str) -> TaskId:
    """Return a task ID."""
    if not TASK_ID_PATTERN.fullmatch(value):
        raise ValueError("a task ID")
    return TaskId(value)


def as_secret(value: str) -> Secret:
    """Return a secret in one line."""
    if not re.fullmatch(r"[^\x00-\x1f\x7f\ud800-\udfff]+", value):
        raise ValueError("text without control characters")
    return Secret(value)


def as_callback_secret(value: str) -> Secret:
    """Return a secret that signs callbacks: text, or `whsec_` and a key in base64 (Standard Webhooks)."""
    if value.startswith(KEY_PREFIX):
        text = value.removeprefix(KEY_PREFIX)
        try:
            # Padding may be missing.
            key = base64.b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), validate=True)
        except ValueError:
            key = b""
        if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
            raise ValueError(f"{MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes in base64 after {KEY_PREFIX}")
    elif len(value) < MIN_CALLBACK_SECRET_CHARS:
        raise ValueError(f"at least {MIN_CALLBACK_SECRET_CHARS} characters long")
    return as_secret(value)


def as_credential(value: str) -> Secret:
    """Return a secret that can be part of an HTTP header."""
    # It becomes part of an HTTP header.
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ValueError("printable ASCII characters without blanks")
    return Secret(value)


def as_headers(value: str) -> tuple[tuple[str, Secret], ...]:
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


def as_proxy(value: str) -> Secret:
    """Return the URL of an HTTP proxy, which may contain a password."""
    try:
        url = as_url(value if "://" in value else f"http://{value}")
        is_proxy = urlsplit(url).path in ("", "/") and not urlsplit(url).query
    except ValueError:
        is_proxy = False
    if not is_proxy:
        raise ValueError("the URL of an HTTP proxy, such as http://proxy.example:3128")
    return Secret(url)


def as_agent_proxy(value: str) -> str:
    """Return the URL of an HTTP proxy without a password, or `none`."""
    if value == "none":
        return value
    url = as_proxy(value).reveal()
    if "@" in url:
        raise ValueError("the URL of an HTTP proxy without user and password, or none")
    return url


def as_urls(value: str) -> tuple[str, ...]:
    """Return URLs that commas separate."""
    return tuple(as_url(item.strip()) for item in value.split(",") if item.strip())


def as_tokens(value: str) -> tuple[Secret, ...]:
    """Return tokens that commas separate."""
    tokens = [token.strip() for token in value.split(",") if token.strip()]
    if not tokens or not all(re.fullmatch(rf"[\x21-\x7e]{{{MIN_API_TOKEN_CHARS},}}", token) for token in tokens):
        raise ValueError(
            f"tokens of at least {MIN_API_TOKEN_CHARS} printable ASCII characters each, separated by commas"
        )
    return tuple(Secret(token) for token in tokens)


#: Settings whose values no error shows.
_SECRET_READERS: Final = (as_secret, as_callback_secret, as_credential, as_headers, as_proxy, as_tokens)


def setting(name: str, read: Callable[[str], Any] = as_word, *, default: Any = None) -> Any:
    """Return a setting.

    Args:
        name: The name of the variable.
        read: Its parser. If its value is invalid, `ConfigError` says what is allowed.
        default: The value if the variable is not set.
    """

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

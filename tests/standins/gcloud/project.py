"""The project that the stand-in works on, the log of calls, and errors."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Tests start the stand-in hundreds of times, so it imports as little as possible: `typing` for type checkers only.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

STATE_FILE = Path(os.environ["GCLOUD_STANDIN"])
STATE: dict[str, Any] = json.loads(STATE_FILE.read_text(encoding="utf-8"))
#: The words of the command, such as `run jobs deploy`, without names and flags.
COMMAND_WORDS: list[str] = []
#: The last words of the commands that only read.
READS = (
    *("describe", "list", "list-cleanup-policies", "get-iam-policy", "access"),
    *("print-identity-token", "configure-docker"),
)


class Call:
    """The names and the flags of a call."""

    def __init__(self, flags: dict[str, Any], names: list[str]) -> None:
        self.flags, self.names = flags, names

    def __getitem__(self, flag: str) -> Any:
        return self.flags[flag]

    def get(self, flag: str, default: Any = None) -> Any:
        """Return the value of a flag, or the default."""
        return self.flags.get(flag, default)


def save() -> None:
    """Write the state of the project to its file."""
    STATE_FILE.write_text(json.dumps(STATE), encoding="utf-8")


def log_call(resource: Any = None, output: str | None = None) -> None:
    """Add this call to the log, with the resource that it read and its output."""
    reads = bool(COMMAND_WORDS) and COMMAND_WORDS[-1] in READS
    entry = {"argv": sys.argv[1:], "reads": reads, "resource": resource, "output": output}
    with STATE_FILE.with_suffix(".calls").open("a", encoding="utf-8") as calls:
        calls.write(json.dumps(entry) + "\n")


def fail(message: str, status: int = 1) -> NoReturn:
    """Print an error as gcloud does, log the call and exit."""
    sys.stderr.write(f"ERROR: (gcloud.{'.'.join(COMMAND_WORDS)}) {message}\n")
    log_call()
    sys.exit(status)


# --- resources ---------------------------------------------------------------------------------------------------------


def resource_key(kind: str, *names: str) -> str:
    """Return the key of a resource in the state."""
    return "/".join((kind, *names))


def get(key: str, description: str | None = None) -> Any:
    """Return a resource, or fail as gcloud does when it does not exist."""
    resource = STATE["resources"].get(key)
    if resource is None:
        fail(f"NOT_FOUND: {description or key} not found.")
    return resource


def create(key: str, resource: Any) -> None:
    """Add a resource, or fail as gcloud does when it exists."""
    if key in STATE["resources"]:
        fail(f"ALREADY_EXISTS: {key} already exists.")
    STATE["resources"][key] = resource


def delete(key: str) -> None:
    """Delete a resource and its policy."""
    get(key)
    del STATE["resources"][key]
    STATE["policies"].pop(key, None)


def parse_pairs(text: str) -> dict[str, str]:
    """Parse `NAME=VALUE,NAME=VALUE`. With a prefix such as `^#^`, the separator is `#` (see `gcloud topic escaping`)."""
    separator = ","
    if text.startswith("^"):
        _, separator, text = text.split("^", 2)
    return dict(pair.split("=", 1) for pair in text.split(separator))

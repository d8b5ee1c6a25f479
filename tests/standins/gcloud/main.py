"""The entry point of the stand-in: parses a command line, checks permissions, runs the command and prints its output."""

from __future__ import annotations

import sys

from . import iam, run, services, storage
from .formats import format_output
from .project import COMMAND_WORDS, READS, STATE, Call, fail, log_call, save

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: Number of names (None for any), allowed flags and function; by command.
COMMANDS: dict[str, tuple[int | None, str, Callable[[Call], Any]]] = {
    **services.COMMANDS,
    **storage.COMMANDS,
    **run.COMMANDS,
    **iam.COMMANDS,
}
#: Flags of all commands.
GLOBAL_FLAGS = {"project", "quiet", "format", "flatten"}
#: Flags without a value, which can also be given as `--no-…`.
SWITCHES = {
    *("uniform-bucket-level-access", "public-access-prevention", "clear-soft-delete", "versioning", "dry-run"),
    *("recursive", "primary", "clear-secrets", "allow-unauthenticated", "cpu-throttling", "enabled"),
}
#: The API that must be enabled, by the first word of a command.
APIS = {
    "storage": "storage",
    "kms": "cloudkms",
    "secrets": "secretmanager",
    "iam": "iam",
    "artifacts": "artifactregistry",
    "builds": "cloudbuild",
    "run": "run",
    "scheduler": "cloudscheduler",
}


def parse(argv: list[str]) -> Call:
    """Parse a command line, and set `COMMAND_WORDS`."""
    words = next((argv[:n] for n in (4, 3, 2) if " ".join(argv[:n]) in COMMANDS), argv[:3])
    COMMAND_WORDS[:] = words
    if " ".join(words) not in COMMANDS:
        fail(f"Invalid choice: {argv}", 2)
    count, command_flags, _ = COMMANDS[" ".join(words)]
    allowed = {*command_flags.split(), *GLOBAL_FLAGS}
    flags, names = {}, []
    for word in argv[len(words) :]:
        if not word.startswith("--"):
            names.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        is_no = name.startswith("no-") and name[3:] in SWITCHES
        name = name[3:] if is_no else name
        if name not in allowed or (name in SWITCHES or name == "quiet") == bool(equals):
            fail(f"unrecognized arguments: {word}", 2)
        flags[name] = value if equals else not is_no
    if count is not None and len(names) != count:
        fail(f"expected {count} names, got {names}", 2)
    return Call(flags, names)


def check_access(call: Call) -> None:
    """Fail if the permission is denied, the project is another one, or the API is disabled."""
    command, project = " ".join(COMMAND_WORDS), call.get("project")
    if command in STATE["denied"]:
        fail(
            f"[{STATE['account']}] does not have permission to access this.\nPERMISSION_DENIED: "
            f"Permission '{STATE['denied'][command]}' denied on resource (or it may not exist)."
        )
    if COMMAND_WORDS[0] != "auth" and (not project or project != STATE["project"]):
        fail(f"PERMISSION_DENIED: {STATE['account']} does not have permission to access projects instance [{project}].")
    api = APIS.get(COMMAND_WORDS[0])
    if api and f"{api}.googleapis.com" not in STATE["services"]:
        fail(f"PERMISSION_DENIED: {api} API has not been used in project {project} before or it is disabled.")


def main() -> None:
    """Run the command of `sys.argv`."""
    call = parse(sys.argv[1:])
    check_access(call)
    result = COMMANDS[" ".join(COMMAND_WORDS)][2](call)
    if COMMAND_WORDS[-1] not in READS:
        save()
        log_call()
    elif "format" in call.flags:
        output = format_output(call, result)
        sys.stdout.write(output)
        log_call(result, output)
    else:
        # Commands without `--format` return text.
        sys.stdout.write(result)
        log_call()

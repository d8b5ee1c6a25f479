"""Checks of the fields that configure the agent: its environment variables, and the settings and files of the CLI."""

from __future__ import annotations

import functools
import re
from pathlib import PurePosixPath
from typing import Any, Final

from ccrun import ijson
from ccrun.api import checks
from ccrun.api.checks import MAX_NAME_CHARS, MAX_PATH_BYTES, InvalidValue, Location, run_check
from ccrun.spec import (
    MAX_ARGUMENT_BYTES,
    MAX_ENVIRONMENT_BYTES,
    MAX_ENVIRONMENT_VARIABLES,
    MAX_OUTPUT_TOKENS,
    MIN_THINKING_TOKENS,
    VARIABLE_NAME,
    is_merged_variable,
    is_reserved_variable,
)

MAX_SETTINGS_BYTES: Final = 256 * 1024
#: Files in each of `slashCommands`, `subagents`, `skills` and `plugins`.
MAX_CONFIG_FILES: Final = 128
MAX_CONFIG_FILE_BYTES: Final = 256 * 1024

#: Settings with which the CLI would use another credential than that of the proxy, or none.
_CREDENTIAL_SETTINGS: Final = frozenset(
    {
        "apiKeyHelper",
        "awsAuthRefresh",
        "awsCredentialExport",
        "forceLoginMethod",
        "forceLoginOrgUUID",
        "gcpAuthRefresh",
        "inferenceCredentialHelper",
        "proxyAuthHelper",
    }
)


def variables(value: Any, location: Location) -> dict[str, Any]:
    """Check environment variables."""
    given = {
        name: run_check(functools.partial(_variable, name), text, location.field(name))
        for name, text in checks.as_object(value, max_entries=MAX_ENVIRONMENT_VARIABLES).items()
    }
    size = sum(len(name) + len(text.encode()) + 2 for name, text in given.items() if text is not None)
    if size > MAX_ENVIRONMENT_BYTES:
        raise InvalidValue(f"must have at most {MAX_ENVIRONMENT_BYTES} bytes in total")
    return given


def _variable(name: str, value: Any, location: Location) -> str:
    if re.fullmatch(VARIABLE_NAME, name) is None:
        raise InvalidValue("is not a valid variable name: use letters, digits and underscores, and no digit first")
    if is_reserved_variable(name):
        raise InvalidValue("is reserved: the service itself sets this variable")
    return checks.as_string(value, max_bytes=MAX_ARGUMENT_BYTES - len(name) - 1)


def thinking_tokens(value: Any, location: Location) -> int:
    """Check a thinking budget: 0 for no thinking, or what the model API accepts."""
    tokens: int = checks.integer(0, MAX_OUTPUT_TOKENS)(value, location)
    if 0 < tokens < MIN_THINKING_TOKENS:
        raise InvalidValue(f"must be 0, which turns thinking off, or at least {MIN_THINKING_TOKENS}")
    return tokens


def settings(value: Any, location: Location) -> dict[str, Any]:
    """Check settings of the CLI for those that would replace the credential proxy. The CLI itself checks the others."""
    given: dict[str, Any] = checks.any_object(MAX_SETTINGS_BYTES)(value, location)
    for name in sorted(given.keys() & _CREDENTIAL_SETTINGS):
        field = location.field(name)
        field.add_error(f"{field.path} is not allowed: the service itself gives the agent its credential")
    if "env" in given:
        run_check(_settings_variables, given["env"], location.field("env"))
    return given


def _settings_variables(value: Any, location: Location) -> dict[str, Any]:
    given = variables(value, location)
    for name in filter(is_merged_variable, given):
        field = location.field(name)
        field.add_error(
            f"{field.path} is not allowed: set it in environmentSecrets, where the service adds its own hosts"
        )
    return given


# --- files -----------------------------------------------------------------------------------------------------------

_NAME: Final = rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{MAX_NAME_CHARS - 1}}}"
#: Inside a directory of the CLI a name may start with a dot, as `.claude-plugin` does.
_INNER_NAME: Final = rf"(?!\.\.?(?:/|$))[A-Za-z0-9_.][A-Za-z0-9_.-]{{0,{MAX_NAME_CHARS - 1}}}"
_ALLOWED: Final = f"at most {MAX_NAME_CHARS} letters, digits, `_`, `.` and `-`, and a letter or digit first"
_FILE_NAME_RULE: Final = f"is not a valid file name: use {_ALLOWED}"
_COMMAND_RULE: Final = f"{_FILE_NAME_RULE}; `/` separates directories"
_PATH_RULE: Final = (
    f"is not a valid path: start with the name of a directory ({_ALLOWED}), and use at most {MAX_NAME_CHARS} of these "
    f"characters in each part and {MAX_PATH_BYTES} in total"
)


def subagents(value: Any, location: Location) -> dict[str, Any]:
    """Check subagents by name."""
    return _files(value, location, _NAME, _FILE_NAME_RULE)


def slash_commands(value: Any, location: Location) -> dict[str, Any]:
    """Check slash commands by name. One in a directory, `git/commit`, is the command `/git:commit`."""
    return _files(value, location, rf"{_NAME}(?:/{_NAME})*", _COMMAND_RULE)


def skills(value: Any, location: Location) -> dict[str, Any]:
    """Check the files of skills by path. Each skill is a directory with a file `SKILL.md`."""
    given = _files_in_directories(value, location)
    for name in dict.fromkeys(path.partition("/")[0] for path in given):
        if f"{name}/SKILL.md" not in given:
            location.add_error(f"{location.path} has no file {name}/SKILL.md, which the skill {name} needs")
    return given


def plugins(value: Any, location: Location) -> dict[str, Any]:
    """Check the files of plugins by path. Each plugin is a directory."""
    given = _files_in_directories(value, location)
    for path, file in given.items():
        if file is not None and PurePosixPath(path).match("*/.claude-plugin/plugin.json"):
            run_check(_manifest, file.get("content", "{}"), location.field(path).field("content"))
    return given


def _manifest(value: Any, location: Location) -> None:
    try:
        manifest = ijson.parse(value.encode())
    except ijson.NotIJson:
        manifest = None
    if not isinstance(manifest, dict):
        raise InvalidValue("must be a JSON object")


def _files_in_directories(value: Any, location: Location) -> dict[str, Any]:
    given = _files(value, location, rf"{_NAME}(?:/{_INNER_NAME})+", _PATH_RULE)
    for path, file in given.items():
        if file is not None and "frontmatter" in file and not path.endswith(".md"):
            field = location.field(path).field("frontmatter")
            field.add_error(f"{field.path} is not allowed: only Markdown files (.md) have front matter")
        if any(str(parent) in given for parent in PurePosixPath(path).parents):
            field = location.field(path)
            field.add_error(f"{field.path} is in a directory whose path is that of a file")
    return given


def _files(value: Any, location: Location, pattern: str, rule: str) -> dict[str, Any]:
    return {
        name: run_check(functools.partial(_file, name, pattern, rule), file, location.field(name))
        for name, file in checks.as_object(value, max_entries=MAX_CONFIG_FILES).items()
    }


def _file(name: str, pattern: str, rule: str, value: Any, location: Location) -> Any:
    if len(name) > MAX_PATH_BYTES or re.fullmatch(pattern, name) is None:
        raise InvalidValue(rule)
    given = _FILE(value, location)
    location.require("content", given)
    return given


_FILE: Final = checks.object_of(
    {"frontmatter": checks.any_object(MAX_CONFIG_FILE_BYTES), "content": checks.text(MAX_CONFIG_FILE_BYTES)}
)

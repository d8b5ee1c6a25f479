"""The Claude CLI: its arguments, its environment and its input files.

Pure functions. What is said about the CLI here was observed with version 2.1.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ccrun.process.tree import MARKER_VARIABLE
from ccrun.spec import ConfigFile, TaskSpec, is_reserved_variable

#: With a longer path, that of the CLI's socket exceeds 103 bytes, and the CLI uses the shared /tmp/cc-socks-UID instead.
MAX_TEMPORARY_PATH_BYTES: Final = 80
#: The variables of the worker that the agent gets, besides PATH.
_INHERITED: Final = re.compile(
    r"LANG|TZ|LC_\w+|ANTHROPIC_(?:MODEL|SMALL_FAST_MODEL|(?:DEFAULT|CUSTOM)_\w*MODEL(?:_\w+)?)"
)
#: An item of a list. A comma in parentheses belongs to the item, as in `Bash(git log:*, -n)`.
_LIST_ITEM: Final = re.compile(r"(?:[^,(]|\([^)]*\)?)+")


def environment(
    spec: TaskSpec,
    *,
    inherited: Mapping[str, str],
    network: Mapping[str, str],
    home: Path,
    config: Path,
    temporary: Path,
    model_api: Mapping[str, str],
    is_root: bool,
    marker: str,
) -> dict[str, str]:
    """Return all environment variables of the agent. Those of the worker are PATH, locale, time zone and names of models only.

    Args:
        inherited: The environment of the worker.
        network: The variables for proxies and certificates, which those of the request override.
        home: HOME of the agent.
        config: The configuration directory of the CLI, with the `config_files` of the task.
        temporary: TMPDIR, at most `MAX_TEMPORARY_PATH_BYTES` long so that the CLI puts all its files there.
        model_api: The variables with which the CLI sends its requests to the proxy.
        is_root: Whether the agent runs as root. The CLI then rejects `bypassPermissions` unless it is in a sandbox.
        marker: The marker by which the processes of the task are found.
    """
    secrets = {
        name: secret.reveal() for name, secret in spec.environment_secrets.items() if not is_reserved_variable(name)
    }
    paths = (secrets.get("PATH"), inherited.get("PATH", os.defpath))
    direct = secrets.get("NO_PROXY") or secrets.get("no_proxy") or network.get("NO_PROXY")
    no_proxy = ",".join(filter(None, (direct, "127.0.0.1")))
    return {
        "LANG": "C.UTF-8",
        **{name: value for name, value in inherited.items() if _INHERITED.fullmatch(name)},
        **network,
        **secrets,
        # A PATH of the request comes before the one that the CLI needs. A proxy of the request is not used for loopback.
        "PATH": os.pathsep.join(filter(None, paths)),
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "HOME": str(home),
        "CLAUDE_CONFIG_DIR": str(config),
        "TMPDIR": str(temporary),
        "TERM": "dumb",
        **model_api,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        **({"IS_SANDBOX": "1"} if is_root else {}),
        MARKER_VARIABLE: marker,
    }


#: The variables that decide where the CLI sends its requests and with which credential.
ROUTING_VARIABLES: Final = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "ANTHROPIC_BASE_URL",
    "ANTHROPIC_BEDROCK_BASE_URL",
    "ANTHROPIC_FOUNDRY_API_KEY",
    "ANTHROPIC_FOUNDRY_BASE_URL",
    "ANTHROPIC_VERTEX_BASE_URL",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_FOUNDRY",
    "CLAUDE_CODE_USE_VERTEX",
)
_PINNED_VARIABLES: Final = (*ROUTING_VARIABLES, "NO_PROXY", "no_proxy")


def option_files(spec: TaskSpec, environment: Mapping[str, str]) -> dict[str, bytes]:
    """Return the contents of the files that options of the CLI name, by option.

    They are files and not arguments because they are large (an argument has at most 128 KiB on Linux) and confidential
    (arguments are visible in the process list).
    """
    # Settings of a repository may set variables and override the environment; those that an option names override both.
    given = spec.settings or {}
    pinned = {name: environment.get(name, "") for name in _PINNED_VARIABLES}
    variables = {**given.get("env", {}), **spec.option_variables, **pinned}
    files = {"settings": json.dumps({**given, "apiKeyHelper": "", "env": variables}).encode()}
    if spec.system_prompt is not None:
        files["system-prompt-file"] = spec.system_prompt.encode()
    if spec.append_system_prompt is not None:
        files["append-system-prompt-file"] = spec.append_system_prompt.encode()
    if spec.mcp_config is not None:
        files["mcp-config"] = json.dumps(spec.mcp_config).encode()
    if spec.subagents:
        # In a directory `agents`, those of the repository with the same name would be used.
        agents = {name: _agent(name, file) for name, file in spec.subagents.items()}
        files["agents"] = json.dumps(agents).encode()
    return files


#: Directories below CLAUDE_CONFIG_DIR that the CLI itself does not use.
PLUGINS_DIRECTORY: Final = "task-plugins"
SETTINGS_CHECK_DIRECTORY: Final = "settings-check"


def config_files(spec: TaskSpec) -> dict[str, ConfigFile]:
    """Return the files in CLAUDE_CONFIG_DIR, by path. Those of a repository with the same name are not used."""
    files = {f"commands/{name}.md": file for name, file in spec.slash_commands.items()}
    files |= {f"skills/{path}": file for path, file in spec.skills.items()}
    files |= {f"{PLUGINS_DIRECTORY}/{path}": file for path, file in spec.plugins.items()}
    if spec.settings is not None:
        files[f"{SETTINGS_CHECK_DIRECTORY}/settings.json"] = ConfigFile(content=json.dumps(spec.settings))
    return files


def settings_errors(printed: str) -> list[str]:
    """Return the invalid settings in the output of `claude doctor`, one sentence each, without the path of the file.

    The CLI silently ignores a file with an invalid setting, with those of ccrun in it.
    """
    _, _, section = printed.partition("\nInvalid settings\n")
    lines = section.partition("\n\n")[0].splitlines()
    return [line.rpartition(" \u203a ")[2].removeprefix("- ") for line in lines]


def _agent(name: str, file: ConfigFile) -> dict[str, Any]:
    """Return a subagent for `--agents`, which needs lists where front matter has `Read, Grep`."""
    agent = {key: value for key, value in file.frontmatter.items() if key != "name" and value is not None}
    for key in ("tools", "disallowedTools", "skills"):
        if isinstance(listed := agent.get(key), str):
            agent[key] = [item.strip() for item in _LIST_ITEM.findall(listed) if item.strip()]
    return {"description": f"The subagent {name}.", **agent, "prompt": file.content}


def argv(spec: TaskSpec, *, cli: Path, files: Mapping[str, Path], config: Path) -> list[str]:
    """Return the command. The prompt is not in it, since it goes to stdin.

    `=` joins each value to its option, so that no value is read as an option. Each tool has its own option, since the CLI
    splits a value at commas and spaces outside parentheses.

    Args:
        files: The paths of the `option_files`, by option.
        config: The configuration directory of the CLI, with the `config_files`.
    """
    single = {"model": spec.model, "fallback-model": spec.fallback_model, "permission-mode": spec.permission_mode}
    plugins = dict.fromkeys(path.partition("/")[0] for path in spec.plugins)
    return [
        str(cli),
        "-p",
        "--verbose",
        "--output-format=stream-json",
        "--permission-prompts=none",
        f"--max-turns={spec.max_turns}",
        *(f"--{option}={value}" for option, value in single.items() if value is not None),
        *(f"--allowedTools={tool}" for tool in spec.allowed_tools),
        *(f"--disallowedTools={tool}" for tool in spec.disallowed_tools),
        *(f"--{option}={path}" for option, path in files.items()),
        *(f"--plugin-dir={config / PLUGINS_DIRECTORY / name}" for name in plugins),
        *(("--strict-mcp-config",) if spec.strict_mcp_config else ()),
    ]

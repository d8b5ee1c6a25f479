from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.claude import task

from ccrun.spec import ConfigFile, TaskSpec, is_reserved_variable
from ccrun.task import Secret
from ccrun.worker.claude import argv, environment, option_files

OAUTH = {"ANTHROPIC_BASE_URL": "http://127.0.0.1:1", "CLAUDE_CODE_OAUTH_TOKEN": "run-token"}


def agent_environment(spec: TaskSpec, **changed: Any) -> dict[str, str]:
    """Return the environment of the agent; the directories do not exist."""
    defaults = {
        "inherited": {"PATH": "/usr/bin:/bin"},
        "network": {},
        "home": Path("/t/home"),
        "config": Path("/t/config"),
        "temporary": Path("/t/tmp"),
        "model_api": {"ANTHROPIC_BASE_URL": "http://127.0.0.1:1", "ANTHROPIC_API_KEY": "run-token"},
        "is_root": False,
        "marker": "t1",
    }
    return environment(spec, **{**defaults, **changed})


# --- the environment -------------------------------------------------------------------------------------------------


def test_environment_has_only_the_expected_variables() -> None:
    """Of the worker's variables, it has PATH, locale and time zone only. The real credential is not in it."""
    inherited = {
        "PATH": "/bin",
        "LC_ALL": "de_DE.UTF-8",
        "TZ": "UTC",
        "ANTHROPIC_API_KEY": "real",
        "GCS_LOGS_BUCKET": "b",
    }
    spec = task(environment_secrets={"TOKEN": Secret("s3cret")}, anthropic_api_key=Secret("real"))
    assert agent_environment(spec, inherited=inherited) == {
        "PATH": "/bin",
        "LANG": "C.UTF-8",
        "LC_ALL": "de_DE.UTF-8",
        "TZ": "UTC",
        "TERM": "dumb",
        "TOKEN": "s3cret",
        "HOME": "/t/home",
        "CLAUDE_CONFIG_DIR": "/t/config",
        "TMPDIR": "/t/tmp",
        "ANTHROPIC_BASE_URL": "http://127.0.0.1:1",
        "ANTHROPIC_API_KEY": "run-token",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "CCRUN_MARK": "t1",
    }


def test_secrets_cannot_override_variables_of_ccrun() -> None:
    """A secret with the name of a reserved variable is ignored; PATH and NO_PROXY are merged; LANG may be overridden."""
    defaults = {**agent_environment(task()), **agent_environment(task(), model_api=OAUTH, is_root=True)}
    secrets = {name: Secret("secret") for name in (*defaults, "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_USE_BEDROCK")}
    del secrets["no_proxy"]
    changed = {**agent_environment(task(environment_secrets=secrets), model_api=OAUTH, is_root=True)}
    merged = {"PATH": "secret:/usr/bin:/bin", "NO_PROXY": "secret,127.0.0.1", "no_proxy": "secret,127.0.0.1"}
    assert changed == {**agent_environment(task(), model_api=OAUTH, is_root=True), **merged, "LANG": "secret"}


@pytest.mark.parametrize(
    "name",
    [
        "DATABASE_URL",
        "PATH",
        "LD_LIBRARY_PATH",
        "GITHUB_TOKEN",
        "NODE_OPTIONS",
        "MY_HOME",
        "MAX_THINKING_TOKENS",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS",
        "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS",
        "CLAUDE_BASH_MAINTAIN_PROJECT_WORKING_DIR",
    ],
)
def test_other_variables_are_not_reserved(name: str) -> None:
    """A secret may set any variable that does not affect the CLI's requests, its directories or its permissions."""
    assert not is_reserved_variable(name)


@pytest.mark.parametrize(
    "name",
    [
        "ANTHROPIC_BASE_URL",
        "CCRUN_X",
        "CLAUDE_CODE_USE_VERTEX",
        "CLAUDE_CODE_OAUTH_TOKEN",
        "CLAUDE_CODE_API_BASE_URL",
        "CLAUDE_CODE_SESSION_ACCESS_TOKEN",
        "CLAUDE_CODE_SKIP_BEDROCK_AUTH",
        "CLAUDE_CODE_PROVIDER_MANAGED_BY_HOST",
        "CLAUDE_CODE_CLIENT_CERT",
        "CLAUDE_BRIDGE_BASE_URL",
        "CLAUDE_CODE_TMPDIR",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
    ],
)
def test_variables_that_route_the_cli_are_reserved(name: str) -> None:
    """A request may not choose the CLI's server, credential, directories or parent program by a variable."""
    assert is_reserved_variable(name)


def test_environment_with_an_oauth_token_as_root() -> None:
    """The run token is passed as an OAuth token, and IS_SANDBOX lets root use every permission mode."""
    plain = agent_environment(task())
    changed = agent_environment(task(), model_api=OAUTH, is_root=True)
    del plain["ANTHROPIC_API_KEY"]
    assert changed == {**plain, "CLAUDE_CODE_OAUTH_TOKEN": "run-token", "IS_SANDBOX": "1"}


# --- arguments and input files ---------------------------------------------------------------------------------------


def test_default_arguments() -> None:
    """The CLI never asks for a permission, and the number of turns is limited."""
    command = ["/bin/claude", "-p", "--verbose", "--output-format=stream-json", "--permission-prompts=none"]
    assert argv(task(), cli=Path("/bin/claude"), files={}, config=Path("/c")) == [*command, "--max-turns=6"]


def test_values_are_joined_to_their_options() -> None:
    """A value that begins with `--` is not read as an option, and each tool has its own option."""
    spec = task(
        model="--danger",
        fallback_model="haiku",
        permission_mode="plan",
        max_turns=3,
        allowed_tools=("Bash(git log:*, -n)", "--dangerously-skip-permissions"),
        disallowed_tools=("WebFetch",),
        strict_mcp_config=True,
        plugins={"a/commands/x.md": ConfigFile(content=""), "a/skills/y/SKILL.md": ConfigFile(content="")},
    )
    command = argv(spec, cli=Path("claude"), files={"mcp-config": Path("/f/mcp-config")}, config=Path("/c"))
    assert command[5:] == [
        "--max-turns=3",
        "--model=--danger",
        "--fallback-model=haiku",
        "--permission-mode=plan",
        "--allowedTools=Bash(git log:*, -n)",
        "--allowedTools=--dangerously-skip-permissions",
        "--disallowedTools=WebFetch",
        "--mcp-config=/f/mcp-config",
        "--plugin-dir=/c/task-plugins/a",
        "--strict-mcp-config",
    ]


def test_arguments_contain_nothing_confidential() -> None:
    """Other users of the machine see the arguments in the process list, so these have no prompts and no secrets."""
    spec = task(
        prompt="word-1",
        system_prompt="word-2",
        append_system_prompt="word-3",
        mcp_config={"mcpServers": {"word-4": {}}},
        subagents={"word-5": ConfigFile(content="word-6")},
        environment_secrets={"WORD_7": Secret("word-8")},
        anthropic_api_key=Secret("word-9"),
    )
    files = {option: Path("/f", option) for option in option_files(spec, agent_environment(spec))}
    assert "word" not in " ".join(argv(spec, cli=Path("claude"), files=files, config=Path("/c"))).lower()


def test_settings_of_the_request_do_not_override_those_of_ccrun() -> None:
    """Settings and options of the request are added to the settings of ccrun, and an option overrides a setting."""
    given = {"apiKeyHelper": "x", "hooks": {}, "env": {"A": "b", "ANTHROPIC_BASE_URL": "x", "MAX_THINKING_TOKENS": "1"}}
    plain = json.loads(option_files(task(), agent_environment(task()))["settings"])
    spec = task(settings=given, max_thinking_tokens=0, small_model="tiny")
    options = {"A": "b", "MAX_THINKING_TOKENS": "0", "ANTHROPIC_DEFAULT_HAIKU_MODEL": "tiny"}
    assert {**plain, "hooks": {}, "env": {**plain["env"], **options}} == json.loads(
        option_files(spec, agent_environment(spec))["settings"]
    )


def test_subagents_are_converted_for_the_agents_option() -> None:
    """Comma-separated tools become lists, null fields are removed, and a missing description is added."""
    matter = {"name": "other", "tools": "Read, Bash(git log:*, -n),", "model": None, "disallowedTools": ["Edit"]}
    spec = task(subagents={"a": ConfigFile(frontmatter=matter, content="Be a."), "b": ConfigFile(content="Be b.")})
    assert json.loads(option_files(spec, {})["agents"]) == {
        "a": {
            "description": "The subagent a.",
            "tools": ["Read", "Bash(git log:*, -n)"],
            "disallowedTools": ["Edit"],
            "prompt": "Be a.",
        },
        "b": {"description": "The subagent b.", "prompt": "Be b."},
    }

from __future__ import annotations

from typing import Any

import pytest
from helpers.request import MINIMAL, errors_of, field_errors, parse

from ccrun.api.options import MAX_CONFIG_FILES
from ccrun.spec import EFFORT_LEVELS, ConfigFile

FILE = {"content": "x"}

# --- the model -------------------------------------------------------------------------------------------------------


def test_options_of_the_model_are_kept() -> None:
    """The task has the effort, the numbers of tokens and the small model of the request."""
    fields = {"effort": "xhigh", "maxThinkingTokens": 2048, "maxOutputTokens": 4096, "smallModel": "tiny[1m]"}
    spec = parse({**MINIMAL, **fields})
    assert ("xhigh", 2048, 4096, "tiny[1m]") == (
        spec.effort,
        spec.max_thinking_tokens,
        spec.max_output_tokens,
        spec.small_model,
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("effort", "extreme", f"effort must be one of {', '.join(EFFORT_LEVELS)}"),
        ("maxThinkingTokens", -1, "maxThinkingTokens must be a whole number from 0 to 1000000"),
        ("maxThinkingTokens", 1023, "maxThinkingTokens must be 0, which turns thinking off, or at least 1024"),
        ("maxOutputTokens", 0, "maxOutputTokens must be a whole number from 1 to 1000000"),
        ("smallModel", "-x", "smallModel must be printable ASCII without spaces and may not start with a hyphen"),
    ],
)
def test_impossible_options_of_the_model_are_errors(field: str, value: object, message: str) -> None:
    """A value that the CLI would ignore or the model API would reject is an error of the request."""
    assert {field: message} == field_errors(field, value)


def test_thinking_must_leave_tokens_for_the_output() -> None:
    """A thinking budget that uses up the output is an error, since the output includes it."""
    message = "maxThinkingTokens must be less than maxOutputTokens, which includes it"
    body = {**MINIMAL, "maxThinkingTokens": 2048, "maxOutputTokens": 2048}
    assert {"maxThinkingTokens": message} == errors_of(body)
    assert 0 == parse({**body, "maxThinkingTokens": 0}).max_thinking_tokens


@pytest.mark.parametrize("field", ["environmentSecrets", "settings"])
def test_option_is_given_only_once(field: str) -> None:
    """A field and the variable that has the same effect cannot both be given; the variable alone can."""
    variables = {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "4096"}
    body = {**MINIMAL, field: variables if field == "environmentSecrets" else {"env": variables}}
    path = "environmentSecrets" if field == "environmentSecrets" else "settings.env"
    parse(body)
    message = "and a field of the request set the same option: give only one of them"
    assert {f"{path}.CLAUDE_CODE_MAX_OUTPUT_TOKENS": f"{path}.CLAUDE_CODE_MAX_OUTPUT_TOKENS {message}"} == errors_of(
        {**body, "maxOutputTokens": 4096}
    )


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_kept() -> None:
    """The task has the settings of the request unchanged."""
    settings = {"hooks": {"Stop": []}, "includeCoAuthoredBy": False, "env": {"NODE_ENV": "test"}}
    assert settings == parse({**MINIMAL, "settings": settings}).settings


@pytest.mark.parametrize("name", ["apiKeyHelper", "awsCredentialExport", "forceLoginMethod"])
def test_settings_with_another_credential_are_rejected(name: str) -> None:
    """A setting that would replace the credential proxy is an error."""
    message = f"settings.{name} is not allowed: the service itself gives the agent its credential"
    assert {f"settings.{name}": message} == field_errors("settings", {name: "x"})


@pytest.mark.parametrize(
    ("variables", "rule"),
    [
        ({"ANTHROPIC_BASE_URL": "http://127.0.0.1"}, "is reserved: the service itself sets this variable"),
        ({"CLAUDE_CODE_USE_BEDROCK": "1"}, "is reserved: the service itself sets this variable"),
        (
            {"NO_PROXY": "*"},
            "is not allowed: set it in environmentSecrets, where the service adds its own hosts",
        ),
        ({"A": 1}, "must be a string, not a number"),
    ],
)
def test_variables_in_settings_are_checked(variables: dict[str, Any], rule: str) -> None:
    """Settings cannot set a variable that the service sets."""
    (name,) = variables
    assert {f"settings.env.{name}": f"settings.env.{name} {rule}"} == field_errors("settings", {"env": variables})


# --- files -----------------------------------------------------------------------------------------------------------


def test_commands_in_directories_are_kept() -> None:
    """A slash command may be in a directory; a subagent may not."""
    commands = {"git/commit": FILE, "git": FILE, "a/b/c": FILE}
    assert (
        dict.fromkeys(commands, ConfigFile(content="x")) == parse({**MINIMAL, "slashCommands": commands}).slash_commands
    )
    assert {'subagents["git/commit"]'} == field_errors("subagents", {"git/commit": FILE}).keys()


@pytest.mark.parametrize("path", ["git/../x", "git/./x", "/x", "x/", "git//x", "git/.x", "a/" * 600 + "a"])
def test_command_stays_in_its_directory(path: str) -> None:
    """A path with an empty part, `..`, a hidden part or too many characters is an error."""
    (message,) = field_errors("slashCommands", {path: FILE}).values()
    assert message.endswith("and a letter or digit first; `/` separates directories")


def test_skills_and_plugins_are_kept() -> None:
    """The task has the files of skills and plugins by path, with front matter where it is given."""
    skills = {"review/SKILL.md": {"frontmatter": {"description": "d"}, "content": "x"}, "review/scripts/run.sh": FILE}
    plugins = {"p/.claude-plugin/plugin.json": {"content": '{"name": "p"}'}, "p/commands/hi.md": FILE}
    spec = parse({**MINIMAL, "skills": skills, "plugins": plugins})
    assert {
        "review/SKILL.md": ConfigFile(frontmatter={"description": "d"}, content="x"),
        "review/scripts/run.sh": ConfigFile(content="x"),
    } == spec.skills
    assert ["p/.claude-plugin/plugin.json", "p/commands/hi.md"] == list(spec.plugins)


@pytest.mark.parametrize(
    "path", ["SKILL.md", "../a/SKILL.md", "a/../SKILL.md", ".a/x", "a//x", "/a/x", "a/b c", "-a/x"]
)
@pytest.mark.parametrize("field", ["skills", "plugins"])
def test_files_stay_in_their_directories(field: str, path: str) -> None:
    """A path that is not inside a directory of its own is an error."""
    errors = field_errors(field, {path: FILE, "a/SKILL.md": FILE})
    assert [True] == [
        "is not a valid path: start with the name of a directory" in text
        for name, text in errors.items()
        if name != field
    ]


@pytest.mark.parametrize(
    ("field", "files", "path", "rule"),
    [
        ("skills", {"a/x.md": FILE}, "skills", "has no file a/SKILL.md, which the skill a needs"),
        (
            "skills",
            {"a/SKILL.md": FILE, "a/run.sh": {"frontmatter": {}, "content": "x"}},
            'skills["a/run.sh"].frontmatter',
            "is not allowed: only Markdown files (.md) have front matter",
        ),
        (
            "plugins",
            {"a/b": FILE, "a/b/c": FILE},
            'plugins["a/b/c"]',
            "is in a directory whose path is that of a file",
        ),
        (
            "plugins",
            {"a/.claude-plugin/plugin.json": FILE},
            'plugins["a/.claude-plugin/plugin.json"].content',
            "must be a JSON object",
        ),
        ("plugins", {"a/b": {}}, 'plugins["a/b"].content', "is required"),
        (
            "plugins",
            {f"a/{number}": FILE for number in range(MAX_CONFIG_FILES + 1)},
            "plugins",
            f"may have at most {MAX_CONFIG_FILES} entries, not {MAX_CONFIG_FILES + 1}",
        ),
    ],
)
def test_incomplete_files_are_errors(field: str, files: dict[str, Any], path: str, rule: str) -> None:
    """Files that the CLI would silently ignore, or that cannot be written, are an error of the request."""
    assert {path: f"{path} {rule}"} == field_errors(field, files)

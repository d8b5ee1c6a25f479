from __future__ import annotations

import pytest
from helpers.request import MINIMAL, errors_of, field_errors, parse

from ccrun.api import checks
from ccrun.api.request import Defaults, request_fields
from ccrun.spec import (
    ConfigFile,
    GitAction,
    GitToken,
    PostRunActions,
    TaskSpec,
    UploadAction,
)
from ccrun.task import Secret, TaskId, TaskType
from ccrun.urls import parse_git_url

# --- the fields of a body --------------------------------------------------------------------------------------------


def test_minimal_request_gets_all_defaults() -> None:
    """Each field that a request leaves out has its documented default in the task."""
    expected = TaskSpec(
        task_id=TaskId("made-id"),
        type=TaskType.ASYNC,
        prompt="Fix the tests.",
        timeout_minutes=55.0,
        anthropic_api_key=Secret("made-up-key"),
        callback_url=Secret("https://example.com/hook"),
        max_turns=6,
        git_depth=1,
        cwd_relative=".",
    )

    assert expected == parse(MINIMAL)


def test_full_request_keeps_every_value() -> None:
    """Each documented field sets the attribute of the task with the same name."""
    body = {
        **MINIMAL,
        "anthropicApiKey": None,
        "anthropicOAuthToken": "made-up-token",
        "taskId": "deploy-prod_001",
        "systemPrompt": "You are terse.",
        "appendSystemPrompt": "- in lists\n",
        "model": "claude-sonnet-4-5",
        "fallbackModel": "opus[1m]",
        "allowedTools": ["Bash(git log:*)", "Read"],
        "disallowedTools": ["WebFetch"],
        "permissionMode": "acceptEdits",
        "maxTurns": 20,
        "timeoutMinutes": 0.5,
        "gitRepo": "git@github.com:org/repo.git",
        "gitBranch": "feature/x",
        "gitDepth": 50,
        "gitSubmodules": True,
        "sshKey": "made-up\nkey\n",
        "gitToken": "made-up-git-token",
        "environmentSecrets": {"DB_URL": "postgres://u:p@h/db", "EMPTY": ""},
        "preExecutionCommands": ["npm ci", "- odd"],
        "mcpConfig": {"mcpServers": {"x": {"command": "node", "args": ["${DB_URL}"]}}},
        "slashCommands": {"review": {"frontmatter": {"description": "d"}, "content": "Review $ARGUMENTS"}},
        "subagents": {"tester": {"content": "You test."}},
        "cwdRelative": "packages/api",
        "useNamedPipe": True,
        "metadata": {"a": [1, {"b": None}]},
        "postExecutionActions": {
            "git": {
                "commit": True,
                "commitMessage": "m",
                "push": True,
                "branch": "out",
                "files": ["src/**"],
                "conflictStrategy": "fail",
            },
            "uploadFiles": {"globPatterns": ["*.log", ".playwright/**/*.{webm,png}"], "gcsPrefix": "artifacts/x"},
        },
    }
    expected = TaskSpec(
        task_id=TaskId("deploy-prod_001"),
        type=TaskType.SYNC,
        prompt="Fix the tests.",
        timeout_minutes=0.5,
        anthropic_oauth_token=Secret("made-up-token"),
        callback_url=Secret("https://example.com/hook"),
        system_prompt="You are terse.",
        append_system_prompt="- in lists\n",
        model="claude-sonnet-4-5",
        fallback_model="opus[1m]",
        allowed_tools=("Bash(git log:*)", "Read"),
        disallowed_tools=("WebFetch",),
        permission_mode="acceptEdits",
        max_turns=20,
        git_repo=parse_git_url("git@github.com:org/repo.git"),
        git_branch="feature/x",
        git_depth=50,
        git_submodules=True,
        ssh_key=Secret("made-up\nkey\n"),
        git_token=GitToken.parse("made-up-git-token"),
        environment_secrets={"DB_URL": Secret("postgres://u:p@h/db"), "EMPTY": Secret("")},
        pre_execution_commands=("npm ci", "- odd"),
        mcp_config={"mcpServers": {"x": {"command": "node", "args": ["${DB_URL}"]}}},
        slash_commands={"review": ConfigFile(frontmatter={"description": "d"}, content="Review $ARGUMENTS")},
        subagents={"tester": ConfigFile(content="You test.")},
        cwd_relative="packages/api",
        metadata={"a": [1, {"b": None}]},
        post_execution_actions=PostRunActions(
            git=GitAction(
                commit=True,
                commit_message="m",
                push=True,
                branch="out",
                files=("src/**",),
                conflict_strategy="fail",
            ),
            upload_files=UploadAction(glob_patterns=("*.log", ".playwright/**/*.{webm,png}"), gcs_prefix="artifacts/x"),
        ),
    )

    assert expected == parse(body, task_type=TaskType.SYNC)


@pytest.mark.parametrize("absent", [None, "", " \n"])
def test_null_and_blank_fields_count_as_absent(absent: str | None) -> None:
    """A field that is null or a blank string gets its default."""
    names = [field for field in request_fields(Defaults()) if field not in MINIMAL]

    assert parse(MINIMAL) == parse({**MINIMAL, **dict.fromkeys(names, absent)})


def test_settings_of_the_service_apply_to_absent_fields() -> None:
    """Without fields of its own, a request gets the operator's tools, permission mode, timeout and credential."""
    spec = parse(
        {"prompt": "p"},
        task_type=TaskType.SYNC,
        operator_has_credential=True,
        allowed_tools=("Read",),
        permission_mode="plan",
        max_timeout_minutes=10.0,
    )

    assert (("Read",), "plan", 10.0, None) == (
        spec.allowed_tools,
        spec.permission_mode,
        spec.timeout_minutes,
        spec.anthropic_api_key,
    )


def test_empty_list_of_tools_allows_no_tool() -> None:
    """An empty `allowedTools` overrides the tools that the service allows by default."""
    assert () == parse({**MINIMAL, "allowedTools": []}, allowed_tools=("Read",)).allowed_tools


def test_missing_required_fields_have_documented_errors_in_order() -> None:
    """The errors that clients match have their documented texts and order; the first is the message of the exception."""
    assert [
        ("prompt", "prompt is required"),
        ("callbackUrl", "callbackUrl is required for async tasks"),
        ("anthropicApiKey", "Either anthropicApiKey or anthropicOAuthToken is required"),
        ("taskId", "taskId must be URL-safe (alphanumeric, underscore, hyphen only)"),
    ] == list(errors_of({"taskId": "a b"}).items())


def test_sync_request_needs_no_callback_url() -> None:
    """`/run` works without a callback URL."""
    assert parse({"prompt": "p", "anthropicApiKey": "k"}, task_type=TaskType.SYNC).callback_url is None


def test_every_credential_is_a_secret() -> None:
    """Also one that is not used because the CLI prefers another: which one is used is decided by the worker."""
    names = ("anthropicApiKey", "anthropicOAuthToken", "anthropicAuthToken")
    spec = parse({"prompt": "p", **{name: f"made-up-{name}" for name in names}}, task_type=TaskType.SYNC)
    assert {Secret(f"made-up-{name}") for name in names} == set(spec.secrets)


def test_base_url_must_be_allowed_and_needs_a_credential() -> None:
    """The operator lists the allowed ones. The operator's credential is not sent to them."""
    allowed = {"allowed_base_urls": ("https://gateway.example/v1",), "operator_has_credential": True}
    body = {"prompt": "p", "anthropicBaseUrl": "https://gateway.example/v1/"}
    spec = parse({**body, "anthropicAuthToken": "made-up"}, task_type=TaskType.SYNC, **allowed)
    assert "https://gateway.example/v1" == spec.anthropic_base_url
    assert {
        "anthropicApiKey": "anthropicBaseUrl needs anthropicAuthToken, anthropicApiKey or anthropicOAuthToken: "
        "the service sends its own credential to no other server"
    } == errors_of(body, task_type=TaskType.SYNC, **allowed)
    other = "http://169.254.169.254"
    assert {
        "anthropicBaseUrl": "anthropicBaseUrl must be one of the URLs that the service allows: https://gateway.example/v1"
    } == field_errors("anthropicBaseUrl", other, **allowed)
    assert {
        "anthropicBaseUrl": "anthropicBaseUrl is not allowed: the service has no ALLOWED_BASE_URLS"
    } == field_errors("anthropicBaseUrl", other)


def test_push_requires_a_repository() -> None:
    """A push without `gitRepo` is rejected before the agent runs; a push without a commit is valid."""
    push = {"git": {"push": True}}

    assert {"gitRepo": "gitRepo is required for postExecutionActions.git.push"} == field_errors(
        "postExecutionActions", push
    )
    spec = parse({**MINIMAL, "postExecutionActions": push, "gitRepo": "https://example.com/r"})
    assert GitAction(push=True) == spec.post_execution_actions.git


# --- errors ----------------------------------------------------------------------------------------------------------


def test_all_errors_are_reported_with_their_paths() -> None:
    """One exception has all errors at all depths, each with its path in JSON names."""
    body = {
        **MINIMAL,
        "prompt": 5,
        "promt": "x",
        "allowedTools": ["Read", 7, " ", "--dangerously"],
        "maxTurns": True,
        "environmentSecrets": {"FOO": 1, "1BAD": "x", "a b": "x"},
        "slashCommands": {"x": {"contents": "x"}},
        "postExecutionActions": {"git": {"branch": "-x", "pushh": True}, "uploadFile": {}},
    }

    assert {
        "prompt": "prompt must be a string, not a number",
        "allowedTools[1]": "allowedTools[1] must be a string, not a number",
        "allowedTools[2]": "allowedTools[2] may not be blank",
        "allowedTools[3]": "allowedTools[3] may not contain control characters or start with a hyphen",
        "maxTurns": "maxTurns must be a whole number from 1 to 1000",
        "environmentSecrets.FOO": "environmentSecrets.FOO must be a string, not a number",
        "environmentSecrets.1BAD": "environmentSecrets.1BAD is not a valid variable name: "
        "use letters, digits and underscores, and no digit first",
        'environmentSecrets["a b"]': 'environmentSecrets["a b"] is not a valid variable name: '
        "use letters, digits and underscores, and no digit first",
        "slashCommands.x.contents": "Unknown field `contents`; did you mean `content`?",
        "slashCommands.x.content": "slashCommands.x.content is required",
        "postExecutionActions.git.branch": "postExecutionActions.git.branch is not a valid branch name",
        "postExecutionActions.git.pushh": "Unknown field `pushh`; did you mean `push`?",
        "postExecutionActions.uploadFile": "Unknown field `uploadFile`; did you mean `uploadFiles`?",
        "promt": "Unknown field `promt`; did you mean `prompt`?",
    } == errors_of(body)


def test_number_of_errors_is_limited() -> None:
    """A hostile body gets a bounded number of errors."""
    body = {**MINIMAL, **{f"x{number}": number for number in range(10_000)}}

    assert checks.MAX_FIELD_ERRORS == len(errors_of(body))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"[]", {"": "The body must be a JSON object, not an array"}),
        (b"null", {"": "The body must be a JSON object, not null"}),
        (b'{"metadata": {"n": 9007199254740993}}', None),
        (b'{"prompt": "a", "prompt": "b"}', None),
        (b"{", None),
        (b"", None),
        (b"\xff", None),
    ],
)
def test_body_that_is_not_an_i_json_object_is_rejected(body: bytes, expected: dict[str, str] | None) -> None:
    """Invalid JSON, duplicate keys, numbers that would lose digits and values other than objects are rejected."""
    found = errors_of(body)

    assert expected is None or expected == found


def test_values_are_never_converted() -> None:
    """Values that cattrs would convert to a string, a list or a boolean are rejected; the error has both types."""
    body = {
        **MINIMAL,
        "allowedTools": "Bash",
        "systemPrompt": ["a"],
        "useNamedPipe": "true",
        "environmentSecrets": {"A": None},
        "metadata": [1],
        "postExecutionActions": {"git": {"commit": 1}, "uploadFiles": []},
    }

    assert {
        "systemPrompt": "systemPrompt must be a string, not an array",
        "allowedTools": "allowedTools must be an array of strings, not a string",
        "environmentSecrets.A": "environmentSecrets.A must be a string, not null",
        "useNamedPipe": "useNamedPipe must be true or false, not a string",
        "metadata": "metadata must be a JSON object, not an array",
        "postExecutionActions.git.commit": "postExecutionActions.git.commit must be true or false, not a number",
        "postExecutionActions.uploadFiles": "postExecutionActions.uploadFiles must be a JSON object, not an array",
    } == errors_of(body)


def test_nul_is_rejected_in_every_string() -> None:
    """No string may contain a NUL, which would truncate an argument or a variable."""
    body = {
        **MINIMAL,
        "prompt": "a\0b",
        "systemPrompt": "\0",
        "allowedTools": ["a\0"],
        "preExecutionCommands": ["a\0"],
        "environmentSecrets": {"A": "\0"},
        "sshKey": "\0",
    }

    assert {"may not contain a NUL character"} == {
        message.removeprefix(f"{field} ") for field, message in errors_of(body).items()
    }


def test_errors_do_not_repeat_secrets() -> None:
    """Errors have the field and the rule, never the value."""
    secret = "correct-horse\n-battery"
    fields = ["anthropicApiKey", "anthropicOAuthToken", "gitToken", "gitRepo", "callbackUrl", "model", "gitBranch"]
    messages = " ".join(errors_of({**MINIMAL, **dict.fromkeys(fields, secret)}).values())

    assert "correct" not in messages

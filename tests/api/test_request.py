from __future__ import annotations

import base64
import datetime as dt
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccrun import codec, javascript_json, task
from ccrun.api import checks
from ccrun.api.request import MAX_CONFIG_FILES, Defaults, parse_request, request_fields
from ccrun.errors import InvalidRequest, SealError, StorageError
from ccrun.task import (
    ActionError,
    CallbackInfo,
    CallbackState,
    ConfigFile,
    GitAction,
    GitCommit,
    GitToken,
    PostRunActions,
    Reason,
    Recovery,
    Secret,
    Status,
    Summary,
    TaskId,
    TaskRecord,
    TaskSpec,
    TaskType,
    UploadAction,
    UploadedFile,
)
from ccrun.urls import parse_git_url

MINIMAL: Mapping[str, Any] = {
    "prompt": "Fix the tests.",
    "anthropicApiKey": "made-up-key",
    "callbackUrl": "https://example.com/hook",
}


def parse(body: object, *, type: TaskType = TaskType.ASYNC, **defaults: Any) -> TaskSpec:  # noqa: A002
    """Return the task that a body asks for."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_request(content, type=type, task_id=TaskId("made-id"), defaults=Defaults(**defaults))


def errors(body: object, *, type: TaskType = TaskType.ASYNC, **defaults: Any) -> dict[str, str]:  # noqa: A002
    """Return the faults of a body, message by field."""
    with pytest.raises(InvalidRequest) as caught:
        parse(body, type=type, **defaults)
    assert caught.value.message == caught.value.errors[0].message
    return {fault.field: fault.message for fault in caught.value.errors}


def faults_of(field: str, value: object, **defaults: Any) -> dict[str, str]:
    """Return the faults of a body that is minimal but for one field."""
    return errors({**MINIMAL, field: value}, **defaults)


# --- requests ---


def test_a_minimal_request_spells_out_every_default() -> None:
    """What a request leaves out has the documented default in the task."""
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


def test_a_full_request_keeps_every_value() -> None:
    """Each documented field reaches the task under its own name."""
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

    assert expected == parse(body, type=TaskType.SYNC)


@pytest.mark.parametrize("absent", [None, "", " \n"])
def test_a_field_that_is_null_or_blank_counts_as_not_given(absent: str | None) -> None:
    """Callers that fill in a form with nothing get the defaults."""
    names = [field for field in request_fields(Defaults()) if field not in MINIMAL]

    assert parse(MINIMAL) == parse({**MINIMAL, **dict.fromkeys(names, absent)})


def test_the_service_fills_in_what_a_request_does_not_name() -> None:
    """Tools, permission mode, timeout and credential of the operator apply where the request names none."""
    spec = parse(
        {"prompt": "p"},
        type=TaskType.SYNC,
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


def test_an_empty_list_of_tools_is_a_choice() -> None:
    """A request that allows no tool gets none, whatever the service would have allowed."""
    assert () == parse({**MINIMAL, "allowedTools": []}, allowed_tools=("Read",)).allowed_tools


def test_required_fields_are_named_in_the_documented_words_and_order() -> None:
    """The texts that callers match stand in their order, the first of them as the sentence of the error."""
    assert [
        ("prompt", "prompt is required"),
        ("callbackUrl", "callbackUrl is required for async tasks"),
        ("anthropicApiKey", "Either anthropicApiKey or anthropicOAuthToken is required"),
        ("taskId", "taskId must be URL-safe (alphanumeric, underscore, hyphen only)"),
    ] == list(errors({"taskId": "a b"}).items())


def test_a_sync_request_needs_no_callback() -> None:
    """`/run` works without a callback URL."""
    assert parse({"prompt": "p", "anthropicApiKey": "k"}, type=TaskType.SYNC).callback_url is None


def test_the_api_key_wins_over_the_token() -> None:
    """Of two credentials the task holds the API key, as the CLI would choose."""
    spec = parse({**MINIMAL, "anthropicOAuthToken": "made-up-token"})

    assert (Secret("made-up-key"), None) == (spec.anthropic_api_key, spec.anthropic_oauth_token)


def test_every_fault_is_told_at_once_by_its_path() -> None:
    """One answer names each fault, at whatever depth, in the names of the wire."""
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
        "allowedTools[3]": "allowedTools[3] may not hold control characters or start with a dash",
        "maxTurns": "maxTurns must be a whole number from 1 to 1000",
        "environmentSecrets.FOO": "environmentSecrets.FOO must be a string, not a number",
        "environmentSecrets.1BAD": "environmentSecrets.1BAD is no name for an environment variable: "
        "letters, digits and underscores, no digit first",
        'environmentSecrets["a b"]': 'environmentSecrets["a b"] is no name for an environment variable: '
        "letters, digits and underscores, no digit first",
        "slashCommands.x.contents": "Unknown field `contents`; did you mean `content`?",
        "slashCommands.x.content": "slashCommands.x.content is required",
        "postExecutionActions.git.branch": "postExecutionActions.git.branch is not a valid branch name",
        "postExecutionActions.git.pushh": "Unknown field `pushh`; did you mean `push`?",
        "postExecutionActions.uploadFile": "Unknown field `uploadFile`; did you mean `uploadFiles`?",
        "promt": "Unknown field `promt`; did you mean `prompt`?",
    } == errors(body)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("callback_url", "Unknown field `callback_url`; did you mean `callbackUrl`?"),
        ("MAXTURNS", "Unknown field `MAXTURNS`; did you mean `maxTurns`?"),
        ("zzz", "Unknown field `zzz`"),
        ("a\nb\x1b", "Unknown field `a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}`"),
        ("x" * 1000, f"Unknown field `{'x' * 64}…`"),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest_known(name: str, message: str) -> None:
    """A slip of the pen is corrected; what nobody could mean is named alone, fit for one line."""
    assert [message] == list(faults_of(name, 1).values())


def test_a_body_of_a_million_faults_is_answered_with_the_first_hundred() -> None:
    """A hostile body costs a bounded answer."""
    body = {**MINIMAL, **{f"x{number}": number for number in range(10_000)}}

    assert checks.MAX_FIELD_ERRORS == len(errors(body))


@pytest.mark.parametrize(
    ("body", "fault"),
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
def test_a_body_that_is_no_object_in_i_json_is_one_clear_error(body: bytes, fault: dict[str, str] | None) -> None:
    """Broken JSON, doubled keys, numbers that lose digits and other values than objects are refused."""
    found = errors(body)

    assert fault is None or fault == found


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "http://localhost:8080/hook?a=b#c",
        "https://user:password@example.com/x",
        "https://münchen.example/straße",
        "http://127.0.0.1/",
        "http://[::1]:80/",
        "HTTPS://EXAMPLE.COM./",
        "http://my_host/",
        "https://example.com/" + "a" * 2028,
    ],
)
def test_a_callback_url_may_be_any_that_can_be_called(url: str) -> None:
    """Ports, credentials, addresses and international names are all right."""
    assert Secret(url) == parse({**MINIMAL, "callbackUrl": url}).callback_url


@pytest.mark.parametrize(
    "url",
    [
        "example.com/hook",
        "ftp://example.com/",
        "javascript:alert(1)",
        "file:///etc/passwd",
        "https://",
        "https:///path",
        "https://?x",
        "https://exa mple.com/",
        "https://example.com/a\r\nX-Evil: 1",
        "https://example.com/\ta",
        "https://example.com\\@evil.com/",
        "https://example.com:0/",
        "https://example.com:99999/",
        "https://example.com:port/",
        "https://[::1",
        "https://[fe80::1%25eth0]/",
        "https://a..b/",
        "https://xn--a/",
        f"https://{'a' * 64}.com/",
        "https://a%20b/",
        "https://./",
        "https://example.com/" + "a" * 2029,
        "https://example.com/\x00",
        5,
        ["https://example.com"],
    ],
)
def test_a_callback_url_that_cannot_be_called_is_refused_in_the_documented_words(url: object) -> None:
    """Whatever is wrong with it, the text is the one that callers know."""
    assert {"callbackUrl": "callbackUrl is not a valid URL"} == faults_of("callbackUrl", url)


@pytest.mark.parametrize(
    "url",
    [
        "https://github.com/org/repo",
        "https://git.example.com:8443/org/repo.git",
        "ssh://git@github.com/org/repo.git",
        "ssh://git.example.com:2222/~me/repo",
        "ssh://git@[::1]:22/repo",
        "git@github.com:org/repo.git",
        "deploy_1@my-host:~/repo",
    ],
)
def test_a_repository_may_be_reached_by_https_and_ssh(url: str) -> None:
    """The URLs that hosting services show are taken as they are."""
    assert parse_git_url(url) == parse({**MINIMAL, "gitRepo": url}).git_repo


@pytest.mark.parametrize(
    "url",
    [
        "-oProxyCommand=x",
        "--upload-pack=x",
        "ext::sh -c id",
        "ext::sh",
        "git@host:-x",
        "git@host::x",
        "git@-host:x",
        "-git@host:x",
        "ssh://-oProxyCommand=x/repo",
        "ssh://%2DoProxyCommand=x/repo",
        "ssh://git@-oProxyCommand=x/repo",
        "ssh://-x@host/repo",
        "ssh://%2Dx@host/repo",
        "ssh://host/-x",
        "ssh://git:pass@host/repo",
        "https://github.com",
        "https://github.com/",
        "https://git hub.com/x",
        "https://github.com/a\nb",
        "https://github.com\\x/y",
        "https://token@github.com/org/repo",
        "https://user:token@github.com/org/repo",
        "git://host/repo",
        "ftp://host/repo",
        "/srv/repo",
        "../repo",
        "repo",
        "C:\\repo",
        "https://[::1/x",
        "https://host:0/x",
    ],
)
@pytest.mark.parametrize("local", [True, False])
def test_a_repository_that_could_be_an_option_a_command_or_a_secret_is_refused(url: str, local: bool) -> None:
    """No URL can make git or ssh run something, nor carry a token where nobody masks it; the answer never repeats it."""
    (message,) = faults_of("gitRepo", url, backend_is_local=local).values()

    assert message.startswith("gitRepo ")
    assert url not in message


@pytest.mark.parametrize("url", ["http://localhost:3000/repo", "file:///srv/repo.git"])
def test_only_the_local_backend_reaches_repositories_by_http_and_file(url: str) -> None:
    """In the cloud, http and file URLs are refused."""
    assert parse_git_url(url) == parse({**MINIMAL, "gitRepo": url}, backend_is_local=True).git_repo
    assert {"gitRepo": "gitRepo must be an https or SSH URL or git@host:path"} == faults_of("gitRepo", url)


def test_a_token_in_a_repository_url_is_sent_to_its_own_field() -> None:
    """The refusal says where the token belongs."""
    assert {"gitRepo": "gitRepo may not hold a user name, password or token: put the token into gitToken"} == faults_of(
        "gitRepo", "https://token@github.com/o/r"
    )


BRANCHES = [
    *("main", "a/b", "a.b", "ä", "v1.0", "a-", "@a", "a@b", "a{b", "x.lockx", "1", "a#b", "a&b", "refs/heads/x"),
    *("", "-x", "--x", ".a", "a/.b", "a..b", "a/", "/a", "a//b", "a.", "a.lock", "a.lock/b", "a@{b", "a b"),
    *("a\tb", "a~1", "a^", "a:b", "a?", "a*", "a[b", "a\\b", "a\x7fb", "a\nb", "a..", "a/.", "a/b.lock", "a/-b"),
]


@pytest.mark.parametrize("name", BRANCHES)
def test_branch_names_are_those_that_git_takes(name: str) -> None:
    """The rules are the ones of `git check-ref-format --branch`, asked here itself."""
    git = subprocess.run(["git", "check-ref-format", "--branch", name], check=False, capture_output=True)
    takes = checks.INVALID_IN_BRANCH.search(name) is None and name != ""

    assert (git.returncode == 0) == takes


def test_a_branch_that_git_refuses_is_refused_at_both_places() -> None:
    """`gitBranch` and the branch to push to follow the same rules; `HEAD` and its short form are no branches."""
    assert ["gitBranch"] == list(faults_of("gitBranch", "@"))
    body = {**MINIMAL, "gitBranch": "HEAD", "postExecutionActions": {"git": {"branch": "a..b"}}}

    assert {
        "gitBranch": "gitBranch is not a valid branch name",
        "postExecutionActions.git.branch": "postExecutionActions.git.branch is not a valid branch name",
    } == errors(body)


@pytest.mark.parametrize("path", ["/etc", "..", "../x", "a/../b", "a/..", "~/x", "-rf", "{a,../b}/c", "a\nb", "a\x00"])
def test_a_path_stays_inside_the_workspace(path: str) -> None:
    """Neither the start folder nor what is committed, uploaded or named in the bucket can climb out."""
    body = {
        **MINIMAL,
        "cwdRelative": path,
        "postExecutionActions": {
            "git": {"files": [path]},
            "uploadFiles": {"globPatterns": [path], "gcsPrefix": path},
        },
    }

    assert [
        "cwdRelative",
        "postExecutionActions.git.files[0]",
        "postExecutionActions.uploadFiles.globPatterns[0]",
        "postExecutionActions.uploadFiles.gcsPrefix",
    ] == list(errors(body))


@pytest.mark.parametrize("path", [".", "a/b", "..a", "a..b", ".hidden", "a b", "ä/…", "**/*.{js,ts}"])
def test_an_ordinary_path_is_kept(path: str) -> None:
    """Dots in names are no climb."""
    assert path == parse({**MINIMAL, "cwdRelative": path}).cwd_relative


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "-x", "team:review", "a b", "", "x" * 65, "ä", "a\n"])
def test_names_of_commands_and_agents_are_file_names_never_paths(name: str) -> None:
    """A name cannot place a file elsewhere, hide it or become an option."""
    for field in ("slashCommands", "subagents"):
        (message,) = faults_of(field, {name: {"content": "x"}}).values()
        assert "is no file name" in message


@pytest.mark.parametrize("turns", [6, 6.0, 1, 1000])
def test_a_whole_number_may_be_printed_as_any(turns: float) -> None:
    """JSON knows one kind of number: 6.0 is 6."""
    spec = parse({**MINIMAL, "maxTurns": turns})

    assert (turns, int) == (spec.max_turns, type(spec.max_turns))


@pytest.mark.parametrize("turns", [0, 1001, -1, 1.5, True, False, "6", [], {}, 1e300])
def test_a_number_that_is_none_or_out_of_range_is_refused(turns: object) -> None:
    """Booleans, strings, fractions and what is beyond the bounds are not made to fit."""
    assert {"maxTurns": "maxTurns must be a whole number from 1 to 1000"} == faults_of("maxTurns", turns)


@pytest.mark.parametrize("minutes", [0, -1, 60.1, True, "55", 1e300])
def test_a_timeout_is_above_zero_and_within_what_the_operator_allows(minutes: object) -> None:
    """The bound in the message is the one of the service."""
    assert {"timeoutMinutes": "timeoutMinutes must be a number above 0 and at most 60"} == faults_of(
        "timeoutMinutes", minutes
    )


def test_values_are_never_converted() -> None:
    """What cattrs would turn into a string, a list or a flag is refused with what it is and what it should be."""
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
    } == errors(body)


@pytest.mark.parametrize("field", ["anthropicApiKey", "anthropicOAuthToken", "gitToken"])
def test_a_credential_loses_its_last_newline_and_may_hold_no_other(field: str) -> None:
    """A key read from a file works; one that would begin another header is refused without being repeated."""
    assert field in json.loads(codec.spec_to_bytes(parse({**MINIMAL, field: "made-up\n"})))
    for bad in ("made\r\nX-Evil: 1", "made up", "mäde", "made\x00up"):
        (message,) = faults_of(field, bad).values()
        assert message.startswith(f"{field} may")
        assert bad not in message


@pytest.mark.parametrize("name", ["HOME", "ANTHROPIC_BASE_URL", "CLAUDE_CONFIG_DIR", "CCRUN_X"])
def test_variables_that_the_service_sets_are_reserved(name: str) -> None:
    """A secret cannot take the place of what keeps the agent apart from the service."""
    assert {
        f"environmentSecrets.{name}": f"environmentSecrets.{name} is reserved: the service itself sets this variable"
    } == faults_of("environmentSecrets", {name: "x"})


def test_no_text_holds_a_nul() -> None:
    """A NUL, which would end an argument or a variable half-way, is refused in each text."""
    body = {
        **MINIMAL,
        "prompt": "a\0b",
        "systemPrompt": "\0",
        "allowedTools": ["a\0"],
        "preExecutionCommands": ["a\0"],
        "environmentSecrets": {"A": "\0"},
        "sshKey": "\0",
    }

    assert {"may not hold a NUL character"} == {
        message.removeprefix(f"{field} ") for field, message in errors(body).items()
    }


def test_sizes_are_bounded_in_bytes() -> None:
    """Each text, list and object has its limit, and the limit itself is still taken."""
    limits: dict[str, tuple[Any, Any]] = {
        "prompt": ("é" * (task.MAX_PROMPT_BYTES // 2), "é" * (task.MAX_PROMPT_BYTES // 2) + "x"),
        "systemPrompt": ("x" * task.MAX_PROMPT_BYTES, "x" * (task.MAX_PROMPT_BYTES + 1)),
        "allowedTools": (["x"] * checks.MAX_LIST_ITEMS, ["x"] * (checks.MAX_LIST_ITEMS + 1)),
        "disallowedTools": (["x" * 4000] * 32, ["x" * 4000] * 33),
        "environmentSecrets": (
            {f"A{number}": "x" * 100_000 for number in range(5)},
            {f"A{number}": "x" * 100_000 for number in range(6)},
        ),
        "metadata": (
            {"a": "x" * (task.MAX_METADATA_BYTES - 8)},
            {"a": "x" * (task.MAX_METADATA_BYTES - 7)},
        ),
        "taskId": ("x" * 128, "x" * 129),
        "slashCommands": (
            {f"a{number}": {"content": "x"} for number in range(MAX_CONFIG_FILES)},
            {f"a{number}": {"content": "x"} for number in range(MAX_CONFIG_FILES + 1)},
        ),
    }

    parse({**MINIMAL, **{field: largest for field, (largest, _) in limits.items()}})
    assert limits.keys() == errors({**MINIMAL, **{field: beyond for field, (_, beyond) in limits.items()}}).keys()


def test_metadata_is_measured_as_it_will_be_printed() -> None:
    """Values that JavaScript prints longer than they came count with what they become."""
    numbers = {"a": [1e20] * 3200}

    assert len(json.dumps(numbers)) < task.MAX_METADATA_BYTES < len(javascript_json.dumps(numbers))
    assert {"metadata": "metadata must have at most 65536 bytes as JSON"} == faults_of("metadata", numbers)


@pytest.mark.parametrize(
    ("patterns", "fault"),
    [
        (["ok", "{a,b}" * 20], "globPatterns[1] may stand for at most 1000 patterns"),
        (["{" * 100], "globPatterns[0] may have at most 32 opening braces"),
        (["a{1..900}", "b{1..900}"], "globPatterns may stand for at most 1000 patterns of 262144 characters in all"),
    ],
)
def test_patterns_that_stand_for_too_many_are_refused(patterns: list[str], fault: str) -> None:
    """What an upload could not use is told before the agent has done its work; the same holds for the files of a commit."""
    for action, field in (("uploadFiles", "globPatterns"), ("git", "files")):
        found = faults_of("postExecutionActions", {action: {field: patterns}})
        ((where, message),) = found.items()
        expected = f"postExecutionActions.{action}.{fault}".replace("globPatterns", field)
        assert message.startswith(expected)
        assert expected.startswith(where)


def test_negated_pattern_is_kept() -> None:
    """A pattern may begin with the mark that takes away."""
    upload = {"globPatterns": ["**", "!**/node_modules"], "gcsPrefix": "a/b"}
    spec = parse({**MINIMAL, "postExecutionActions": {"uploadFiles": upload}})
    assert UploadAction(glob_patterns=("**", "!**/node_modules"), gcs_prefix="a/b") == (
        spec.post_execution_actions.upload_files
    )


def test_prefix_in_the_bucket_has_no_backslash() -> None:
    """No object's name has one, so that every upload would fail."""
    field = "postExecutionActions.uploadFiles.gcsPrefix"
    assert {field: f"{field} may not hold a backslash: folders are told apart by slashes"} == faults_of(
        "postExecutionActions", {"uploadFiles": {"globPatterns": ["*"], "gcsPrefix": "a\\b"}}
    )


def test_both_spellings_of_the_glob_patterns_are_taken() -> None:
    """`glob Patterns`, as one document has it, means `globPatterns`; two that differ are refused."""
    for upload in ({"glob Patterns": ["*.log"]}, {"glob Patterns": ["*.log"], "globPatterns": ["*.log"]}):
        spec = parse({**MINIMAL, "postExecutionActions": {"uploadFiles": upload}})
        assert UploadAction(glob_patterns=("*.log",)) == spec.post_execution_actions.upload_files

    path = "postExecutionActions.uploadFiles"
    assert {f'{path}["glob Patterns"]': "glob Patterns and globPatterns differ: give one of the two"} == faults_of(
        "postExecutionActions", {"uploadFiles": {"glob Patterns": ["a"], "globPatterns": ["b"]}}
    )
    assert {f"{path}.globPatterns": f"{path}.globPatterns is required"} == faults_of(
        "postExecutionActions", {"uploadFiles": {"gcsPrefix": "x"}}
    )


def test_a_push_needs_a_repository_to_push_to() -> None:
    """What must fail after the agent has worked is refused before; a push without a commit is all right."""
    push = {"git": {"push": True}}

    assert {"gitRepo": "gitRepo is required for postExecutionActions.git.push"} == faults_of(
        "postExecutionActions", push
    )
    spec = parse({**MINIMAL, "postExecutionActions": push, "gitRepo": "https://example.com/r"})
    assert GitAction(push=True) == spec.post_execution_actions.git


def test_mcp_servers_come_wrapped_or_bare() -> None:
    """A bare map of servers becomes what the CLI reads; a server that is no object is named."""
    wrapped = {"mcpServers": {"a": {"type": "http", "url": "https://example.com"}}}

    assert wrapped == parse({**MINIMAL, "mcpConfig": wrapped}).mcp_config
    assert wrapped == parse({**MINIMAL, "mcpConfig": wrapped["mcpServers"]}).mcp_config
    assert {"mcpConfig.mcpServers.a": "mcpConfig.mcpServers.a must be a JSON object, not a string"} == faults_of(
        "mcpConfig", {"mcpServers": {"a": "x"}}
    )
    assert {"mcpConfig.a": "mcpConfig.a must be a JSON object, not null"} == faults_of("mcpConfig", {"a": None})


def test_no_fault_repeats_a_secret() -> None:
    """Answers name fields and rules, never what a field held."""
    secret = "correct-horse\n-battery"
    fields = ["anthropicApiKey", "anthropicOAuthToken", "gitToken", "gitRepo", "callbackUrl", "model", "gitBranch"]
    answer = " ".join(errors({**MINIMAL, **dict.fromkeys(fields, secret)}).values())

    assert "correct" not in answer


# --- sealed tasks and stored records ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
).filter(lambda value: "Infinity" not in json.dumps(value))
OBJECT = st.dictionaries(st.text(), JSON, max_size=3)
TEXT = st.text()
NAMES = st.dictionaries(st.from_regex(r"[A-Z]{1,8}", fullmatch=True), st.builds(Secret, TEXT), max_size=3)
TIMES = st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(2100, 1, 1)).map(  # noqa: DTZ001 - made aware below.
    lambda moment: moment.replace(microsecond=moment.microsecond // 1000 * 1000, tzinfo=dt.UTC)
)
FILES = st.dictionaries(TEXT, st.builds(ConfigFile, frontmatter=OBJECT, content=TEXT), max_size=2)
SPECS = st.builds(
    TaskSpec,
    task_id=st.from_regex(task.TASK_ID_PATTERN, fullmatch=True),
    type=st.sampled_from(TaskType),
    prompt=TEXT,
    timeout_minutes=st.floats(0.001, 1440),
    anthropic_api_key=st.none() | st.builds(Secret, TEXT),
    anthropic_oauth_token=st.none() | st.builds(Secret, TEXT),
    environment_secrets=NAMES,
    allowed_tools=st.lists(TEXT, max_size=3).map(tuple),
    mcp_config=st.none() | OBJECT,
    slash_commands=FILES,
    subagents=FILES,
    metadata=st.none() | OBJECT,
    post_execution_actions=st.builds(
        PostRunActions,
        git=st.none() | st.builds(GitAction, commit=st.booleans(), files=st.lists(TEXT, max_size=2).map(tuple)),
        upload_files=st.none() | st.builds(UploadAction, glob_patterns=st.lists(TEXT, max_size=2).map(tuple)),
    ),
)
SUMMARIES = st.builds(
    Summary,
    duration_ms=st.integers(0, 10**9),
    turns=st.integers(0, 1000),
    errors=st.integers(0, 1000),
    started_at=st.none() | TIMES,
    completed_at=TIMES,
    cost_usd=st.none() | st.floats(0, 1000),
    usage=st.none() | OBJECT,
    session_id=st.none() | TEXT,
    result=st.none() | TEXT,
)
GIT_COMMITS = st.builds(
    GitCommit,
    sha=st.none() | TEXT,
    message=TEXT,
    pushed=st.booleans(),
    branch=TEXT,
    committed=st.sampled_from([None, False]),
    recovery=st.none()
    | st.builds(Recovery, method=TEXT, remote_sha=TEXT, conflict_files=st.lists(TEXT, max_size=2).map(tuple)),
)
RECORDS = st.builds(
    TaskRecord,
    task_id=st.from_regex(task.TASK_ID_PATTERN, fullmatch=True),
    type=st.sampled_from(TaskType),
    status=st.sampled_from(Status),
    created_at=TIMES,
    logs_path=TEXT,
    started_at=st.none() | TIMES,
    completed_at=st.none() | TIMES,
    exit_code=st.none() | st.integers(0, 255),
    error=st.none() | TEXT,
    reason=st.none() | st.sampled_from(Reason),
    summary=st.none() | SUMMARIES,
    uploaded_files=st.none()
    | st.lists(st.builds(UploadedFile, original_path=TEXT, gcs_path=TEXT, size_bytes=st.integers(0, 2**53 - 1))).map(
        tuple
    ),
    git_commit=st.none() | GIT_COMMITS,
    action_errors=st.lists(st.builds(ActionError, action=TEXT, error=TEXT), max_size=2).map(tuple),
    webhook=st.none()
    | st.builds(
        CallbackInfo,
        state=st.sampled_from(CallbackState),
        attempts=st.integers(0, 99),
        last_error=st.none() | TEXT,
        next_attempt_at=st.none() | TIMES,
    ),
    metadata=st.none() | OBJECT,
    sealed_callback_url=st.none() | st.binary(),
    idempotency_digest=st.none() | TEXT,
)


@settings(deadline=None)
@given(spec=SPECS)
def test_a_task_comes_out_of_its_seal_as_it_went_in(spec: TaskSpec) -> None:
    """Whatever a task holds, secrets and numbers included, the worker reads what the API wrote."""
    assert spec == codec.spec_from_bytes(codec.spec_to_bytes(spec))


@settings(deadline=None)
@given(record=RECORDS)
def test_a_record_is_read_as_it_was_written(record: TaskRecord) -> None:
    """Whatever a record holds, reading gives the same fact, and writing that the same bytes."""
    content = codec.record_to_bytes(record)

    assert record == codec.record_from_bytes(content)
    assert content == codec.record_to_bytes(codec.record_from_bytes(content))


def test_a_sealed_task_names_every_field_on_the_wire() -> None:
    """Defaults are spelled out under the names of the request, so that two versions agree about them."""
    sealed = json.loads(codec.spec_to_bytes(parse(MINIMAL)))

    assert set(request_fields(Defaults())) - {"useNamedPipe"} | {"type"} == sealed.keys()
    assert (55, 6, "made-up-key", None) == (
        sealed["timeoutMinutes"],
        sealed["maxTurns"],
        sealed["anthropicApiKey"],
        sealed["anthropicOAuthToken"],
    )


def test_what_a_newer_version_wrote_can_be_read() -> None:
    """Unknown fields are ignored, at each level."""
    spec = parse({**MINIMAL, "postExecutionActions": {"git": {"commit": True}}})
    sealed = json.loads(codec.spec_to_bytes(spec))
    sealed["newField"] = sealed["postExecutionActions"]["git"]["newField"] = {"x": 1}
    stored = {**json.loads(codec.record_to_bytes(RECORD)), "newField": 1}

    assert spec == codec.spec_from_bytes(json.dumps(sealed).encode())
    assert RECORD == codec.record_from_bytes(json.dumps(stored).encode())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'"x"', b"\xff", b'{"taskId": 5}', b"[" * 100_000],
)
def test_bytes_that_are_no_task_and_no_record_are_one_clear_error(content: bytes) -> None:
    """Broken bytes give an error of ours, which tells nothing of what they held."""
    with pytest.raises(SealError) as caught:
        codec.spec_from_bytes(content)
    assert caught.value.__cause__ is None
    with pytest.raises(StorageError):
        codec.record_from_bytes(content)


@pytest.mark.parametrize(
    ("field", "value"),
    [("exitCode", "0"), ("exitCode", True), ("status", "sleeping"), ("error", 5), ("createdAt", 5), ("metadata", [1])],
)
def test_a_record_with_a_value_of_another_type_is_not_converted(field: str, value: object) -> None:
    """A damaged record is an error and never becomes a plausible one."""
    stored = {**json.loads(codec.record_to_bytes(RECORD)), field: value}

    with pytest.raises(StorageError):
        codec.record_from_bytes(json.dumps(stored).encode())


NOON = dt.datetime(2025, 1, 10, 12, 34, 56, 789_999, tzinfo=dt.UTC)
RECORD = TaskRecord(
    task_id=TaskId("t-1"),
    type=TaskType.ASYNC,
    status=Status.PENDING,
    created_at=NOON.replace(microsecond=789_000),
    logs_path="gs://bucket/sessions/t-1/",
    callback_url="https://example.com/hook",
    webhook=CallbackInfo(),
    metadata={"requestId": "r"},
    sealed_callback_url=b"\x00sealed",
    idempotency_digest="digest",
)
DONE = attrs.evolve(
    RECORD,
    status=Status.COMPLETED,
    started_at=NOON,
    completed_at=NOON,
    exit_code=0,
    reason=Reason.COMPLETED,
    summary=Summary(
        duration_ms=45_000,
        turns=15,
        errors=0,
        started_at=NOON,
        completed_at=NOON.astimezone(dt.timezone(dt.timedelta(hours=2))),
        cost_usd=0.25,
    ),
    uploaded_files=(UploadedFile(original_path="a.log", gcs_path="gs://bucket/a.log", size_bytes=3),),
    git_commit=GitCommit(sha="a1", message="m", pushed=True, branch="main"),
)


def test_the_public_record_has_a_stable_shape() -> None:
    """Each field is there from the beginning, null while unknown; nothing internal ever is."""
    assert {
        "taskId": "t-1",
        "type": "async",
        "status": "pending",
        "createdAt": "2025-01-10T12:34:56.789Z",
        "logsPath": "gs://bucket/sessions/t-1/",
        "startedAt": None,
        "completedAt": None,
        "cancelledAt": None,
        "executionName": None,
        "callbackUrl": "https://example.com/hook",
        "exitCode": None,
        "error": None,
        "reason": None,
        "summary": None,
        "actionErrors": [],
        "webhook": {"state": "waiting", "attempts": 0, "lastError": None, "nextAttemptAt": None},
        "metadata": {"requestId": "r"},
    } == codec.record_to_public(RECORD)


def test_the_stored_record_keeps_what_callers_do_not_see() -> None:
    """The sealed callback URL and the digest are stored, the bytes as base64."""
    stored = json.loads(codec.record_to_bytes(RECORD))

    assert (base64.b64encode(b"\x00sealed").decode(), "digest") == (
        stored["sealedCallbackUrl"],
        stored["idempotencyDigest"],
    )


def test_the_callback_has_the_documented_body() -> None:
    """A completed task is told in the documented fields and their order, times in UTC with milliseconds."""
    assert (
        b'{"taskId":"t-1","status":"completed","exitCode":0,"logsPath":"gs://bucket/sessions/t-1/","summary":'
        b'{"durationMs":45000,"turns":15,"errors":0,"startedAt":"2025-01-10T12:34:56.789Z",'
        b'"completedAt":"2025-01-10T12:34:56.789Z","costUsd":0.25,"usage":null,"sessionId":null,"result":null},'
        b'"error":null,"metadata":{"requestId":"r"},'
        b'"uploadedFiles":[{"originalPath":"a.log","gcsPath":"gs://bucket/a.log","sizeBytes":3}],'
        b'"gitCommit":{"sha":"a1","message":"m","pushed":true,"branch":"main"}}'
    ) == codec.callback_body(DONE)


def test_the_callback_leaves_out_actions_that_there_were_none_of() -> None:
    """Without uploads and commit their fields are absent; failed actions are told."""
    bare = attrs.evolve(DONE, uploaded_files=None, git_commit=None)
    failed = attrs.evolve(bare, action_errors=(ActionError(action="git", error="No."),))

    assert ["taskId", "status", "exitCode", "logsPath", "summary", "error", "metadata"] == list(
        json.loads(codec.callback_body(bare))
    )
    assert [{"action": "git", "error": "No."}] == json.loads(codec.callback_body(failed))["actionErrors"]


def test_metadata_goes_back_with_the_values_it_came_with() -> None:
    """Through seal, record and callback, numbers keep their values and names their order, as JavaScript prints them."""
    body = b'{"big":1e20,"negative":-0,"one":1.0,"tiny":5e-324,"max":9007199254740991,"text":"\\u00e9\\ud83d\\ude00"}'
    request = b'{"prompt":"p","anthropicApiKey":"k","callbackUrl":"https://a.example","metadata":' + body + b"}"

    spec = codec.spec_from_bytes(codec.spec_to_bytes(parse(request)))
    record = codec.record_from_bytes(codec.record_to_bytes(attrs.evolve(DONE, metadata=spec.metadata)))

    assert json.loads(body) == json.loads(codec.callback_body(record))["metadata"]
    assert (
        '"metadata":{"big":100000000000000000000,"negative":0,"one":1,"tiny":5e-324,"max":9007199254740991,"text":"é😀"}'
    ) in codec.callback_body(record).decode()


def test_a_figure_that_json_does_not_have_does_not_lose_the_task() -> None:
    """A NaN that an agent reported becomes null in the record, which can still be written and read."""
    assert DONE.summary is not None
    summary = attrs.evolve(DONE.summary, usage={"n": float("nan"), "s": "\ud800"})
    record = codec.record_from_bytes(codec.record_to_bytes(attrs.evolve(DONE, summary=summary)))

    assert record.summary is not None
    assert {"n": None, "s": "\ud800"} == record.summary.usage


def test_a_commit_has_only_the_fields_that_apply() -> None:
    """`committed` and `recovery` are absent where they say nothing; all other fields are always there."""
    plain = GitCommit(sha=None, message="m", pushed=False, branch="main")
    recovery = Recovery(method="rebase", remote_sha="b2", conflict_files=("a.txt",))
    recovered = attrs.evolve(plain, sha="a1", pushed=True, recovery=recovery)

    def printed(commit: GitCommit) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(codec.record_to_bytes(attrs.evolve(DONE, git_commit=commit)))["gitCommit"]
        return value

    assert {"sha": None, "message": "m", "pushed": False, "branch": "main"} == printed(plain)
    assert {**printed(plain), "committed": False} == printed(attrs.evolve(plain, committed=False))
    expected = {"method": "rebase", "remoteSha": "b2", "conflictFiles": ["a.txt"]}
    assert {**printed(plain), "sha": "a1", "pushed": True, "recovery": expected} == printed(recovered)


def test_importing_codec_makes_no_converter() -> None:
    """The converter, which takes time to make, is made when it is first used."""
    program = "from ccrun import codec; print(codec._converter.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)

    assert "0\n" == done.stdout

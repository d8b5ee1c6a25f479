from __future__ import annotations

import json

import pytest
from helpers.request import MINIMAL, errors_of, field_errors, parse

from ccrun import codec, javascript_json
from ccrun.spec import MAX_METADATA_BYTES, UploadAction
from ccrun.task import Secret

# --- objects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("callback_url", "Unknown field `callback_url`; did you mean `callbackUrl`?"),
        ("MAXTURNS", "Unknown field `MAXTURNS`; did you mean `maxTurns`?"),
        ("repo", "Unknown field `repo`; did you mean `gitRepo`?"),
        ("zzz", "Unknown field `zzz`"),
        ("sessionId", "Unknown field `sessionId`"),
        ("tags", "Unknown field `tags`"),
        ("a\nb\x1b", "Unknown field `a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}`"),
        ("x" * 1000, f"Unknown field `{'x' * 64}…`"),
    ],
)
def test_unknown_field_is_reported_with_most_similar_known_field(name: str, message: str) -> None:
    """A typing error gets a suggestion. Names in errors are short and printable."""
    assert [message] == list(field_errors(name, 1).values())


def test_metadata_is_limited_in_bytes_of_the_callback() -> None:
    """Numbers count with their length in the callback, where JavaScript's form may be longer."""
    numbers = {"a": [1e20] * 3200}

    assert len(json.dumps(numbers)) < MAX_METADATA_BYTES < len(javascript_json.dumps(numbers))
    assert {"metadata": "metadata must have at most 65536 bytes as JSON"} == field_errors("metadata", numbers)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [6, 6.0, 1, 1000])
def test_whole_number_may_be_printed_as_float(turns: float) -> None:
    """JSON has one kind of number: 6.0 is 6."""
    spec = parse({**MINIMAL, "maxTurns": turns})

    assert (turns, int) == (spec.max_turns, type(spec.max_turns))


@pytest.mark.parametrize("turns", [0, 1001, -1, 1.5, True, False, "6", [], {}, 1e300])
def test_integer_rejects_other_types_and_values_out_of_range(turns: object) -> None:
    """Booleans, strings, fractions and numbers out of range are rejected."""
    assert {"maxTurns": "maxTurns must be a whole number from 1 to 1000"} == field_errors("maxTurns", turns)


@pytest.mark.parametrize("minutes", [0, -1, 60.1, True, "55", 1e300])
def test_timeout_is_positive_and_within_the_maximum(minutes: object) -> None:
    """The error has the maximum of the service."""
    assert {"timeoutMinutes": "timeoutMinutes must be a number above 0 and at most 60"} == field_errors(
        "timeoutMinutes", minutes
    )


# --- strings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["anthropicApiKey", "anthropicOAuthToken", "gitToken"])
def test_credential_is_stripped_and_is_printable(field: str) -> None:
    """A key that was read from a file works; one that would add another header is rejected, and the error does not repeat it."""
    assert field in json.loads(codec.spec_to_bytes(parse({**MINIMAL, field: "made-up\n"})))
    for bad in ("made\r\nX-Evil: 1", "made up", "mäde", "made\x00up"):
        (message,) = field_errors(field, bad).values()
        assert message.startswith(f"{field} may")
        assert bad not in message


@pytest.mark.parametrize("path", ["/etc", "..", "../x", "a/../b", "a/..", "~/x", "-rf", "{a,../b}/c", "a\nb", "a\x00"])
def test_path_outside_the_workspace_is_rejected(path: str) -> None:
    """Neither the start directory nor a path to commit, to upload or in the bucket can leave its root."""
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
    ] == list(errors_of(body))


@pytest.mark.parametrize("path", [".", "a/b", "..a", "a..b", ".hidden", "a b", "ä/…", "**/*.{js,ts}"])
def test_dots_within_names_are_valid(path: str) -> None:
    """Dots within the names of a path are not `..`."""
    assert path == parse({**MINIMAL, "cwdRelative": path}).cwd_relative


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["ok", "{a,b}" * 20], "globPatterns[1] may expand to at most 1000 patterns"),
        (["{" * 100], "globPatterns[0] may have at most 32 opening braces"),
        (
            ["a{1..900}", "b{1..900}"],
            "globPatterns may expand to at most 1000 patterns with 262144 characters in total",
        ),
    ],
)
def test_patterns_with_too_many_expansions_are_rejected(patterns: list[str], message: str) -> None:
    """A pattern that an upload or a commit could not use is rejected before the agent runs."""
    for action, field in (("uploadFiles", "globPatterns"), ("git", "files")):
        found = field_errors("postExecutionActions", {action: {field: patterns}})
        ((path, found_message),) = found.items()
        expected = f"postExecutionActions.{action}.{message}".replace("globPatterns", field)
        assert found_message.startswith(expected)
        assert expected.startswith(path)


def test_negated_pattern_is_valid() -> None:
    """A pattern may start with `!`, which excludes its matches."""
    upload = {"globPatterns": ["**", "!**/node_modules"], "gcsPrefix": "a/b"}
    spec = parse({**MINIMAL, "postExecutionActions": {"uploadFiles": upload}})
    assert UploadAction(glob_patterns=("**", "!**/node_modules"), gcs_prefix="a/b") == (
        spec.post_execution_actions.upload_files
    )


def test_prefix_in_the_bucket_has_no_backslash() -> None:
    """An object name has no backslash, so that every upload would fail."""
    field = "postExecutionActions.uploadFiles.gcsPrefix"
    assert {field: f"{field} may not contain a backslash: separate directories by slashes"} == field_errors(
        "postExecutionActions", {"uploadFiles": {"globPatterns": ["*"], "gcsPrefix": "a\\b"}}
    )


# --- URLs ------------------------------------------------------------------------------------------------------------


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
def test_callback_url_may_be_any_http_url(url: str) -> None:
    """Ports, credentials, addresses and international names are valid."""
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
def test_invalid_callback_url_has_the_documented_error(url: object) -> None:
    """Every invalid URL gets the error that clients match."""
    assert {"callbackUrl": "callbackUrl is not a valid URL"} == field_errors("callbackUrl", url)

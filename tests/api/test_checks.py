from __future__ import annotations

import json
import subprocess

import pytest
from helpers.request import MINIMAL, errors_of, field_errors, parse

from ccrun import codec, javascript_json
from ccrun.api.git_checks import INVALID_IN_BRANCH
from ccrun.spec import MAX_METADATA_BYTES, UploadAction
from ccrun.task import Secret
from ccrun.urls import parse_git_url

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


BRANCHES = [
    *("main", "a/b", "a.b", "ä", "v1.0", "a-", "@a", "a@b", "a{b", "x.lockx", "1", "a#b", "a&b", "refs/heads/x"),
    *("", "-x", "--x", ".a", "a/.b", "a..b", "a/", "/a", "a//b", "a.", "a.lock", "a.lock/b", "a@{b", "a b"),
    *("a\tb", "a~1", "a^", "a:b", "a?", "a*", "a[b", "a\\b", "a\x7fb", "a\nb", "a..", "a/.", "a/b.lock", "a/-b"),
]


@pytest.mark.parametrize("name", BRANCHES)
def test_branch_names_are_those_that_git_accepts(name: str) -> None:
    """The rules equal those of `git check-ref-format --branch`, which is run here."""
    git = subprocess.run(["git", "check-ref-format", "--branch", name], check=False, capture_output=True)
    is_valid = INVALID_IN_BRANCH.search(name) is None and name != ""

    assert (git.returncode == 0) == is_valid


def test_both_branch_fields_have_the_same_rules() -> None:
    """`gitBranch` and the branch to push to have the same rules; `HEAD` and `@` are not branches."""
    assert ["gitBranch"] == list(field_errors("gitBranch", "@"))
    body = {**MINIMAL, "gitBranch": "HEAD", "postExecutionActions": {"git": {"branch": "a..b"}}}

    assert {
        "gitBranch": "gitBranch is not a valid branch name",
        "postExecutionActions.git.branch": "postExecutionActions.git.branch is not a valid branch name",
    } == errors_of(body)


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
def test_repository_may_have_an_https_or_ssh_url(url: str) -> None:
    """The URLs that hosting services show are valid."""
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
def test_repository_url_with_option_command_or_secret_is_rejected(url: str, local: bool) -> None:
    """No URL can make git or ssh run a command or contain a token that is not masked; the error does not repeat the URL."""
    (message,) = field_errors("gitRepo", url, backend_is_local=local).values()

    assert message.startswith("gitRepo ")
    assert url not in message


@pytest.mark.parametrize("url", ["http://localhost:3000/repo", "file:///srv/repo.git"])
def test_only_the_local_backend_accepts_http_and_file_urls(url: str) -> None:
    """In the cloud, http and file URLs are rejected."""
    assert parse_git_url(url) == parse({**MINIMAL, "gitRepo": url}, backend_is_local=True).git_repo
    assert {"gitRepo": "gitRepo must be an https or SSH URL or git@host:path"} == field_errors("gitRepo", url)


def test_error_for_a_token_in_a_repository_url_names_its_field() -> None:
    """The error says which field a token belongs in."""
    assert {"gitRepo": "gitRepo must not have a password or token: put the token into gitToken"} == field_errors(
        "gitRepo", "https://ghp_token@github.com/o/r"
    )


@pytest.mark.parametrize("name", ["main", "refs/heads/main"])
def test_branches_are_accepted_in_both_forms(name: str) -> None:
    """CI systems give `refs/heads/main`, which is the branch `main`."""
    body = {
        **MINIMAL,
        "gitRepo": "https://example.com/a.git",
        "gitBranch": name,
        "gitBase": name,
        "postExecutionActions": {"git": {"commit": True, "branch": name}},
    }
    spec = parse(body)
    assert spec.post_execution_actions.git is not None
    assert ["main"] * 3 == [spec.git_branch, spec.git_base, spec.post_execution_actions.git.branch]


def test_other_refs_are_for_cloning_or_for_reviews() -> None:
    """A pull request or a tag can be cloned; a push goes to a branch or to `refs/for/` of a Gerrit server."""
    for ref in ("refs/tags/v1", "refs/pull/7/head", "refs/merge-requests/7/head"):
        assert ref == parse({**MINIMAL, "gitBranch": ref}).git_branch
        assert {"gitBase": "gitBase must be the name of a branch, with or without refs/heads/"} == field_errors(
            "gitBase", ref
        )
        field = "postExecutionActions.git.branch"
        rule = "must be the name of a branch, with or without refs/heads/, or refs/for/BRANCH for a Gerrit server"
        assert {field: f"{field} {rule}"} == field_errors("postExecutionActions", {"git": {"branch": ref}})
    spec = parse({**MINIMAL, "postExecutionActions": {"git": {"branch": "refs/for/main"}}})
    assert spec.post_execution_actions.git is not None
    assert "refs/for/main" == spec.post_execution_actions.git.branch


def test_base_needs_a_repository() -> None:
    """Without a repository, there is no branch to compare with."""
    assert {"gitBase": "gitBase needs gitRepo: it is a branch of that repository"} == field_errors("gitBase", "main")


def test_directories_of_a_sparse_checkout_are_below_the_top() -> None:
    """They are relative paths without `.` and `..`; a slash at the end has no meaning."""
    repository = {"gitRepo": "https://example.com/a.git"}
    assert ("src/lib", "docs") == parse(
        {**MINIMAL, **repository, "sparseCheckout": ["src/lib/", "docs"]}
    ).sparse_checkout
    for path in (".", "./src", "src//lib", "src/."):
        rule = "must be a directory below the top of the repository, such as docs or src/lib"
        assert {"sparseCheckout[0]": f"sparseCheckout[0] {rule}"} == field_errors("sparseCheckout", [path])
    for path in ("/src", "../src", "src/..", "a\nb"):
        rule = "must be a relative path inside the workspace, without `..`"
        assert {"sparseCheckout[0]": f"sparseCheckout[0] {rule}"} == field_errors("sparseCheckout", [path])


def test_options_of_a_clone_need_a_repository() -> None:
    """Without a repository they have no meaning."""
    for field, value in (("sparseCheckout", ["src"]), ("cloneTimeoutMinutes", 10)):
        (error,) = field_errors(field, value).values()
        assert error.startswith(f"{field} needs gitRepo: ")


def test_timeout_of_a_clone_is_a_positive_number() -> None:
    """The default is five minutes."""
    repository = {"gitRepo": "https://example.com/a.git"}
    assert 5 == parse({**MINIMAL, **repository}).clone_timeout_minutes
    assert 0.5 == parse({**MINIMAL, **repository, "cloneTimeoutMinutes": 0.5}).clone_timeout_minutes
    assert {"cloneTimeoutMinutes"} == field_errors("cloneTimeoutMinutes", 0).keys()

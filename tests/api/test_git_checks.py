from __future__ import annotations

import subprocess

import pytest
from helpers.request import MINIMAL, errors_of, field_errors, parse

from ccrun.api.git_checks import INVALID_IN_BRANCH
from ccrun.urls import parse_git_url

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

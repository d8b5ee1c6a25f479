from __future__ import annotations

import pytest

from ccrun.urls import ForbiddenInGitUrl, GitUrl, is_http_url, parse_git_url

PORT_OR_DIRECTORY = (
    "must have the form ssh://user@host:port/path if the number after the host is a port, "
    "or ssh://user@host/path if it is a directory"
)


@pytest.mark.parametrize(
    ("url", "expected", "host"),
    [
        ("https://github.com/org/repo", "ssh://git@github.com/org/repo", "github.com"),
        ("https://github.com/org/repo.git", "ssh://git@github.com/org/repo.git", "github.com"),
        ("https://github.com/org/repo/", "ssh://git@github.com/org/repo", "github.com"),
        ("https://gitlab.com/group/sub/deep/repo.git", "ssh://git@gitlab.com/group/sub/deep/repo.git", "gitlab.com"),
        ("https://bitbucket.org/team/repo", "ssh://git@ssh.bitbucket.org/team/repo", "ssh.bitbucket.org"),
        ("https://Git.Example.com:8443/a/b.git", "ssh://git@git.example.com/a/b.git", "git.example.com"),
        ("https://[2001:db8::1]/a/b.git", "ssh://git@[2001:db8::1]/a/b.git", "2001:db8::1"),
        ("https://example.com/a%20b/c.git", "ssh://git@example.com/a b/c.git", "example.com"),
        ("ssh://alice@example.com:2222/a/b.git", "ssh://alice@example.com:2222/a/b.git", "example.com"),
        ("ssh://example.com/a/b.git", "ssh://example.com/a/b.git", "example.com"),
        ("git@github.com:org/repo.git", "git@github.com:org/repo.git", "github.com"),
        ("deploy@Example.com:org/repo", "deploy@Example.com:org/repo", "example.com"),
    ],
)
def test_https_url_becomes_an_ssh_url(url: str, expected: str, host: str) -> None:
    """An https URL becomes an SSH URL with the same path and without the port; an SSH URL is not changed."""
    assert GitUrl(url=expected, scheme="ssh", host=host) == parse_git_url(url).over_ssh()


@pytest.mark.parametrize("url", ["https://github.com/org/repo", "http://127.0.0.1:80/x.git", "file:///srv/x.git"])
def test_other_url_is_not_changed(url: str) -> None:
    """A URL of another scheme is passed to git unchanged, and is not used over SSH."""
    remote = parse_git_url(url)
    assert (url, False) == (remote.url, remote.is_ssh)


def test_origin_is_scheme_host_and_port() -> None:
    """The origin, which a credential is limited to, has neither path nor query."""
    assert "https://example.com:8443" == parse_git_url("https://example.com:8443/a/b?x#y").origin


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("https://org@dev.azure.com/org/project/_git/repo", "https://dev.azure.com/org/project/_git/repo"),
        ("https://user@bitbucket.org/team/repo.git", "https://bitbucket.org/team/repo.git"),
        ("HTTPS://github.com/org/repo", "https://github.com/org/repo"),
        ("HTTP://127.0.0.1:80/x.git", "http://127.0.0.1:80/x.git"),
        ("SSH://git@host/x.git", "ssh://git@host/x.git"),
    ],
)
def test_urls_of_clone_buttons(url: str, plain: str) -> None:
    """The user name of an https URL is dropped, and the scheme is in lower case, as git needs it."""
    assert plain == parse_git_url(url).url


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("https://user:secret@host/x", "must not have a password or token: put the token into gitToken"),
        ("https://token@github.com/x/y", "must not have a password or token: put the token into gitToken"),
        ("https://ghp_0123456789@host/x", "must not have a password or token: put the token into gitToken"),
        (f"https://{'t' * 40}@host/x", "must not have a password or token: put the token into gitToken"),
        ("ssh://git:secret@host/x", "must not have a password: put the key into sshKey"),
        (
            "git@host:2424/org/repo.git",
            PORT_OR_DIRECTORY,
        ),
    ],
)
def test_forbidden_parts_are_named(url: str, rule: str) -> None:
    """The message says what to do instead, and does not repeat the URL, which may have a secret."""
    with pytest.raises(ForbiddenInGitUrl) as caught:
        parse_git_url(url)
    assert rule == str(caught.value)


@pytest.mark.parametrize(
    "rest", ["/a b", "/a%2", "/a%zz", '/a"b', "/a<b>", "/a{b}", "/a^b", "/a`b", "/a?b#c d", "/a?%"]
)
def test_what_is_not_allowed_in_a_url_is_refused(rest: str) -> None:
    """It could not be sent as it was given."""
    assert not is_http_url(f"https://example.com{rest}")


@pytest.mark.parametrize("rest", ["", "?a", "/%2Fa?b=%2f|c", "/a;b=1,2/(c)!*'$@:~", "/a?b[]=1&c=d/e?f", "/straße"])
def test_any_valid_path_is_accepted(rest: str) -> None:
    """Also escapes of any character, and what many servers put into URLs."""
    assert is_http_url(f"https://example.com{rest}")

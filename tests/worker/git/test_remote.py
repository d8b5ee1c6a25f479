"""The configuration of SSH. `test_clone` tests access with real servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccrun.task import Secret
from ccrun.urls import parse_git_url
from ccrun.worker.git.remote import Access, _ssh_config


@pytest.mark.parametrize(("host", "checking"), [("github.com", "yes"), ("git.example.com", "accept-new")])
def test_new_keys_are_accepted_of_unknown_hosts_only(host: str, checking: str) -> None:
    """A well-known host must have a key from the `known_hosts` file of ccrun."""
    config = _ssh_config(host, Path("/r/seen"), None)
    assert f"StrictHostKeyChecking {checking}\n" in config
    assert "IdentityAgent none\n" in config
    assert "ForwardAgent no\n" in config


def test_repr_does_not_have_the_key() -> None:
    """A debugger or a log may print the `repr` of the access."""
    access = Access(remote=parse_git_url("git@h:x"), ssh_key=Secret("made-up"))
    assert "made-up" not in repr(access)

from __future__ import annotations

import re

import attrs

from ccrun.spec import GitToken, TaskSpec
from ccrun.task import Secret, TaskId, TaskType


def test_secrets_of_a_request_are_collected() -> None:
    """`secrets` has the value of every secret field except the callback URL, a part of which is in the record."""
    spec = TaskSpec(
        task_id=TaskId("t-1"),
        type=TaskType.SYNC,
        prompt="",
        timeout_minutes=1,
        anthropic_api_key=Secret("api"),
        anthropic_oauth_token=Secret("oauth"),
        anthropic_auth_token=Secret("auth"),
        ssh_key=Secret("ssh"),
        git_token=GitToken.parse("user:git"),
        environment_secrets={"A": Secret("one"), "B": Secret("two")},
        callback_url=Secret("https://example.com"),
    )
    assert {"api", "oauth", "auth", "ssh", "user:git", "git", "one", "two"} == {
        secret.reveal() for secret in spec.secrets
    }


def test_secret_fields_of_a_request_are_known() -> None:
    """A new secret field fails this test, so that it is added to the test above."""
    fields = {field.name for field in attrs.fields(TaskSpec) if re.search("Secret|Token", str(field.type))}
    assert {
        "anthropic_api_key",
        "anthropic_auth_token",
        "anthropic_oauth_token",
        "callback_url",
        "environment_secrets",
        "git_token",
        "ssh_key",
    } == fields

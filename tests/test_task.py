from __future__ import annotations

import pytest

from ccrun.spec import TaskSpec
from ccrun.task import (
    TASK_ID_PATTERN,
    Secret,
    TaskId,
    TaskType,
)


def test_text_of_a_secret_is_masked() -> None:
    """Every conversion to text masks a secret, alone or inside another object."""
    secret = Secret("made-up secret")
    spec = TaskSpec(
        task_id=TaskId("t-1"),
        type=TaskType.SYNC,
        prompt="made-up secret",
        timeout_minutes=1,
        anthropic_api_key=secret,
        environment_secrets={"TOKEN": secret},
    )
    texts = [repr(secret), str(secret), f"{secret}", f"{secret!r}", "%s" % secret, repr([secret]), repr(spec)]  # noqa: UP031
    assert [] == [text for text in texts if "made-up secret" in text]
    assert secret.reveal() == "made-up secret"


def test_secret_equals_only_a_secret_with_its_value() -> None:
    """Two secrets with the same value are equal and have the same hash; a secret does not equal a string."""
    assert Secret("a") == Secret("a")
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2
    assert Secret("a") != "a"


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        ("a", True),
        ("A-z_0", True),
        ("-", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("a.b", False),
        ("a/b", False),
        ("a\n", False),
        ("é", False),
        ("\u0660", False),
    ],
)
def test_task_id_is_url_safe(text: str, is_valid: bool) -> None:
    """A task ID has 1 to 128 ASCII letters, digits, underscores and hyphens."""
    assert is_valid == (TASK_ID_PATTERN.fullmatch(text) is not None)

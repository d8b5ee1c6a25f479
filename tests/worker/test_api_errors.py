"""What is read from errors of the model API."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from types import MappingProxyType

import pytest
from multidict import CIMultiDict

from ccrun.results import ApiError
from ccrun.worker.api_errors import MAX_MESSAGE_CHARS, api_error_sentence, parse_api_error

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
IN_A_MINUTE = NOW + dt.timedelta(minutes=1)


def parse(status: int = 429, body: str = "", headers: Mapping[str, str] = MappingProxyType({})) -> ApiError:
    """Return what a response says."""
    return parse_api_error(
        status, body, CIMultiDict(headers), now=NOW, mask=lambda text: text.replace("made-up-key", "***")
    )


def test_type_and_message_are_those_of_the_api() -> None:
    """The credential in them is masked before the message is cut."""
    message = "x" * (MAX_MESSAGE_CHARS - 5) + "made-up-key"
    error = parse(400, json.dumps({"type": "error", "error": {"type": "invalid_request_error", "message": message}}))
    assert ("invalid_request_error", "x" * (MAX_MESSAGE_CHARS - 5) + "***") == (error.type, error.message)


@pytest.mark.parametrize(
    "body", ["", "<html>", "[]", '"x"', "null", '{"error": "x"}', '{"error": {"message": 1}}', "[" * 9999]
)
def test_body_of_another_format_says_nothing(body: str) -> None:
    """A gateway may respond with anything; the status remains."""
    assert ApiError(status=400, retryable=False) == parse(400, body)


@pytest.mark.parametrize(("status", "retryable"), [(400, False), (404, False), (408, True), (429, True), (529, True)])
def test_status_says_whether_a_retry_may_succeed(status: int, *, retryable: bool) -> None:
    """`X-Should-Retry` overrides the status."""
    assert retryable is parse(status).retryable
    assert [True, False] == [parse(status, headers={"X-Should-Retry": value}).retryable for value in ("true", "false")]


@pytest.mark.parametrize(
    ("headers", "resets_at"),
    [
        ({"Retry-After": "60"}, IN_A_MINUTE),
        ({"Retry-After": "Thu, 01 Jan 2026 00:01:00 GMT"}, IN_A_MINUTE),
        ({"anthropic-ratelimit-unified-reset": str(int(IN_A_MINUTE.timestamp()))}, IN_A_MINUTE),
        ({"Retry-After": "1", "anthropic-ratelimit-unified-reset": str(int(IN_A_MINUTE.timestamp()))}, IN_A_MINUTE),
        ({"Retry-After": "1e300"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "soon"}, None),
        ({"anthropic-ratelimit-unified-reset": "9" * 400}, None),
        ({}, None),
    ],
    ids=str,
)
def test_reset_is_the_later_of_two_times(headers: dict[str, str], resets_at: dt.datetime | None) -> None:
    """A time that is no time, in the past or too far in the future is ignored."""
    assert resets_at == parse(headers=headers).resets_at


def test_sentence_names_what_the_api_said() -> None:
    """It has the status, the type and the message as far as they are known."""
    full = ApiError(status=529, type="overloaded_error", message="Overloaded", retryable=True)
    assert "The model API responded with status 529 (overloaded_error: Overloaded)." == api_error_sentence(full)
    assert "The model API responded with status 500." == api_error_sentence(ApiError(status=500, retryable=True))
    assert "Down." == api_error_sentence(ApiError(message="Down.", retryable=True))

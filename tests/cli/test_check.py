from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.check import TOKEN, run_check
from helpers.service import CALLBACK_SECRET, MADE_UP_KEY, StartService

from ccrun.task import Secret
from ccrun.testing.model import Fail
from ccrun.testing.receiver import Receiver


async def test_local_check_passes_without_settings() -> None:
    """The check starts a service with a scripted model, reads a stream and verifies a callback."""
    result = await run_check("local")
    assert (0, "") == (result.code, result.stderr)
    assert ["none: a script responds"] == result.rows_with_status("model")
    assert ["GET /health", "GET /ready", "POST /run", "POST /run-async"] == [
        row.partition(":")[0] for row in result.rows_with_status("passed")
    ]
    assert result.rows[-1].endswith("its callback was delivered and verified")


async def test_remote_check_uses_the_token_and_the_credential(start_service: StartService) -> None:
    """The check sends the token with every request and the credential with every task, and does not print the token."""
    credentials = {"AUTH_TOKEN": TOKEN, "ANTHROPIC_API_KEY": MADE_UP_KEY}
    async with start_service(CCRUN_API_TOKENS=TOKEN) as service:
        for check, expected in (("remote", 3), ("auth", 1)):
            result = await run_check(check, SERVICE_URL=service.url, **credentials)
            assert (0, expected) == (result.code, len(result.rows_with_status("passed"))), result
        assert TOKEN not in "".join(result.rows)
        headers = [request.headers for request in service.model.requests]
    assert {MADE_UP_KEY} == {each.get("X-Api-Key", "") for each in headers}


async def test_callback_must_be_delivered_to_the_given_url(start_service: StartService) -> None:
    """With TEST_CALLBACK_URL the callback must be delivered; without it, the service is its own receiver, and rejects it."""
    credentials = {"ANTHROPIC_API_KEY": MADE_UP_KEY}
    async with start_service() as service, Receiver(Secret(CALLBACK_SECRET)) as receiver:
        settings = {"SERVICE_URL": service.url, "TEST_CALLBACK_URL": receiver.url, **credentials}
        delivered, own_receiver, no_receiver = await asyncio.gather(
            run_check("remote-async", **settings),
            run_check("remote-async", SERVICE_URL=service.url, **credentials),
            run_check("remote-async", **{**settings, "TEST_CALLBACK_URL": receiver.url + "/other"}),
        )
        await receiver.first()
    assert (0, True) == (delivered.code, delivered.rows[-1].endswith("its callback was delivered"))
    assert (0, True) == (own_receiver.code, own_receiver.rows[-1].endswith("set TEST_CALLBACK_URL to see it delivered"))
    assert (1, True) == (no_receiver.code, "was not delivered: " in no_receiver.rows[-1])


async def test_auth_check_fails_for_a_service_without_tokens(start_service: StartService) -> None:
    """The check fails when the service accepts a request without a token."""
    async with start_service() as service:
        result = await run_check("auth", SERVICE_URL=service.url)
    assert (1, ["GET /tasks with no token gives 200: anyone who reaches this service can use it."]) == (
        result.code,
        result.rows_with_status("failed"),
    )


async def test_failed_task_fails_its_check(start_service: StartService) -> None:
    """The check of the failed task has its error, and the other checks run."""
    async with start_service(lambda _: Fail(400, "invalid_request_error", "Not today.")) as service:
        result = await run_check("remote", SERVICE_URL=service.url, ANTHROPIC_API_KEY=MADE_UP_KEY)
    assert (1, 2, 1) == (result.code, len(result.rows_with_status("passed")), len(result.rows_with_status("failed")))
    assert "Not today." in result.rows[-1]


async def test_examples_are_sent_with_replaced_placeholders(tmp_path: Path) -> None:
    """The task IDs, keys and callback URLs of the files are replaced; an invalid or missing file fails with its error."""

    def write(name: str, **body: Any) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps({"prompt": "Hello", **body}))
        return path

    result = await run_check(
        "examples",
        write("plain.json", taskId="same", anthropicApiKey="<your key>"),
        write("again.json", taskId="same", metadata={"a": 1}),
        write("async.json", callbackUrl="https://example.com/hook"),
        write("wrong.json", maxTruns=3),
        tmp_path / "missing.json",
    )
    assert 1 == result.code
    assert ["plain.json: POST /run", "again.json: POST /run", "async.json: POST /run-async"] == [
        ":".join(row.split(":")[:2]) for row in result.rows_with_status("passed")
    ]
    wrong, missing = result.rows_with_status("failed")
    assert wrong.startswith("wrong.json: The service responded with 400: ")
    assert missing.startswith("missing.json cannot be read: ")


async def test_unknown_check_is_a_usage_error() -> None:
    """The message has the names of all checks; the exit status is 2."""
    result = await run_check("remte")
    assert (2, []) == (result.code, result.rows_with_status("failed"))
    assert re.search(r'Invalid value "remte"[^"]*Choose from:[^"]*"local", "remote"', result.stderr)


@pytest.mark.parametrize(
    ("check", "environment", "code", "sentence"),
    [
        ("remote", {}, 1, "SERVICE_URL is not set: it names the service to check."),
        (
            "remote",
            {"SERVICE_URL": "http://127.0.0.1:1"},
            1,
            "The service does not respond: Cannot connect to host 127.0.0.1:1",
        ),
        (
            "remote",
            {"SERVICE_URL": "http://example.com", "AUTH_TOKEN": TOKEN},
            1,
            "SERVICE_URL must begin with https: the token would be sent without encryption.",
        ),
        ("examples", {}, 1, "No example was named, and there is none in docs/examples."),
    ],
)
async def test_missing_or_unsafe_setting_fails_the_check(
    check: str, environment: dict[str, str], code: int, sentence: str
) -> None:
    """The output is one sentence without a traceback, and the exit status is 1."""
    result = await run_check(check, **environment)
    assert (code, True, "") == (
        result.code,
        result.rows_with_status("failed")[0].startswith(sentence),
        result.stderr,
    )

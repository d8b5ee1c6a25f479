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


async def test_a_service_that_is_started_for_it_passes() -> None:
    """With nothing set: a scripted model, a stream, a verified callback."""
    checked = await run_check("local")
    assert (0, "") == (checked.code, checked.stderr)
    assert ["none: a script answers"] == checked.rows_with_status("model")
    assert ["GET /health", "GET /ready", "POST /run", "POST /run-async"] == [
        row.partition(":")[0] for row in checked.rows_with_status("passed")
    ]
    assert checked.rows[-1].endswith("its callback was delivered and verified")


async def test_a_service_elsewhere_passes_with_its_token_and_a_credential(start_service: StartService) -> None:
    """The token goes with every request; the credential goes with every task."""
    brought = {"AUTH_TOKEN": TOKEN, "ANTHROPIC_API_KEY": MADE_UP_KEY}
    async with start_service(CCRUN_API_TOKENS=TOKEN) as service:
        for word, expected in (("remote", 3), ("auth", 1)):
            checked = await run_check(word, SERVICE_URL=service.url, **brought)
            assert (0, expected) == (checked.code, len(checked.rows_with_status("passed"))), checked
        assert TOKEN not in "".join(checked.rows)
        headers = [request.headers for request in service.model.requests]
    assert {MADE_UP_KEY} == {each.get("X-Api-Key", "") for each in headers}


async def test_a_callback_is_seen_to_arrive(start_service: StartService) -> None:
    """With TEST_CALLBACK_URL it must be delivered; without, the service itself gets it and refuses."""
    brought = {"ANTHROPIC_API_KEY": MADE_UP_KEY}
    async with start_service() as service, Receiver(Secret(CALLBACK_SECRET)) as receiver:
        there = {"SERVICE_URL": service.url, "TEST_CALLBACK_URL": receiver.url, **brought}
        delivered, itself, nowhere = await asyncio.gather(
            run_check("remote-async", **there),
            run_check("remote-async", SERVICE_URL=service.url, **brought),
            run_check("remote-async", **{**there, "TEST_CALLBACK_URL": receiver.url + "/nowhere"}),
        )
        await receiver.first()
    assert (0, True) == (delivered.code, delivered.rows[-1].endswith("its callback was delivered"))
    assert (0, True) == (itself.code, itself.rows[-1].endswith("set TEST_CALLBACK_URL to see it delivered"))
    assert (1, True) == (nowhere.code, "was not delivered: " in nowhere.rows[-1])


async def test_an_open_service_does_not_pass_for_a_closed_one(start_service: StartService) -> None:
    """Whoever is answered without a token is told of."""
    async with start_service() as service:
        checked = await run_check("auth", SERVICE_URL=service.url)
    assert (1, ["GET /tasks with no token gives 200: anyone who reaches this service can use it."]) == (
        checked.code,
        checked.rows_with_status("failed"),
    )


async def test_a_task_that_fails_is_a_check_that_fails(start_service: StartService) -> None:
    """What went wrong is said; the other checks are made all the same."""
    async with start_service(lambda _: Fail(400, "invalid_request_error", "Not today.")) as service:
        checked = await run_check("remote", SERVICE_URL=service.url, ANTHROPIC_API_KEY=MADE_UP_KEY)
    assert (1, 2, 1) == (checked.code, len(checked.rows_with_status("passed")), len(checked.rows_with_status("failed")))
    assert "Not today." in checked.rows[-1]


async def test_examples_are_sent_as_they_are_but_for_what_is_made_up_in_them(tmp_path: Path) -> None:
    """One with a callback goes to /run-async; task IDs, keys and receivers of the files are replaced; faults are named."""

    def write(name: str, **body: Any) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps({"prompt": "Hello", **body}))
        return path

    checked = await run_check(
        "examples",
        write("plain.json", taskId="same", anthropicApiKey="<your key>"),
        write("again.json", taskId="same", metadata={"a": 1}),
        write("async.json", callbackUrl="https://example.com/hook"),
        write("wrong.json", maxTruns=3),
        tmp_path / "missing.json",
    )
    assert 1 == checked.code
    assert ["plain.json: POST /run", "again.json: POST /run", "async.json: POST /run-async"] == [
        ":".join(row.split(":")[:2]) for row in checked.rows_with_status("passed")
    ]
    wrong, missing = checked.rows_with_status("failed")
    assert wrong.startswith("wrong.json: The service answered 400: ")
    assert missing.startswith("missing.json cannot be read: ")


async def test_an_unknown_check_is_a_usage_error() -> None:
    """The message names the checks that there are; the exit status is 2."""
    checked = await run_check("remte")
    assert (2, []) == (checked.code, checked.rows_with_status("failed"))
    assert re.search(r'Invalid value "remte"[^"]*Choose from:[^"]*"local", "remote"', checked.stderr)


@pytest.mark.parametrize(
    ("word", "environment", "code", "sentence"),
    [
        ("remote", {}, 1, "SERVICE_URL is not set: it names the service to check."),
        (
            "remote",
            {"SERVICE_URL": "http://127.0.0.1:1"},
            1,
            "The service does not answer: Cannot connect to host 127.0.0.1:1",
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
async def test_what_is_missing_is_told(word: str, environment: dict[str, str], code: int, sentence: str) -> None:
    """One sentence, and a status that is not 0."""
    checked = await run_check(word, **environment)
    assert (code, True, "") == (
        checked.code,
        checked.rows_with_status("failed")[0].startswith(sentence),
        checked.stderr,
    )

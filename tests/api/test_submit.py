from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from helpers.api import CALLBACK_URL, MAX_REQUEST_BYTES, Api, api_on, until
from helpers.submit import api

from ccrun import codec
from ccrun.api.dependencies import ApiTimeouts
from ccrun.api.request import Defaults
from ccrun.backends.local.key import LocalKey
from ccrun.errors import StorageError
from ccrun.seal import Purpose
from ccrun.task import Status, TaskId, TaskType
from ccrun.unseal import unseal

__all__ = ["api"]


# --- invalid bodies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/run", "/run-async"])
@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/xml", "x"]
)
async def test_other_content_type_is_415(api: Api, path: str, content_type: str | None) -> None:
    """A form or text, which a page of another site could send, is rejected."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = await api.call(
        "POST", path, data=json.dumps(api.body()), headers=headers, skip_auto_headers=["Content-Type"]
    )
    assert 415 == response.status
    assert {"error": "The body must be JSON, with Content-Type: application/json."} == response.body


async def test_content_type_may_have_a_charset(api: Api) -> None:
    """`application/json; charset=utf-8` is JSON."""
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    body = json.dumps(api.body(callbackUrl=CALLBACK_URL))
    assert 202 == (await api.call("POST", "/run-async", data=body, headers=headers)).status


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The text is empty."),
        (b" \r\n", "The text is empty."),
        (b"{", "The text is not valid JSON: see line 1, column 2."),
        (b"{'prompt': 1}", "The text is not valid JSON: see line 1, column 2."),
        (b'{"prompt":"\xff"}', "The text is not valid UTF-8."),
        (b"[]", "The body must be a JSON object, not an array"),
        (b"null", "The body must be a JSON object, not null"),
        (b"true", "The body must be a JSON object, not a boolean"),
        (b"5", "The body must be a JSON object, not a number"),
        (b'"prompt"', "The body must be a JSON object, not a string"),
        (b'{"prompt":"a","prompt":"b"}', "prompt is given more than once"),
        (b'{"metadata":{"a":NaN}}', "metadata.a is NaN, which JSON does not have"),
        (b'{"prompt":"\\ud800"}', "prompt has a lone surrogate, which is no character"),
        (b'{"metadata":{"a":1e999}}', "metadata.a is a number beyond the range of a double; send it as a string"),
        (b'{"metadata":' + b'{"a":' * 300 + b"1" + b"}" * 301, "levels deep"),
        (b"[" * 100_000, "The text is nested more than 256 levels deep."),
    ],
    ids=lambda value: repr(value[:20]),
)
@pytest.mark.parametrize("path", ["/run", "/run-async"])
async def test_body_that_is_not_a_json_object_is_400(api: Api, path: str, body: bytes, message: str) -> None:
    """The error says what is wrong with the text, and the service continues to work."""
    response = await api.call("POST", path, data=body, headers={"Content-Type": "application/json"})
    assert 400 == response.status
    assert message in response.body["error"]
    assert response.body["error"] == response.body["details"][0]["message"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": ["x"]}, "prompt"),
        ({"maxTurns": True}, "maxTurns"),
        ({"maxTurns": "6"}, "maxTurns"),
        ({"maxTurns": 0}, "maxTurns"),
        ({"maxTurns": 1001}, "maxTurns"),
        ({"maxTurns": 1.5}, "maxTurns"),
        ({"timeoutMinutes": 0}, "timeoutMinutes"),
        ({"timeoutMinutes": 61}, "timeoutMinutes"),
        ({"timeoutMinutes": False}, "timeoutMinutes"),
        ({"allowedTools": "Bash"}, "allowedTools"),
        ({"allowedTools": [1]}, "allowedTools[0]"),
        ({"environmentSecrets": ["A"]}, "environmentSecrets"),
        ({"environmentSecrets": {"A": 1}}, "environmentSecrets.A"),
        ({"metadata": "x"}, "metadata"),
        ({"permissionMode": "root"}, "permissionMode"),
        ({"taskId": "../x"}, "taskId"),
        ({"taskId": "x" * 129}, "taskId"),
        ({"cwdRelative": "../.."}, "cwdRelative"),
        ({"subagents": {"../x": {"content": "x"}}}, 'subagents["../x"]'),
        ({"callbackUrl": "ftp://x/"}, "callbackUrl"),
        ({"callbackUrl": "javascript:alert(1)"}, "callbackUrl"),
    ],
    ids=str,
)
async def test_invalid_value_is_400(api: Api, fields: dict[str, Any], field: str) -> None:
    """The response has the path of a value with a wrong type or range, and nothing is launched."""
    response = await api.call("POST", "/run-async", json=api.body(**{"callbackUrl": CALLBACK_URL, **fields}))
    assert (400, [field]) == (response.status, [error["field"] for error in response.body["details"]])
    assert [] == api.jobs.launched


async def test_response_has_all_errors(api: Api) -> None:
    """One response has all errors; `error` is the first of them."""
    body = {"prompt": 5, "maxTurns": 0, "promt": "x", "metadata": [], "callbackUrl": "nowhere"}
    response = await api.call("POST", "/run-async", json=body)
    assert 400 == response.status
    assert {
        "error": "prompt must be a string, not a number",
        "details": [
            {"field": "prompt", "message": "prompt must be a string, not a number"},
            {"field": "callbackUrl", "message": "callbackUrl is not a valid URL"},
            {"field": "anthropicApiKey", "message": "Either anthropicApiKey or anthropicOAuthToken is required"},
            {"field": "maxTurns", "message": "maxTurns must be a whole number from 1 to 1000"},
            {"field": "metadata", "message": "metadata must be a JSON object, not an array"},
            {"field": "promt", "message": "Unknown field `promt`; did you mean `prompt`?"},
        ],
    } == response.body


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/run", {"anthropicApiKey": "k"}, "prompt is required"),
        ("/run-async", {"prompt": "x", "anthropicApiKey": "k"}, "callbackUrl is required for async tasks"),
        ("/run", {"prompt": "x"}, "Either anthropicApiKey or anthropicOAuthToken is required"),
        ("/run", {"prompt": "x", "anthropicApiKey": "k", "callbackUrl": "x"}, "callbackUrl is not a valid URL"),
        (
            "/run",
            {"prompt": "x", "anthropicApiKey": "k", "taskId": "a b"},
            "taskId must be URL-safe (alphanumeric, underscore, hyphen only)",
        ),
    ],
)
async def test_documented_errors_have_exact_texts(api: Api, path: str, body: dict[str, str], message: str) -> None:
    """Clients match these texts."""
    response = await api.call("POST", path, json=body)
    assert (400, message) == (response.status, response.body["error"])


async def test_credential_of_the_operator_is_used(tmp_path: Path) -> None:
    """If the operator has a credential, a request needs none."""
    async with api_on(tmp_path / "data", defaults=Defaults(operator_has_credential=True)) as api:
        response = await api.call("POST", "/run-async", json={"prompt": "x", "callbackUrl": CALLBACK_URL})
        assert 202 == response.status


async def chunked(body: bytes) -> AsyncIterator[bytes]:
    """Yield a body in chunks, so that the request has no Content-Length."""
    for start in range(0, len(body), 64 * 1024):
        yield body[start : start + 64 * 1024]


def padded(api: Api, size: int) -> bytes:
    """Return a valid body of this size in bytes."""
    body = json.dumps(api.body(callbackUrl=CALLBACK_URL)).encode()
    return body + b" " * (size - len(body))


async def test_body_of_maximum_size_is_accepted(api: Api) -> None:
    """A body of exactly the maximum size is accepted, with and without a Content-Length."""
    headers = {"Content-Type": "application/json"}
    body = padded(api, MAX_REQUEST_BYTES)
    assert 202 == (await api.call("POST", "/run-async", data=body, headers=headers)).status
    assert 202 == (await api.call("POST", "/run-async", data=chunked(body), headers=headers)).status


@pytest.mark.parametrize("size", [MAX_REQUEST_BYTES + 1, 3 * MAX_REQUEST_BYTES])
@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize("path", ["/run", "/run-async"])
async def test_larger_body_is_413(api: Api, size: int, path: str, in_chunks: bool) -> None:
    """The error has the maximum size, with and without a Content-Length."""
    body = padded(api, size)
    response = await api.call(
        "POST", path, data=chunked(body) if in_chunks else body, headers={"Content-Type": "application/json"}
    )
    assert 413 == response.status
    assert {"error": f"The body is too large: at most {MAX_REQUEST_BYTES} bytes are allowed."} == response.body


async def test_incomplete_body_is_408(tmp_path: Path) -> None:
    """A client that sends half a body holds its connection only until the timeout."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(body=0.1)) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(b'POST /run HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"')
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        writer.close()
    assert head.startswith(b"HTTP/1.1 408 ")


# --- POST /run-async -------------------------------------------------------------------------------------------------


async def test_response_describes_the_task(api: Api) -> None:
    """The response has the ID, status, log path, time and execution; a header has the ID too."""
    response = await api.run_async(taskId="deploy-1")
    assert 202 == response.status
    created_at = response.body.pop("createdAt")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", created_at)
    assert {
        "taskId": "deploy-1",
        "status": "pending",
        "logsPath": api.store.logs_path(TaskId("deploy-1")),
        "executionName": "executions/deploy-1",
    } == response.body
    assert "deploy-1" == response.headers["X-Task-Id"]
    assert "Idempotent-Replay" not in response.headers
    assert (await api.call("GET", "/tasks/deploy-1")).body["createdAt"] == created_at


async def test_default_task_id_is_a_uuid(api: Api) -> None:
    """Each task without a given ID has another UUID."""
    ids = {await api.submit() for _ in range(5)}
    assert 5 == len(ids)
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", task_id) for task_id in ids)


async def test_task_is_stored_and_launched_once(api: Api) -> None:
    """After the response, the record is stored and the worker launched."""
    task_id = await api.submit(metadata={"a": 1})
    record = await api.store.record(task_id)
    assert (TaskType.ASYNC, Status.PENDING, {"a": 1}) == (record.type, record.status, record.metadata)
    assert [task_id] == api.jobs.launched


async def test_secrets_are_neither_stored_nor_shown(api: Api, tmp_path: Path) -> None:
    """No file and no response contains a credential, a secret, the prompt or a secret part of the callback URL in plain text."""
    secrets = {
        "anthropicApiKey": "made-up-one",
        "anthropicOAuthToken": "made-up-two",
        "environmentSecrets": {"A": "made-up-three"},
    }
    url = "http://user:made-up-four@127.0.0.1:9/hook?token=made-up-five"
    task_id = await api.submit(**secrets, callbackUrl=url, prompt="made-up-six")
    response = await api.call("GET", f"/tasks/{task_id}")
    assert "http://127.0.0.1:9/hook" == response.body["callbackUrl"]
    assert "made-up" not in response.text
    stored = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert {"metadata.json", "encrypted-payload.bin"} <= {path.name for path in stored}
    assert [] == [path for path in stored if b"made-up" in path.read_bytes()]


async def test_one_of_several_requests_with_an_id_is_accepted(api: Api) -> None:
    """Of twenty concurrent requests with one ID, one is accepted and stored completely; the others get 409."""
    responses = await asyncio.gather(*(api.run_async(taskId="one", metadata={"n": number}) for number in range(20)))
    assert [202] + [409] * 19 == sorted(response.status for response in responses)
    assert {"The task ID one is in use."} == {
        response.body["error"] for response in responses if response.status == 409
    }
    assert ["one"] == api.jobs.launched
    accepted = next(number for number, response in enumerate(responses) if response.status == 202)
    assert {"n": accepted} == (await api.store.record(TaskId("one"))).metadata
    key = LocalKey(api.directory / ".keys" / "sealing.key")
    sealed = await api.store.payload(TaskId("one"))
    opened = await unseal(key, sealed, task_id=TaskId("one"), purpose=Purpose.PAYLOAD)
    assert {"n": accepted} == codec.spec_from_bytes(opened).metadata


async def test_id_of_a_finished_task_cannot_be_reused(api: Api) -> None:
    """The second request gets 409, and overwrites nothing."""
    task_id = await api.submit_finished(taskId="one")
    before = await api.store.read_versioned(task_id)
    response = await api.call("POST", "/run", json=api.body(taskId="one"))
    assert (409, {"error": "The task ID one is in use."}) == (response.status, response.body)
    assert before == await api.store.read_versioned(task_id)
    with pytest.raises(StorageError):
        await api.store.payload(TaskId("none"))


async def test_missing_callback_secret_rejects_only_callbacks(tmp_path: Path) -> None:
    """When callbacks cannot be signed, a task with one is rejected and not stored; a task without one is accepted."""
    message = "Callbacks cannot be signed (missing CLOUDRUN_CALLBACK_SECRET)"
    async with api_on(tmp_path / "data", callbacks_unavailable=message) as api:
        response = await api.run_async()
        assert (500, {"error": message}) == (response.status, response.body)
        assert [] == list((await api.store.page(limit=10)).tasks)
        async with api.http.post(f"{api.url}/run", json=api.body()) as stream:
            assert 200 == stream.status


async def test_submission_continues_after_its_client_disconnects(api: Api) -> None:
    """A task is submitted completely, even if the client disconnects before the response."""
    api.key.gate = asyncio.Event()
    request = asyncio.create_task(api.run_async(taskId="one"))
    await until(lambda: api.key.waiting == 1)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
        await request
    api.key.gate.set()
    await until(lambda: api.jobs.launched == ["one"])
    assert Status.PENDING is (await api.store.record(TaskId("one"))).status

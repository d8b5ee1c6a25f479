from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from helpers.api import CALLBACK_URL, MAX_REQUEST_BYTES, OTHER_TOKEN, TOKEN, Api, ApiResponse, api_on, bearer, until
from helpers.service import Event, read_events

from ccrun import codec
from ccrun.api.dependencies import ApiTimeouts
from ccrun.api.request import Defaults
from ccrun.backends.local.key import LocalKey
from ccrun.errors import StorageError
from ccrun.seal import Purpose
from ccrun.task import Status, TaskId, TaskType
from ccrun.unseal import unseal


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """An API without authorization, and with a short grace period for abandoned tasks."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(abandon=0.1)) as running:
        yield running


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


async def test_limit_applies_to_decompressed_body(api: Api) -> None:
    """A small body that decompresses to a large one is rejected."""
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = await api.call("POST", "/run-async", data=gzip.compress(b" " * 50_000_000), headers=headers)
    assert 413 == response.status


async def test_body_that_cannot_be_decompressed_is_400(api: Api) -> None:
    """A body whose encoding does not match its header is a client error."""
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = await api.call("POST", "/run-async", data=b"{}", headers=headers)
    assert (400, {"error": "The body is not encoded as its headers say."}) == (response.status, response.body)


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


# --- Idempotency-Key -------------------------------------------------------------------------------------------------


async def run_with_key(api: Api, key: str, *, token: str | None = None, **fields: Any) -> ApiResponse:
    """Send `POST /run-async` with an Idempotency-Key."""
    headers = {"Idempotency-Key": key} | (bearer(token) if token else {})
    return await api.run_async(headers=headers, **fields)


async def test_retry_gets_the_same_task(api: Api) -> None:
    """The same key and body get the first task and a header that says so, even after the task has finished."""
    first = await run_with_key(api, "key")
    await api.start(first.body["taskId"])
    await api.finish(first.body["taskId"])
    retry = await run_with_key(api, "key")
    assert (202, first.body["taskId"]) == (retry.status, retry.body["taskId"])
    assert (None, "true") == (first.headers.get("Idempotent-Replay"), retry.headers["Idempotent-Replay"])
    assert ("completed", first.body["createdAt"]) == (retry.body["status"], retry.body["createdAt"])
    assert 1 == len(api.jobs.launched)


async def test_retry_of_run_streams_the_same_task(api: Api) -> None:
    """`/run` with a key that was used streams the first task."""
    async with api.http.post(f"{api.url}/run", json=api.body(), headers={"Idempotency-Key": "k"}) as first:
        task_id = TaskId(first.headers["X-Task-Id"])
        await api.start(task_id)
        await api.finish(task_id)
        await first.read()
    async with api.http.post(f"{api.url}/run", json=api.body(), headers={"Idempotency-Key": "k"}) as retry:
        assert (task_id, "true") == (retry.headers["X-Task-Id"], retry.headers["Idempotent-Replay"])
        assert b"event: done\n" in await retry.read()
    assert [task_id] == api.jobs.launched


@pytest.mark.parametrize("task_id", [None, "mine"])
async def test_key_with_another_body_is_409(api: Api, task_id: str | None) -> None:
    """A key identifies one request."""
    fields = {"taskId": task_id} if task_id else {}
    assert 202 == (await run_with_key(api, "key", **fields)).status
    response = await run_with_key(api, "key", prompt="Something else.", **fields)
    assert (409, {"error": "This Idempotency-Key was used with another request."}) == (response.status, response.body)
    assert 1 == len(api.jobs.launched)


async def test_concurrent_retries_start_one_task(api: Api) -> None:
    """Of twenty equal concurrent requests all get the same task, which is launched once."""
    responses = await asyncio.gather(*(run_with_key(api, "key") for _ in range(20)))
    assert {202} == {response.status for response in responses}
    assert 1 == len({response.body["taskId"] for response in responses})
    assert 19 == sum("Idempotent-Replay" in response.headers for response in responses)
    assert 1 == len(api.jobs.launched)


@pytest.mark.parametrize(("key", "status"), [("k", 202), ("k" * 255, 202), ("k" * 256, 400), ("", 400), ("ä", 400)])
async def test_key_is_1_to_255_printable_ascii_characters(api: Api, key: str, status: int) -> None:
    """Any other key is rejected with an error that names the header."""
    response = await run_with_key(api, key)
    assert status == response.status
    if status == 400:
        assert "Idempotency-Key must have 1 to 255 printable ASCII characters" == response.body["error"]
        assert ["Idempotency-Key"] == [error["field"] for error in response.body["details"]]


async def test_key_belongs_to_its_token(api_with_tokens: Api) -> None:
    """Two callers with different tokens can use the same key."""
    first = await run_with_key(api_with_tokens, "key", token=TOKEN)
    second = await run_with_key(api_with_tokens, "key", token=OTHER_TOKEN)
    assert (202, 202) == (first.status, second.status)
    assert first.body["taskId"] != second.body["taskId"]


async def test_rejected_request_does_not_use_its_key(api: Api) -> None:
    """After a 400, the corrected request can have the same key."""
    assert 400 == (await run_with_key(api, "key", maxTurns=0)).status
    assert 202 == (await run_with_key(api, "key", maxTurns=1)).status


# --- POST /run -------------------------------------------------------------------------------------------------------


async def test_run_streams_the_whole_task(api: Api) -> None:
    """A header has the task ID before the first event; then all events of the task follow."""
    async with api.http.post(f"{api.url}/run", json=api.body(taskId="one")) as response:
        assert (200, "one") == (response.status, response.headers["X-Task-Id"])
        events = read_events(response)
        assert Event(
            name="task",
            data={"taskId": "one", "status": "pending", "logsPath": api.store.logs_path(TaskId("one"))},
        ) == await anext(events)
        await api.start(TaskId("one"))
        await api.add_chunk(TaskId("one"), 1, b'{"n":1}', b'{"n":2}')
        await api.finish(TaskId("one"))
        rest = [event async for event in events]
    assert ["caught_up", *["message"] * 2, "done"] == [event.name for event in rest]
    assert ["1:1", "1:2"] == [event.id for event in rest if event.name == "message"]
    assert "sync" == (await api.call("GET", "/tasks/one")).body["type"]


async def test_run_responds_after_the_task_is_stored(api: Api) -> None:
    """There is no response before the task is stored; a storage error is a regular error response."""
    api.blobs.gate = asyncio.Event()
    request = asyncio.create_task(api.call("POST", "/run", json=api.body()))
    await until(lambda: api.blobs.waiting > 0)
    assert not request.done()
    api.blobs.error = StorageError()
    api.blobs.gate.set()
    assert (503, {"error": "The storage does not answer."}) == ((await request).status, (await request).body)


# --- clients of /run that disconnect ---------------------------------------------------------------------------------


async def disconnect_from_run(api: Api) -> TaskId:
    """Submit a task over `/run`, read its first bytes and disconnect. Return its ID."""
    async with aiohttp.ClientSession() as http, http.post(f"{api.url}/run", json=api.body()) as response:
        task_id = TaskId(response.headers["X-Task-Id"])
        await api.start(task_id)
        await response.content.readline()
    return task_id


async def test_abandoned_task_is_cancelled(api: Api) -> None:
    """After the grace period, the task is cancelled."""
    task_id = await disconnect_from_run(api)
    await until(lambda: api.jobs.cancelled == [task_id])
    assert (await api.store.record(task_id)).is_cancelling


async def test_abandoned_task_with_another_reader_continues(api: Api) -> None:
    """A client that reads the events at the end of the grace period keeps the task running."""
    async with contextlib.AsyncExitStack() as reading:
        async with aiohttp.ClientSession() as http, http.post(f"{api.url}/run", json=api.body()) as response:
            task_id = TaskId(response.headers["X-Task-Id"])
            await api.start(task_id)
            reader = await reading.enter_async_context(api.http.get(f"{api.url}/tasks/{task_id}/events"))
        await asyncio.sleep(0.3)  # Three times the grace period. That nothing happens is visible only after waiting.
        assert [] == api.jobs.cancelled
        await api.finish(task_id)
        assert (await reader.read()).endswith(await api.done_event(task_id))


async def test_task_abandoned_during_submission_is_cancelled(api: Api) -> None:
    """A client that disconnects before the response does not know the ID; its task is cancelled too."""
    api.key.gate = asyncio.Event()
    request = asyncio.create_task(api.call("POST", "/run", json=api.body(taskId="one")))
    await until(lambda: api.key.waiting == 1)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    # The server notices the disconnection before the key service responds.
    await asyncio.sleep(0.05)
    api.key.gate.set()
    await until(lambda: api.jobs.cancelled == ["one"])
    assert Status.CANCELLED is (await api.store.record(TaskId("one"))).status


async def test_abandoned_request_does_not_cancel_a_task_with_the_same_id(api: Api) -> None:
    """A request for an ID in use, whose client disconnects, does not cancel the existing task."""
    await api.submit(taskId="one")
    api.key.gate = asyncio.Event()
    request = asyncio.create_task(api.call("POST", "/run", json=api.body(taskId="one")))
    await until(lambda: api.key.waiting == 1)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    await asyncio.sleep(0.05)
    api.key.gate.set()
    await asyncio.sleep(0.3)  # Three times the grace period.
    assert ([], Status.PENDING) == (api.jobs.cancelled, (await api.store.record(TaskId("one"))).status)


@pytest.mark.parametrize("path", ["/run-async", "/run"])
async def test_disconnected_reader_of_events_cancels_nothing(api: Api, path: str) -> None:
    """Neither a reader of `/events` that disconnects nor a client of `/run` that stays to the end cancels the task."""
    async with contextlib.AsyncExitStack() as running:
        body = api.body(taskId="one", callbackUrl="http://127.0.0.1:9/")
        owner = await running.enter_async_context(api.http.post(api.url + path, json=body))
        await api.start(TaskId("one"))
        async with aiohttp.ClientSession() as http, http.get(f"{api.url}/tasks/one/events") as response:
            await response.content.readline()
        await asyncio.sleep(0.3)  # Three times the grace period.
        assert [] == api.jobs.cancelled
        await api.finish(TaskId("one"))
        await owner.read()
    await asyncio.sleep(0.2)
    assert [] == api.jobs.cancelled

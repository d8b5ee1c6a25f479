from __future__ import annotations

import asyncio
from typing import Any

import pytest
from helpers.api import OTHER_TOKEN, TOKEN, Api, ApiResponse, bearer
from helpers.submit import api

from ccrun.task import TaskId

__all__ = ["api"]


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

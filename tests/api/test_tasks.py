from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Container
from pathlib import Path
from typing import Any

import attrs
import pytest
from helpers.api import COMPLETED, FAILED, Api, api_on

from ccrun.api.dependencies import ApiTimeouts
from ccrun.errors import StorageError
from ccrun.jobs import ExecutionState
from ccrun.lifecycle import cancelled_outcome
from ccrun.task import CallbackInfo, CallbackState, Reason, Status, TaskId, TaskRecord, TaskType

# --- GET /tasks ------------------------------------------------------------------------------------------------------


async def add_tasks(api: Api, count: int, *, failed: Container[int] = ()) -> list[str]:
    """Store tasks with increasing creation times; return their IDs, newest first."""
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    for number in range(count):
        record = TaskRecord(
            task_id=TaskId(f"task-{number:03d}"),
            type=TaskType.ASYNC,
            status=Status.PENDING,
            created_at=start + dt.timedelta(minutes=7 * number),
            logs_path="file:///sessions/",
        )
        if number in failed:
            record = attrs.evolve(record, status=Status.FAILED)
        await api.store.add(record)
    return [f"task-{number:03d}" for number in reversed(range(count))]


async def pages(api: Api, query: str) -> list[list[str]]:
    """Follow the cursor to the last page; return the IDs of each page."""
    found, cursor = [], ""
    while True:
        response = await api.call("GET", f"/tasks?{query}{cursor}")
        assert response.status == 200, response.text
        found.append([record["taskId"] for record in response.body["tasks"]])
        if response.body["nextCursor"] is None:
            return found
        cursor = f"&cursor={response.body['nextCursor']}"


async def test_list_without_tasks_is_empty(api: Api) -> None:
    """Without tasks, there is one empty page."""
    response = await api.call("GET", "/tasks")
    assert (200, {"tasks": [], "nextCursor": None}) == (response.status, response.body)


async def test_pages_have_all_tasks_newest_first(api: Api) -> None:
    """The cursor leads through all tasks, each once; the last page has no cursor, even if it is full."""
    ids = await add_tasks(api, 23)
    assert [ids[start : start + 5] for start in range(0, 23, 5)] == await pages(api, "limit=5")
    assert [ids[:23]] == await pages(api, "limit=23")
    assert [ids] == await pages(api, "")


async def test_new_task_does_not_shift_pages(api: Api) -> None:
    """A task that is added between two pages is not on the second one, and shifts no task onto it."""
    ids = await add_tasks(api, 4)
    first = (await api.call("GET", "/tasks?limit=2")).body
    await api.submit()
    second = (await api.call("GET", f"/tasks?limit=2&cursor={first['nextCursor']}")).body
    assert ids == [record["taskId"] for record in first["tasks"] + second["tasks"]]


async def test_status_filters_the_list(api: Api) -> None:
    """Only tasks with the status are listed, over all pages."""
    failed = {0, 1, 3, 6, 7, 8, 12, 19}
    ids = await add_tasks(api, 20, failed=failed)
    expected = [task_id for task_id in ids if int(task_id[-3:]) in failed]
    for limit in range(1, 10):
        found = await pages(api, f"limit={limit}&status=failed")
        assert expected == [task_id for page in found for task_id in page]
    assert [[]] == await pages(api, "status=cancelled")


@pytest.mark.parametrize("limit", ["0", "101", "-1", "x", "", "1.5", "1e2", "٣", "9" * 5000])
async def test_invalid_limit_is_400(api: Api, limit: str) -> None:
    """The error has the allowed range."""
    response = await api.call("GET", "/tasks", params={"limit": limit})
    assert (400, "limit must be a whole number from 1 to 100") == (response.status, response.body["error"])


@pytest.mark.parametrize("limit", ["1", "100", "007"])
async def test_valid_limit_is_accepted(api: Api, limit: str) -> None:
    """Both ends of the range are valid."""
    assert 200 == (await api.call("GET", f"/tasks?limit={limit}")).status


@pytest.mark.parametrize(
    "cursor", ["x", "../../etc/passwd", "00000/000/00000-../x", "00000/000/00000-", "00000/000/00000-a\x00", "9" * 4000]
)
async def test_invalid_cursor_is_400(api: Api, cursor: str) -> None:
    """Any other text is rejected, and never becomes a path."""
    response = await api.call("GET", "/tasks", params={"cursor": cursor})
    assert (400, "cursor must be the nextCursor of an earlier response") == (response.status, response.body["error"])
    assert ["cursor"] == [error["field"] for error in response.body["details"]]


async def test_response_has_all_errors_of_a_query(api: Api) -> None:
    """An invalid limit does not hide an invalid status."""
    response = await api.call("GET", "/tasks?limit=0&status=done&webhook=lost")
    assert ["limit", "status", "webhook"] == [error["field"] for error in response.body["details"]]
    assert [
        "status must be one of pending, running, completed, failed, cancelled",
        "webhook must be one of waiting, delivering, owed, delivered, abandoned",
    ] == [error["message"] for error in response.body["details"][1:]]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/tasks"),
        ("GET", "/tasks/status"),
        ("GET", "/tasks/t"),
        ("GET", "/tasks/t/logs"),
        ("GET", "/tasks/t/events"),
        ("POST", "/tasks/t/webhook"),
        ("POST", "/cancel/t"),
        ("POST", "/run"),
        ("POST", "/run-async"),
    ],
)
async def test_unknown_query_parameter_is_400(api: Api, method: str, path: str) -> None:
    """It would have no effect, so it is an error as an unknown field is."""
    response = await api.call(method, f"{path}?lastEventID=1&limits=5")
    assert 400 == response.status
    messages = {error["field"]: error["message"] for error in response.body["details"]}
    assert messages["limits"].startswith("Unknown query parameter `limits`")
    assert (path in ("/tasks", "/tasks/t/logs")) == messages["limits"].endswith("; did you mean `limit`?")
    assert (path in ("/tasks/t/events", "/run")) == messages["lastEventID"].endswith("; did you mean `lastEventId`?")


# --- GET /tasks/status -----------------------------------------------------------------------------------------------


async def test_status_has_running_tasks(api: Api) -> None:
    """The response has the running tasks, which of them are being cancelled, and how many tasks wait."""
    empty = await api.call("GET", "/tasks/status")
    assert {"active": 0, "max": 2, "queued": 0, "tasks": []} == empty.body
    running, cancelled, _ = [await api.submit(taskId=task_id) for task_id in ("a", "b", "c")]
    await api.submit_finished(taskId="d")
    started = await api.start(running)
    await api.start(cancelled)
    await api.call("POST", f"/cancel/{cancelled}")
    response = (await api.call("GET", "/tasks/status")).body
    assert (2, 2, 1) == (response["active"], response["max"], response["queued"])
    tasks = {task["taskId"]: task for task in response["tasks"]}
    assert started.started_at is not None
    started_at = started.started_at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    assert {"taskId": "a", "type": "async", "startedAt": started_at, "cancelling": False} == tasks["a"]
    assert tasks["b"]["cancelling"]
    assert {"a", "b"} == set(tasks)


# --- GET /tasks/{taskId} ---------------------------------------------------------------------------------------------


async def test_record_has_all_public_fields(api: Api) -> None:
    """The record has every public field, null while unknown, and no internal ones."""
    task_id = await api.submit(metadata={"b": 1, "a": [2]})
    response = await api.call("GET", f"/tasks/{task_id}")
    assert 200 == response.status
    assert {
        "taskId", "type", "status", "createdAt", "logsPath", "startedAt", "completedAt", "cancelledAt", "executionName",
        "callbackUrl", "exitCode", "error", "reason", "summary", "actionErrors", "webhook", "metadata",
    } == set(response.body)  # fmt: skip
    assert ("async", "pending", None, None) == tuple(
        response.body[name] for name in ("type", "status", "startedAt", "summary")
    )
    assert {"state": "waiting", "attempts": 0, "lastError": None, "nextAttemptAt": None} == response.body["webhook"]
    assert '"metadata":{"b":1,"a":[2]}' in response.text


async def test_finished_record_has_outcome_and_summary(api: Api) -> None:
    """The final record has status, exit code, reason, error and summary."""
    task_id = await api.submit()
    await api.start(task_id)
    await api.finish(task_id, FAILED)
    body = (await api.call("GET", f"/tasks/{task_id}")).body
    assert ("failed", 1, "agent_error", "Claude process exited with code 1") == tuple(
        body[name] for name in ("status", "exitCode", "reason", "error")
    )
    assert {
        "durationMs", "turns", "errors", "startedAt", "completedAt", "costUsd", "usage", "sessionId", "result"
    } == set(body["summary"])  # fmt: skip


async def test_reading_a_lost_task_settles_it(api: Api) -> None:
    """A task whose execution has ended is returned as failed."""
    task_id = await api.submit()
    await api.start(task_id)
    api.jobs.states[task_id] = ExecutionState.FINISHED
    body = (await api.call("GET", f"/tasks/{task_id}")).body
    assert ("failed", "worker_lost", "The worker was lost before the task finished.") == (
        body["status"],
        body["reason"],
        body["error"],
    )


async def test_execution_is_checked_at_most_once_per_interval(api: Api) -> None:
    """Clients poll, and each check of an execution is a call with a quota."""
    task_id = await api.submit()
    for _ in range(20):
        await api.call("GET", f"/tasks/{task_id}")
    assert 1 == api.jobs.state_calls


async def test_slow_check_of_the_execution_delays_no_response(tmp_path: Path) -> None:
    """When the backend does not respond within the timeout, the record is returned as it is stored."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(settle=0.01)) as api:
        task_id = await api.submit()
        api.jobs.gate = asyncio.Event()
        assert "pending" == (await api.call("GET", f"/tasks/{task_id}")).body["status"]
        api.jobs.gate.set()


# --- POST /cancel/{taskId} -------------------------------------------------------------------------------------------


async def test_pending_task_is_cancelled_immediately(api: Api) -> None:
    """The task is final, its payload deleted and its callback due."""
    task_id = await api.submit()
    response = await api.call("POST", f"/cancel/{task_id}")
    assert 200 == response.status
    assert {"message": "The task was cancelled", "taskId": task_id, "status": "cancelled"} == response.body
    record = await api.store.record(task_id)
    assert (Status.CANCELLED, 130, Reason.CANCELLED) == (record.status, record.exit_code, record.reason)
    assert 1 == len(api.owed)
    with pytest.raises(StorageError):
        await api.store.payload(task_id)


async def test_running_task_is_asked_to_stop(api: Api) -> None:
    """The worker is asked to stop; a second cancellation asks again and is reported as such."""
    task_id = await api.submit()
    await api.start(task_id)
    first, second = [await api.call("POST", f"/cancel/{task_id}") for _ in range(2)]
    assert {"message": "The task was cancelled", "taskId": task_id, "status": "cancelled"} == first.body
    assert (200, "cancelling") == (second.status, second.body["status"])
    assert [task_id, task_id] == api.jobs.cancelled
    record = await api.store.record(task_id)
    assert record.is_cancelling
    await api.finish(task_id)
    assert Status.CANCELLED is (await api.store.record(task_id)).status


@pytest.mark.parametrize("outcome", [COMPLETED, FAILED, cancelled_outcome()], ids=lambda outcome: str(outcome.status))
async def test_cancelling_a_finished_task_is_409(api: Api, outcome: Any) -> None:
    """The error has the status of the task, and nothing changes."""
    task_id = await api.submit(taskId="one")
    await api.start(task_id)
    await api.finish(task_id, outcome)
    before = await api.store.read_versioned(task_id)
    response = await api.call("POST", "/cancel/one")
    assert (409, {"error": f"Task one is already {outcome.status}."}) == (response.status, response.body)
    assert before == await api.store.read_versioned(task_id)
    assert [] == api.jobs.cancelled


async def test_one_of_several_cancellations_is_the_first(api: Api) -> None:
    """Of ten concurrent cancellations, one is reported as the first."""
    task_id = await api.submit()
    await api.start(task_id)
    responses = await asyncio.gather(*(api.call("POST", f"/cancel/{task_id}") for _ in range(10)))
    assert ["cancelled"] + ["cancelling"] * 9 == sorted(response.body["status"] for response in responses)


# --- POST /tasks/{taskId}/webhook ------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [COMPLETED, FAILED, cancelled_outcome()], ids=lambda outcome: str(outcome.status))
async def test_delivered_callback_becomes_due_again(api: Api, outcome: Any) -> None:
    """After any outcome, a delivered callback becomes due again."""
    task_id = await api.submit()
    await api.start(task_id)
    await api.finish(task_id, outcome)
    delivered = CallbackInfo(state=CallbackState.DELIVERED, attempts=1)
    await api.store.update(task_id, lambda record: attrs.evolve(record, webhook=delivered))
    response = await api.call("POST", f"/tasks/{task_id}/webhook")
    assert 202 == response.status
    assert {"message": "The callback will be delivered again", "taskId": task_id} == response.body
    assert (await api.store.record(task_id)).owes_callback
    assert [None] == api.owed


@pytest.mark.parametrize("is_running", [False, True])
async def test_redelivery_for_an_unfinished_task_is_409(api: Api, is_running: bool) -> None:
    """The error says that the task has not finished."""
    task_id = await api.submit(taskId="one")
    if is_running:
        await api.start(task_id)
    response = await api.call("POST", "/tasks/one/webhook")
    assert (409, {"error": "Task one has not finished yet."}) == (response.status, response.body)


async def test_redelivery_without_a_callback_is_409(api: Api) -> None:
    """The error says that the task has no callback."""
    async with api.http.post(f"{api.url}/run", json=api.body(taskId="one")):
        await api.start(TaskId("one"))
        await api.finish(TaskId("one"))
        response = await api.call("POST", "/tasks/one/webhook")
    assert (409, {"error": "Task one has no callback."}) == (response.status, response.body)

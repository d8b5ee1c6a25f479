from __future__ import annotations

from pathlib import Path

import pytest
import structlog.testing
from helpers.api import CALLBACK_URL, INTERNAL_ERROR, STORAGE_ROUTES, Api, api_on
from helpers.service import MADE_UP_KEY

from ccrun.api.responses import whole_number
from ccrun.errors import Busy, KeyServiceError, LaunchFailed, StorageError
from ccrun.task import Reason, Status, TaskId


async def test_storage_error_is_503_on_every_route(api: Api) -> None:
    """Each route responds that the storage does not answer, with `Retry-After`."""
    task_id = await api.submit()
    await api.start(task_id)
    api.blobs.error = StorageError()
    for method, path in STORAGE_ROUTES:
        body = {"json": api.body(callbackUrl=CALLBACK_URL)} if path.startswith("/run") else {}
        response = await api.call(method, path.format(task_id), **body)
        assert (503, "5") == (response.status, response.headers["Retry-After"]), path
        assert "The storage does not answer." == response.body["error"]


async def test_key_service_error_is_503(api: Api) -> None:
    """Without the key service, nothing is stored."""
    api.key.error = KeyServiceError()
    response = await api.run_async()
    assert (503, "5") == (response.status, response.headers["Retry-After"])
    assert {"error": "The key service does not answer."} == response.body
    assert [] == list((await api.store.page(limit=10)).tasks)


async def test_launch_error_is_502(api: Api) -> None:
    """The response has the reason; the task is stored as failed, without a callback."""
    api.jobs.error = LaunchFailed("Cloud Run refused the execution: check the permission run.jobs.run.")
    response = await api.run_async(taskId="one")
    assert (502, {"error": api.jobs.error.message}) == (response.status, response.body)
    record = await api.store.record(TaskId("one"))
    assert (Status.FAILED, Reason.LAUNCH_FAILED, None) == (record.status, record.reason, record.webhook)
    with pytest.raises(StorageError):
        await api.store.payload(TaskId("one"))


async def test_busy_backend_is_503(api: Api) -> None:
    """`Retry-After` has the value of the backend."""
    api.jobs.error = Busy("10 tasks are waiting already.", retry_after=30)
    response = await api.run_async()
    assert (503, "30") == (response.status, response.headers["Retry-After"])
    assert {"error": "10 tasks are waiting already."} == response.body


@pytest.mark.parametrize("dependency", ["blobs", "key", "jobs"])
@pytest.mark.parametrize("error", [RuntimeError, ConnectionResetError, TimeoutError, PermissionError, KeyError])
async def test_unexpected_error_is_500_without_details(api: Api, dependency: str, error: type[Exception]) -> None:
    """The response to an unexpected error is constant: no stack trace, no path, no secret. The service continues to work."""
    getattr(api, dependency).error = error(f"/srv/data/{MADE_UP_KEY}")
    with structlog.testing.capture_logs() as logs:
        response = await api.run_async()
    assert (500, {"error": INTERNAL_ERROR}) == (response.status, response.body)
    assert ["request_crashed"] == [entry["event"] for entry in logs if entry["log_level"] == "error"]
    getattr(api, dependency).error = None
    assert 202 == (await api.run_async()).status


@pytest.mark.parametrize("route", STORAGE_ROUTES, ids=lambda pair: " ".join(pair))
async def test_no_route_reveals_an_unexpected_error(api: Api, route: tuple[str, str]) -> None:
    """On every route, the response to an unexpected error is constant."""
    method, path = route
    task_id = await api.submit()
    await api.start(task_id)
    api.blobs.error = RuntimeError(f"/srv/data/{MADE_UP_KEY}")
    body = {"json": api.body(callbackUrl=CALLBACK_URL)} if path.startswith("/run") else {}
    with structlog.testing.capture_logs():
        response = await api.call(method, path.format(task_id), **body)
    assert (500, {"error": INTERNAL_ERROR}) == (response.status, response.body)


async def test_unusable_directory_is_503_without_its_path(tmp_path: Path) -> None:
    """When the storage directory is a file, the error does not contain its path."""
    directory = tmp_path / "data"
    directory.write_text("not a directory")
    async with api_on(directory) as api:
        response = await api.run_async()
        ready = await api.call("GET", "/ready")
    assert (503, "5") == (response.status, response.headers["Retry-After"])
    assert {"error": "The key file can be neither read nor created: Not a directory."} == response.body
    assert (503, ["keyService", "storage"]) == (ready.status, ready.body["failing"])
    assert str(tmp_path) not in response.text + ready.text


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("20", 20), ("07", 7)])
def test_whole_number_is_read(text: str, number: int) -> None:
    """In the range, with at most as many digits as the maximum."""
    assert number == whole_number(text, 1, 20)


@pytest.mark.parametrize("text", ["", "0", "21", "007", "-1", "1.0", "1_0", " 1", "\u0661"])
def test_other_text_is_no_whole_number(text: str) -> None:
    """Neither a number out of the range, nor one that Python would accept and that has other characters than ASCII digits."""
    assert whole_number(text, 1, 20) is None

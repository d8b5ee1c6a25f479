from __future__ import annotations

import asyncio
import json
import os

import pytest
from helpers.api import TASK_ROUTES, Api
from helpers.service import StartService

from ccrun.api.health import ENDPOINTS

# --- routes ----------------------------------------------------------------------------------------------------------


async def test_every_endpoint_of_the_index_exists(api: Api) -> None:
    """No endpoint that `GET /` lists responds as an unknown path or method."""
    for method, path in (endpoint.split() for endpoint in ENDPOINTS):
        response = await api.call(method, path.replace("{taskId}", "none"))
        assert response.status != 405
        assert "GET / lists" not in response.text


async def test_unknown_path_is_404(api: Api) -> None:
    """The error has the path, and says where the endpoints are listed."""
    response = await api.call("GET", "/nothing/here")
    assert (404, {"error": "There is no GET /nothing/here; GET / lists the endpoints."}) == (
        response.status,
        response.body,
    )


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/run", "POST"),
        ("PUT", "/run-async", "POST"),
        ("POST", "/tasks", "GET, HEAD"),
        ("DELETE", "/tasks/none", "GET, HEAD"),
        ("POST", "/tasks/none/events", "GET, HEAD"),
        ("GET", "/tasks/none/webhook", "POST"),
        ("GET", "/cancel/none", "POST"),
        ("OPTIONS", "/health", "GET, HEAD"),
    ],
)
async def test_unsupported_method_is_405(api: Api, method: str, path: str, allowed: str) -> None:
    """The `Allow` header and the error have the methods of the path."""
    response = await api.call(method, path)
    assert (405, allowed) == (response.status, response.headers["Allow"])
    assert {"error": f"{method} is not allowed here; use {allowed}."} == response.body


@pytest.mark.parametrize("path", ["/tasks/{}/logs", "/tasks/{}", "/tasks", "/health"])
async def test_head_has_no_body(api: Api, path: str) -> None:
    """The response to HEAD has no body, so that the connection serves the next request."""
    task_id = await api.submit_finished()
    await api.add_chunk(task_id, 1, b'{"n":1}')
    head = f"HEAD {path.format(task_id)} HTTP/1.1\r\nHost: x\r\n\r\n"
    response = await api.raw((head + "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").encode())
    first, _, second = response.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert second.startswith(b"HTTP/1.1 200 ")


# --- task IDs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", TASK_ROUTES, ids=lambda pair: " ".join(pair))
async def test_unknown_task_is_404(api: Api, route: tuple[str, str]) -> None:
    """Each route responds that there is no such task."""
    method, path = route
    response = await api.call(method, path.format("none"))
    assert (404, {"error": "There is no task none."}) == (response.status, response.body)


@pytest.mark.parametrize("route", TASK_ROUTES, ids=lambda pair: " ".join(pair))
@pytest.mark.parametrize(
    "task_id",
    [
        "..%2f..%2fdata",
        "..%2F.keys%2Fsealing.key",
        "%2e%2e",
        "a%5c..%5cb",
        ".locks",
        "%00",
        "a%00",
        "a%0a",
        "a%20b",
        "a.b",
        "a;b=c",
        "%ff",
        "%E2%82%AC",
        "x" * 129,
        "x" * 300,
    ],
)
async def test_invalid_task_id_is_404(api: Api, route: tuple[str, str], task_id: str) -> None:
    """An ID with other characters is never looked up in the storage."""
    method, path = route
    api.blobs.error = AssertionError("the storage was used")
    raw = f"{method} {path.format(task_id)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    response = await api.raw(raw.encode())
    assert response.startswith(b"HTTP/1.1 404 ")
    message = "There is no task with this ID: an ID has letters, digits, underscores and hyphens only."
    assert message == json.loads(response.partition(b"\r\n\r\n")[2])["error"]


async def test_task_id_may_have_every_allowed_character_and_length(api: Api) -> None:
    """Every allowed character and the full length work in a path."""
    for task_id in ("x" * 128, "-", "_", "AZaz09_-", "status-1"):
        await api.submit(taskId=task_id)
        assert task_id == (await api.call("GET", f"/tasks/{task_id}")).body["taskId"]


# --- complete services -----------------------------------------------------------------------------------------------


async def test_two_services_on_one_directory_serve_the_same_tasks(start_service: StartService) -> None:
    """Each streams, lists and replays the tasks that the other runs."""
    async with start_service() as one, start_service(data_dir=one.data_dir) as other:
        task_id = (await one.submit())["taskId"]
        other_events, own_events = await asyncio.gather(other.events(task_id), one.events(task_id))
        assert "completed" == other_events[-1].data["status"]
        compared = [
            [event for event in events if event.name in ("message", "done")] for events in (other_events, own_events)
        ]
        assert compared[0] == compared[1]
        other_id = (await other.run())[-1].data["taskId"]
        assert {task_id, other_id} == {task["taskId"] for task in (await one.get("/tasks"))["tasks"]}


async def test_directory_that_becomes_unusable_is_503(start_service: StartService) -> None:
    """When the directory of a running service becomes read-only (for root: a file), the error does not contain its path."""
    async with start_service() as service:
        await service.get("/ready")
        if os.geteuid() == 0:
            service.data_dir.rename(service.data_dir.with_name("away"))
            service.data_dir.write_text("not a directory")
        else:
            for path in [service.data_dir, *service.data_dir.rglob("*")]:
                path.chmod(0o500 if path.is_dir() else 0o400)
        async with service.http.post(f"{service.url}/run", json=service.body()) as response:
            assert (503, "5") == (response.status, response.headers["Retry-After"])
            message = (await response.json())["error"]
        assert message.startswith(("The key file can be", "The storage directory cannot be"))
        assert str(service.data_dir) not in message

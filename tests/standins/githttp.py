"""A stand-in for a git host over HTTP on a loopback socket: aiohttp in front of the real `git http-backend`.

https://git-scm.com/docs/http-protocol
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import enum
import re
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Self

import attrs
import pytest
from aiohttp import web
from standins.git_process import CHUNK_BYTES, backend, environment, pump
from standins.lfs import LfsServer
from standins.repos import Repos
from standins.tls import self_signed

TOKEN: Final = "made-up-token-of-the-tests"
REALM: Final = 'Basic realm="Git"'
#: The paths of the smart protocol.
SERVICE: Final = re.compile(r"/(info/refs|git-upload-pack|git-receive-pack)$")

#: Some distributions have it in a separate package.
needs_backend: Final = pytest.mark.skipif(
    not Path(subprocess.check_output(["git", "--exec-path"], text=True).strip(), "git-http-backend").exists(),
    reason="git-http-backend is not installed: git cannot be served over HTTP",
)


class Mode(enum.Enum):
    """How the server handles requests."""

    SERVE = enum.auto()
    #: Never respond to a request.
    HANG = enum.auto()


@attrs.frozen(kw_only=True)
class Redirect:
    """A redirect of every request to the same path on another server."""

    base: str
    status: int = 302


@attrs.frozen(kw_only=True)
class Request:
    """A request that the server received."""

    method: str
    #: Including the query.
    path: str
    #: The header `Authorization`.
    authorization: str | None
    headers: dict[str, str]

    @property
    def credential(self) -> tuple[str, str] | None:
        """The user name and the password of Basic authentication."""
        return _credential(self.authorization)


class GitHttp:
    """A server for repositories.

    Args:
        repos: The repositories.
        token: The password, with any user name. None: no authentication is required.
        public: Whether fetching requires no authentication.
        tls: Whether the server uses https, with the certificate `ca_file`.
    """

    def __init__(self, repos: Repos, *, token: str | None = TOKEN, public: bool = False, tls: bool = False) -> None:
        self.token = token
        self.public = public
        self.mode = Mode.SERVE
        #: If set, the status of every response, such as 403 or 503. Its body is `message`.
        self.status: int | None = None
        #: How many responses have that status; None for all.
        self.status_times: int | None = None
        self.message = "Requested by the test."
        #: The headers of such a response.
        self.headers: dict[str, str] = {}
        self.redirect: Redirect | None = None
        #: Old names of repositories, with their new ones. Requests for old names are redirected with 301.
        self.moved: dict[str, str] = {}
        #: If set, the connection is reset after this many bytes of a response of git.
        self.drop_after_bytes: int | None = None
        #: Called with method and path before git starts.
        self.before: Callable[[str], Awaitable[None]] | None = None
        #: The server of Git LFS for all repositories, if there is one.
        self.lfs: LfsServer | None = None
        self.requests: list[Request] = []
        self.port = 0
        self._repos = repos
        self._tls = tls
        self._directory: Path | None = None
        self._handlers: set[asyncio.Task[Any]] = set()
        self._open = contextlib.AsyncExitStack()

    @property
    def ca_file(self) -> Path:
        """The certificate, for GIT_SSL_CAINFO or SSL_CERT_FILE. It exists while the server runs."""
        assert self._directory is not None
        return self._directory / "certificate.pem"

    @property
    def base(self) -> str:
        """The URL of the server, without a trailing slash."""
        return self.base_at("127.0.0.1")

    def base_at(self, host: str, *, user: str | None = None) -> str:
        """Return the URL of the server with another host name of this machine, such as `localhost`."""
        return f"http{'s' if self._tls else ''}://{f'{user}@' if user else ''}{host}:{self.port}"

    def url(self, name: str, *, user: str | None = None, host: str = "127.0.0.1", suffix: str = ".git") -> str:
        """Return the URL of a repository. `user` may contain a password after a colon."""
        return f"{self.base_at(host, user=user)}/{name}{suffix}"

    def clear_requests(self) -> None:
        """Forget the requests so far."""
        self.requests.clear()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            context = None
            if self._tls:
                self._directory = Path(await asyncio.to_thread(tempfile.mkdtemp))
                stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
                context, _ = self_signed(self._directory)
            # git-http-backend decompresses bodies itself.
            server = web.Server(self._handle, access_log=None, auto_decompress=False, handler_cancellation=True)
            runner = web.ServerRunner(server, shutdown_timeout=0.05)
            await runner.setup()
            stack.push_async_callback(self._wait_for_handlers)
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
            self.port = runner.addresses[0][1]
            self._open = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._open.aclose()

    async def _wait_for_handlers(self) -> None:
        # `cleanup` cancels the handlers but does not wait until they have killed their git processes.
        while self._handlers:
            await asyncio.wait(self._handlers)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(
            Request(
                method=request.method,
                path=request.raw_path,
                authorization=request.headers.get("Authorization"),
                headers=dict(request.headers),
            )
        )
        if self.mode is Mode.HANG:
            await asyncio.Event().wait()
        if self.redirect is not None:
            return web.Response(
                status=self.redirect.status, headers={"Location": self.redirect.base + request.raw_path}
            )
        if self.status is not None and self.status_times != 0:
            if self.status_times is not None:
                self.status_times -= 1
            return web.Response(status=self.status, headers=self.headers, text=self.message)
        return await self._serve(request)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.lfs is not None and self.lfs.handles(request.path):
            if self.lfs.needs_login(request.path) and not self._is_authorized(request):
                return web.Response(status=401, headers={"WWW-Authenticate": REALM, "LFS-Authenticate": REALM})
            return await self.lfs.handle(request, self.base)
        service = SERVICE.search(request.path)
        if service is None or (service[1] == "info/refs" and "service" not in request.query):
            return web.Response(status=404, text="Not found. This server supports only git's smart protocol.")
        name = request.path[: service.start()].strip("/")
        if not self._is_authorized(request):
            return web.Response(status=401, headers={"WWW-Authenticate": REALM}, text="Authentication required.")
        moved_to = self.moved.get(name.removesuffix(".git"))
        if moved_to is not None:
            query = f"?{request.query_string}" if request.query_string else ""
            return web.Response(status=301, headers={"Location": f"/{moved_to}.git{service[0]}{query}"})
        repository = self._repos.find(name)
        if repository is None:
            return web.Response(status=404, text="Repository not found.")
        if self.before is not None:
            await self.before(f"{request.method} {request.raw_path}")
        variables = _cgi(
            request, self._repos.root.resolve(), f"/{repository.relative_to(self._repos.root.resolve())}{service[0]}"
        )
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        try:
            async with backend(["git", "http-backend"], env=environment(**variables)) as git:
                return await self._bridge(request, git)
        finally:
            self._handlers.discard(handler)

    def _is_authorized(self, request: web.BaseRequest) -> bool:
        is_push = "git-receive-pack" in (request.path.rpartition("/")[2], request.query.get("service"))
        if self.token is None or (self.public and not is_push):
            return True
        credential = _credential(request.headers.get("Authorization"))
        return credential is not None and credential[1] == self.token

    async def _bridge(self, request: web.BaseRequest, git: asyncio.subprocess.Process) -> web.StreamResponse:
        assert git.stdin is not None
        assert git.stdout is not None
        assert git.stderr is not None
        tasks = [
            asyncio.create_task(_feed(request, git.stdin)),
            # If its stderr were not read, git would block.
            asyncio.create_task(pump(git.stderr, _discard)),
        ]
        try:
            head = (await git.stdout.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
            headers = {name: value for name, _, value in (line.partition(": ") for line in head if line)}
            response = web.StreamResponse(status=int(headers.pop("Status", "200").split()[0]), headers=headers)
            # A client that disconnects is not an error.
            with contextlib.suppress(ConnectionResetError):
                await self._send(request, response, git.stdout)
            return response
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _send(
        self, request: web.BaseRequest, response: web.StreamResponse, content: asyncio.StreamReader
    ) -> None:
        await response.prepare(request)
        sent = 0
        while data := await content.read(CHUNK_BYTES):
            if self.drop_after_bytes is not None and sent + len(data) > self.drop_after_bytes:
                await response.write(data[: self.drop_after_bytes - sent])
                _reset(request)
                return
            sent += len(data)
            await response.write(data)


def _cgi(request: web.BaseRequest, root: Path, path: str) -> dict[str, str]:
    """Return the variables that git-http-backend(1) reads."""
    variables = {
        "GIT_PROJECT_ROOT": str(root),
        "GIT_HTTP_EXPORT_ALL": "1",
        "REQUEST_METHOD": request.method,
        "PATH_INFO": path,
        "QUERY_STRING": request.query_string,
        "CONTENT_TYPE": request.headers.get("Content-Type", ""),
        "REMOTE_ADDR": request.remote or "",
    }
    # A chunked body has no length. Then the backend reads to the end of its input.
    for variable, header in {
        "CONTENT_LENGTH": "Content-Length",
        "HTTP_CONTENT_ENCODING": "Content-Encoding",
        "GIT_PROTOCOL": "Git-Protocol",
    }.items():
        if header in request.headers:
            variables[variable] = request.headers[header]
    return variables


async def _feed(request: web.BaseRequest, stdin: asyncio.StreamWriter) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        async for data in request.content.iter_any():
            stdin.write(data)
            await stdin.drain()
        # Not if the client disconnected: git must not mistake the incomplete request for a complete one.
        stdin.close()


async def _discard(data: bytes) -> None: ...


def _reset(request: web.BaseRequest) -> None:
    """Reset the TCP connection."""
    assert request.transport is not None
    request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()


def _credential(header: str | None) -> tuple[str, str] | None:
    scheme, _, encoded = (header or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return user, password

"""Single requests of the upload protocol. `test_blobs_parts.py` tests whole uploads and their failures."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import attrs
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from ccrun.backends.gcp.upload import PART_BYTES, ResumableStorage, UploadProgress

TIMEOUT = aiohttp.ClientTimeout(total=10)


@attrs.define
class Service:
    """A server that returns a fixed response and records its requests."""

    response: web.Response = attrs.field(factory=web.Response)
    requests: list[tuple[str, dict[str, str], bytes]] = attrs.field(factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        """Record a request and return the response."""
        self.requests.append((request.path_qs, dict(request.headers), await request.read()))
        return self.response


@pytest.fixture
async def service() -> AsyncIterator[tuple[Service, ResumableStorage, str]]:
    """Return a server, a client of it, and the URL of an upload."""
    service = Service()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", service.handle)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        shared: Any = session
        root = str(server.make_url("")).rstrip("/")
        yield service, ResumableStorage(session=shared, api_root=root, token=None), f"{root}/upload?id=a%2Fb"


def test_part_size_is_valid() -> None:
    """The size of a part is a multiple of 256 KiB, which the protocol requires."""
    assert 0 == PART_BYTES % (256 * 1024)


@pytest.mark.parametrize(
    ("status", "headers", "body", "progress"),
    [
        (308, {}, None, UploadProgress(0)),
        (308, {"Range": "bytes=0-9"}, None, UploadProgress(10)),
        (200, {}, {"size": "26", "generation": "7"}, UploadProgress(26, 7)),
    ],
)
async def test_response_contains_the_progress(
    service: tuple[Service, ResumableStorage, str],
    status: int,
    headers: dict[str, str],
    body: dict[str, str] | None,
    progress: UploadProgress,
) -> None:
    """The response to a part says that nothing, some bytes, or the whole object is stored. 308 is not treated as a redirect."""
    server, storage, url = service
    server.response = web.json_response(body, status=status, headers=headers)
    assert progress == await storage.send_part(url, b"abc", start=10, size=26, timeout=TIMEOUT)
    [(path, sent, content)] = server.requests
    assert ("/upload?id=a%2Fb", "bytes 10-12/26", b"abc") == (path, sent["Content-Range"], content)


async def test_progress_query_has_no_content(service: tuple[Service, ResumableStorage, str]) -> None:
    """A progress query contains the object's size but no content."""
    server, storage, url = service
    server.response = web.Response(status=308)
    assert UploadProgress(0) == await storage.get_progress(url, size=26, timeout=TIMEOUT)
    [(_, sent, content)] = server.requests
    assert ("bytes */26", b"") == (sent["Content-Range"], content)


@pytest.mark.parametrize("status", [404, 410, 412, 503])
async def test_error_status_is_raised(service: tuple[Service, ResumableStorage, str], status: int) -> None:
    """An error status is raised with its number, which the caller interprets."""
    server, storage, url = service
    server.response = web.Response(status=status)
    with pytest.raises(aiohttp.ClientResponseError) as caught:
        await storage.get_progress(url, size=26, timeout=TIMEOUT)
    assert status == caught.value.status

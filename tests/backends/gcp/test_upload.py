"""The protocol of an upload in parts, one request at a time; whole uploads, with all that can go wrong, are in `test_blobs`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import attrs
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from ccrun.backends.gcp.upload import PART_BYTES, ResumableStorage, UploadProgress

SILENCE = aiohttp.ClientTimeout(total=10)


@attrs.define
class Service:
    """Answers as it is told, and notes what it was asked."""

    answer: web.Response = attrs.field(factory=web.Response)
    asked: list[tuple[str, dict[str, str], bytes]] = attrs.field(factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        """Answer one request."""
        self.asked.append((request.path_qs, dict(request.headers), await request.read()))
        return self.answer


@pytest.fixture
async def service() -> AsyncIterator[tuple[Service, ResumableStorage, str]]:
    """A service, a client of it, and the url of an upload."""
    service = Service()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", service.handle)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        shared: Any = session
        root = str(server.make_url("")).rstrip("/")
        yield service, ResumableStorage(session=shared, api_root=root, token=None), f"{root}/upload?id=a%2Fb"


def test_parts_are_what_the_protocol_wants() -> None:
    """All but the last are a multiple of 256 KiB."""
    assert 0 == PART_BYTES % (256 * 1024)


@pytest.mark.parametrize(
    ("status", "headers", "body", "progress"),
    [
        (308, {}, None, UploadProgress(0)),
        (308, {"Range": "bytes=0-9"}, None, UploadProgress(10)),
        (200, {}, {"size": "26", "generation": "7"}, UploadProgress(26, 7)),
    ],
)
async def test_an_answer_tells_how_far_it_has_come(
    service: tuple[Service, ResumableStorage, str],
    status: int,
    headers: dict[str, str],
    body: dict[str, str] | None,
    progress: UploadProgress,
) -> None:
    """Nothing yet, some bytes, or all of them: 308 is no redirection here."""
    server, storage, url = service
    server.answer = web.json_response(body, status=status, headers=headers)
    assert progress == await storage.send_part(url, b"abc", start=10, size=26, timeout=SILENCE)
    [(path, sent, content)] = server.asked
    assert ("/upload?id=a%2Fb", "bytes 10-12/26", b"abc") == (path, sent["Content-Range"], content)


async def test_progress_is_asked_without_content(service: tuple[Service, ResumableStorage, str]) -> None:
    """With the size of the whole."""
    server, storage, url = service
    server.answer = web.Response(status=308)
    assert UploadProgress(0) == await storage.get_progress(url, size=26, timeout=SILENCE)
    [(_, sent, content)] = server.asked
    assert ("bytes */26", b"") == (sent["Content-Range"], content)


@pytest.mark.parametrize("status", [404, 410, 412, 503])
async def test_a_refusal_is_raised(service: tuple[Service, ResumableStorage, str], status: int) -> None:
    """What it means is for the caller to say."""
    server, storage, url = service
    server.answer = web.Response(status=status)
    with pytest.raises(aiohttp.ClientResponseError) as caught:
        await storage.get_progress(url, size=26, timeout=SILENCE)
    assert status == caught.value.status

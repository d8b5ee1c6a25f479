"""EventSource of browsers, which gives up after any status but 200."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from helpers.api import Api, until
from helpers.service import WAIT_SECONDS

from ccrun.errors import StorageError

#: The headers by which an EventSource is told from other clients.
EVENT_SOURCE = {"Accept": "text/event-stream", "Cache-Control": "no-cache", "Sec-Fetch-Mode": "cors"}
PAGE = """<!doctype html><script>
const source = new EventSource("/tasks/one/events");
for (const name of ["task", "unavailable", "done"])
  source.addEventListener(name, event => {
    fetch("/report", {method: "POST", body: JSON.stringify([name, JSON.parse(event.data)])});
    if (name == "done") source.close();
  });
</script>"""


async def test_event_source_gets_an_event_instead_of_503(api: Api) -> None:
    """The event says when it comes back. Other clients get 503, also those that use `fetch` in a browser."""
    await api.submit(taskId="one")
    api.blobs.error = StorageError()
    async with api.http.get(f"{api.url}/tasks/one/events", headers=EVENT_SOURCE) as response:
        assert (200, "text/event-stream", "close") == (
            response.status,
            response.content_type,
            response.headers["Connection"],
        )
        assert (await response.text()) == (
            'retry: 5000\nevent: unavailable\ndata: {"error":"The storage does not answer.","retryAfter":5}\n\n'
        )
    for name in EVENT_SOURCE:
        headers = {each: value for each, value in EVENT_SOURCE.items() if each != name}
        other = await api.call("GET", "/tasks/one/events", headers=headers)
        assert (503, "5") == (other.status, other.headers["Retry-After"])


async def test_unknown_task_ends_an_event_source(api: Api) -> None:
    """A status that another attempt would not change stays what it is."""
    response = await api.call("GET", "/tasks/one/events", headers=EVENT_SOURCE)
    assert response.status == 404


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
async def test_chromium_comes_back_to_an_unavailable_stream(api: Api, tmp_path: Path) -> None:
    """The stream that could not be served is read to its end in the same page."""
    await api.submit_finished(taskId="one")
    reports: list[list[object]] = []

    async def page(_: web.Request) -> web.Response:
        return web.Response(text=PAGE, content_type="text/html")

    async def report(request: web.Request) -> web.Response:
        reports.append(json.loads(await request.text()))
        return web.Response()

    async def events(request: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name != "Host"}
        async with ClientSession() as http, http.get(api.url + request.path_qs, headers=headers) as found:
            return web.Response(
                body=await found.read(), status=found.status, headers={"Content-Type": found.content_type}
            )

    app = web.Application()
    app.add_routes([web.get("/page", page), web.post("/report", report), web.get("/tasks/one/events", events)])
    api.blobs.error = StorageError()
    async with TestServer(app) as server:
        browser = await asyncio.create_subprocess_exec(
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--remote-debugging-port=0", str(server.make_url("/page"))),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await until(lambda: len(reports) == 1)
                api.blobs.error = None
                await until(lambda: len(reports) == 3)
        finally:
            browser.kill()
            await browser.wait()
    assert ["unavailable", "task", "done"] == [name for name, _ in reports]

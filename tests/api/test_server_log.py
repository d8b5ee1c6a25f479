from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from pathlib import Path
from typing import Final

import aiohttp
import pytest
from helpers.service import WAIT_SECONDS, serve_process
from yarl import URL

from ccrun import log
from ccrun.api.server_log import server_logger
from ccrun.config import LogFormat

CANARY: Final = b"canary-of-the-tests"
BODY: Final = b'{"prompt": "' + CANARY + b'"}'
JSON_TYPE: Final = b"Content-Type: application/json\r\n"
LENGTH: Final = b"Content-Length: %d\r\n" % len(BODY)
#: How often each request is sent: a thousand requests in total.
REPETITIONS: Final = 50


def request(body: bytes = b"", headers: bytes = b"", line: bytes = b"POST /run-async HTTP/1.1") -> bytes:
    """Return the bytes of a request."""
    return line + b"\r\nHost: localhost\r\nConnection: close\r\n" + headers + b"\r\n" + body


REQUESTS: Final = {
    "control character in a header": request(BODY, b"Authorization: Bearer \x01" + CANARY + b"\r\n" + LENGTH),
    "long header": request(headers=b"Authorization: Bearer " + CANARY * 1000 + b"\r\n"),
    "many headers": request(headers=(b"X-Header: " + CANARY + b"\r\n") * 1000),
    "header without a colon": request(headers=b"Authorization " + CANARY + b"\r\n"),
    "body that is not chunked": request(BODY, JSON_TYPE + b"Transfer-Encoding: chunked\r\n"),
    "chunk of another size": request(b"5\r\n" + BODY, JSON_TYPE + b"Transfer-Encoding: chunked\r\n"),
    "unknown transfer encoding": request(BODY, JSON_TYPE + b"Transfer-Encoding: " + CANARY + b"\r\n"),
    "body that is not compressed": request(BODY, JSON_TYPE + b"Content-Encoding: gzip\r\n" + LENGTH),
    "unknown content encoding": request(BODY, JSON_TYPE + b"Content-Encoding: " + CANARY + b"\r\n" + LENGTH),
    "length that is no number": request(BODY, JSON_TYPE + b"Content-Length: " + CANARY + b"\r\n"),
    "two lengths": request(BODY, JSON_TYPE + LENGTH + b"Content-Length: 5\r\n"),
    "unknown method": request(line=CANARY + b" / HTTP/1.1"),
    "invalid method": request(line=CANARY + b"\x02 / HTTP/1.1"),
    "unknown version": request(line=b"GET / HTTP/" + CANARY),
    "unknown path": request(line=b"GET /tasks/" + CANARY + b"?key=" + CANARY + b" HTTP/1.1"),
    "invalid host in the path": request(line=b"GET http://[" + CANARY + b"/ HTTP/1.1"),
    "upgrade": request(headers=b"Upgrade: " + CANARY + b"\r\n", line=b"GET / HTTP/1.1"),
    "unknown charset": request(BODY, b"Content-Type: application/json; charset=" + CANARY + b"\r\n" + LENGTH),
    "body that is no JSON": request(b"{" + BODY, JSON_TYPE + b"Content-Length: %d\r\n" % (len(BODY) + 1)),
    "byte that is no ASCII": request(BODY, JSON_TYPE + LENGTH + b"Idempotency-Key: " + CANARY + b"\xff\r\n"),
}


async def send(url: str, content: bytes) -> bytes:
    """Send bytes on a new connection; return what the server sends until it closes the connection."""
    async with asyncio.timeout(WAIT_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", URL(url).port)
        response = b""
        # The server may close the connection before it has read everything.
        with contextlib.suppress(ConnectionError):
            writer.write(content)
            await writer.drain()
            response = await reader.read()
        writer.close()
        return response


async def test_log_does_not_quote_malformed_requests(tmp_path: Path) -> None:
    """Nothing of a thousand malformed requests is in the log, at any level; each is a line at INFO at most, without a trace."""
    log_file = tmp_path / "log"
    gate = asyncio.Semaphore(20)

    async def send_one(url: str, content: bytes) -> None:
        async with gate:
            await send(url, content)

    async with serve_process(tmp_path / "data", log_file, LOG_LEVEL="DEBUG") as service:
        for _ in range(REPETITIONS):
            await asyncio.gather(*(send_one(service.url, content) for content in REQUESTS.values()))
        async with aiohttp.ClientSession() as http, http.get(f"{service.url}/health") as response:
            assert 200 == response.status
    content = await asyncio.to_thread(log_file.read_bytes)
    assert CANARY not in content
    lines = [json.loads(line) for line in content.splitlines()]
    assert {"DEBUG", "INFO"} >= {line["severity"] for line in lines if line.get("event") != "response_aborted"}
    malformed = [line for line in lines if line.get("event") == "request_malformed"]
    assert {"127.0.0.1"} == {line["peer"] for line in malformed}
    assert len(malformed) >= REPETITIONS * 10


@pytest.mark.parametrize("name", ["body that is not chunked", "body that is not compressed", "unknown version"])
async def test_malformed_request_is_rejected(tmp_path: Path, name: str) -> None:
    """The client gets the status 400."""
    async with serve_process(tmp_path / "data") as service:
        assert b"400 Bad Request" == (await send(service.url, REQUESTS[name])).split(b"\r\n")[0][len("HTTP/1.1 ") :]


async def test_other_errors_are_logged_without_their_text(tmp_path: Path) -> None:
    """The line about an unexpected error has its type and its frames, and not its message."""
    with (tmp_path / "log").open("wb") as file:
        log.configure(LogFormat.JSON, "INFO", fd=file.fileno())
        try:
            int(CANARY)
        except ValueError:
            server_logger().exception("Unhandled exception")
        server_logger().debug("Ignored premature client disconnection")
        for handler in logging.getLogger().handlers:
            await asyncio.to_thread(handler.flush)
        log.configure(LogFormat.JSON, "WARNING")
        line = json.loads((tmp_path / "log").read_bytes())
    assert ("server_error", "ERROR", "ValueError") == (line["event"], line["severity"], line["kind"])
    assert line["frames"][0].startswith("test_other_errors_are_logged_without_their_text (")
    assert CANARY.decode() not in json.dumps(line)

"""Compressed bodies."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest
from helpers.api import MAX_REQUEST_BYTES, Api, ApiResponse

from ccrun.api.body import decompress

BODY = json.dumps({"prompt": "Do it.", "anthropicApiKey": "made-up-key", "callbackUrl": "http://127.0.0.1:9/"}).encode()
NOT_ENCODED = "The body is not encoded as its headers say."


async def post(api: Api, body: bytes, coding: str) -> ApiResponse:
    """Send a body with a content coding."""
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    return await api.call("POST", "/run-async", data=body, headers=headers)


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(BODY)),
        ("GZIP", gzip.compress(BODY)),
        ("x-gzip", gzip.compress(BODY)),
        ("deflate", zlib.compress(BODY)),
        ("identity", BODY),
    ],
)
async def test_compressed_body_is_read(api: Api, coding: str, body: bytes) -> None:
    """The usual codings of HTTP are accepted."""
    assert 202 == (await post(api, body, coding)).status


@pytest.mark.parametrize(
    "body",
    [b"{}", b"", gzip.compress(BODY)[:-1], gzip.compress(BODY) + b"x", gzip.compress(BODY)[:-8] + bytes(8)],
    ids=["plain", "empty", "incomplete", "more than one", "wrong checksum"],
)
async def test_body_that_cannot_be_decompressed_is_400(api: Api, body: bytes) -> None:
    """A body whose encoding does not match its header is a client error."""
    response = await post(api, body, "gzip")
    assert (400, {"error": NOT_ENCODED}) == (response.status, response.body)


async def test_unknown_coding_is_415(api: Api) -> None:
    """The error names the codings that are accepted."""
    response = await post(api, BODY, "br")
    error = "Content-Encoding may be gzip, deflate or identity."
    assert (415, {"error": error}) == (response.status, response.body)


async def test_limit_applies_to_the_decompressed_body(api: Api) -> None:
    """A small body that decompresses to a large one is rejected, without decompressing all of it."""
    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) < MAX_REQUEST_BYTES
    assert 413 == (await post(api, bomb, "gzip")).status
    assert 1001 == len(decompress(bomb, 31, max_bytes=1000))

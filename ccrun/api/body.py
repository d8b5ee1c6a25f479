"""Reading the body of a request, with limits on its time, and on its size before and after decompression."""

from __future__ import annotations

import asyncio
import zlib
from typing import Final

from aiohttp import web

#: `wbits` of zlib for each coding of RFC 9110, section 8.4.1: with its header and trailer.
_CODINGS: Final = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


async def read_json_body(request: web.Request, *, seconds: float) -> bytes:
    """Return the body, decompressed in a thread. The server must not decompress it: it would block the event loop.

    Args:
        seconds: For the arrival of the whole body. Its size is limited by the app's `client_max_size`.

    Raises:
        web.HTTPException: It is not JSON by its headers, too late, too large, or not encoded as its headers say.
    """
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(reason="The body must be JSON, with Content-Type: application/json")
    coding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in (*_CODINGS, "identity"):
        raise web.HTTPUnsupportedMediaType(reason="Content-Encoding may be gzip, deflate or identity")
    try:
        async with asyncio.timeout(seconds):
            body = await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason=f"The body did not arrive within {seconds:g} s") from None
    except web.RequestPayloadError:
        raise web.HTTPBadRequest(reason="The body is not encoded as its headers say") from None
    if coding == "identity":
        return body
    try:
        decompressed = await asyncio.to_thread(decompress, body, _CODINGS[coding], max_bytes=request.client_max_size)
    except (EOFError, zlib.error):
        raise web.HTTPBadRequest(reason="The body is not encoded as its headers say") from None
    if len(decompressed) > request.client_max_size:
        raise web.HTTPRequestEntityTooLarge(request.client_max_size)
    return decompressed


def decompress(body: bytes, wbits: int, *, max_bytes: int) -> bytes:
    """Return the decompressed body, or the first `max_bytes` + 1 bytes of it.

    Args:
        wbits: As of `zlib.decompressobj`.

    Raises:
        EOFError: The body is incomplete, or more follows it.
        zlib.error: The body is not compressed in this way.
    """
    decompressor = zlib.decompressobj(wbits)
    content = decompressor.decompress(body, max_bytes + 1)
    if len(content) <= max_bytes and (not decompressor.eof or decompressor.unused_data):
        raise EOFError
    return content

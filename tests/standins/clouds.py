"""Stand-ins for the model APIs of clouds: they check the credential, and a scripted model replies in the format of each.

- Vertex AI: https://docs.cloud.google.com/vertex-ai/generative-ai/docs/partner-models/claude
- Bedrock: https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_InvokeModelWithResponseStream.html
  and https://smithy.io/2.0/aws/amazon-eventstream.html
- Foundry: https://learn.microsoft.com/azure/ai-foundry/foundry-models/how-to/use-foundry-models-claude
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final, Self

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from ccrun.testing.model import Script, ScriptedModel

_VERTEX: Final = re.compile(
    r"/projects/[^/]+/locations/[^/]+/publishers/anthropic/models/([^:]+):[a-zA-Z]*[rR]awPredict"
)
_BEDROCK: Final = re.compile(r"/model/(.+)/invoke-with-response-stream")

#: Returns whether a request is authenticated, from method, path, headers and body.
IsAuthentic = Callable[[str, str, Mapping[str, str], bytes], bool]


class CloudModel:
    """The server.

    Args:
        script: What the model does.
        is_authentic: Checks each request. Others get 403.
    """

    def __init__(self, script: Script, is_authentic: IsAuthentic) -> None:
        self._script = script
        self._is_authentic = is_authentic
        #: The paths of the requests.
        self.paths: list[str] = []
        self.rejected = 0
        self.url = ""
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._model = await self._stack.enter_async_context(ScriptedModel(self._script))
        self._session = await self._stack.enter_async_context(aiohttp.ClientSession())
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        server = await self._stack.enter_async_context(TestServer(app))
        self.url = str(server.make_url("")).rstrip("/")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        content = await request.read()
        self.paths.append(request.raw_path)
        if not self._is_authentic(request.method, request.raw_path, request.headers, content):
            self.rejected += 1
            return web.json_response({"message": "The signature or the token is not valid."}, status=403)
        body: dict[str, Any] = json.loads(content)
        is_bedrock = _BEDROCK.fullmatch(request.path)
        match = _VERTEX.fullmatch(request.path) or is_bedrock
        if match:
            body |= {"model": match[1], "stream": True}
        response = web.StreamResponse(
            headers={"Content-Type": "application/vnd.amazon.eventstream" if is_bedrock else "text/event-stream"}
        )
        headers = {"X-Api-Key": "made-up", "Anthropic-Version": "2023-06-01"}
        async with self._session.post(f"{self._model.url}/v1/messages", json=body, headers=headers) as answer:
            await response.prepare(request)
            async for piece in _events(answer) if is_bedrock else answer.content.iter_any():
                await response.write(piece)
        return response


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the events of a stream as messages of Amazon's event streams."""
    async for line in answer.content:
        if line.startswith(b"data: "):
            payload = json.dumps({"bytes": base64.b64encode(line[6:].strip()).decode()}).encode()
            yield _message(
                {":event-type": "chunk", ":content-type": "application/json", ":message-type": "event"}, payload
            )


def _message(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Return a message: lengths, their checksum, headers of type string, payload, checksum."""
    encoded = b"".join(
        struct.pack("!B", len(name)) + name.encode() + struct.pack("!BH", 7, len(value)) + value.encode()
        for name, value in headers.items()
    )
    prelude = struct.pack("!II", 16 + len(encoded) + len(payload), len(encoded))
    message = prelude + struct.pack("!I", zlib.crc32(prelude)) + encoded + payload
    return message + struct.pack("!I", zlib.crc32(message))

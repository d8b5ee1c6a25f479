"""A stand-in for Cloud KMS on a loopback socket: the methods encrypt and decrypt of the REST API v1, with injected faults.

https://cloud.google.com/kms/docs/reference/rest/v1/projects.locations.keyRings.cryptoKeys
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import itertools
import secrets
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator
from typing import Any, Final, Self

import aiohttp
import attrs
from aiohttp import web
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ccrun.backends.gcp import calls
from ccrun.backends.gcp.calls import CallPolicy
from ccrun.backends.gcp.key import KmsKey

PROJECT, LOCATION, KEY_RING, KEY_NAME = "test-project", "global", "claude-code", "payload-encryption"
NAME: Final = f"projects/{PROJECT}/locations/{LOCATION}/keyRings/{KEY_RING}/cryptoKeys/{KEY_NAME}"
#: https://cloud.google.com/kms/docs/reference/rest/v1/projects.locations.keyRings.cryptoKeys/encrypt
MAX_PLAINTEXT_BYTES: Final = 64 * 1024
NONCE_BYTES: Final = 12
PERMISSIONS: Final = {
    "encrypt": "cloudkms.cryptoKeyVersions.useToEncrypt",
    "decrypt": "cloudkms.cryptoKeyVersions.useToDecrypt",
}
#: https://cloud.google.com/apis/design/errors#handling_errors
STATUS_NAMES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


@attrs.frozen(kw_only=True)
class Fault:
    """A fault of one call.

    Args:
        status: The HTTP status of the response.
        headers: The headers of the response.
        body: The body of the response, instead of an error in Google's format.
        reset: When the connection is reset: `before` the call takes effect, or `after` it.
        delay_seconds: The delay before the call takes effect.
    """

    status: int | None = None
    headers: dict[str, str] = attrs.field(factory=dict)
    body: str | None = None
    reset: str | None = None
    delay_seconds: float = 0.0


#: Longer than any test takes.
HANG: Final = Fault(delay_seconds=3600.0)


@attrs.define
class Key:
    """A CryptoKey with one version."""

    material: bytes = attrs.field(factory=lambda: AESGCM.generate_key(256), repr=False)
    is_enabled: bool = True


class Kms:
    """A server with one key."""

    def __init__(self) -> None:
        self.keys = {NAME: Key()}
        #: The methods that the client has no permission for.
        self.denied: set[str] = set()
        #: How many calls the server received.
        self.calls: Counter[str] = Counter()
        #: The `Authorization` header of the last call.
        self.authorization: str | None = None
        self.host = ""
        self._faults: defaultdict[str, deque[Fault]] = defaultdict(deque)

    def fail(self, method: str, fault: Fault, *, times: int = 1) -> None:
        """Inject a fault into the next calls of a method."""
        self._faults[method].extend(itertools.repeat(fault, times))

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/v1/{name:.+}:{method:encrypt|decrypt}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.host = f"127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.Response:
        name, method = request.match_info["name"], request.match_info["method"]
        self.calls[method] += 1
        self.authorization = request.headers.get("Authorization")
        faults = self._faults[method]
        fault = faults.popleft() if faults else Fault()
        await asyncio.sleep(fault.delay_seconds)
        if fault.status is not None:
            return _error(fault.status, "Requested by the test.", fault)
        response = web.Response() if fault.reset == "before" else self._apply(name, method, await request.json())
        if fault.reset is not None:
            assert request.transport is not None
            request.transport.abort()
        return response

    def _apply(self, name: str, method: str, body: dict[str, str]) -> web.Response:
        if method in self.denied:
            return _error(403, f"Permission '{PERMISSIONS[method]}' denied on resource '{name}' (or it may not exist).")
        key = self.keys.get(name)
        if key is None:
            return _error(404, f"CryptoKey {name} not found.")
        if not key.is_enabled:
            text = f"{name}/cryptoKeyVersions/1 is not enabled, current state is: DISABLED."
            return _error(400, text, status_name="FAILED_PRECONDITION")
        field = {"encrypt": "plaintext", "decrypt": "ciphertext"}[method]
        try:
            content = base64.b64decode(body[field], validate=True)
        except (KeyError, binascii.Error):
            return _error(400, f"Invalid value at '{field}' (TYPE_BYTES), Base64 decoding failed.")
        if method == "encrypt":
            return _encrypt(name, key, content)
        return _decrypt(key, content)


def _encrypt(name: str, key: Key, plaintext: bytes) -> web.Response:
    if len(plaintext) > MAX_PLAINTEXT_BYTES:
        return _error(400, f"plaintext must be at most {MAX_PLAINTEXT_BYTES} bytes.")
    nonce = secrets.token_bytes(NONCE_BYTES)
    ciphertext = nonce + AESGCM(key.material).encrypt(nonce, plaintext, None)
    return web.json_response(
        {"name": f"{name}/cryptoKeyVersions/1", "ciphertext": base64.b64encode(ciphertext).decode()}
    )


def _decrypt(key: Key, ciphertext: bytes) -> web.Response:
    try:
        plaintext = AESGCM(key.material).decrypt(ciphertext[:NONCE_BYTES], ciphertext[NONCE_BYTES:], None)
    except (InvalidTag, ValueError):
        return _error(400, "Decryption failed: the ciphertext is invalid.")
    # The JSON form of protocol buffers omits empty fields.
    return web.json_response({"plaintext": base64.b64encode(plaintext).decode()} if plaintext else {})


def _error(status: int, message: str, fault: Fault | None = None, *, status_name: str | None = None) -> web.Response:
    fault = fault or Fault()
    error: dict[str, Any] = {"code": status, "message": message, "status": status_name or STATUS_NAMES.get(status, "")}
    if fault.body is not None:
        return web.Response(status=status, text=fault.body, headers=fault.headers)
    return web.json_response({"error": error}, status=status, headers=fault.headers)


@contextlib.asynccontextmanager
async def open_key(server: Kms, *, policy: CallPolicy | None = None) -> AsyncIterator[KmsKey]:
    """Connect the adapter to the key of a server."""
    async with aiohttp.ClientSession() as session:
        yield KmsKey(
            project=PROJECT,
            location=LOCATION,
            key_ring=KEY_RING,
            key_name=KEY_NAME,
            session=session,
            credentials=await calls.credentials(session, emulated=True),
            emulator=server.host,
            policy=policy or CallPolicy(),
        )

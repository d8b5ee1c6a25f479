"""Cloud KMS on a loopback socket: encrypt and decrypt over REST, as v1 of the API speaks, with the faults that a test asks for.

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
    """What goes wrong with one call.

    Args:
        status: The HTTP status of the answer.
        headers: Of that answer.
        body: Of that answer, instead of Google's own form.
        reset: Whether the connection is reset, `before` the effect or `after` it.
        delay_seconds: How late the answer comes.
    """

    status: int | None = None
    headers: dict[str, str] = attrs.field(factory=dict)
    body: str | None = None
    reset: str | None = None
    delay_seconds: float = 0.0


#: Longer than any test waits.
HANG: Final = Fault(delay_seconds=3600.0)


@attrs.define
class Key:
    """A CryptoKey with one version."""

    material: bytes = attrs.field(factory=lambda: AESGCM.generate_key(256), repr=False)
    is_enabled: bool = True


class Kms:
    """A server with one key; `calls` counts what came in, by method."""

    def __init__(self) -> None:
        self.keys = {NAME: Key()}
        #: The methods that the caller may not use.
        self.denied: set[str] = set()
        self.calls: Counter[str] = Counter()
        #: What the last call carried.
        self.authorization: str | None = None
        self.host = ""
        self._errors: defaultdict[str, deque[Fault]] = defaultdict(deque)

    def fail(self, method: str, fault: Fault, *, times: int = 1) -> None:
        """Let the next calls of a method go wrong."""
        self._errors[method].extend(itertools.repeat(fault, times))

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/v1/{name:.+}:{method:encrypt|decrypt}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.host = f"127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        name, method = request.match_info["name"], request.match_info["method"]
        self.calls[method] += 1
        self.authorization = request.headers.get("Authorization")
        errors = self._errors[method]
        fault = errors.popleft() if errors else Fault()
        await asyncio.sleep(fault.delay_seconds)
        if fault.status is not None:
            return _refusal(fault.status, "The test wants it so.", fault)
        response = web.Response() if fault.reset == "before" else self._apply(name, method, await request.json())
        if fault.reset is not None:
            assert request.transport is not None
            request.transport.abort()
        return response

    def _apply(self, name: str, method: str, body: dict[str, str]) -> web.Response:
        if method in self.denied:
            return _refusal(
                403, f"Permission '{PERMISSIONS[method]}' denied on resource '{name}' (or it may not exist)."
            )
        key = self.keys.get(name)
        if key is None:
            return _refusal(404, f"CryptoKey {name} not found.")
        if not key.is_enabled:
            text = f"{name}/cryptoKeyVersions/1 is not enabled, current state is: DISABLED."
            return _refusal(400, text, status_name="FAILED_PRECONDITION")
        field = {"encrypt": "plaintext", "decrypt": "ciphertext"}[method]
        try:
            given = base64.b64decode(body[field], validate=True)
        except (KeyError, binascii.Error):
            return _refusal(400, f"Invalid value at '{field}' (TYPE_BYTES), Base64 decoding failed.")
        if method == "encrypt":
            return _encrypt(name, key, given)
        return _decrypt(key, given)


def _encrypt(name: str, key: Key, plaintext: bytes) -> web.Response:
    if len(plaintext) > MAX_PLAINTEXT_BYTES:
        return _refusal(400, f"plaintext must be at most {MAX_PLAINTEXT_BYTES} bytes.")
    nonce = secrets.token_bytes(NONCE_BYTES)
    ciphertext = nonce + AESGCM(key.material).encrypt(nonce, plaintext, None)
    return web.json_response(
        {"name": f"{name}/cryptoKeyVersions/1", "ciphertext": base64.b64encode(ciphertext).decode()}
    )


def _decrypt(key: Key, ciphertext: bytes) -> web.Response:
    try:
        plaintext = AESGCM(key.material).decrypt(ciphertext[:NONCE_BYTES], ciphertext[NONCE_BYTES:], None)
    except (InvalidTag, ValueError):
        return _refusal(400, "Decryption failed: the ciphertext is invalid.")
    # JSON of protocol buffers leaves out what is empty.
    return web.json_response({"plaintext": base64.b64encode(plaintext).decode()} if plaintext else {})


def _refusal(status: int, message: str, fault: Fault | None = None, *, status_name: str | None = None) -> web.Response:
    fault = fault or Fault()
    error: dict[str, Any] = {"code": status, "message": message, "status": status_name or STATUS_NAMES.get(status, "")}
    if fault.body is not None:
        return web.Response(status=status, text=fault.body, headers=fault.headers)
    return web.json_response({"error": error}, status=status, headers=fault.headers)


@contextlib.asynccontextmanager
async def key_of(server: Kms, *, policy: CallPolicy | None = None) -> AsyncIterator[KmsKey]:
    """Yield the key service on the server's key."""
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

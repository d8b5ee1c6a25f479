"""Cloud KMS as the key service. Only data keys are sent to it, never what they encrypt.

`wrap` and `check` need only the permission to encrypt, so the API's service account does not need the one to decrypt.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Awaitable, Callable
from typing import Final

import aiohttp
from gcloud.aio.kms import KMS

from ccrun.backends.gcp.calls import CallPolicy, CallTarget, Credentials, call
from ccrun.errors import KeyServiceError, SealError

KMS_API_ROOT: Final = "https://cloudkms.googleapis.com/v1"
#: A key of the same size as a data key, which `check` wraps.
PROBE: Final = bytes(32)

# https://cloud.google.com/kms/docs/reference/permissions-and-roles
MAY_ENCRYPT: Final = "cloudkms.cryptoKeyVersions.useToEncrypt"
MAY_DECRYPT: Final = "cloudkms.cryptoKeyVersions.useToDecrypt"


class KmsKey:
    """A symmetric key of Cloud KMS. Its operations change nothing in the service, so failed calls are retried."""

    def __init__(
        self,
        *,
        project: str,
        location: str,
        key_ring: str,
        key_name: str,
        session: aiohttp.ClientSession,
        credentials: Credentials,
        emulator: str | None = None,
        policy: CallPolicy = CallPolicy(),  # noqa: B008 - Frozen.
    ) -> None:
        """Create the adapter.

        Args:
            project: The ID of the key's Google Cloud project.
            location: The region of the key ring.
            key_ring: The name of the key ring.
            key_name: The name of the key.
            session: Used for the calls. It is not closed.
            credentials: The credentials for the calls.
            emulator: The host and port of an emulator, which is called instead of Google.
            policy: Timeouts and retries.
        """
        self._kms = KMS(
            keyproject=project,
            keyring=key_ring,
            keyname=key_name,
            location=location,
            session=session,  # type: ignore[arg-type] # Annotated with the synchronous variant's type.
            token=credentials,
            api_root=f"http://{emulator}/v1" if emulator else KMS_API_ROOT,
            api_is_dev=emulator is not None,
        )
        self._policy = policy
        self._target = CallTarget(
            service="Cloud KMS",
            resource=f"the key {key_name} in {project}/{location}/{key_ring}",
            settings="PROJECT_ID, KMS_LOCATION, KMS_KEY_RING and KMS_KEY_NAME",
            error=KeyServiceError,
        )

    async def wrap(self, key: bytes) -> bytes:
        plaintext = base64.b64encode(key).decode()
        try:
            return await self._call(lambda: self._kms.encrypt(plaintext), MAY_ENCRYPT)
        except aiohttp.ClientResponseError as error:
            raise self._unusable() from error

    async def unwrap(self, wrapped: bytes) -> bytes:
        ciphertext = base64.b64encode(wrapped).decode()
        try:
            return await self._call(lambda: self._kms.decrypt(ciphertext), MAY_DECRYPT)
        except aiohttp.ClientResponseError as error:
            if _status_name(error) == "INVALID_ARGUMENT":
                raise SealError("The sealed payload was not sealed under this key.") from None
            raise self._unusable() from error

    async def check(self) -> None:
        await self.wrap(PROBE)

    async def _call(self, attempt: Callable[[], Awaitable[str]], permission: str) -> bytes:
        async def decoded() -> bytes:
            return base64.b64decode(await attempt(), validate=True)

        try:
            return await call(decoded, target=self._target, permission=permission, policy=self._policy, expected=(400,))
        except binascii.Error:
            raise KeyServiceError("The response is not from Cloud KMS: check the network.") from None

    def _unusable(self) -> KeyServiceError:
        return KeyServiceError(f"Cloud KMS cannot use {self._target.resource}: check that its version is enabled.")


def _status_name(error: aiohttp.ClientResponseError) -> str | None:
    """Return Google's name of the error. A changed ciphertext and a disabled key have the same HTTP status."""
    # gcloud-aio appends the body of the response to the reason phrase.
    _, _, body = error.message.partition(": ")
    try:
        return str(json.loads(body)["error"]["status"])
    except (ValueError, LookupError, TypeError):
        return None

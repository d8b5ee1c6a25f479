"""Identity tokens of Google for receivers behind IAM: Cloud Run services that require authentication, and IAP.

The metadata server of the platform issues them for the service account of the worker or the sweep, and caches them:
https://cloud.google.com/run/docs/authenticating/service-to-service#use_the_metadata_server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

import aiohttp
import attrs

from ccrun.errors import CcrunError

#: Seconds for the metadata server, which is on the same machine.
METADATA_SECONDS: Final = 5.0
#: Bytes. A token has less than 2 KiB.
MAX_TOKEN_BYTES: Final = 16 * 1024
_PATH: Final = "/computeMetadata/v1/instance/service-accounts/default/identity"


class NoIdentityToken(CcrunError):
    """The metadata server has issued no token."""


@attrs.frozen(kw_only=True)
class IdentityTokens:
    """Gets identity tokens.

    Args:
        audiences: The audience of the tokens for each origin, such as `https://receiver.example.com`. No other origin gets one.
        metadata_host: Host and port of the metadata server.
    """

    audiences: Mapping[str, str]
    metadata_host: str

    async def headers_for(self, url: str) -> dict[str, str]:
        """Return the header with the token for a URL, none if its origin gets no token.

        Raises:
            NoIdentityToken: The metadata server cannot be reached, or has issued none.
        """
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".lower()
        audience = self.audiences.get(origin.removesuffix(":443") if parts.scheme == "https" else origin)
        if audience is None:
            return {}
        # The other header belongs to the credentials of the URL. Cloud Run checks this one first.
        name = "X-Serverless-Authorization" if "@" in parts.netloc else "Authorization"
        return {name: f"Bearer {await self._token(audience)}"}

    async def _token(self, audience: str) -> str:
        timeout = aiohttp.ClientTimeout(total=METADATA_SECONDS)
        try:
            # Neither proxies nor redirects: the metadata server is on this machine.
            async with (
                aiohttp.ClientSession(timeout=timeout) as http,
                http.get(
                    f"http://{self.metadata_host}{_PATH}",
                    params={"audience": audience, "format": "full"},
                    headers={"Metadata-Flavor": "Google"},
                    allow_redirects=False,
                ) as response,
            ):
                token = (await response.content.read(MAX_TOKEN_BYTES)).decode("latin-1").strip()
                # A JSON Web Token: three parts in base64url (RFC 7515, section 3.1).
                if response.status == 200 and len(token.split(".")) == 3 and token.isascii() and token.isprintable():
                    return token
                reason = f"it responded with {response.status}"
        except (aiohttp.ClientError, TimeoutError):
            reason = "it cannot be reached"
        raise NoIdentityToken(f"The metadata server issued no identity token for the receiver: {reason}.")

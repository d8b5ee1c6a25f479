"""Signatures of requests to AWS, version 4.

See https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html. Written here because the libraries
that sign are parts of AWS's SDKs, which take seconds to load.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl, quote, urlsplit

import attrs

from ccrun.task import Secret

_ALGORITHM: Final = "AWS4-HMAC-SHA256"


@attrs.frozen(kw_only=True)
class AwsCredential:
    """An access key, with the session token that a temporary one has."""

    access_key_id: str
    secret_access_key: Secret
    session_token: Secret | None = None


def signed_headers(
    credential: AwsCredential,
    *,
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    service: str,
    region: str,
    at: dt.datetime,
) -> dict[str, str]:
    """Return the headers that authenticate a request.

    Args:
        url: Its path is encoded as it is sent.
        headers: Those that are signed besides `Host` and those that are returned.
        at: The time of the request, in UTC.
    """
    parts = urlsplit(url)
    time, date = at.strftime("%Y%m%dT%H%M%SZ"), at.strftime("%Y%m%d")
    added = {"X-Amz-Date": time}
    if credential.session_token is not None:
        added["X-Amz-Security-Token"] = credential.session_token.reveal()
    canonical = {
        name.lower(): " ".join(value.split()) for name, value in {**headers, **added, "Host": parts.netloc}.items()
    }
    names = ";".join(sorted(canonical))
    query = "&".join(
        f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}"
        for name, value in sorted(parse_qsl(parts.query, keep_blank_values=True))
    )
    request = "\n".join(
        (
            method,
            # Each part of the path is encoded once more, except for S3.
            quote(parts.path or "/", safe="/-_.~"),
            query,
            *(f"{name}:{canonical[name]}" for name in sorted(canonical)),
            "",
            names,
            hashlib.sha256(body).hexdigest(),
        )
    )
    scope = f"{date}/{region}/{service}/aws4_request"
    text = "\n".join((_ALGORITHM, time, scope, hashlib.sha256(request.encode()).hexdigest()))
    key = f"AWS4{credential.secret_access_key.reveal()}".encode()
    for part in (date, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    authorization = (
        f"{_ALGORITHM} Credential={credential.access_key_id}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return {**added, "Authorization": authorization}

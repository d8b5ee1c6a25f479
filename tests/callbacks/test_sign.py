from __future__ import annotations

import base64
import hashlib
import hmac
import time

import pytest
from standardwebhooks import Webhook

from ccrun.callbacks.sign import sign
from ccrun.task import Secret


def test_signature_covers_timestamp_and_body() -> None:
    """The headers are those of the guide and those of the Standard Webhooks specification."""
    headers = sign(b'{"a":1}', webhook_id="msg-1", secret=Secret("abc"), timestamp=1700000000)
    hexadecimal = hmac.new(b"abc", b'1700000000.{"a":1}', hashlib.sha256).hexdigest()
    standard = base64.b64encode(hmac.new(b"abc", b'msg-1.1700000000.{"a":1}', hashlib.sha256).digest()).decode()
    assert {
        "Content-Type": "application/json",
        "User-Agent": "cloudrun-claude-code/async-task",
        "X-Webhook-Signature": f"sha256={hexadecimal}",
        "X-Webhook-Timestamp": "1700000000",
        "webhook-id": "msg-1",
        "webhook-timestamp": "1700000000",
        "webhook-signature": f"v1,{standard}",
    } == headers


@pytest.mark.parametrize(
    ("secret", "library_secret"),
    [
        (f"whsec_{base64.b64encode(bytes(32)).decode()}", f"whsec_{base64.b64encode(bytes(32)).decode()}"),
        ("whsec_YWJjZA", "whsec_YWJjZA"),
        ("0123abcd" * 8, base64.b64encode(b"0123abcd" * 8).decode()),
        ("ünïcödé", base64.b64encode("ünïcödé".encode()).decode()),
    ],
)
def test_standard_webhooks_library_verifies(secret: str, library_secret: str) -> None:
    """The reference library verifies the signature, given a `whsec_` secret unchanged or any other secret in base64."""
    body = '{"é":"\u2028"}'.encode()
    headers = sign(body, webhook_id="msg-1", secret=Secret(secret), timestamp=int(time.time()))
    assert Webhook(library_secret).verify(body, headers) == {"é": "\u2028"}

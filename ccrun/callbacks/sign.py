"""The signature headers of a callback.

A body printed by `ccrun.javascript_json.dumps` can be verified by parsing it and printing it again, in JavaScript always. In
Python (`json.dumps(…, separators=(",", ":"))`) it can be verified unless the body holds a character outside printable ASCII (DEL
included) or a number with a magnitude from 1e-9 up to 1e-4: Python prints those differently. A receiver that verifies the raw
bytes, as every Standard Webhooks library does, has no such limits.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from typing import Final

from ccrun.task import Secret

USER_AGENT: Final = "cloudrun-claude-code/async-task"
#: Marks a secret that holds its key in base64 (Standard Webhooks).
KEY_PREFIX: Final = "whsec_"


def sign(body: bytes, *, webhook_id: str, secret: Secret, timestamp: int) -> dict[str, str]:
    """Return the headers that go with a body.

    `X-Webhook-Signature` is the hex HMAC-SHA256 of `{timestamp}.{body}` under the secret's UTF-8 bytes.
    `webhook-signature` is that of the Standard Webhooks specification, of `{id}.{timestamp}.{body}`. Its key is what
    stands in base64 after `whsec_`; a secret of another form is used as it is, and a library is given its base64.

    Args:
        webhook_id: The same for each try, so that a receiver sees a repetition; holds no dot.
        timestamp: Unix time in seconds. Receivers commonly refuse one that is five minutes off.
    """
    secret_bytes = secret.reveal().encode()
    ours = hmac.digest(secret_bytes, b"%d.%b" % (timestamp, body), "sha256")
    standard = hmac.digest(_standard_key(secret), b"%b.%d.%b" % (webhook_id.encode(), timestamp, body), "sha256")
    return {
        "Content-Type": "application/json",
        "User-Agent": USER_AGENT,
        "X-Webhook-Signature": f"sha256={ours.hex()}",
        "X-Webhook-Timestamp": str(timestamp),
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(standard).decode()}",
    }


def _standard_key(secret: Secret) -> bytes:
    text = secret.reveal()
    if text.startswith(KEY_PREFIX):
        try:
            # Padding may be missing, and what there is too much of is passed over.
            return base64.b64decode(text.removeprefix(KEY_PREFIX) + "==")
        except binascii.Error:
            pass
    return text.encode()

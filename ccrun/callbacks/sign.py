"""The signature headers of a callback.

A receiver should verify the raw bytes, as all Standard Webhooks libraries do. A body printed by
`ccrun.javascript_json.dumps` can also be verified after parsing and printing it again: in JavaScript always, in Python
(`json.dumps(…, separators=(",", ":"))`) unless it has a character outside printable ASCII, or a number with a magnitude from
1e-9 up to 1e-4.
"""

from __future__ import annotations

import base64
import hmac
from typing import Final

from ccrun.setting import KEY_PREFIX
from ccrun.task import Secret

USER_AGENT: Final = "cloudrun-claude-code/async-task"


def sign(body: bytes, *, webhook_id: str, secret: Secret, timestamp: int) -> dict[str, str]:
    """Return the signature headers of a body.

    `X-Webhook-Signature` is the hex HMAC-SHA256 of `{timestamp}.{body}` with the UTF-8 bytes of the secret as its key.
    `webhook-signature` is that of the Standard Webhooks specification, of `{id}.{timestamp}.{body}`. Its key is the base64 text
    after `whsec_`; the bytes of a secret of another form are the key, and a library needs them in base64.

    Args:
        webhook_id: Equal for all attempts, so that a receiver recognizes a retry. Has no dot.
        timestamp: Unix time in seconds. Receivers commonly reject one that is five minutes off.
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
        # Padding may be missing, and additional padding is ignored.
        return base64.b64decode(text.removeprefix(KEY_PREFIX) + "==")
    return text.encode()

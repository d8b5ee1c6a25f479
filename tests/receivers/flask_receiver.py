"""The receiver of the guide ("Signature Verification (Python)"), on a free port, which it prints."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time

from flask import Flask, Request, Response, jsonify, request
from werkzeug.serving import make_server

app = Flask(__name__)


def verify_webhook_signature(request: Request) -> bool:
    """Verify HMAC signature from webhook request."""
    signature = request.headers.get("X-Webhook-Signature")
    timestamp = request.headers.get("X-Webhook-Timestamp")
    secret = os.environ["CLOUDRUN_CALLBACK_SECRET"]

    if not signature or not timestamp:
        raise ValueError("Missing signature or timestamp headers")

    # Check timestamp is recent (prevent replay attacks)
    now = int(time.time())
    time_diff = abs(now - int(timestamp))
    if time_diff > 300:  # 5 minutes tolerance
        raise ValueError("Timestamp too old or too far in future")

    # Verify signature format
    if not signature.startswith("sha256="):
        raise ValueError("Invalid signature format")

    provided_signature = signature[7:]  # Remove 'sha256=' prefix

    # Recompute signature
    payload_string = json.dumps(request.json, separators=(",", ":"))
    message = f"{timestamp}.{payload_string}"
    expected_signature = hmac.new(secret.encode("utf-8"), message.encode("utf-8"), hashlib.sha256).hexdigest()

    # Constant-time comparison
    if not hmac.compare_digest(provided_signature, expected_signature):
        raise ValueError("Invalid signature")

    return True


@app.route("/webhooks/claude-complete", methods=["POST"])
def claude_complete() -> tuple[Response, int]:
    """Verify signature before processing."""
    try:
        verify_webhook_signature(request)
        return jsonify({"received": True}), 200
    except Exception as e:
        print(f"Webhook verification failed: {e}")
        return jsonify({"error": "Unauthorized"}), 401


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, app)
    print(server.port, flush=True)
    server.serve_forever()

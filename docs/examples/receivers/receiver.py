"""Receives callbacks of ccrun and verifies their raw bytes before it parses them. Needs Flask.

CLOUDRUN_CALLBACK_SECRET=… flask --app receiver run --port 3000
"""

import hashlib
import hmac
import os
import time

from flask import Flask, abort, request

TOLERANCE_SECONDS = 300

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 4 * 1024 * 1024


def is_genuine(headers, body):
    timestamp = headers.get("X-Webhook-Timestamp", "")
    secret = os.environ["CLOUDRUN_CALLBACK_SECRET"].encode()
    expected = hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    given = headers.get("X-Webhook-Signature", "")
    is_fresh = timestamp.isdecimal() and abs(time.time() - int(timestamp)) <= TOLERANCE_SECONDS
    return is_fresh and hmac.compare_digest(f"sha256={expected}".encode(), given.encode())


@app.post("/")
def receive():
    if not is_genuine(request.headers, request.get_data()):
        abort(401)
    outcome = request.get_json()
    # Respond first and process the outcome afterwards. The same outcome may be delivered twice.
    print(f"Task {outcome['taskId']} is {outcome['status']}", flush=True)
    return {"received": True}

from __future__ import annotations

import asyncio
import time

import aiohttp
import pytest

from ccrun.callbacks.deliver import deliver
from ccrun.callbacks.guard import CallbackGuard
from ccrun.callbacks.sign import sign
from ccrun.task import Secret
from ccrun.testing.receiver import MAX_AGE_SECONDS, InvalidCallback, ReceivedCallback, Receiver, verify

SECRET = Secret("made-up secret, ünïcödé")
BODY = '{"taskId":"t-1","status":"completed","é":1}'.encode()
NOW = 1_700_000_000


def _signed(**changes: str) -> ReceivedCallback:
    headers = sign(BODY, webhook_id="task_t-1", secret=SECRET, timestamp=NOW)
    return ReceivedCallback(
        headers={**headers, **{name.replace("_", "-"): value for name, value in changes.items()}}, body=BODY
    )


def test_signed_callback_is_verified() -> None:
    """`verify` accepts a callback that ccrun signed, and returns its age."""
    assert 7 == verify(_signed(), secret=SECRET, now=NOW + 7)


@pytest.mark.parametrize(
    ("callback", "secret", "now"),
    [
        pytest.param(ReceivedCallback(headers=_signed().headers, body=BODY + b" "), SECRET, NOW, id="other-body"),
        pytest.param(_signed(), Secret("another"), NOW, id="other-secret"),
        pytest.param(_signed(X_Webhook_Timestamp=str(NOW + 1)), SECRET, NOW, id="other-timestamp"),
        pytest.param(_signed(X_Webhook_Timestamp="soon"), SECRET, NOW, id="invalid-timestamp"),
        pytest.param(_signed(X_Webhook_Signature=""), SECRET, NOW, id="empty-signature"),
        pytest.param(_signed(X_Webhook_Signature="sha256=é\udcff"), SECRET, NOW, id="invalid-signature"),
        pytest.param(ReceivedCallback(headers={}, body=BODY), SECRET, NOW, id="no-headers"),
        pytest.param(_signed(), SECRET, NOW + MAX_AGE_SECONDS + 1, id="too-old"),
        pytest.param(_signed(), SECRET, NOW - MAX_AGE_SECONDS - 1, id="in-the-future"),
    ],
)
def test_forged_callback_is_rejected(callback: ReceivedCallback, secret: Secret, now: float) -> None:
    """`verify` raises if the body, secret, timestamp or signature differs, or the timestamp is too far from now."""
    with pytest.raises(InvalidCallback):
        verify(callback, secret=secret, now=now)


async def test_receiver_rejects_forged_callbacks() -> None:
    """The receiver responds with 401 to an invalid callback, and `first` returns the first valid one."""
    async with Receiver(SECRET) as receiver, aiohttp.ClientSession() as session, asyncio.timeout(10):
        stale = sign(BODY, webhook_id="task_t-1", secret=SECRET, timestamp=int(time.time()) - 1000)
        async with session.post(receiver.url, data=BODY, headers=stale) as response:
            assert 401 == response.status
        delivery = await deliver(
            Secret(receiver.url), BODY, webhook_id="task_t-1", secret=SECRET, guard=CallbackGuard(everywhere=True)
        )
        assert delivery.delivered
        assert BODY == (await receiver.first()).body

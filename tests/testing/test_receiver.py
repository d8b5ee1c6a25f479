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


def test_what_ccrun_signed_is_genuine() -> None:
    """Its age is told."""
    assert 7 == verify(_signed(), secret=SECRET, now=NOW + 7)


@pytest.mark.parametrize(
    ("callback", "secret", "now"),
    [
        pytest.param(ReceivedCallback(headers=_signed().headers, body=BODY + b" "), SECRET, NOW, id="another body"),
        pytest.param(_signed(), Secret("another"), NOW, id="another secret"),
        pytest.param(_signed(X_Webhook_Timestamp=str(NOW + 1)), SECRET, NOW, id="another time"),
        pytest.param(_signed(X_Webhook_Timestamp="soon"), SECRET, NOW, id="no time"),
        pytest.param(_signed(X_Webhook_Signature=""), SECRET, NOW, id="no signature"),
        pytest.param(_signed(X_Webhook_Signature="sha256=é\udcff"), SECRET, NOW, id="no hexadecimal"),
        pytest.param(ReceivedCallback(headers={}, body=BODY), SECRET, NOW, id="no headers"),
        pytest.param(_signed(), SECRET, NOW + MAX_AGE_SECONDS + 1, id="too old"),
        pytest.param(_signed(), SECRET, NOW - MAX_AGE_SECONDS - 1, id="of the future"),
    ],
)
def test_what_is_not_genuine_is_refused(callback: ReceivedCallback, secret: Secret, now: float) -> None:
    """A change of the body, the secret, the time or the signature, or a time that is far off."""
    with pytest.raises(InvalidCallback):
        verify(callback, secret=secret, now=now)


async def test_forged_callbacks_are_answered_401_and_not_told() -> None:
    """The first callback that is told is the first genuine one."""
    async with Receiver(SECRET) as receiver, aiohttp.ClientSession() as session, asyncio.timeout(10):
        stale = sign(BODY, webhook_id="task_t-1", secret=SECRET, timestamp=int(time.time()) - 1000)
        async with session.post(receiver.url, data=BODY, headers=stale) as answer:
            assert 401 == answer.status
        delivery = await deliver(
            Secret(receiver.url), BODY, webhook_id="task_t-1", secret=SECRET, guard=CallbackGuard(everywhere=True)
        )
        assert delivery.delivered
        assert BODY == (await receiver.first()).body

"""Cloud KMS as the key service. What every key service owes is in `test_seal.py`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from gcloud.aio.auth import Token
from standins.kms import HANG, NAME, Fault, Key, Kms, key_of

from ccrun import log
from ccrun.backends.gcp.calls import CallPolicy
from ccrun.backends.gcp.key import KmsKey
from ccrun.config import LogFormat
from ccrun.errors import KeyServiceError, SealError

DATA_KEY = bytes(range(32))
MAY_ENCRYPT = "cloudkms.cryptoKeyVersions.useToEncrypt"
THE_KEY = "the key payload-encryption in test-project/global/claude-code"
SETTINGS = "PROJECT_ID, KMS_LOCATION, KMS_KEY_RING and KMS_KEY_NAME"
HASTY = CallPolicy(attempt_seconds=0.2, attempts=3, total_seconds=2.0, first_delay_seconds=0.001)


@pytest.fixture
async def server() -> AsyncIterator[Kms]:
    """Return a Cloud KMS with one key."""
    async with Kms() as running:
        yield running


@pytest.fixture
async def key(server: Kms) -> AsyncIterator[KmsKey]:
    """Return the key service on that key."""
    async with key_of(server, policy=HASTY) as opened:
        yield opened


async def test_a_data_key_costs_one_call(server: Kms, key: KmsKey) -> None:
    """Wrapping is one encryption, unwrapping one decryption."""
    await key.unwrap(await key.wrap(DATA_KEY))
    assert {"encrypt": 1, "decrypt": 1} == server.calls


async def test_the_check_needs_no_right_to_decrypt(server: Kms, key: KmsKey) -> None:
    """A service that may only encrypt is found ready; one that may not even do that is not."""
    server.denied = {"decrypt"}
    await key.check()
    assert {"encrypt": 1} == server.calls
    server.denied = {"encrypt"}
    with pytest.raises(KeyServiceError, match=r"cloudkms\.cryptoKeyVersions\.useToEncrypt"):
        await key.check()


async def test_another_key_does_not_open(server: Kms, key: KmsKey) -> None:
    """What was wrapped by another key is an error of sealing, and is not tried again."""
    wrapped = await key.wrap(DATA_KEY)
    server.keys[NAME] = Key()
    with pytest.raises(SealError, match="not sealed under this key"):
        await key.unwrap(wrapped)
    assert 1 == server.calls["decrypt"]


async def test_changed_ciphertext_does_not_open(key: KmsKey) -> None:
    """Whatever byte of a wrapped key is changed, it does not open."""
    wrapped = bytearray(await key.wrap(DATA_KEY))
    for place in range(len(wrapped)):
        broken = bytes(wrapped[:place] + bytes([wrapped[place] ^ 1]) + wrapped[place + 1 :])
        with pytest.raises(SealError):
            await key.unwrap(broken)


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault(status=status) for status in (408, 429, 500, 502, 503, 504)),
        Fault(reset="before"),
        Fault(reset="after"),
        HANG,
        Fault(delay_seconds=0.05),
    ],
    ids=str,
)
async def test_a_passing_fault_is_not_noticed(server: Kms, key: KmsKey, fault: Fault) -> None:
    """Both calls are made again after what passes by itself: overload, faults, resets, hangs; slowness is none."""
    server.fail("encrypt", fault)
    server.fail("decrypt", fault)
    assert DATA_KEY == await key.unwrap(await key.wrap(DATA_KEY))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault(status=401), "Cloud KMS rejected the credentials: check the service account."),
        (
            Fault(status=403),
            f"Cloud KMS denied access: check that the service account has {MAY_ENCRYPT} on {THE_KEY}.",
        ),
        (
            Fault(status=404),
            f"Cloud KMS cannot find {THE_KEY}: check {SETTINGS}.",
        ),
        (Fault(status=429), "Cloud KMS limits the rate of calls: check the quotas of the project."),
        (Fault(status=503), "Cloud KMS is temporarily unavailable (503): try again later."),
        (Fault(reset="before"), "Cloud KMS cannot be reached: check the network."),
        (HANG, "Cloud KMS did not respond in time: check the network."),
        (Fault(status=200, body="<html>"), "The response is not from Cloud KMS: check the network."),
        (Fault(status=200, body='{"ciphertext": "?"}'), "The response is not from Cloud KMS: check the network."),
    ],
    ids=str,
)
async def test_a_lasting_fault_says_what_to_check(server: Kms, key: KmsKey, fault: Fault, sentence: str) -> None:
    """A fault that stays is one sentence that names Cloud KMS and what to check, after a bounded time."""
    server.fail("encrypt", fault, times=100)
    async with asyncio.timeout(HASTY.total_seconds + 1):
        with pytest.raises(KeyServiceError) as caught:
            await key.wrap(DATA_KEY)
    assert sentence == caught.value.message
    assert server.calls["encrypt"] <= HASTY.attempts


async def test_a_refusal_is_not_repeated(server: Kms, key: KmsKey) -> None:
    """What will be refused again is asked once."""
    server.denied = {"encrypt", "decrypt"}
    for attempt in (key.wrap, key.unwrap):
        with pytest.raises(KeyServiceError):
            await attempt(DATA_KEY)
    assert {"encrypt": 1, "decrypt": 1} == server.calls


async def test_nobody_there_is_said_so(key: KmsKey, server: Kms) -> None:
    """Where nothing listens, the error says that Cloud KMS cannot be reached."""
    await server.__aexit__()
    with pytest.raises(KeyServiceError, match="Cloud KMS cannot be reached"):
        await key.wrap(DATA_KEY)


async def test_a_disabled_key_is_no_broken_payload(server: Kms, key: KmsKey) -> None:
    """A key that was disabled is told apart from a payload that does not open, though Google answers both with 400."""
    wrapped = await key.wrap(DATA_KEY)
    server.keys[NAME].is_enabled = False
    for attempt in (key.wrap, key.unwrap):
        with pytest.raises(KeyServiceError, match="check that its version is enabled"):
            await attempt(wrapped)


@pytest.mark.parametrize("body", ["", "<html>", "[]", '{"error": "no"}', '{"error": {}}', '{"error": {"status": 5}}'])
async def test_a_strange_400_is_no_broken_payload(server: Kms, key: KmsKey, body: str) -> None:
    """Only Google's own word makes a payload count as changed; a proxy's 400 does not."""
    server.fail("decrypt", Fault(status=400, body=body))
    with pytest.raises(KeyServiceError):
        await key.unwrap(DATA_KEY)


class MadeUpToken(Token):
    """Credentials that need no Google."""

    async def get(self) -> str | None:
        return "made-up-access-token"


async def test_the_access_token_is_in_no_log(server: Kms, key: KmsKey, capfd: pytest.CaptureFixture[str]) -> None:
    """A call that is made again is logged without the token that it carries."""
    log.configure(LogFormat.JSON, "WARNING")
    server.fail("encrypt", Fault(status=503))
    key._kms.token = MadeUpToken()
    key._kms._api_is_dev = False
    await key.wrap(DATA_KEY)
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert ["call_retried"] == [line["event"] for line in lines]
    assert "made-up-access-token" not in str(lines)
    assert "Bearer made-up-access-token" == server.authorization

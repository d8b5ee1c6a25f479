"""Cloud KMS as the key service. `tests/test_seal.py` tests what every key service must do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from gcloud.aio.auth import Token
from standins.kms import HANG, NAME, Fault, Key, Kms, open_key

from ccrun import log
from ccrun.backends.gcp.calls import CallPolicy
from ccrun.backends.gcp.key import KmsKey
from ccrun.config import LogFormat
from ccrun.errors import KeyServiceError, SealError

DATA_KEY = bytes(range(32))
ENCRYPT_PERMISSION = "cloudkms.cryptoKeyVersions.useToEncrypt"
RESOURCE = "the key payload-encryption in test-project/global/claude-code"
SETTINGS = "PROJECT_ID, KMS_LOCATION, KMS_KEY_RING and KMS_KEY_NAME"
POLICY = CallPolicy(attempt_seconds=0.7, attempts=3, total_seconds=3.0, first_delay_seconds=0.001)


@pytest.fixture
async def server() -> AsyncIterator[Kms]:
    """Return a stand-in for Cloud KMS."""
    async with Kms() as running:
        yield running


@pytest.fixture
async def key(server: Kms) -> AsyncIterator[KmsKey]:
    """Return the adapter, connected to the stand-in."""
    async with open_key(server, policy=POLICY) as opened:
        yield opened


async def test_each_operation_costs_one_call(server: Kms, key: KmsKey) -> None:
    """`wrap` makes one call to encrypt, and `unwrap` one call to decrypt."""
    await key.unwrap(await key.wrap(DATA_KEY))
    assert {"encrypt": 1, "decrypt": 1} == server.calls


async def test_check_needs_only_the_permission_to_encrypt(server: Kms, key: KmsKey) -> None:
    """`check` passes without the permission to decrypt, and fails without the permission to encrypt."""
    server.denied = {"decrypt"}
    await key.check()
    assert {"encrypt": 1} == server.calls
    server.denied = {"encrypt"}
    with pytest.raises(KeyServiceError, match=r"cloudkms\.cryptoKeyVersions\.useToEncrypt"):
        await key.check()


async def test_bytes_of_another_key_are_not_unwrapped(server: Kms, key: KmsKey) -> None:
    """Unwrapping what another key wrapped raises `SealError`, without a retry."""
    wrapped = await key.wrap(DATA_KEY)
    server.keys[NAME] = Key()
    with pytest.raises(SealError, match="not sealed under this key"):
        await key.unwrap(wrapped)
    assert 1 == server.calls["decrypt"]


async def test_changed_bytes_are_not_unwrapped(key: KmsKey) -> None:
    """Changing any byte of a wrapped key makes `unwrap` raise `SealError`."""
    wrapped = bytearray(await key.wrap(DATA_KEY))
    for index in range(len(wrapped)):
        broken = bytes(wrapped[:index] + bytes([wrapped[index] ^ 1]) + wrapped[index + 1 :])
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
async def test_transient_fault_is_retried(server: Kms, key: KmsKey, fault: Fault) -> None:
    """Both calls are retried after transient statuses, resets and timeouts."""
    server.fail("encrypt", fault)
    server.fail("decrypt", fault)
    assert DATA_KEY == await key.unwrap(await key.wrap(DATA_KEY))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=401), "Cloud KMS rejected the credentials: check the service account."),
        (
            Fault(status=403),
            f"Cloud KMS denied access: check that the service account has {ENCRYPT_PERMISSION} on {RESOURCE}.",
        ),
        (
            Fault(status=404),
            f"Cloud KMS cannot find {RESOURCE}: check {SETTINGS}.",
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
async def test_permanent_fault_says_what_to_check(server: Kms, key: KmsKey, fault: Fault, message: str) -> None:
    """A fault that persists is an error within the total timeout, whose message names Cloud KMS and what to check."""
    server.fail("encrypt", fault, times=100)
    async with asyncio.timeout(POLICY.total_seconds + 1):
        with pytest.raises(KeyServiceError) as caught:
            await key.wrap(DATA_KEY)
    assert message == caught.value.message
    assert server.calls["encrypt"] <= (POLICY.attempts or 0)


async def test_denied_call_is_not_retried(server: Kms, key: KmsKey) -> None:
    """A call that was denied is not retried."""
    server.denied = {"encrypt", "decrypt"}
    for attempt in (key.wrap, key.unwrap):
        with pytest.raises(KeyServiceError):
            await attempt(DATA_KEY)
    assert {"encrypt": 1, "decrypt": 1} == server.calls


async def test_unreachable_service_is_an_error(key: KmsKey, server: Kms) -> None:
    """If nothing listens at the address, the error says that Cloud KMS cannot be reached."""
    await server.__aexit__()
    with pytest.raises(KeyServiceError, match="Cloud KMS cannot be reached"):
        await key.wrap(DATA_KEY)


async def test_disabled_key_is_not_a_seal_error(server: Kms, key: KmsKey) -> None:
    """A disabled key raises `KeyServiceError`, not `SealError`, although Google responds with 400 in both cases."""
    wrapped = await key.wrap(DATA_KEY)
    server.keys[NAME].is_enabled = False
    for attempt in (key.wrap, key.unwrap):
        with pytest.raises(KeyServiceError, match="check that its version is enabled"):
            await attempt(wrapped)


@pytest.mark.parametrize("body", ["", "<html>", "[]", '{"error": "no"}', '{"error": {}}', '{"error": {"status": 5}}'])
async def test_400_of_a_proxy_is_not_a_seal_error(server: Kms, key: KmsKey, body: str) -> None:
    """Only Google's own error format raises `SealError`. Any other response with status 400, such as a proxy's, does not."""
    server.fail("decrypt", Fault(status=400, body=body))
    with pytest.raises(KeyServiceError):
        await key.unwrap(DATA_KEY)


class MadeUpToken(Token):
    """Credentials with a fixed access token."""

    async def get(self) -> str | None:
        return "made-up-access-token"


async def test_access_token_is_not_logged(server: Kms, key: KmsKey, capfd: pytest.CaptureFixture[str]) -> None:
    """The log line of a retry does not contain the access token."""
    log.configure(LogFormat.JSON, "WARNING")
    server.fail("encrypt", Fault(status=503))
    key._kms.token = MadeUpToken()
    key._kms._api_is_dev = False
    await key.wrap(DATA_KEY)
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert ["call_retried"] == [line["event"] for line in lines]
    assert "made-up-access-token" not in str(lines)
    assert "Bearer made-up-access-token" == server.authorization

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from helpers.seal import KEY_SERVICES, TASK, UnavailableKeyService, open_wrapper, sealed_by
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ccrun.errors import KeyServiceError, SealError
from ccrun.seal import MAGIC, KeyWrapper, Purpose
from ccrun.task import TaskId
from ccrun.unseal import unseal


@pytest.fixture(params=KEY_SERVICES)
async def wrapper(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[KeyWrapper]:
    """Return each key service."""
    async with open_wrapper(request.param, tmp_path) as opened:
        yield opened


@given(plaintext=st.binary(max_size=300), purpose=st.sampled_from(Purpose))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_envelope_is_opened(wrapper: KeyWrapper, plaintext: bytes, purpose: Purpose) -> None:
    """An envelope opens with the task ID and the purpose that it was sealed for."""
    sealed = await sealed_by(wrapper, plaintext, purpose)
    assert plaintext == await unseal(wrapper, sealed, task_id=TASK, purpose=purpose)


@pytest.mark.parametrize(
    ("task_id", "purpose"),
    [
        (TaskId("t-2"), Purpose.PAYLOAD),
        (TaskId("t-1x"), Purpose.PAYLOAD),
        (TaskId("t-"), Purpose.PAYLOAD),
        (TASK, Purpose.CALLBACK_URL),
    ],
)
async def test_copied_envelope_is_not_opened(wrapper: KeyWrapper, task_id: TaskId, purpose: Purpose) -> None:
    """An envelope does not open for another task or another purpose."""
    sealed = await sealed_by(wrapper)
    with pytest.raises(SealError):
        await unseal(wrapper, sealed, task_id=task_id, purpose=purpose)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_changed_envelope_is_not_opened(wrapper: KeyWrapper, data: st.DataObject) -> None:
    """Flipping any bit of an envelope makes `unseal` raise `SealError`."""
    sealed = bytearray(await sealed_by(wrapper))
    index = data.draw(st.integers(0, len(sealed) - 1))
    sealed[index] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SealError):
        await unseal(wrapper, bytes(sealed), task_id=TASK, purpose=Purpose.PAYLOAD)


async def test_envelope_of_another_length_is_not_opened(wrapper: KeyWrapper) -> None:
    """Truncating an envelope anywhere, or appending to it, makes `unseal` raise `SealError`."""
    sealed = await sealed_by(wrapper, b"short")
    for broken in (*(sealed[:length] for length in range(len(sealed))), sealed + b"\0"):
        with pytest.raises(SealError):
            await unseal(wrapper, broken, task_id=TASK, purpose=Purpose.PAYLOAD)


@given(st.binary(max_size=200).map(lambda rest: MAGIC + rest))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_forged_envelope_is_not_opened(wrapper: KeyWrapper, sealed: bytes) -> None:
    """Arbitrary bytes after the magic number make `unseal` raise `SealError`."""
    with pytest.raises(SealError):
        await unseal(wrapper, sealed, task_id=TASK, purpose=Purpose.PAYLOAD)


async def test_envelope_of_another_version_has_its_own_error(wrapper: KeyWrapper) -> None:
    """The error for an envelope of another version differs from that for a broken one."""
    sealed = await sealed_by(wrapper)
    with pytest.raises(SealError, match="not an envelope that this version of ccrun can read"):
        await unseal(wrapper, b"ccrun\x02" + sealed[len(MAGIC) :], task_id=TASK, purpose=Purpose.PAYLOAD)


async def test_error_reveals_nothing(wrapper: KeyWrapper) -> None:
    """A `SealError` has no context that a log would print, and its message does not contain the original task ID."""
    sealed = await sealed_by(wrapper)
    with pytest.raises(SealError) as caught:
        await unseal(wrapper, sealed, task_id=TaskId("t-2"), purpose=Purpose.PAYLOAD)
    assert caught.value.__suppress_context__
    assert "t-1" not in caught.value.message


async def test_payload_of_ten_mebibytes_is_opened(wrapper: KeyWrapper) -> None:
    """A payload as large as the largest request is sealed and opened."""
    plaintext = bytes(10 * 1024 * 1024)
    sealed = await sealed_by(wrapper, plaintext)
    # Not in the assertion, because pytest would print both values.
    is_same = plaintext == await unseal(wrapper, sealed, task_id=TASK, purpose=Purpose.PAYLOAD)
    assert is_same


async def test_unavailable_key_service_is_not_a_seal_error(wrapper: KeyWrapper) -> None:
    """If the key service is unavailable, `unseal` raises `KeyServiceError`, not `SealError`."""
    with pytest.raises(KeyServiceError):
        await unseal(UnavailableKeyService(), await sealed_by(wrapper), task_id=TASK, purpose=Purpose.PAYLOAD)

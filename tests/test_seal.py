"""Sealing, and what every key service must do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from helpers.seal import KEY_SERVICES, PLAINTEXT, TASK, UnavailableKeyService, open_wrapper

from ccrun.errors import KeyServiceError, SealError
from ccrun.seal import MAGIC, DataKey, KeyWrapper, Purpose, new_data_key


@pytest.fixture(params=KEY_SERVICES)
async def wrapper(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[KeyWrapper]:
    """Return each key service."""
    async with open_wrapper(request.param, tmp_path) as opened:
        yield opened


# --- every key service -----------------------------------------------------------------------------------------------


async def test_wrapped_key_is_unwrapped(wrapper: KeyWrapper) -> None:
    """`unwrap` returns the key that was wrapped, and the wrapped form does not contain it."""
    key = bytes(range(32))
    wrapped = await wrapper.wrap(key)
    assert key == await wrapper.unwrap(wrapped)
    assert key not in wrapped


@pytest.mark.parametrize("wrapped", [b"", b"short", bytes(12), bytes(60), bytes(1000)])
async def test_other_bytes_are_not_unwrapped(wrapper: KeyWrapper, wrapped: bytes) -> None:
    """`unwrap` raises `SealError` for bytes of any length that the key service did not return."""
    with pytest.raises(SealError):
        await wrapper.unwrap(wrapped)


async def test_check_of_a_working_key_service_passes(wrapper: KeyWrapper) -> None:
    """`check` of a working key service returns."""
    await wrapper.check()


# --- the envelope ----------------------------------------------------------------------------------------------------


async def test_envelope_reveals_nothing(wrapper: KeyWrapper) -> None:
    """An envelope contains neither the plaintext nor the data key, and sealing twice gives different ciphertexts."""
    key = await new_data_key(wrapper)
    first = await key.seal(PLAINTEXT, task_id=TASK, purpose=Purpose.PAYLOAD)
    second = await key.seal(PLAINTEXT, task_id=TASK, purpose=Purpose.PAYLOAD)
    assert first.startswith(MAGIC)
    assert (first.count(PLAINTEXT), first.count(key.plain)) == (0, 0)
    assert first[-len(PLAINTEXT) :] != second[-len(PLAINTEXT) :]


async def test_data_keys_differ(wrapper: KeyWrapper) -> None:
    """Every data key is new."""
    one, two = await new_data_key(wrapper), await new_data_key(wrapper)
    assert one.plain != two.plain


async def test_one_data_key_costs_one_call(wrapper: KeyWrapper) -> None:
    """The payload and the callback URL are sealed with the same wrapped key."""
    key = await new_data_key(wrapper)
    for purpose in Purpose:
        sealed = await key.seal(b"", task_id=TASK, purpose=purpose)
        assert sealed.count(key.wrapped) == 1


async def test_no_data_key_without_a_key_service() -> None:
    """If the key service is unavailable, creating a data key raises `KeyServiceError`."""
    with pytest.raises(KeyServiceError):
        await new_data_key(UnavailableKeyService())


def test_repr_of_a_data_key_shows_no_key() -> None:
    """The `repr` of a data key contains neither form of the key, so a log cannot contain it."""
    assert repr(DataKey(plain=b"plain", wrapped=b"wrapped")) == "DataKey()"

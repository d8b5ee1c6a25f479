from __future__ import annotations

import asyncio
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standins.kms import Kms, key_of

from ccrun.backends.local.key import LocalKey, load_or_create_secret
from ccrun.errors import KeyServiceError, SealError
from ccrun.seal import MAGIC, DataKey, KeyWrapper, Purpose, Sealed, new_data_key
from ccrun.task import TaskId
from ccrun.unseal import unseal

TASK = TaskId("t-1")
PLAIN = '{"prompt": "ünïcödé", "anthropicApiKey": "made-up-key"}'.encode()


@pytest.fixture(params=["local", "kms"])
async def wrapper(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[KeyWrapper]:
    """Each key service in turn."""
    match request.param:
        case "local":
            yield LocalKey(tmp_path / "keys" / "sealing.key")
        case "kms":
            async with Kms() as server, key_of(server) as key:
                yield key
        case _:
            raise AssertionError


async def sealed_by(wrapper: KeyWrapper, plaintext: bytes = PLAIN, purpose: Purpose = Purpose.PAYLOAD) -> Sealed:
    """Seal under a fresh data key."""
    return await (await new_data_key(wrapper)).seal(plaintext, task_id=TASK, purpose=purpose)


# --- every key service -----------------------------------------------------------------------------------------------


async def test_key_is_unwrapped_as_it_was_wrapped(wrapper: KeyWrapper) -> None:
    """Unwrapping gives back the key, and the wrapped one shows nothing of it."""
    key = bytes(range(32))
    wrapped = await wrapper.wrap(key)
    assert key == await wrapper.unwrap(wrapped)
    assert key not in wrapped


@pytest.mark.parametrize("wrapped", [b"", b"short", bytes(12), bytes(60), bytes(1000)])
async def test_what_was_never_wrapped_is_not_unwrapped(wrapper: KeyWrapper, wrapped: bytes) -> None:
    """Bytes that the key service did not make are an error of sealing, however short or long."""
    with pytest.raises(SealError):
        await wrapper.unwrap(wrapped)


async def test_working_key_service_passes_its_check(wrapper: KeyWrapper) -> None:
    """The check of a key service that works returns."""
    await wrapper.check()


# --- the envelope ----------------------------------------------------------------------------------------------------


@given(plaintext=st.binary(max_size=300), purpose=st.sampled_from(Purpose))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_unsealing_gives_back_what_was_sealed(wrapper: KeyWrapper, plaintext: bytes, purpose: Purpose) -> None:
    """Whatever was sealed opens with the same task and purpose."""
    sealed = await sealed_by(wrapper, plaintext, purpose)
    assert plaintext == await unseal(wrapper, sealed, task_id=TASK, purpose=purpose)


async def test_envelope_shows_nothing(wrapper: KeyWrapper) -> None:
    """Neither the plain text nor the data key stands in the envelope, and sealing twice gives two envelopes."""
    key = await new_data_key(wrapper)
    first = await key.seal(PLAIN, task_id=TASK, purpose=Purpose.PAYLOAD)
    second = await key.seal(PLAIN, task_id=TASK, purpose=Purpose.PAYLOAD)
    assert first.startswith(MAGIC)
    assert (first.count(PLAIN), first.count(key.plain)) == (0, 0)
    assert first[-len(PLAIN) :] != second[-len(PLAIN) :]


async def test_every_task_has_a_key_of_its_own(wrapper: KeyWrapper) -> None:
    """No two data keys are the same."""
    one, two = await new_data_key(wrapper), await new_data_key(wrapper)
    assert one.plain != two.plain


@pytest.mark.parametrize(
    ("task_id", "purpose"),
    [
        (TaskId("t-2"), Purpose.PAYLOAD),
        (TaskId("t-1x"), Purpose.PAYLOAD),
        (TaskId("t-"), Purpose.PAYLOAD),
        (TASK, Purpose.CALLBACK_URL),
    ],
)
async def test_envelope_of_another_place_does_not_open(wrapper: KeyWrapper, task_id: TaskId, purpose: Purpose) -> None:
    """What is copied to another task, or to another place of the same one, does not open."""
    sealed = await sealed_by(wrapper)
    with pytest.raises(SealError):
        await unseal(wrapper, sealed, task_id=task_id, purpose=purpose)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_changed_envelope_does_not_open(wrapper: KeyWrapper, data: st.DataObject) -> None:
    """Wherever one bit of an envelope is turned, it does not open, and the error is always the same kind."""
    sealed = bytearray(await sealed_by(wrapper))
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SealError):
        await unseal(wrapper, bytes(sealed), task_id=TASK, purpose=Purpose.PAYLOAD)


async def test_cut_envelope_does_not_open(wrapper: KeyWrapper) -> None:
    """Wherever an envelope is cut off, or goes on, it does not open, and the error is always the same kind."""
    sealed = await sealed_by(wrapper, b"short")
    for broken in (*(sealed[:length] for length in range(len(sealed))), sealed + b"\0"):
        with pytest.raises(SealError):
            await unseal(wrapper, broken, task_id=TASK, purpose=Purpose.PAYLOAD)


@given(st.binary(max_size=200).map(lambda rest: MAGIC + rest))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_made_up_envelope_does_not_open(wrapper: KeyWrapper, sealed: bytes) -> None:
    """Whatever bytes pretend to be an envelope, there is one clear error."""
    with pytest.raises(SealError):
        await unseal(wrapper, sealed, task_id=TASK, purpose=Purpose.PAYLOAD)


async def test_envelope_of_a_later_version_says_so(wrapper: KeyWrapper) -> None:
    """An envelope of another version is told apart from a broken one."""
    sealed = await sealed_by(wrapper)
    with pytest.raises(SealError, match="not an envelope that this version of ccrun can read"):
        await unseal(wrapper, b"ccrun\x02" + sealed[len(MAGIC) :], task_id=TASK, purpose=Purpose.PAYLOAD)


async def test_error_of_unsealing_shows_nothing(wrapper: KeyWrapper) -> None:
    """An error of unsealing has no cause that a log could print."""
    sealed = await sealed_by(wrapper)
    with pytest.raises(SealError) as caught:
        await unseal(wrapper, sealed, task_id=TaskId("t-2"), purpose=Purpose.PAYLOAD)
    assert caught.value.__suppress_context__
    assert "t-1" not in caught.value.message


async def test_payload_of_ten_mebibytes_is_sealed(wrapper: KeyWrapper) -> None:
    """The largest request that is taken can be sealed."""
    plaintext = bytes(10 * 1024 * 1024)
    sealed = await sealed_by(wrapper, plaintext)
    is_same = plaintext == await unseal(wrapper, sealed, task_id=TASK, purpose=Purpose.PAYLOAD)
    assert is_same


class SilentKeyService:
    """A key service that does not answer."""

    async def wrap(self, key: bytes) -> bytes:
        raise KeyServiceError

    async def unwrap(self, wrapped: bytes) -> bytes:
        raise KeyServiceError

    async def check(self) -> None:
        raise KeyServiceError


async def test_silent_key_service_is_no_broken_envelope(wrapper: KeyWrapper) -> None:
    """A key service that does not answer is told apart from an envelope that does not open."""
    silent: KeyWrapper = SilentKeyService()
    with pytest.raises(KeyServiceError):
        await new_data_key(silent)
    with pytest.raises(KeyServiceError):
        await unseal(silent, await sealed_by(wrapper), task_id=TASK, purpose=Purpose.PAYLOAD)


async def test_one_data_key_costs_one_call(wrapper: KeyWrapper) -> None:
    """Payload and callback URL are sealed under one wrapped key."""
    key = await new_data_key(wrapper)
    for purpose in Purpose:
        sealed = await key.seal(b"", task_id=TASK, purpose=purpose)
        assert sealed.count(key.wrapped) == 1


# --- the key file ----------------------------------------------------------------------------------------------------


async def test_key_file_is_its_owners_alone(tmp_path: Path) -> None:
    """The key file is made on first use, with mode 0600 in a folder of mode 0700."""
    path = tmp_path / "keys" / "sealing.key"
    await LocalKey(path).check()
    assert (0o600, 0o700) == (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode))
    assert [path] == list(path.parent.iterdir())


async def test_key_outlives_the_process(tmp_path: Path) -> None:
    """What was sealed before a restart opens after it."""
    sealed = await sealed_by(LocalKey(tmp_path / "key"))
    assert PLAIN == await unseal(LocalKey(tmp_path / "key"), sealed, task_id=TASK, purpose=Purpose.PAYLOAD)


async def test_another_key_does_not_open(tmp_path: Path) -> None:
    """Under another key file nothing opens."""
    sealed = await sealed_by(LocalKey(tmp_path / "one"))
    with pytest.raises(SealError, match="not sealed under this key"):
        await unseal(LocalKey(tmp_path / "two"), sealed, task_id=TASK, purpose=Purpose.PAYLOAD)


async def test_damaged_key_file_is_not_replaced(tmp_path: Path) -> None:
    """A key file of the wrong length is an error that says so; a new key would make all that is sealed unreadable."""
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(KeyServiceError, match="must have 32 bytes"):
        await LocalKey(tmp_path / "key").wrap(bytes(32))
    assert (tmp_path / "key").read_bytes() == b"short"


async def test_key_file_that_cannot_be_made_is_told_without_its_path(tmp_path: Path) -> None:
    """Where no key file can be, the error names no local path."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(KeyServiceError) as caught:
        await LocalKey(tmp_path / "file" / "key").check()
    assert str(tmp_path) not in caught.value.message


async def test_threads_that_ask_first_get_one_secret(tmp_path: Path) -> None:
    """Twenty who ask at once for a secret that is not there yet all get the same."""
    count = iter(range(20))
    secrets = await asyncio.gather(
        *(asyncio.to_thread(load_or_create_secret, tmp_path / "secret", lambda: b"%d" % next(count)) for _ in range(20))
    )
    assert {(tmp_path / "secret").read_bytes()} == set(secrets)
    assert [tmp_path / "secret"] == list(tmp_path.iterdir())


ASK = """
import secrets, sys
from pathlib import Path
from ccrun.backends.local.key import load_or_create_secret
print("ready", flush=True)
sys.stdin.readline()
print(load_or_create_secret(Path(sys.argv[1]), lambda: secrets.token_bytes(32)).hex())
"""


def test_processes_that_ask_first_get_one_secret(tmp_path: Path) -> None:
    """Services that start at once on one folder agree on one key."""
    processes = [
        subprocess.Popen([sys.executable, "-c", ASK, tmp_path / "key"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    outputs = {process.communicate(b"go\n", 30)[0] for process in processes}
    assert {(tmp_path / "key").read_bytes().hex().encode() + b"\n"} == outputs


def test_data_key_does_not_show_itself() -> None:
    """Neither form of a data key is in its `repr`, so none gets into a log."""
    assert repr(DataKey(plain=b"plain", wrapped=b"wrapped")) == "DataKey()"

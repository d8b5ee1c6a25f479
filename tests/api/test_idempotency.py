from __future__ import annotations

import asyncio
import itertools

import attrs
import pytest
from helpers.dispatch import (
    TASK,
    URL,
    RecordingJobs,
    WatchedBlobs,
    all_objects,
    blobs,
    dispatcher,
    finish_task,
    jobs,
    other_store,
    owed,
    spec,
    store,
    wrapper,
)

from ccrun import codec
from ccrun.api.dispatch import Dispatcher, Idempotency, Submitted
from ccrun.backends.local.key import LocalKey
from ccrun.errors import (
    BlobNotFound,
    Busy,
    CcrunError,
    LaunchFailed,
    TaskExists,
)
from ccrun.names import payload_name
from ccrun.seal import Purpose, Sealed
from ccrun.store import Store
from ccrun.task import TASK_ID_PATTERN, Status
from ccrun.unseal import unseal

__all__ = ["blobs", "dispatcher", "jobs", "other_store", "owed", "store", "wrapper"]

# --- idempotency -----------------------------------------------------------------------------------------------------


def test_key_and_caller_determine_the_task_id() -> None:
    """Equal keys of one caller give one task ID; other keys and other callers give others."""
    keys = [Idempotency(key=key, caller=caller) for caller in ("one", "two") for key in ("a", "b")]
    assert len({key.task_id for key in keys}) == 4
    assert Idempotency(key="a", caller="one").task_id == keys[0].task_id
    assert all(TASK_ID_PATTERN.fullmatch(key.task_id) for key in keys)


def test_digest_depends_on_body_key_and_caller() -> None:
    """The digest differs when the body, the key or the caller differs."""
    digests = {
        Idempotency(key=key, caller=caller).digest(body)
        for key, caller, body in itertools.product(("a", "b"), ("one", "two"), (b"1", b"2"))
    }
    assert len(digests) == 8
    assert Idempotency(key="a", caller="one").digest(b"1") in digests


async def test_retry_returns_the_same_task(dispatcher: Dispatcher, store: Store, jobs: RecordingJobs) -> None:
    """A retry returns the same task, even after it has finished, and launches nothing."""
    first = await dispatcher.submit(spec(), idempotency_digest="d")
    retry = await dispatcher.submit(spec(), idempotency_digest="d")
    assert (False, True) == (first.is_replay, retry.is_replay)
    assert await store.record(TASK) == retry.record
    finished = await finish_task(store)
    assert Submitted(record=finished, is_replay=True) == await dispatcher.submit(spec(), idempotency_digest="d")
    with pytest.raises(BlobNotFound):
        await store.payload(TASK)
    assert [TASK] == jobs.launched


@pytest.mark.parametrize("first_digest", ["other", None])
async def test_other_request_with_the_key_is_rejected(dispatcher: Dispatcher, first_digest: str | None) -> None:
    """A request with the same key and another body is rejected; so is one for a task that was submitted without a key."""
    await dispatcher.submit(spec(), idempotency_digest=first_digest)
    with pytest.raises(TaskExists, match="This Idempotency-Key was used with another request"):
        await dispatcher.submit(spec(), idempotency_digest="d")


async def test_concurrent_retries_launch_one_task(dispatcher: Dispatcher, jobs: RecordingJobs) -> None:
    """Of twenty equal concurrent requests one launches the task, and all return it."""
    outcomes = await asyncio.gather(*(dispatcher.submit(spec(), idempotency_digest="d") for _ in range(20)))
    assert [False] + [True] * 19 == sorted(outcome.is_replay for outcome in outcomes)
    assert [TASK] == jobs.launched
    assert {TASK} == {outcome.record.task_id for outcome in outcomes}


async def test_retry_waits_for_the_first_request(dispatcher: Dispatcher, blobs: WatchedBlobs) -> None:
    """A retry that arrives before the first request is stored returns its task."""
    blobs.may_store_records.clear()
    first = asyncio.create_task(dispatcher.submit(spec(), idempotency_digest="d"))
    async with asyncio.timeout(10):
        while payload_name(TASK) not in await all_objects(blobs):
            await asyncio.sleep(0.001)
    second = asyncio.create_task(dispatcher.submit(spec(), idempotency_digest="d"))
    blobs.may_store_records.set()
    assert (False, True) == ((await first).is_replay, (await second).is_replay)


@pytest.mark.parametrize("digest", ["d", None])
async def test_incomplete_task_of_another_request_is_busy(
    dispatcher: Dispatcher, store: Store, blobs: WatchedBlobs, digest: str | None
) -> None:
    """While another request with the ID is incomplete, a request fails with a time for the retry, and changes nothing."""
    await store.mark_active(TASK, request_digest="other")
    await store.add_payload(TASK, Sealed(b"other"))
    before = await all_objects(blobs)
    with pytest.raises(Busy, match="An earlier request with this task ID or Idempotency-Key is still") as caught:
        await dispatcher.submit(spec(), idempotency_digest=digest)
    assert (60, before) == (caught.value.retry_after, await all_objects(blobs))


async def test_retry_continues_an_interrupted_request(
    dispatcher: Dispatcher, store: Store, jobs: RecordingJobs, wrapper: LocalKey
) -> None:
    """If the process of the first request was killed before the record was stored, a retry creates and launches the task."""
    await store.mark_active(TASK, request_digest="d")
    await store.add_payload(TASK, Sealed(b"of the killed process"))
    submitted = await dispatcher.submit(spec(), idempotency_digest="d")
    assert (False, [TASK]) == (submitted.is_replay, jobs.launched)
    content = await unseal(wrapper, await store.payload(TASK), task_id=TASK, purpose=Purpose.PAYLOAD)
    assert spec() == codec.spec_from_bytes(content)
    assert [TASK] == [mark.task_id for mark in await store.active()]


async def test_retry_of_a_slow_request_launches_one_task(
    dispatcher: Dispatcher, jobs: RecordingJobs, blobs: WatchedBlobs, other_store: Store
) -> None:
    """A retry that overtakes the first request creates the task; the first request then returns it, and its payload remains."""
    blobs.may_store_records.clear()
    first = asyncio.create_task(dispatcher.submit(spec(), idempotency_digest="d"))
    async with asyncio.timeout(10):
        while payload_name(TASK) not in await all_objects(blobs):
            await asyncio.sleep(0.001)
    second = await attrs.evolve(dispatcher, store=other_store).submit(spec(), idempotency_digest="d")
    blobs.may_store_records.set()
    assert (True, False) == ((await first).is_replay, second.is_replay)
    assert [TASK] == jobs.launched
    assert payload_name(TASK) in await all_objects(blobs)


@pytest.mark.parametrize("error", [LaunchFailed("No image."), Busy("It is full.", retry_after=7)])
async def test_retry_after_a_failed_launch_launches_the_task(
    dispatcher: Dispatcher, store: Store, jobs: RecordingJobs, error: CcrunError
) -> None:
    """A retry with the same key launches the task; it owes its callback, and further retries return it."""
    jobs.error = error
    with pytest.raises(type(error)):
        await dispatcher.submit(spec(callback_url=URL), idempotency_digest="d")
    rejected = await store.record(TASK)
    jobs.error = None
    submitted = await dispatcher.submit(spec(callback_url=URL), idempotency_digest="d")
    record = await store.record(TASK)
    assert (Status.PENDING, False, rejected.created_at) == (record.status, submitted.is_replay, record.created_at)
    assert record.webhook is not None
    assert [TASK] == [mark.task_id for mark in await store.active()]
    assert [TASK] == [listed.task_id for listed in (await store.page(limit=10)).tasks]
    assert (await dispatcher.submit(spec(), idempotency_digest="d")).is_replay
    assert [TASK] == jobs.launched


async def test_retries_after_a_failed_launch_launch_one_task(dispatcher: Dispatcher, jobs: RecordingJobs) -> None:
    """Of ten concurrent retries after a failed launch, one launches the task; the others return it or the error of the launch."""
    jobs.error = LaunchFailed("No image.")
    with pytest.raises(LaunchFailed):
        await dispatcher.submit(spec(), idempotency_digest="d")
    jobs.error = None
    jobs.launched.clear()
    outcomes = await asyncio.gather(
        *(dispatcher.submit(spec(), idempotency_digest="d") for _ in range(10)), return_exceptions=True
    )
    assert [TASK] == jobs.launched
    assert all(isinstance(outcome, Submitted | LaunchFailed) for outcome in outcomes)
    assert 1 == sum(isinstance(outcome, Submitted) and not outcome.is_replay for outcome in outcomes)


async def test_other_request_does_not_launch_a_rejected_task(dispatcher: Dispatcher, jobs: RecordingJobs) -> None:
    """Another request with the key or ID of a task whose launch failed is rejected."""
    jobs.error = LaunchFailed("No image.")
    with pytest.raises(LaunchFailed):
        await dispatcher.submit(spec(), idempotency_digest="d")
    jobs.error = None
    for digest in ("other", None):
        with pytest.raises(TaskExists):
            await dispatcher.submit(spec(), idempotency_digest=digest)
    assert [] == jobs.launched

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import attrs
import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestServer
from standardwebhooks import Webhook as StandardWebhook
from structlog.testing import capture_logs
from structlog.typing import EventDict

from ccrun import codec
from ccrun.backends.local.blobs import DirectoryBlobs
from ccrun.backends.local.key import LocalKey
from ccrun.callbacks import deliver, guard
from ccrun.callbacks.owed import CALLBACK_LEASE, OwedCallbacks
from ccrun.errors import TaskNotFound
from ccrun.lifecycle import finish, start
from ccrun.seal import Purpose, new_data_key
from ccrun.store import Store
from ccrun.task import CallbackInfo, CallbackState, Outcome, Reason, Secret, Status, TaskId, TaskRecord, TaskType

TASK = TaskId("t-1")
#: When the tasks of these tests end. Callbacks of tasks that ended long ago are given up.
NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0, result="done")
SECRET = Secret("whsec_bWFkZS11cCBzZWNyZXQ=")
ONCE = deliver.RetryPolicy(attempt_seconds=5, attempts=1, total_seconds=5)


class Receiver:
    """Takes callbacks, and answers as a test wants."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes]] = []
        self.status = 200
        self.headers: dict[str, str] = {}
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        """Verify the signature with the reference library, and note the body."""
        body = await request.read()
        StandardWebhook(SECRET.reveal()).verify(body, dict(request.headers))
        self.got.append((request.headers["webhook-id"], body))
        return web.Response(status=self.status, headers=self.headers)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver on loopback."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.take)
    async with TestServer(app) as server:
        receiver.url = str(server.make_url("/hook?token=made-up-token"))
        yield receiver


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The store of a test."""
    return Store(DirectoryBlobs(tmp_path / "blobs"))


@pytest.fixture
def callbacks(store: Store, tmp_path: Path) -> OwedCallbacks:
    """The courier of a test, which tries once."""
    return OwedCallbacks(
        store=store,
        wrapper=LocalKey(tmp_path / "sealing.key"),
        secret=SECRET,
        guard=guard.CallbackGuard(everywhere=True),
        policy=ONCE,
    )


async def end_task(callbacks: OwedCallbacks, url: str, *, sealed_for: TaskId = TASK) -> TaskRecord:
    """Store a task that is over and owes a callback to that URL."""
    key = await new_data_key(callbacks.wrapper)
    sealed = await key.seal(url.encode(), task_id=sealed_for, purpose=Purpose.CALLBACK_URL)
    record = TaskRecord(
        task_id=TASK,
        type=TaskType.ASYNC,
        status=Status.PENDING,
        created_at=NOW,
        logs_path="file:///sessions/t-1/",
        webhook=CallbackInfo(),
        sealed_callback_url=sealed,
    )
    record = finish(start(record, at=NOW), SUCCESS, at=NOW)
    await callbacks.store.mark_active(TASK)
    await callbacks.store.add(record)
    return record


async def taken_up(callbacks: OwedCallbacks) -> TaskRecord:
    """Take up a callback that is due."""
    claimed = await callbacks.claim(TASK)
    assert claimed is not None
    return claimed


def told(record: TaskRecord) -> CallbackInfo:
    """Return what the record tells of its callback."""
    assert record.webhook is not None
    return record.webhook


async def test_one_of_many_takes_a_debt_up(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """Of ten couriers at once one has the debt, for the length of its lease, and the others nothing."""
    await end_task(callbacks, receiver.url)
    claims = [claim for claim in await asyncio.gather(*(callbacks.claim(TASK) for _ in range(10))) if claim]
    assert len(claims) == 1
    claim = told(claims[0])
    assert claim.state is CallbackState.DELIVERING
    assert claim.next_attempt_at is not None
    assert (
        dt.timedelta(0) <= CALLBACK_LEASE - (claim.next_attempt_at - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)
    )
    assert claims[0] == await callbacks.store.record(TASK)


async def test_lease_that_ran_out_binds_nobody(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """The debt of a courier that died is taken up by another when the lease is over."""
    await end_task(callbacks, receiver.url)
    await taken_up(callbacks)
    assert await callbacks.claim(TASK) is None

    def expire(record: TaskRecord) -> TaskRecord:
        return attrs.evolve(record, webhook=attrs.evolve(told(record), next_attempt_at=NOW))

    await callbacks.store.update(TASK, expire)
    assert await callbacks.claim(TASK) is not None


async def test_there_is_nothing_to_take_up_of_a_settled_task(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """A callback that is delivered is not taken up; a task that is unknown is told."""
    await end_task(callbacks, receiver.url)
    await callbacks.deliver(await taken_up(callbacks))
    assert await callbacks.claim(TASK) is None
    with pytest.raises(TaskNotFound):
        await callbacks.claim(TaskId("unknown"))


async def test_callback_is_delivered_and_noted(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """The receiver gets the signed body of the record under the task's own ID, and the debt is gone."""
    record = await end_task(callbacks, receiver.url)
    delivered = await callbacks.deliver(await taken_up(callbacks))
    assert [("task_t-1", codec.callback_body(record))] == receiver.got
    assert CallbackInfo(state=CallbackState.DELIVERED, attempts=1) == told(delivered)
    assert delivered == await callbacks.store.record(TASK)
    assert await callbacks.store.active() == []


async def test_every_delivery_has_the_same_body(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """What a receiver gets when a delivery is made again is what it got before, byte for byte."""
    await end_task(callbacks, receiver.url)
    receiver.status = 503
    owed = await callbacks.deliver(await taken_up(callbacks))
    await callbacks.deliver(owed)
    assert receiver.got[0] == receiver.got[1]


async def test_failed_delivery_stays_owed(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """A receiver that refuses leaves the debt, due after a pause, with what went wrong."""
    await end_task(callbacks, receiver.url)
    receiver.status = 500
    before = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    noted = told(await callbacks.deliver(await taken_up(callbacks)))
    assert (CallbackState.OWED, 1, 1, "The receiver answered 500.") == (
        noted.state,
        noted.attempts,
        noted.rounds,
        noted.last_error,
    )
    assert noted.next_attempt_at is not None
    assert dt.timedelta(minutes=1) <= noted.next_attempt_at - before < dt.timedelta(minutes=2)
    assert [TASK] == [mark.task_id for mark in await callbacks.store.active()]


async def test_receiver_is_left_alone_as_long_as_it_wants(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """`Retry-After` of the last answer puts the next delivery off."""
    await end_task(callbacks, receiver.url)
    receiver.status, receiver.headers = 429, {"Retry-After": "3600"}
    noted = told(await callbacks.deliver(await taken_up(callbacks)))
    assert noted.next_attempt_at is not None
    assert noted.next_attempt_at - dt.datetime.now(dt.UTC) > dt.timedelta(minutes=59)


async def test_url_that_is_known_need_not_be_unsealed(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """The worker, which has the URL, delivers without the key service."""
    await end_task(callbacks, receiver.url, sealed_for=TaskId("another"))
    delivered = await callbacks.deliver(await taken_up(callbacks), url=Secret(receiver.url))
    assert told(delivered).state is CallbackState.DELIVERED


async def test_url_that_does_not_open_is_noted(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """A callback URL that was changed, or copied from another task, is a delivery that failed, and nobody is called."""
    await end_task(callbacks, receiver.url, sealed_for=TaskId("another"))
    noted = told(await callbacks.deliver(await taken_up(callbacks)))
    assert (CallbackState.OWED, 0, []) == (noted.state, noted.attempts, receiver.got)
    assert noted.last_error is not None
    assert "belongs to another task" in noted.last_error


async def test_silent_key_service_leaves_the_debt(callbacks: OwedCallbacks, receiver: Receiver, tmp_path: Path) -> None:
    """When the key service does not answer, that is noted as what went wrong, and the callback stays owed."""
    await end_task(callbacks, receiver.url)
    claimed = await taken_up(callbacks)
    (tmp_path / "sealing.key").write_bytes(b"damaged")
    noted = told(await callbacks.deliver(claimed))
    expected = (CallbackState.OWED, 0, "The key file is damaged: it must have 32 bytes.")
    assert expected == (noted.state, noted.attempts, noted.last_error)


async def test_courier_that_hands_over_leaves_the_debt_to_a_sweep(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """What a courier that is about to end could not deliver is due again at once, unless the receiver wants a pause."""
    await end_task(callbacks, receiver.url)
    receiver.status = 500
    hasty = attrs.evolve(callbacks, single_attempt=True)
    noted = told(await hasty.deliver(await taken_up(hasty)))
    assert (CallbackState.OWED, 1, 0) == (noted.state, noted.attempts, noted.rounds)
    receiver.headers = {"Retry-After": "3600"}
    await hasty.deliver(await taken_up(hasty))
    assert await callbacks.claim(TASK) is None


async def test_claim_is_given_back(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """A courier that cannot deliver what it has claimed gives it back, due at once; what is settled it leaves alone."""
    await end_task(callbacks, receiver.url)
    await taken_up(callbacks)
    await callbacks.release(TASK)
    await callbacks.deliver(await taken_up(callbacks))
    await callbacks.release(TASK)
    assert told(await callbacks.store.record(TASK)).state is CallbackState.DELIVERED


@pytest.fixture
def logged() -> Iterator[list[EventDict]]:
    """What is logged, of every level."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("DEBUG"))
    with capture_logs() as entries:
        yield entries
    structlog.configure(**before)


async def test_nothing_of_the_url_is_logged_or_noted(
    callbacks: OwedCallbacks, receiver: Receiver, logged: list[EventDict]
) -> None:
    """Neither the log nor the record shows where a callback went, or failed to go."""
    await end_task(callbacks, receiver.url)
    receiver.status = 500
    failed = await callbacks.deliver(await taken_up(callbacks))
    receiver.status = 200
    await callbacks.deliver(failed)
    shown = f"{logged} {codec.record_to_public(failed)}"
    assert "callback_delivered" in shown
    assert "made-up-token" not in shown
    assert "/hook" not in shown

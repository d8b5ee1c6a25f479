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
from ccrun.callbacks.owed import OwedCallbacks
from ccrun.errors import TaskNotFound
from ccrun.lifecycle import finish, start
from ccrun.seal import Purpose, new_data_key
from ccrun.store import Store
from ccrun.task import CallbackInfo, CallbackState, Outcome, Reason, Secret, Status, TaskId, TaskRecord, TaskType

TASK = TaskId("t-1")
#: When the tasks of these tests finish. It is recent, since callbacks of old tasks are abandoned.
NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0, result="done")
SECRET = Secret("whsec_bWFkZS11cCBzZWNyZXQ=")
ONCE = deliver.RetryPolicy(attempt_seconds=5, attempts=1, total_seconds=5)


class Receiver:
    """Records callbacks, and responds with a status and headers that the test sets."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, bytes]] = []
        self.status = 200
        self.headers: dict[str, str] = {}
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        """Verify the signature with the reference library, and record the request."""
        body = await request.read()
        StandardWebhook(SECRET.reveal()).verify(body, dict(request.headers))
        self.requests.append((request.headers["webhook-id"], body))
        return web.Response(status=self.status, headers=self.headers)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """Start a receiver on loopback."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.handle)
    async with TestServer(app) as server:
        receiver.url = str(server.make_url("/hook?token=made-up-token"))
        yield receiver


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return an empty store."""
    return Store(DirectoryBlobs(tmp_path / "blobs"))


@pytest.fixture
def callbacks(store: Store, tmp_path: Path) -> OwedCallbacks:
    """Return callbacks that are delivered in one attempt."""
    return OwedCallbacks(
        store=store,
        wrapper=LocalKey(tmp_path / "sealing.key"),
        secret=SECRET,
        guard=guard.CallbackGuard(everywhere=True),
        policy=ONCE,
    )


async def add_finished_task(callbacks: OwedCallbacks, url: str, *, sealed_for: TaskId = TASK) -> TaskRecord:
    """Store a finished task that owes a callback to the URL."""
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


async def claim_due(callbacks: OwedCallbacks) -> TaskRecord:
    """Claim the callback, which is due."""
    claimed = await callbacks.claim(TASK)
    assert claimed is not None
    return claimed


def callback_of(record: TaskRecord) -> CallbackInfo:
    """Return the state of the callback."""
    assert record.webhook is not None
    return record.webhook


async def test_one_of_many_concurrent_claims_succeeds(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """Of ten concurrent claims, one gets the callback, for the duration of the lease."""
    await add_finished_task(callbacks, receiver.url)
    claims = [claim for claim in await asyncio.gather(*(callbacks.claim(TASK) for _ in range(10))) if claim]
    assert len(claims) == 1
    callback = callback_of(claims[0])
    assert callback.state is CallbackState.DELIVERING
    assert callback.next_attempt_at is not None
    assert (
        dt.timedelta(0)
        <= callbacks.lease - (callback.next_attempt_at - dt.datetime.now(dt.UTC))
        < dt.timedelta(minutes=1)
    )
    assert claims[0] == await callbacks.store.record(TASK)


async def test_callback_can_be_claimed_after_the_lease(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """A claimed callback can be claimed again only after its lease has expired."""
    await add_finished_task(callbacks, receiver.url)
    await claim_due(callbacks)
    assert await callbacks.claim(TASK) is None

    def expire(record: TaskRecord) -> TaskRecord:
        return attrs.evolve(record, webhook=attrs.evolve(callback_of(record), next_attempt_at=NOW))

    await callbacks.store.update(TASK, expire)
    assert await callbacks.claim(TASK) is not None


async def test_delivered_callback_cannot_be_claimed(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """A claim of a delivered callback returns None; a claim for an unknown task raises `TaskNotFound`."""
    await add_finished_task(callbacks, receiver.url)
    await callbacks.deliver(await claim_due(callbacks))
    assert await callbacks.claim(TASK) is None
    with pytest.raises(TaskNotFound):
        await callbacks.claim(TaskId("unknown"))


async def test_delivery_is_recorded(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """The receiver gets the signed body with the ID of the task, and the callback is no longer owed."""
    record = await add_finished_task(callbacks, receiver.url)
    delivered = await callbacks.deliver(await claim_due(callbacks))
    assert [("task_t-1", codec.callback_body(record))] == receiver.requests
    assert CallbackInfo(state=CallbackState.DELIVERED, attempts=1) == callback_of(delivered)
    assert delivered == await callbacks.store.record(TASK)
    assert await callbacks.store.active() == []


async def test_every_delivery_has_the_same_body(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """A second delivery sends exactly the bytes of the first."""
    await add_finished_task(callbacks, receiver.url)
    receiver.status = 503
    owed = await callbacks.deliver(await claim_due(callbacks))
    await callbacks.deliver(owed)
    assert receiver.requests[0] == receiver.requests[1]


async def test_callback_stays_owed_after_a_failure(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """After a failed delivery the callback is due again after a delay, and the record has the error."""
    await add_finished_task(callbacks, receiver.url)
    receiver.status = 500
    before = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    recorded = callback_of(await callbacks.deliver(await claim_due(callbacks)))
    assert (CallbackState.OWED, 1, 1, "The receiver responded with 500.") == (
        recorded.state,
        recorded.attempts,
        recorded.rounds,
        recorded.last_error,
    )
    assert recorded.next_attempt_at is not None
    assert dt.timedelta(minutes=1) <= recorded.next_attempt_at - before < dt.timedelta(minutes=2)
    assert [TASK] == [mark.task_id for mark in await callbacks.store.active()]


@pytest.mark.parametrize(
    ("status", "days", "state"),
    [
        (410, 0, CallbackState.ABANDONED),
        (404, 0, CallbackState.OWED),
        *((status, 2.9, CallbackState.OWED) for status in (400, 401, 403, 404, 301, 308)),
        *((status, 3.1, CallbackState.ABANDONED) for status in (400, 401, 403, 404, 301, 308)),
        *((status, 29.9, CallbackState.OWED) for status in (405, 422, 429, 500, 503)),
        *((status, 30.1, CallbackState.ABANDONED) for status in (405, 422, 429, 500, 503)),
    ],
)
async def test_status_decides_how_long_a_callback_is_retried(
    callbacks: OwedCallbacks, receiver: Receiver, status: int, days: float, state: CallbackState
) -> None:
    """410 ends it at once, a rejection after three days, anything else after 30."""
    await add_finished_task(callbacks, receiver.url)
    finished = dt.datetime.now(dt.UTC) - dt.timedelta(days=days)
    await callbacks.store.update(TASK, lambda record: attrs.evolve(record, completed_at=finished))
    receiver.status = status
    recorded = callback_of(await callbacks.deliver(await claim_due(callbacks)))
    assert (state, f"The receiver responded with {status}") == (recorded.state, str(recorded.last_error)[:31])


async def test_next_delivery_obeys_retry_after(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """The next delivery is due after the time in the `Retry-After` header of the last response."""
    await add_finished_task(callbacks, receiver.url)
    receiver.status, receiver.headers = 429, {"Retry-After": "3600"}
    recorded = callback_of(await callbacks.deliver(await claim_due(callbacks)))
    assert recorded.next_attempt_at is not None
    assert recorded.next_attempt_at - dt.datetime.now(dt.UTC) > dt.timedelta(minutes=59)


async def test_given_url_is_used_without_the_key_service(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """The worker passes the URL, so the sealed URL is not opened."""
    await add_finished_task(callbacks, receiver.url, sealed_for=TaskId("another"))
    delivered = await callbacks.deliver(await claim_due(callbacks), url=Secret(receiver.url))
    assert callback_of(delivered).state is CallbackState.DELIVERED


async def test_url_that_cannot_be_opened_fails_the_delivery(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """A sealed URL that was copied from another task fails the delivery, and no request is sent."""
    await add_finished_task(callbacks, receiver.url, sealed_for=TaskId("another"))
    recorded = callback_of(await callbacks.deliver(await claim_due(callbacks)))
    assert (CallbackState.OWED, 0, []) == (recorded.state, recorded.attempts, receiver.requests)
    assert recorded.last_error is not None
    assert "belongs to another task" in recorded.last_error


async def test_callback_stays_owed_without_the_key_service(
    callbacks: OwedCallbacks, receiver: Receiver, tmp_path: Path
) -> None:
    """When the key service fails, the record has its error and the callback stays owed."""
    await add_finished_task(callbacks, receiver.url)
    claimed = await claim_due(callbacks)
    (tmp_path / "sealing.key").write_bytes(b"damaged")
    recorded = callback_of(await callbacks.deliver(claimed))
    expected = (CallbackState.OWED, 0, "The key file is damaged: it must have 32 bytes.")
    assert expected == (recorded.state, recorded.attempts, recorded.last_error)


async def test_single_attempt_leaves_the_callback_due(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """With `single_attempt`, a failed callback is due again immediately, unless the receiver sent `Retry-After`."""
    await add_finished_task(callbacks, receiver.url)
    receiver.status = 500
    single = attrs.evolve(callbacks, single_attempt=True)
    recorded = callback_of(await single.deliver(await claim_due(single)))
    assert (CallbackState.OWED, 1, 0) == (recorded.state, recorded.attempts, recorded.rounds)
    receiver.headers = {"Retry-After": "3600"}
    await single.deliver(await claim_due(single))
    assert await callbacks.claim(TASK) is None


async def test_claim_can_be_released(callbacks: OwedCallbacks, receiver: Receiver) -> None:
    """A released callback can be claimed immediately; releasing a delivered callback changes nothing."""
    await add_finished_task(callbacks, receiver.url)
    await claim_due(callbacks)
    await callbacks.release(TASK)
    await callbacks.deliver(await claim_due(callbacks))
    await callbacks.release(TASK)
    assert callback_of(await callbacks.store.record(TASK)).state is CallbackState.DELIVERED


@pytest.fixture
def logged() -> Iterator[list[EventDict]]:
    """Return the log entries of all levels."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("DEBUG"))
    with capture_logs() as entries:
        yield entries
    structlog.configure(**before)


async def test_url_is_neither_logged_nor_recorded(
    callbacks: OwedCallbacks, receiver: Receiver, logged: list[EventDict]
) -> None:
    """Neither the log nor the public record contains any part of the URL, whether the delivery succeeds or fails."""
    await add_finished_task(callbacks, receiver.url)
    receiver.status = 500
    failed = await callbacks.deliver(await claim_due(callbacks))
    receiver.status = 200
    await callbacks.deliver(failed)
    shown = f"{logged} {codec.record_to_public(failed)}"
    assert "callback_delivered" in shown
    assert "made-up-token" not in shown
    assert "/hook" not in shown

"""Owed callbacks on the gcp backend."""

from __future__ import annotations

import asyncio
import datetime as dt

import attrs
import pytest
from helpers.cloud import Cloud, Receiver
from helpers.settling import leftovers, submit_without_start, webhook_of

from ccrun.sweep import SweepReport
from ccrun.task import CallbackState, TaskId, TaskRecord


async def submit_and_settle(cloud: Cloud, receiver: Receiver) -> TaskId:
    """Return a task that is settled and owes its callback."""
    task_id = await submit_without_start(cloud, receiver)
    await cloud.get(task_id)
    return task_id


@pytest.mark.parametrize("sweeps", [2, 5])
async def test_concurrent_sweeps_deliver_once(cloud: Cloud, receiver: Receiver, sweeps: int) -> None:
    """One of several concurrent sweeps claims the callback and delivers it. The others do nothing."""
    await submit_and_settle(cloud, receiver)
    reports = await asyncio.gather(*(cloud.sweep() for _ in range(sweeps)))
    assert 1 == sum(report.delivered for report in reports)
    assert (0, 0) == (sum(report.undelivered for report in reports), sum(report.failed for report in reports))
    assert 1 == len(receiver.received)


async def test_delays_between_deliveries_grow(cloud: Cloud, receiver: Receiver) -> None:
    """After failed deliveries the next attempt is due after one, two and four minutes. Until then a sweep does nothing."""
    receiver.status = 500
    task_id = await submit_and_settle(cloud, receiver)
    delays = []
    for attempts in (1, 2, 3):
        started = dt.datetime.now(dt.UTC)
        assert SweepReport(undelivered=1) == await cloud.sweep()
        assert SweepReport() == await cloud.sweep()
        webhook = await webhook_of(cloud, task_id)
        assert (CallbackState.OWED, attempts, attempts) == (webhook.state, webhook.attempts, len(receiver.received))
        assert webhook.next_attempt_at is not None
        delays.append(round((webhook.next_attempt_at - started).total_seconds() / 60))
        await make_callback_due(cloud, task_id)
    assert [1, 2, 4] == delays
    receiver.status = 200
    assert SweepReport(delivered=1) == await cloud.sweep()
    assert set() == await leftovers(cloud, task_id)


async def test_unreachable_receiver_leaves_the_callback_owed(cloud: Cloud, receiver: Receiver) -> None:
    """The task keeps its active marker, so that a later sweep delivers the callback."""
    receiver.url = "http://127.0.0.1:9/"
    task_id = await submit_and_settle(cloud, receiver)
    assert SweepReport(undelivered=1) == await cloud.sweep()
    assert CallbackState.OWED is (await webhook_of(cloud, task_id)).state
    assert {"active"} == await leftovers(cloud, task_id)


async def test_denied_decryption_leaves_the_callback_owed(cloud: Cloud, receiver: Receiver) -> None:
    """The record contains the error, and a later sweep delivers the callback."""
    task_id = await submit_and_settle(cloud, receiver)
    cloud.deployment.kms.denied.add("decrypt")
    assert SweepReport(undelivered=1) == await cloud.sweep()
    assert "useToDecrypt" in str((await webhook_of(cloud, task_id)).last_error)
    cloud.deployment.kms.denied.clear()
    await make_callback_due(cloud, task_id)
    assert SweepReport(delivered=1) == await cloud.sweep()
    assert 1 == len(receiver.received)


async def make_callback_due(cloud: Cloud, task_id: TaskId) -> None:
    """Make a callback due now."""

    def due(record: TaskRecord) -> TaskRecord:
        assert record.webhook is not None
        return attrs.evolve(record, webhook=attrs.evolve(record.webhook, next_attempt_at=dt.datetime.now(dt.UTC)))

    await cloud.store.update(task_id, due)

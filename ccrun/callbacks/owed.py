"""Carries the callback of a task that is over: takes up the debt, delivers, notes what became of it.

Whoever wins the swap that takes up a debt delivers it, so any number of couriers at once deliver it once. Only the worker and the
sweep have one; the API neither opens a callback URL nor calls a receiver.
"""

from __future__ import annotations

import datetime as dt
from typing import Final

import attrs
import structlog

from ccrun import codec, lifecycle
from ccrun.callbacks import deliver, guard
from ccrun.errors import KeyServiceError, SealError
from ccrun.seal import KeyWrapper, Purpose
from ccrun.store import Store
from ccrun.task import Secret, TaskId, TaskRecord
from ccrun.unseal import unseal

log = structlog.get_logger()

#: For so long nobody else takes up a debt. Longer than the longest delivery that `webhook.Patience` allows.
CALLBACK_LEASE: Final = dt.timedelta(minutes=5)


class _NotDue(Exception):
    """Somebody else has the debt, or there is none."""


@attrs.frozen(kw_only=True)
class OwedCallbacks:
    """Delivers callbacks, signed with `secret`, to where `guard` allows.

    With `hands_over`, what this courier could not deliver is due again at once, for a sweep that goes on with it.
    """

    store: Store
    wrapper: KeyWrapper
    secret: Secret
    guard: guard.CallbackGuard
    policy: deliver.RetryPolicy
    single_attempt: bool = False

    async def claim(self, task_id: TaskId) -> TaskRecord | None:
        """Claim the callback of a task when it is due; None when it is not, or somebody else was faster."""

        def claim(record: TaskRecord) -> TaskRecord:
            now = dt.datetime.now(dt.UTC)
            if not lifecycle.is_callback_due(record, at=now):
                raise _NotDue
            return lifecycle.claim_callback(record, lease_until=now + CALLBACK_LEASE)

        try:
            return await self.store.update(task_id, claim)
        except _NotDue:
            return None

    async def deliver(self, record: TaskRecord, *, url: Secret | None = None) -> TaskRecord:
        """Deliver a callback that was claimed before, and note the outcome on the record.

        Args:
            record: The final record; the body is made from it, so it is the same for every try.
            url: The callback URL, when the caller knows it; else it is unsealed from the record.
        """
        try:
            target = url or await self._callback_url(record)
        except (SealError, KeyServiceError) as error:
            delivery = deliver.Delivery(delivered=False, attempts=0, error=error.message)
        else:
            delivery = await deliver.deliver(
                target,
                codec.callback_body(record),
                webhook_id=f"task_{record.task_id}",
                secret=self.secret,
                guard=self.guard,
                policy=self.policy,
            )
        if delivery.delivered:
            log.info(
                "callback_delivered",
                message="Callback delivered",
                taskId=record.task_id,
                attempts=delivery.attempts,
            )
        else:
            log.warning(
                "callback_failed",
                message="Callback not delivered",
                taskId=record.task_id,
                attempts=delivery.attempts,
                error=delivery.error,
            )
        now = dt.datetime.now(dt.UTC)
        return await self.store.update(
            record.task_id,
            lambda present: lifecycle.record_delivery(
                present,
                delivered=delivery.delivered,
                attempts=delivery.attempts,
                error=delivery.error,
                at=now,
                not_before=now + dt.timedelta(seconds=delivery.retry_after_seconds or 0),
                backs_off=not self.single_attempt,
            ),
        )

    async def release(self, task_id: TaskId) -> None:
        """Give a claimed callback back, for a sweep to deliver it at once."""

        def owe(record: TaskRecord) -> TaskRecord:
            now = dt.datetime.now(dt.UTC)
            return lifecycle.owe_callback(record, at=now) if record.owes_callback else record

        await self.store.update(task_id, owe)

    async def _callback_url(self, record: TaskRecord) -> Secret:
        if record.sealed_callback_url is None:
            raise SealError("The record has no callback URL.")
        url = await unseal(
            self.wrapper, record.sealed_callback_url, task_id=record.task_id, purpose=Purpose.CALLBACK_URL
        )
        return Secret(url.decode())

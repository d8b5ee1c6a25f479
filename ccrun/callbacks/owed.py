"""Callbacks that are owed: claim one, deliver it, record the result.

A claim is a compare-and-swap on the record, so that one process at a time delivers a callback. Only workers and sweeps
deliver; the API neither opens a callback URL nor calls a receiver.
"""

from __future__ import annotations

import datetime as dt
from typing import Final

import attrs
import structlog

from ccrun import codec, lifecycle
from ccrun.callbacks import deliver, guard
from ccrun.callbacks.oidc import IdentityTokens
from ccrun.egress import Egress
from ccrun.errors import KeyServiceError, SealError
from ccrun.seal import KeyWrapper, Purpose
from ccrun.store import Store
from ccrun.task import Secret, TaskId, TaskRecord
from ccrun.unseal import unseal

log = structlog.get_logger()

#: Seconds by which a claim lasts longer than its delivery may take: for opening the URL, and for writing the record.
LEASE_MARGIN_SECONDS: Final = 30.0


class _NotDue(Exception):
    """The callback is not due."""


@attrs.frozen(kw_only=True)
class OwedCallbacks:
    """Delivers callbacks.

    Args:
        secret: The key of the signatures.
        guard: Where callbacks may go.
        egress: How they get there.
        tokens: The receivers that get an identity token.
        single_attempt: Whether a failed delivery makes the callback due immediately, for a sweep.
    """

    store: Store
    wrapper: KeyWrapper
    secret: Secret
    guard: guard.CallbackGuard
    egress: Egress = attrs.field(factory=Egress)
    tokens: IdentityTokens | None = None
    policy: deliver.RetryPolicy
    single_attempt: bool = False

    @property
    def lease(self) -> dt.timedelta:
        """How long a claim lasts. After a process was killed during a delivery, the next one follows after this time."""
        lease = dt.timedelta(seconds=self.policy.total_seconds + LEASE_MARGIN_SECONDS)
        return min(lease, lifecycle.MAX_CALLBACK_LEASE)

    async def claim(self, task_id: TaskId) -> TaskRecord | None:
        """Claim the callback of a task. Return None when it is not due, or another process has claimed it."""

        def claim(record: TaskRecord) -> TaskRecord:
            now = dt.datetime.now(dt.UTC)
            if not lifecycle.is_callback_due(record, at=now):
                raise _NotDue
            return lifecycle.claim_callback(record, lease_until=now + self.lease)

        try:
            return await self.store.update(task_id, claim)
        except _NotDue:
            return None

    async def deliver(self, record: TaskRecord, *, url: Secret | None = None) -> TaskRecord:
        """Deliver a claimed callback, record the result, and return the record.

        Args:
            record: The final record, from which the body is made, so that all attempts send the same body.
            url: The callback URL, if the caller has it. By default, the one in the record is unsealed.
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
                egress=self.egress,
                tokens=self.tokens,
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
                status=delivery.status,
                at=now,
                not_before=now + dt.timedelta(seconds=delivery.retry_after_seconds or 0),
                backs_off=not self.single_attempt,
            ),
        )

    async def release(self, task_id: TaskId) -> None:
        """Release a claimed callback, so that a sweep delivers it."""

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

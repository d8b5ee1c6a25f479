"""The rules for how a task record may change: status transitions, cancellation, the state of its callback.

Pure functions from one record to the next. Nothing here reads the clock; the caller passes the time.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Final, assert_never

import attrs

from ccrun.errors import IllegalTransition
from ccrun.task import (
    EXIT_CANCELLED,
    EXIT_FAILED,
    CallbackInfo,
    CallbackState,
    Outcome,
    Reason,
    Status,
    Summary,
    TaskRecord,
)

_NEXT_STATUSES: Final[Mapping[Status, frozenset[Status]]] = {
    Status.PENDING: frozenset({Status.RUNNING, Status.FAILED, Status.CANCELLED}),
    Status.RUNNING: frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED}),
    Status.COMPLETED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}


def check_transition(old: Status, new: Status) -> None:
    """Check that a task may change from one status to another.

    Raises:
        IllegalTransition: It may not.
    """
    if new not in _NEXT_STATUSES[old]:
        raise IllegalTransition(f"A task that is {old} cannot become {new}.")


def failed_outcome(reason: Reason, error: str, exit_code: int = EXIT_FAILED) -> Outcome:
    """Return the outcome of a task that failed for a reason that the CLI did not report."""
    return Outcome(status=Status.FAILED, reason=reason, exit_code=exit_code, error=error)


def cancelled_outcome(outcome: Outcome | None = None) -> Outcome:
    """Return the outcome of a cancelled task; `outcome` adds what the task had done by then."""
    outcome = outcome or Outcome(status=Status.CANCELLED, reason=Reason.CANCELLED, exit_code=EXIT_CANCELLED)
    return attrs.evolve(
        outcome,
        status=Status.CANCELLED,
        reason=Reason.CANCELLED,
        exit_code=EXIT_CANCELLED,
        error="The task was cancelled.",
    )


def start(record: TaskRecord, *, at: dt.datetime, execution_name: str | None = None) -> TaskRecord:
    """Return the record of a task that a worker has started.

    Raises:
        IllegalTransition: The task is not pending.
    """
    check_transition(record.status, Status.RUNNING)
    return attrs.evolve(
        record,
        status=Status.RUNNING,
        started_at=at,
        execution_name=execution_name or record.execution_name,
    )


def reject(record: TaskRecord, error: str, *, at: dt.datetime) -> TaskRecord:
    """Return the record of a task whose launch failed. The client gets the error as its response, so no callback is owed.

    Raises:
        IllegalTransition: The task is final.
    """
    failed = finish(record, failed_outcome(Reason.LAUNCH_FAILED, error), at=at)
    return attrs.evolve(failed, webhook=None, launch_rejected=True)


def retry_launch(rejected: TaskRecord, record: TaskRecord) -> TaskRecord:
    """Return the record of a rejected task that its client has submitted again: the only exception from a final state.

    Args:
        record: The record of the new submission.

    Raises:
        IllegalTransition: The task was not rejected, or another process has launched it again.
    """
    if not rejected.launch_rejected:
        raise IllegalTransition(f"Task {rejected.task_id} is already {rejected.status}.")
    # The list of tasks has the time of the first submission.
    return attrs.evolve(record, created_at=rejected.created_at)


def request_cancel(record: TaskRecord, *, at: dt.datetime) -> TaskRecord:
    """Return the record after a request to cancel: final when no worker has started the task, else marked for its worker.

    Raises:
        IllegalTransition: The task is final.
    """
    match record.status:
        case Status.PENDING:
            return finish(attrs.evolve(record, cancelled_at=at), cancelled_outcome(), at=at)
        case Status.RUNNING:
            return attrs.evolve(record, cancelled_at=record.cancelled_at or at)
        case Status.COMPLETED | Status.FAILED | Status.CANCELLED:
            raise IllegalTransition(f"Task {record.task_id} is already {record.status}.")
        case _ as never:
            assert_never(never)


def finish(
    record: TaskRecord, outcome: Outcome, *, at: dt.datetime, lease_until: dt.datetime | None = None
) -> TaskRecord:
    """Return the final record of a task.

    A cancellation that the API has accepted always wins: such a task becomes cancelled, whatever the outcome. The state of
    the callback is part of the same record, so that no crash can separate the two.

    Args:
        lease_until: When the lease of a caller that delivers the callback itself expires. None makes the callback due for a
            sweep immediately.

    Raises:
        IllegalTransition: The task is final.
    """
    if record.is_cancelling:
        outcome = cancelled_outcome(outcome)
    check_transition(record.status, outcome.status)
    started_at = record.started_at or at
    webhook = record.webhook
    if webhook is not None:
        state = CallbackState.OWED if lease_until is None else CallbackState.DELIVERING
        webhook = attrs.evolve(webhook, state=state, next_attempt_at=lease_until or at)
    return attrs.evolve(
        record,
        status=outcome.status,
        completed_at=at,
        exit_code=outcome.exit_code,
        error=outcome.error,
        reason=outcome.reason,
        summary=Summary(
            duration_ms=max(0, round((at - started_at).total_seconds() * 1000)),
            turns=outcome.turns,
            errors=outcome.errors,
            started_at=record.started_at,
            completed_at=at,
            cost_usd=outcome.cost_usd,
            usage=outcome.usage,
            session_id=outcome.session_id,
            result=outcome.result,
            background_tasks=outcome.background_tasks,
            api_error=outcome.api_error,
            mcp_servers=outcome.mcp_servers,
        ),
        uploaded_files=outcome.uploaded_files,
        git_commit=outcome.git_commit,
        action_errors=outcome.action_errors,
        isolation=outcome.isolation,
        webhook=webhook,
    )


# --- the callback ------------------------------------------------------------------------------------------------------

#: The delay after the first failed delivery of a callback. It doubles after each one, up to six hours.
FIRST_CALLBACK_DELAY: Final = dt.timedelta(minutes=1)
MAX_CALLBACK_DELAY: Final = dt.timedelta(hours=6)
#: The maximum time for which one process alone may deliver a callback.
MAX_CALLBACK_LEASE: Final = dt.timedelta(minutes=5)
#: How long after the task has finished its callback is retried. Then it is abandoned.
CALLBACK_RETRY_PERIOD: Final = dt.timedelta(days=30)
#: The same for responses that say that the request is wrong or belongs elsewhere. A receiver can be corrected after a weekend.
REJECTED_CALLBACK_RETRY_PERIOD: Final = dt.timedelta(days=3)
#: Those responses besides redirects.
_REJECTIONS: Final = frozenset({400, 401, 403, 404})
#: 410: the receiver is not there any more, and will not come back (RFC 9110, section 15.5.11).
_GONE: Final = 410


def is_callback_due(record: TaskRecord, *, at: dt.datetime) -> bool:
    """Return whether the callback is owed, its delay is over, and no process holds a lease on it.

    A lease that ends later than any lease can was given before the clock was set back. It does not count.
    """
    if record.webhook is None or not record.owes_callback:
        return False
    due = record.webhook.next_attempt_at
    is_leased = record.webhook.state is CallbackState.DELIVERING
    return due is None or due <= at or (is_leased and due > at + MAX_CALLBACK_LEASE)


def claim_callback(record: TaskRecord, *, lease_until: dt.datetime) -> TaskRecord:
    """Return the record with its callback leased to the process that delivers it."""
    return _with_callback(record, state=CallbackState.DELIVERING, next_attempt_at=lease_until)


def owe_callback(record: TaskRecord, *, at: dt.datetime) -> TaskRecord:
    """Return the record with its callback due at that time, whatever its state was."""
    return _with_callback(record, state=CallbackState.OWED, next_attempt_at=at)


def record_delivery(
    record: TaskRecord,
    *,
    delivered: bool,
    attempts: int,
    error: str | None,
    at: dt.datetime,
    status: int | None = None,
    not_before: dt.datetime | None = None,
    backs_off: bool = True,
) -> TaskRecord:
    """Return the record after a delivery: its callback is delivered, owed with a longer delay, or abandoned.

    Args:
        attempts: HTTP requests that the delivery made.
        status: The status of the last response, None without one.
        not_before: The time before which the receiver wants no retry (its `Retry-After`).
        backs_off: Whether a failure makes the delay longer; if not, the callback is due immediately.
    """
    before = record.webhook or CallbackInfo()
    after = attrs.evolve(before, attempts=before.attempts + attempts, last_error=error)
    if delivered:
        after = attrs.evolve(after, state=CallbackState.DELIVERED, last_error=None, next_attempt_at=None)
    elif at - (record.completed_at or at) > _callback_retry_period(status):
        after = attrs.evolve(after, state=CallbackState.ABANDONED, next_attempt_at=None)
    else:
        delay = min(FIRST_CALLBACK_DELAY * 2 ** min(before.rounds, 10), MAX_CALLBACK_DELAY)
        due = at + delay if backs_off else at
        after = attrs.evolve(
            after,
            state=CallbackState.OWED,
            rounds=before.rounds + backs_off,
            next_attempt_at=max(due, not_before or due),
        )
    return attrs.evolve(record, webhook=after)


def _callback_retry_period(status: int | None) -> dt.timedelta:
    if status == _GONE:
        return dt.timedelta.min
    is_rejection = status is not None and (status in _REJECTIONS or 300 <= status < 400)
    return REJECTED_CALLBACK_RETRY_PERIOD if is_rejection else CALLBACK_RETRY_PERIOD


def _with_callback(record: TaskRecord, *, state: CallbackState, next_attempt_at: dt.datetime) -> TaskRecord:
    webhook = attrs.evolve(record.webhook or CallbackInfo(), state=state, next_attempt_at=next_attempt_at)
    return attrs.evolve(record, webhook=webhook)

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
    """Raise `IllegalTransition` unless a task may go from `old` to `new`."""
    if new not in _NEXT_STATUSES[old]:
        raise IllegalTransition(f"A task that is {old} cannot become {new}.")


def failed_outcome(reason: Reason, error: str, exit_code: int = EXIT_FAILED) -> Outcome:
    """Return what a task ends in that failed without the CLI's own account of it."""
    return Outcome(status=Status.FAILED, reason=reason, exit_code=exit_code, error=error)


def cancelled_outcome(outcome: Outcome | None = None) -> Outcome:
    """Return what a cancelled task ends in, with the figures of what it had done until then."""
    ended = outcome or Outcome(status=Status.CANCELLED, reason=Reason.CANCELLED, exit_code=EXIT_CANCELLED)
    return attrs.evolve(
        ended,
        status=Status.CANCELLED,
        reason=Reason.CANCELLED,
        exit_code=EXIT_CANCELLED,
        error="The task was cancelled.",
    )


def start(record: TaskRecord, *, at: dt.datetime, execution_name: str | None = None) -> TaskRecord:
    """Return the record of the same task, taken up by a worker.

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


def request_cancel(record: TaskRecord, *, at: dt.datetime) -> TaskRecord:
    """Return the record of the same task after a cancel: over when it had not begun, marked when it runs.

    Raises:
        IllegalTransition: The task is over.
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
    """Return the final record of the same task.

    A cancel that was answered stands: whatever the outcome, such a task ends as cancelled. The debt of the callback is
    part of the same value, so that no crash falls between the final state and the debt.

    Args:
        lease_until: The writer delivers the callback itself and has until then; without, it is due at once for a sweep.

    Raises:
        IllegalTransition: The task is over.
    """
    if record.is_cancelling:
        outcome = cancelled_outcome(outcome)
    check_transition(record.status, outcome.status)
    began = record.started_at or at
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
            duration_ms=max(0, round((at - began).total_seconds() * 1000)),
            turns=outcome.turns,
            errors=outcome.errors,
            started_at=record.started_at,
            completed_at=at,
            cost_usd=outcome.cost_usd,
            usage=outcome.usage,
            session_id=outcome.session_id,
            result=outcome.result,
        ),
        uploaded_files=outcome.uploaded_files,
        git_commit=outcome.git_commit,
        action_errors=outcome.action_errors,
        webhook=webhook,
    )


# --- the callback's debt ---------------------------------------------------------------------------------------------

#: Pauses between deliveries of a callback that is owed: one minute, then twice as long each time, six hours at most.
FIRST_CALLBACK_DELAY: Final = dt.timedelta(minutes=1)
MAX_CALLBACK_DELAY: Final = dt.timedelta(hours=6)
#: A receiver that was not there for so long after the task's end will not come back: the callback is given up.
CALLBACK_RETRY_PERIOD: Final = dt.timedelta(days=30)


def is_callback_due(record: TaskRecord, *, at: dt.datetime) -> bool:
    """Return whether the callback is owed and nobody holds a lease on it that has not run out."""
    due = record.webhook.next_attempt_at if record.webhook else None
    return record.owes_callback and (due is None or due <= at)


def claim_callback(record: TaskRecord, *, lease_until: dt.datetime) -> TaskRecord:
    """Return the record of the same task while somebody delivers its callback, until then."""
    return _with_callback(record, state=CallbackState.DELIVERING, next_attempt_at=lease_until)


def owe_callback(record: TaskRecord, *, at: dt.datetime) -> TaskRecord:
    """Return the record of the same task with its callback due now, whatever became of it before."""
    return _with_callback(record, state=CallbackState.OWED, next_attempt_at=at)


def record_delivery(
    record: TaskRecord,
    *,
    delivered: bool,
    attempts: int,
    error: str | None,
    at: dt.datetime,
    not_before: dt.datetime | None = None,
    pauses: bool = True,
) -> TaskRecord:
    """Return the record of the same task after a delivery: settled, owed with a longer pause, or given up.

    Args:
        not_before: When the receiver itself wants to be asked again.
        pauses: Whether a failure counts for the pause; without, the callback is due again at once.
    """
    before = record.webhook or CallbackInfo()
    after = attrs.evolve(before, attempts=before.attempts + attempts, last_error=error)
    if delivered:
        after = attrs.evolve(after, state=CallbackState.DELIVERED, last_error=None, next_attempt_at=None)
    elif at - (record.completed_at or at) > CALLBACK_RETRY_PERIOD:
        after = attrs.evolve(after, state=CallbackState.ABANDONED, next_attempt_at=None)
    else:
        pause = min(FIRST_CALLBACK_DELAY * 2 ** min(before.rounds, 10), MAX_CALLBACK_DELAY)
        due = at + pause if pauses else at
        after = attrs.evolve(
            after,
            state=CallbackState.OWED,
            rounds=before.rounds + pauses,
            next_attempt_at=max(due, not_before or due),
        )
    return attrs.evolve(record, webhook=after)


def _with_callback(record: TaskRecord, *, state: CallbackState, next_attempt_at: dt.datetime) -> TaskRecord:
    webhook = attrs.evolve(record.webhook or CallbackInfo(), state=state, next_attempt_at=next_attempt_at)
    return attrs.evolve(record, webhook=webhook)

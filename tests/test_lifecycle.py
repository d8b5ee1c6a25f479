from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccrun.errors import IllegalTransition
from ccrun.lifecycle import (
    CALLBACK_RETRY_PERIOD,
    FIRST_CALLBACK_DELAY,
    MAX_CALLBACK_DELAY,
    cancelled_outcome,
    check_transition,
    claim_callback,
    finish,
    is_callback_due,
    owe_callback,
    record_delivery,
    request_cancel,
    start,
)
from ccrun.results import ActionError, GitCommit, UploadedFile
from ccrun.task import (
    CallbackInfo,
    CallbackState,
    Outcome,
    Reason,
    Status,
    TaskId,
    TaskRecord,
    TaskType,
)

NOW = dt.datetime(2025, 3, 4, 5, 6, 7, tzinfo=dt.UTC)
SECOND = dt.timedelta(seconds=1)
SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0, turns=3, result="done", cost_usd=0.5)
FAILURE = Outcome(status=Status.FAILED, reason=Reason.AGENT_ERROR, exit_code=1, error="It broke.")


def pending(webhook: CallbackInfo | None = None) -> TaskRecord:
    """Return the record of a new task."""
    return TaskRecord(
        task_id=TaskId("t-1"),
        type=TaskType.ASYNC,
        status=Status.PENDING,
        created_at=NOW,
        logs_path="file:///sessions/t-1/",
        webhook=webhook,
    )


def completed(webhook: CallbackInfo | None = None) -> TaskRecord:
    """Return the record of a completed task."""
    return finish(start(pending(webhook), at=NOW), SUCCESS, at=NOW + SECOND)


# --- transitions -----------------------------------------------------------------------------------------------------

LEGAL = {
    (Status.PENDING, Status.RUNNING),
    (Status.PENDING, Status.FAILED),
    (Status.PENDING, Status.CANCELLED),
    (Status.RUNNING, Status.COMPLETED),
    (Status.RUNNING, Status.FAILED),
    (Status.RUNNING, Status.CANCELLED),
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(Status, Status)))
def test_only_legal_transitions_are_accepted(old: Status, new: Status) -> None:
    """`check_transition` accepts six pairs of statuses and rejects all others."""
    try:
        check_transition(old, new)
        is_legal = True
    except IllegalTransition:
        is_legal = False
    assert ((old, new) in LEGAL) == is_legal


def test_final_statuses() -> None:
    """A status is final when no transition starts from it."""
    assert {Status.COMPLETED, Status.FAILED, Status.CANCELLED} == {status for status in Status if status.is_final}


def test_started_task_is_running() -> None:
    """The record of a started task has the time of the start and the name of the execution."""
    started = start(pending(), at=NOW, execution_name="executions/1")
    expected = attrs.evolve(pending(), status=Status.RUNNING, started_at=NOW, execution_name="executions/1")
    assert expected == started


def test_start_without_an_execution_name_retains_it() -> None:
    """A start without a name does not replace the name that the launch returned."""
    launched = attrs.evolve(pending(), execution_name="executions/1")
    assert start(launched, at=NOW).execution_name == "executions/1"


def test_task_cannot_be_started_twice() -> None:
    """Starting a running task raises `IllegalTransition`."""
    with pytest.raises(IllegalTransition, match="A task that is running cannot become running"):
        start(start(pending(), at=NOW), at=NOW)


def test_pending_task_is_cancelled_immediately() -> None:
    """A cancellation makes a pending task final."""
    record = request_cancel(pending(), at=NOW)
    assert (Status.CANCELLED, NOW, NOW, 130, Reason.CANCELLED) == (
        record.status,
        record.cancelled_at,
        record.completed_at,
        record.exit_code,
        record.reason,
    )


def test_running_task_becomes_cancelling() -> None:
    """A cancelled task runs until its worker stops, and a second cancellation changes nothing."""
    once = request_cancel(start(pending(), at=NOW), at=NOW + SECOND)
    assert (Status.RUNNING, True, NOW + SECOND) == (once.status, once.is_cancelling, once.cancelled_at)
    assert once == request_cancel(once, at=NOW + 2 * SECOND)


@pytest.mark.parametrize("outcome", [SUCCESS, FAILURE, cancelled_outcome()])
def test_final_task_cannot_be_cancelled(outcome: Outcome) -> None:
    """The error has the status of the task."""
    record = finish(start(pending(), at=NOW), outcome, at=NOW)
    with pytest.raises(IllegalTransition, match=f"Task t-1 is already {outcome.status}"):
        request_cancel(record, at=NOW)


def test_final_record_has_the_outcome() -> None:
    """The final record has all fields of the outcome, and the duration."""
    outcome = attrs.evolve(
        SUCCESS,
        errors=2,
        usage={"input_tokens": 5},
        session_id="s-1",
        uploaded_files=(UploadedFile(original_path="a", gcs_path="b", size_bytes=1),),
        git_commit=GitCommit(sha="abc", message="m", pushed=False, branch="main"),
        action_errors=(ActionError(action="git", error="It broke."),),
    )
    record = finish(start(pending(), at=NOW), outcome, at=NOW + dt.timedelta(seconds=1.5))
    for name in ("status", "reason", "exit_code", "error", "uploaded_files", "git_commit", "action_errors"):
        assert getattr(outcome, name) == getattr(record, name)
    assert record.summary is not None
    for name in ("turns", "errors", "cost_usd", "usage", "session_id", "result"):
        assert getattr(outcome, name) == getattr(record.summary, name)
    assert (1500, NOW, NOW + dt.timedelta(seconds=1.5)) == (
        record.summary.duration_ms,
        record.summary.started_at,
        record.summary.completed_at,
    )


def test_task_that_never_started_has_no_duration() -> None:
    """A task that finishes before it starts has a duration of zero and no start time."""
    summary = finish(pending(), FAILURE, at=NOW + SECOND).summary
    assert summary is not None
    assert (0, None) == (summary.duration_ms, summary.started_at)


def test_duration_is_never_negative() -> None:
    """When the clock of another machine is behind, the duration is zero."""
    summary = finish(start(pending(), at=NOW), SUCCESS, at=NOW - SECOND).summary
    assert summary is not None
    assert summary.duration_ms == 0


@pytest.mark.parametrize("outcome", [SUCCESS, FAILURE])
def test_cancelling_task_becomes_cancelled(outcome: Outcome) -> None:
    """A task that is cancelling becomes cancelled with any outcome, and its summary has the values of the outcome."""
    record = finish(request_cancel(start(pending(), at=NOW), at=NOW), outcome, at=NOW + SECOND)
    assert (Status.CANCELLED, Reason.CANCELLED, 130, "The task was cancelled.") == (
        record.status,
        record.reason,
        record.exit_code,
        record.error,
    )
    assert record.summary is not None
    assert outcome.turns == record.summary.turns


Step = Callable[[TaskRecord], TaskRecord]
steps: dict[str, Step] = {
    "start": lambda record: start(record, at=NOW),
    "cancel": lambda record: request_cancel(record, at=NOW),
    "succeed": lambda record: finish(record, SUCCESS, at=NOW),
    "fail": lambda record: finish(record, FAILURE, at=NOW),
    "finish as cancelled": lambda record: finish(record, cancelled_outcome(), at=NOW),
}


@given(st.lists(st.sampled_from(sorted(steps)), max_size=8))
def test_final_status_never_changes(order: list[str]) -> None:
    """In any order of changes, a final status and the fields of the request do not change."""
    record = pending(CallbackInfo())
    cancel_accepted = False
    for name in order:
        before = record
        try:
            record = steps[name](record)
        except IllegalTransition:
            continue
        assert not before.status.is_final
        assert (before.status, record.status) in LEGAL or before.status is record.status
        cancel_accepted = cancel_accepted or name == "cancel"
    constant = ("task_id", "type", "created_at", "logs_path", "metadata", "callback_url")
    assert [getattr(pending(), name) for name in constant] == [getattr(record, name) for name in constant]
    assert not (cancel_accepted and record.status in (Status.COMPLETED, Status.FAILED))
    assert record.status.is_final == record.owes_callback == (record.completed_at is not None)


# --- callbacks ---------------------------------------------------------------------------------------------


def test_task_without_callback_owes_none() -> None:
    """A completed task without a callback URL owes no callback."""
    assert (None, False, False) == (
        completed().webhook,
        completed().owes_callback,
        is_callback_due(completed(), at=NOW + 9 * SECOND),
    )


def test_running_task_owes_no_callback() -> None:
    """A callback is owed only when the task is final."""
    assert not start(pending(CallbackInfo()), at=NOW).owes_callback


def test_final_record_owes_its_callback() -> None:
    """The callback of a final record is due immediately, unless `finish` claims it with a lease."""
    record = completed(CallbackInfo())
    assert CallbackInfo(state=CallbackState.OWED, next_attempt_at=NOW + SECOND) == record.webhook
    assert is_callback_due(record, at=NOW + SECOND)
    leased = finish(start(pending(CallbackInfo()), at=NOW), SUCCESS, at=NOW, lease_until=NOW + 60 * SECOND)
    assert CallbackInfo(state=CallbackState.DELIVERING, next_attempt_at=NOW + 60 * SECOND) == leased.webhook


def test_lease_of_a_clock_that_was_set_back_does_not_count() -> None:
    """A lease that ends later than any lease can does not delay the callback; a delay after a failure does."""
    leased = claim_callback(completed(CallbackInfo()), lease_until=NOW + 60 * SECOND)
    assert is_callback_due(leased, at=NOW - 3600 * SECOND)
    assert not is_callback_due(leased, at=NOW - 200 * SECOND)
    assert not is_callback_due(owe_callback(leased, at=NOW + 60 * SECOND), at=NOW - 3600 * SECOND)


def test_callback_under_a_lease_is_not_due() -> None:
    """A claimed callback is not due until its lease expires."""
    record = claim_callback(completed(CallbackInfo()), lease_until=NOW + 60 * SECOND)
    assert record.owes_callback
    assert not is_callback_due(record, at=NOW + 59 * SECOND)
    assert is_callback_due(record, at=NOW + 60 * SECOND)


def test_delivered_callback_is_not_owed() -> None:
    """After a successful delivery the callback is not owed, and the record has the number of all attempts."""
    failed = record_delivery(completed(CallbackInfo()), delivered=False, attempts=5, error="No response.", at=NOW)
    record = record_delivery(failed, delivered=True, attempts=2, error=None, at=NOW)
    assert record.webhook is not None
    assert (CallbackState.DELIVERED, 7, None, None) == (
        record.webhook.state,
        record.webhook.attempts,
        record.webhook.last_error,
        record.webhook.next_attempt_at,
    )
    assert not record.owes_callback


def test_delay_between_deliveries_grows() -> None:
    """The delay after a failed delivery doubles each time, from one minute to six hours."""
    record, delays = completed(CallbackInfo()), []
    for _ in range(12):
        record = record_delivery(record, delivered=False, attempts=5, error="No response.", at=NOW)
        assert record.webhook is not None
        assert record.webhook.next_attempt_at is not None
        delays.append(record.webhook.next_attempt_at - NOW)
    minutes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 360, 360, 360]
    assert [dt.timedelta(minutes=minute) for minute in minutes] == delays
    assert (minutes[0] * 60, 6 * 3600) == (FIRST_CALLBACK_DELAY.total_seconds(), MAX_CALLBACK_DELAY.total_seconds())


@pytest.mark.parametrize(("requested", "delay"), [(5 * SECOND, 60 * SECOND), (600 * SECOND, 600 * SECOND)])
def test_receiver_can_request_a_longer_delay(requested: dt.timedelta, delay: dt.timedelta) -> None:
    """`not_before` can make the delay longer, and never shorter."""
    record = record_delivery(
        completed(CallbackInfo()), delivered=False, attempts=1, error="Too many.", at=NOW, not_before=NOW + requested
    )
    assert record.webhook is not None
    assert NOW + delay == record.webhook.next_attempt_at


def test_callback_is_abandoned_after_the_retry_period() -> None:
    """A failed delivery after the retry period abandons the callback; the record retains the last error."""
    record = completed(CallbackInfo())
    late = NOW + SECOND + CALLBACK_RETRY_PERIOD
    owed = record_delivery(record, delivered=False, attempts=1, error="No response.", at=late)
    abandoned = record_delivery(owed, delivered=False, attempts=1, error="No response.", at=late + SECOND)
    assert (True, False) == (owed.owes_callback, abandoned.owes_callback)
    assert abandoned.webhook is not None
    assert (CallbackState.ABANDONED, "No response.") == (abandoned.webhook.state, abandoned.webhook.last_error)


@pytest.mark.parametrize("state", list(CallbackState))
def test_callback_can_be_requested_in_any_state(state: CallbackState) -> None:
    """`owe_callback` makes the callback due immediately, and retains the number of attempts."""
    record = owe_callback(completed(CallbackInfo(state=state, attempts=4)), at=NOW)
    assert CallbackInfo(state=CallbackState.OWED, attempts=4, next_attempt_at=NOW) == record.webhook
    assert is_callback_due(record, at=NOW)

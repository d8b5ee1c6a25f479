from __future__ import annotations

import datetime as dt
import itertools
import re
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
from ccrun.task import (
    TASK_ID_PATTERN,
    ActionError,
    CallbackInfo,
    CallbackState,
    GitCommit,
    GitToken,
    Outcome,
    Reason,
    Secret,
    Status,
    TaskId,
    TaskRecord,
    TaskSpec,
    TaskType,
    UploadedFile,
)

NOW = dt.datetime(2025, 3, 4, 5, 6, 7, tzinfo=dt.UTC)
SECOND = dt.timedelta(seconds=1)
SUCCESS = Outcome(status=Status.COMPLETED, reason=Reason.COMPLETED, exit_code=0, turns=3, result="done", cost_usd=0.5)
FAILURE = Outcome(status=Status.FAILED, reason=Reason.AGENT_ERROR, exit_code=1, error="It broke.")


def pending(webhook: CallbackInfo | None = None) -> TaskRecord:
    """Return the record of a task that has just been asked for."""
    return TaskRecord(
        task_id=TaskId("t-1"),
        type=TaskType.ASYNC,
        status=Status.PENDING,
        created_at=NOW,
        logs_path="file:///sessions/t-1/",
        webhook=webhook,
    )


def over(webhook: CallbackInfo | None = None) -> TaskRecord:
    """Return the record of a task that has succeeded."""
    return finish(start(pending(webhook), at=NOW), SUCCESS, at=NOW + SECOND)


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_secret_never_shows_itself() -> None:
    """A secret is a mask in whatever way it is turned into text, alone or inside of a fact."""
    secret = Secret("made-up secret")
    fact = TaskSpec(
        task_id=TaskId("t-1"),
        type=TaskType.SYNC,
        prompt="made-up secret",
        timeout_minutes=1,
        anthropic_api_key=secret,
        environment_secrets={"TOKEN": secret},
    )
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r}", "%s" % secret, repr([secret]), repr(fact)]  # noqa: UP031
    assert [] == [text for text in shown if "made-up secret" in text]
    assert secret.reveal() == "made-up secret"


def test_secrets_are_equal_by_value_only_to_secrets() -> None:
    """Two secrets of one value are equal and hash alike; a secret never equals a string."""
    assert Secret("a") == Secret("a")
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2
    assert Secret("a") != "a"


def test_secrets_of_a_request_are_all_that_must_be_masked() -> None:
    """Every field of a request that holds a secret is named, but the callback URL, which the record shows in part."""
    spec = TaskSpec(
        task_id=TaskId("t-1"),
        type=TaskType.SYNC,
        prompt="",
        timeout_minutes=1,
        anthropic_api_key=Secret("api"),
        anthropic_oauth_token=Secret("oauth"),
        ssh_key=Secret("ssh"),
        git_token=GitToken.parse("user:git"),
        environment_secrets={"A": Secret("one"), "B": Secret("two")},
        callback_url=Secret("https://example.com"),
    )
    assert {"api", "oauth", "ssh", "user:git", "git", "one", "two"} == {secret.reveal() for secret in spec.secrets}


def test_every_secret_field_of_a_request_is_covered() -> None:
    """A field for a secret that is added to the request is also added to what is masked."""
    fields = {field.name for field in attrs.fields(TaskSpec) if re.search("Secret|Token", str(field.type))}
    assert {
        "anthropic_api_key",
        "anthropic_oauth_token",
        "callback_url",
        "environment_secrets",
        "git_token",
        "ssh_key",
    } == fields


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        ("a", True),
        ("A-z_0", True),
        ("-", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("a.b", False),
        ("a/b", False),
        ("a\n", False),
        ("é", False),
        ("\u0660", False),
    ],
)
def test_task_id_is_url_safe(text: str, is_valid: bool) -> None:
    """A task ID has letters, digits, underscores and hyphens of ASCII, up to 128 of them."""
    assert is_valid == (TASK_ID_PATTERN.fullmatch(text) is not None)


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
def test_only_legal_transitions_are_let_through(old: Status, new: Status) -> None:
    """Of all pairs of states, six may follow each other."""
    try:
        check_transition(old, new)
        is_legal = True
    except IllegalTransition:
        is_legal = False
    assert ((old, new) in LEGAL) == is_legal


def test_nothing_follows_a_final_state() -> None:
    """A state is final when no transition leaves it."""
    assert {Status.COMPLETED, Status.FAILED, Status.CANCELLED} == {status for status in Status if status.is_final}


def test_started_task_runs() -> None:
    """A worker that takes a task up is noted with its time and its execution."""
    started = start(pending(), at=NOW, execution_name="executions/1")
    expected = attrs.evolve(pending(), status=Status.RUNNING, started_at=NOW, execution_name="executions/1")
    assert expected == started


def test_worker_without_a_name_keeps_the_one_that_is_known() -> None:
    """A worker that does not know its execution leaves the name that the launch gave."""
    launched = attrs.evolve(pending(), execution_name="executions/1")
    assert start(launched, at=NOW).execution_name == "executions/1"


def test_task_is_taken_up_once() -> None:
    """A second worker of one task is refused."""
    with pytest.raises(IllegalTransition, match="A task that is running cannot become running"):
        start(start(pending(), at=NOW), at=NOW)


def test_pending_task_is_cancelled_at_once() -> None:
    """A cancel before the worker has begun ends the task."""
    record = request_cancel(pending(), at=NOW)
    assert (Status.CANCELLED, NOW, NOW, 130, Reason.CANCELLED) == (
        record.status,
        record.cancelled_at,
        record.completed_at,
        record.exit_code,
        record.reason,
    )


def test_running_task_is_marked_as_cancelling() -> None:
    """A cancel of a running task leaves it to its worker, and a second one changes nothing."""
    once = request_cancel(start(pending(), at=NOW), at=NOW + SECOND)
    assert (Status.RUNNING, True, NOW + SECOND) == (once.status, once.is_cancelling, once.cancelled_at)
    assert once == request_cancel(once, at=NOW + 2 * SECOND)


@pytest.mark.parametrize("outcome", [SUCCESS, FAILURE, cancelled_outcome()])
def test_task_that_is_over_is_not_cancelled(outcome: Outcome) -> None:
    """A cancel that comes too late is told how the task ended."""
    record = finish(start(pending(), at=NOW), outcome, at=NOW)
    with pytest.raises(IllegalTransition, match=f"Task t-1 is already {outcome.status}"):
        request_cancel(record, at=NOW)


def test_final_record_has_the_outcome() -> None:
    """All that is known of the end stands in the final record, with the time that it took."""
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


def test_task_that_never_began_took_no_time() -> None:
    """A task that ends before it began has a duration of zero, and no start."""
    summary = finish(pending(), FAILURE, at=NOW + SECOND).summary
    assert summary is not None
    assert (0, None) == (summary.duration_ms, summary.started_at)


def test_clock_that_goes_back_gives_no_negative_duration() -> None:
    """A task that ended before it began, by another machine's clock, took no time."""
    summary = finish(start(pending(), at=NOW), SUCCESS, at=NOW - SECOND).summary
    assert summary is not None
    assert summary.duration_ms == 0


@pytest.mark.parametrize("outcome", [SUCCESS, FAILURE])
def test_cancel_that_was_answered_stands(outcome: Outcome) -> None:
    """However the worker ends a task that is being cancelled, it ends as cancelled, with the figures of what was done."""
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
    "be cancelled": lambda record: finish(record, cancelled_outcome(), at=NOW),
}


@given(st.lists(st.sampled_from(sorted(steps)), max_size=8))
def test_whoever_comes_first_decides_the_end(order: list[str]) -> None:
    """In whatever order parties change a task, a final state stays as it is and what it was born with never changes."""
    record = pending(CallbackInfo())
    cancel_answered = False
    for name in order:
        before = record
        try:
            record = steps[name](record)
        except IllegalTransition:
            continue
        assert not before.status.is_final
        assert (before.status, record.status) in LEGAL or before.status is record.status
        cancel_answered = cancel_answered or name == "cancel"
    born = ("task_id", "type", "created_at", "logs_path", "metadata", "callback_url")
    assert [getattr(pending(), name) for name in born] == [getattr(record, name) for name in born]
    assert not (cancel_answered and record.status in (Status.COMPLETED, Status.FAILED))
    assert record.status.is_final == record.owes_callback == (record.completed_at is not None)


# --- the callback's debt ---------------------------------------------------------------------------------------------


def test_task_without_callback_owes_none() -> None:
    """A task that named no callback has nothing to deliver, whatever happens."""
    assert (None, False, False) == (over().webhook, over().owes_callback, is_callback_due(over(), at=NOW + 9 * SECOND))


def test_running_task_owes_nothing_yet() -> None:
    """A callback is owed from the end of the task on."""
    assert not start(pending(CallbackInfo()), at=NOW).owes_callback


def test_end_and_debt_are_one_value() -> None:
    """The final record owes its callback at once, unless its writer takes it up in the same act."""
    record = over(CallbackInfo())
    assert CallbackInfo(state=CallbackState.OWED, next_attempt_at=NOW + SECOND) == record.webhook
    assert is_callback_due(record, at=NOW + SECOND)
    leased = finish(start(pending(CallbackInfo()), at=NOW), SUCCESS, at=NOW, lease_until=NOW + 60 * SECOND)
    assert CallbackInfo(state=CallbackState.DELIVERING, next_attempt_at=NOW + 60 * SECOND) == leased.webhook


def test_callback_under_a_lease_is_not_due() -> None:
    """Nobody else takes a callback up before the lease has run out; then anybody may."""
    record = claim_callback(over(CallbackInfo()), lease_until=NOW + 60 * SECOND)
    assert record.owes_callback
    assert not is_callback_due(record, at=NOW + 59 * SECOND)
    assert is_callback_due(record, at=NOW + 60 * SECOND)


def test_delivered_callback_is_settled() -> None:
    """After a delivery nothing is owed, and the tries are counted."""
    tried = record_delivery(over(CallbackInfo()), delivered=False, attempts=5, error="No answer.", at=NOW)
    record = record_delivery(tried, delivered=True, attempts=2, error=None, at=NOW)
    assert record.webhook is not None
    assert (CallbackState.DELIVERED, 7, None, None) == (
        record.webhook.state,
        record.webhook.attempts,
        record.webhook.last_error,
        record.webhook.next_attempt_at,
    )
    assert not record.owes_callback


def test_pauses_between_deliveries_grow() -> None:
    """Each delivery that fails is followed by a pause twice as long, from a minute up to six hours."""
    record, pauses = over(CallbackInfo()), []
    for _ in range(12):
        record = record_delivery(record, delivered=False, attempts=5, error="No answer.", at=NOW)
        assert record.webhook is not None
        assert record.webhook.next_attempt_at is not None
        pauses.append(record.webhook.next_attempt_at - NOW)
    minutes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 360, 360, 360]
    assert [dt.timedelta(minutes=minute) for minute in minutes] == pauses
    assert (minutes[0] * 60, 6 * 3600) == (FIRST_CALLBACK_DELAY.total_seconds(), MAX_CALLBACK_DELAY.total_seconds())


@pytest.mark.parametrize(("wish", "pause"), [(5 * SECOND, 60 * SECOND), (600 * SECOND, 600 * SECOND)])
def test_receiver_may_ask_for_a_longer_pause(wish: dt.timedelta, pause: dt.timedelta) -> None:
    """What the receiver wants makes a pause longer, never shorter."""
    record = record_delivery(
        over(CallbackInfo()), delivered=False, attempts=1, error="Too many.", at=NOW, not_before=NOW + wish
    )
    assert record.webhook is not None
    assert NOW + pause == record.webhook.next_attempt_at


def test_receiver_that_stays_away_is_given_up() -> None:
    """A month after the task's end the callback is owed no more; the last error stays."""
    record = over(CallbackInfo())
    late = NOW + SECOND + CALLBACK_RETRY_PERIOD
    owed = record_delivery(record, delivered=False, attempts=1, error="No answer.", at=late)
    given_up = record_delivery(owed, delivered=False, attempts=1, error="No answer.", at=late + SECOND)
    assert (True, False) == (owed.owes_callback, given_up.owes_callback)
    assert given_up.webhook is not None
    assert (CallbackState.ABANDONED, "No answer.") == (given_up.webhook.state, given_up.webhook.last_error)


@pytest.mark.parametrize("state", list(CallbackState))
def test_callback_is_owed_again_whatever_became_of_it(state: CallbackState) -> None:
    """A wish to deliver again makes the callback due at once and keeps the count of tries."""
    record = owe_callback(over(CallbackInfo(state=state, attempts=4)), at=NOW)
    assert CallbackInfo(state=CallbackState.OWED, attempts=4, next_attempt_at=NOW) == record.webhook
    assert is_callback_due(record, at=NOW)

"""Gives a task whose execution ended without a final record its end.

Both the API, when it comes upon such a task, and the sweep, which looks for them, call this; it neither opens a payload nor calls
a receiver.
"""

from __future__ import annotations

import datetime as dt
from typing import assert_never

from ccrun.jobs import ExecutionState, Jobs
from ccrun.store import Store
from ccrun.task import EXIT_FAILED, Outcome, Reason, Status, TaskRecord, finish


def verdict(status: Status, state: ExecutionState) -> Outcome | None:
    """Return how a task in that status ends when its execution is in that state; None when it may still end by itself."""
    match status:
        case Status.PENDING if state is ExecutionState.ENDED:
            reason, error = Reason.LAUNCH_FAILED, "The worker ended before it began the task."
        case Status.RUNNING if state in (ExecutionState.ENDED, ExecutionState.UNKNOWN):
            reason, error = Reason.WORKER_LOST, "The worker was lost before the task ended."
        case Status.PENDING | Status.RUNNING | Status.COMPLETED | Status.FAILED | Status.CANCELLED:
            return None
        case _ as never:
            assert_never(never)
    return Outcome(status=Status.FAILED, reason=reason, exit_code=EXIT_FAILED, error=error)


async def settle(store: Store, jobs: Jobs, record: TaskRecord) -> TaskRecord:
    """Return the record as it stands after a look at the execution; final when the execution is over.

    Raises:
        StorageError: The storage does not answer.
        TaskNotFound: The task is gone.
    """
    if record.status.is_final:
        return record
    state = await jobs.state(record.task_id, record.execution_name)
    outcome = verdict(record.status, state)
    if outcome is None:
        return record

    def end(present: TaskRecord) -> TaskRecord:
        # The record was read before the execution's state was, so the worker may have ended the task in between.
        return present if present.status.is_final else finish(present, outcome, at=dt.datetime.now(dt.UTC))

    settled = await store.update(record.task_id, end)
    await store.delete_payload(record.task_id)
    await jobs.clear(record.task_id)
    return settled

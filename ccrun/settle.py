"""Settling: writing the final record of a task whose execution is lost.

The API settles a task when a client reads it, a sweep settles all. Neither opens a payload nor calls a receiver here.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Final, assert_never

from ccrun.jobs import ExecutionState, Jobs
from ccrun.lifecycle import failed_outcome, finish
from ccrun.store import Store
from ccrun.task import EXIT_KILLED, EXIT_TIMEOUT, Outcome, Reason, Status, TaskRecord

_NEVER_BEGAN: Final = failed_outcome(Reason.LAUNCH_FAILED, "The worker exited before it started the task.")
_OVERDUE: Final = failed_outcome(Reason.LAUNCH_FAILED, "The worker was launched, but did not start the task in time.")
_LOST: Final = failed_outcome(Reason.WORKER_LOST, "The worker was lost before the task finished.")
#: The outcome of a running task, by the state of its execution.
_OVER: Final[Mapping[ExecutionState, Outcome]] = {
    ExecutionState.FINISHED: _LOST,
    ExecutionState.OUT_OF_MEMORY: failed_outcome(
        Reason.OUT_OF_MEMORY, "The task needed more memory than its worker has.", EXIT_KILLED
    ),
    ExecutionState.TIMED_OUT: failed_outcome(
        Reason.TIMEOUT, "The platform stopped the worker at its time limit.", EXIT_TIMEOUT
    ),
    ExecutionState.CANCELLED: failed_outcome(Reason.KILLED, "The worker was stopped at the platform.", EXIT_KILLED),
}


def lost_outcome(status: Status, state: ExecutionState, *, is_overdue: bool = False) -> Outcome | None:
    """Return the outcome of a task whose execution is lost, None when the worker may still finish it.

    Args:
        is_overdue: Whether the task waits for longer than the platform needs to start a worker.
    """
    match status:
        case Status.PENDING:
            if state in _OVER:
                return _NEVER_BEGAN
            return _OVERDUE if is_overdue and state is ExecutionState.UNKNOWN else None
        case Status.RUNNING:
            return _LOST if state is ExecutionState.UNKNOWN else _OVER.get(state)
        case Status.COMPLETED | Status.FAILED | Status.CANCELLED:
            return None
        case _ as never:
            assert_never(never)


async def settle(
    store: Store,
    jobs: Jobs,
    record: TaskRecord,
    *,
    state: ExecutionState | None = None,
    delete_payload: bool = True,
) -> TaskRecord:
    """Return the record after a check of its execution; it is final when the execution has finished.

    Args:
        state: The state of the execution, if the caller has it already.
        delete_payload: As for `Store.update`.

    Raises:
        StorageError: The storage does not answer.
        TaskNotFound: There is no such task.
    """
    if record.status.is_final:
        return record
    if state is None:
        state = await jobs.state(record.task_id, record.execution_name)
    age = dt.datetime.now(dt.UTC) - record.created_at
    is_overdue = jobs.start_timeout is not None and age > jobs.start_timeout
    outcome = lost_outcome(record.status, state, is_overdue=is_overdue)
    if outcome is None:
        return record

    def end(present: TaskRecord) -> TaskRecord:
        # The record is older than the state of the execution: the worker may have started or finished the task in between.
        return finish(present, outcome, at=dt.datetime.now(dt.UTC)) if present.status is record.status else present

    settled = await store.update(record.task_id, end, delete_payload=delete_payload)
    if not settled.status.is_final:
        return settled
    await jobs.clear(record.task_id)
    return settled

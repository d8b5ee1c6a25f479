"""The operations of the API, without HTTP: submit, cancel, redeliver a callback, read a current record.

Never opens a payload and never calls a receiver. A submission writes mark, payload and record, then launches the worker. A
response never reports a state that is not stored yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import hmac
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import attrs
import structlog

from ccrun import codec, lifecycle
from ccrun.api.background import BackgroundTasks
from ccrun.errors import (
    Busy,
    CcrunError,
    IllegalTransition,
    LaunchFailed,
    NotRedeliverable,
    StorageError,
    TaskAlreadyFinished,
    TaskExists,
    TaskNotFound,
)
from ccrun.jobs import Jobs
from ccrun.seal import KeyWrapper, Purpose, Sealed, new_data_key
from ccrun.settle import settle
from ccrun.spec import TaskSpec
from ccrun.store import Store
from ccrun.task import CallbackInfo, Reason, Status, TaskId, TaskRecord

log = structlog.get_logger()

#: Seconds for which a retry of a request waits for the record of the first one.
CREATION_WAIT_SECONDS: Final = 5.0
CREATION_POLL_SECONDS: Final = 0.05
#: Tasks whose last check is remembered.
MAX_REMEMBERED_CHECKS: Final = 10_000
#: Seconds in which a task is stored, or its request fails; a call to the storage could be retried for longer. A sweep removes
#: what is incomplete after twice this time (`ccrun.sweep.INCOMPLETE_TASK_AGE`).
CREATION_SECONDS: Final = 15.0
#: Seconds after which a sweep has removed an incomplete task of a process that was killed.
INCOMPLETE_TASK_RETRY_SECONDS: Final = 60


@attrs.frozen(kw_only=True)
class Idempotency:
    """An Idempotency-Key and its caller. A retry of a request has the same two."""

    key: str
    caller: str

    @property
    def task_id(self) -> TaskId:
        """The task ID of the request and all of its retries, unless the body has one."""
        return TaskId(hashlib.sha256(f"{self.caller}\n{self.key}".encode()).hexdigest()[:32])

    def digest(self, body: bytes) -> str:
        """Return a digest of key and body. Without the key, it reveals nothing about the body."""
        return hmac.new(f"{self.caller}\n{self.key}".encode(), body, hashlib.sha256).hexdigest()


@attrs.frozen(kw_only=True)
class Submitted:
    """A stored task. `is_replay`: an earlier request with the same Idempotency-Key created it."""

    record: TaskRecord
    is_replay: bool


@attrs.frozen(kw_only=True)
class Cancelled:
    """A cancelled task. `was_already_requested`: an earlier request had cancelled it."""

    record: TaskRecord
    was_already_requested: bool


@attrs.frozen(kw_only=True)
class Dispatcher:
    """The operations.

    Args:
        callback_owed: Called when a client has made a callback due.
        creation_wait_seconds: How long a retry of a request waits for the record of the first one.
        settle_interval_seconds: The minimum between two checks of one execution: clients poll, and each check is a call
            with a quota.
    """

    store: Store
    jobs: Jobs
    wrapper: KeyWrapper
    callback_owed: Callable[[], None]
    creation_wait_seconds: float = CREATION_WAIT_SECONDS
    settle_interval_seconds: float = 2.0
    #: When the execution of a task was last checked, on the clock of the event loop.
    _settled_at: OrderedDict[TaskId, float] = attrs.field(factory=OrderedDict, init=False, repr=False, eq=False)

    async def current_record(
        self, task_id: TaskId, *, background: BackgroundTasks, timeout_seconds: float
    ) -> TaskRecord:
        """Return the record of a task, after settling it if its execution is lost.

        Args:
            background: Where the settling continues after the timeout.
            timeout_seconds: After this time, the record is returned as it was.

        Raises:
            TaskNotFound: There is no such task.
            StorageError: The storage failed.
        """
        record = await self.store.record(task_id)
        now = asyncio.get_running_loop().time()
        if record.status.is_final or now < self._settled_at.get(task_id, -math.inf) + self.settle_interval_seconds:
            return record
        self._settled_at[task_id] = now
        self._settled_at.move_to_end(task_id)
        if len(self._settled_at) > MAX_REMEMBERED_CHECKS:
            self._settled_at.popitem(last=False)
        settling = background.spawn(settle(self.store, self.jobs, record))
        await asyncio.wait([settling], timeout=timeout_seconds)
        return settling.result() if settling.done() else record

    async def submit(self, spec: TaskSpec, *, idempotency_digest: str | None = None) -> Submitted:
        """Store a task and launch its worker.

        Args:
            idempotency_digest: Identifies the request among those with the same task ID; None without an Idempotency-Key.

        Raises:
            TaskExists: Another request has the same ID.
            Busy: There is no capacity, or the first request with this ID or key is not stored yet.
            LaunchFailed: The worker could not be started. The task is stored as failed.
            KeyServiceError: The key service failed.
            StorageError: The storage failed.
        """
        self.jobs.check_capacity()
        record = self._first_record(spec, idempotency_digest)
        data_key = await new_data_key(self.wrapper)
        if spec.callback_url is not None:
            sealed_url = await data_key.seal(
                spec.callback_url.reveal().encode(), task_id=spec.task_id, purpose=Purpose.CALLBACK_URL
            )
            record = attrs.evolve(record, sealed_callback_url=sealed_url)
        payload = await data_key.seal(codec.spec_to_bytes(spec), task_id=spec.task_id, purpose=Purpose.PAYLOAD)
        try:
            async with asyncio.timeout(CREATION_SECONDS) as limit:
                record = await self._store_new_task(record, payload)
        except TimeoutError:
            if not limit.expired():
                raise  # Not this limit: an error that the storage should not raise.
            raise StorageError("The storage did not store the task in time.") from None
        except TaskExists:
            original = await self._original_task(spec.task_id)
            if idempotency_digest is None:
                raise
            return Submitted(record=_replayed(original, idempotency_digest), is_replay=True)
        return Submitted(record=await self._launch(record), is_replay=False)

    async def cancel(self, task_id: TaskId) -> Cancelled:
        """Cancel a task: immediately when no worker has started it, else by asking the worker to stop.

        Raises:
            TaskNotFound: There is no such task.
            TaskAlreadyFinished: The task is final.
            StorageError: The storage failed.
        """
        before: TaskRecord | None = None

        def request(record: TaskRecord) -> TaskRecord:
            nonlocal before
            before = record
            if record.status.is_final:
                raise TaskAlreadyFinished(f"Task {task_id} is already {record.status}.")
            return lifecycle.request_cancel(record, at=dt.datetime.now(dt.UTC))

        record = await self.store.update(task_id, request)
        if record.status.is_final and record.owes_callback:
            self.callback_owed()
        await self.jobs.cancel(task_id, record.execution_name)
        return Cancelled(record=record, was_already_requested=before is not None and before.is_cancelling)

    async def redeliver(self, task_id: TaskId) -> None:
        """Make the callback of a task due again.

        Raises:
            TaskNotFound: There is no such task.
            NotRedeliverable: It is not final, or has no callback.
            StorageError: The storage failed.
        """

        def owe(record: TaskRecord) -> TaskRecord:
            if not record.status.is_final:
                raise NotRedeliverable(f"Task {task_id} has not finished yet.")
            if record.webhook is None:
                raise NotRedeliverable(f"Task {task_id} has no callback.")
            return lifecycle.owe_callback(record, at=dt.datetime.now(dt.UTC))

        owe(await self.store.record(task_id))
        await self.store.mark_active(task_id)
        await self.store.update(task_id, owe)
        # Again, since a process that read the old record may have deleted the first mark meanwhile.
        await self.store.mark_active(task_id)
        self.callback_owed()

    def _first_record(self, spec: TaskSpec, idempotency_digest: str | None) -> TaskRecord:
        url = spec.callback_url
        return TaskRecord(
            task_id=spec.task_id,
            type=spec.type,
            status=Status.PENDING,
            # Stored in milliseconds, so that the response equals what is read later.
            created_at=_in_milliseconds(dt.datetime.now(dt.UTC)),
            logs_path=self.store.logs_path(spec.task_id),
            callback_url=redacted_url(url.reveal()) if url else None,
            webhook=CallbackInfo() if url else None,
            metadata=spec.metadata,
            idempotency_digest=idempotency_digest,
        )

    async def _store_new_task(self, record: TaskRecord, payload: Sealed) -> TaskRecord:
        """Store all parts of a task, or none. Return the stored record.

        Raises:
            TaskExists: There is a task with this ID, or another request stores one.
        """
        task_id, digest = record.task_id, record.idempotency_digest
        # The mark comes first: without it, no sweep would remove an incomplete task.
        is_marked_now = await self.store.mark_active(task_id, request_digest=digest)
        own_payload: int | None = None
        try:
            own_payload = await self.store.add_payload(task_id, payload)
        except TaskExists:
            # An earlier attempt of this request was interrupted or is slow. The one that creates the record launches the task.
            if digest is None or not await self.store.take_over_payload(task_id, payload, request_digest=digest):
                raise
        try:
            await self.store.add(record)
        except CcrunError as error:
            if isinstance(error, TaskExists):
                with contextlib.suppress(IllegalTransition):
                    return await self._retry_launch(record)
            # A payload that was taken over may be that of the task which the other request has created by now.
            if own_payload is not None:
                await self.store.delete_payload(task_id, generation=own_payload)
            raise
        if not is_marked_now:
            # A sweep may have deleted the older mark in the meantime.
            await self.store.mark_active(task_id)
        return record

    async def _retry_launch(self, record: TaskRecord) -> TaskRecord:
        """Return the record of a task that is launched again, after its first launch has failed.

        Raises:
            IllegalTransition: It was not rejected, or was submitted by another request.
        """

        def retry(present: TaskRecord) -> TaskRecord:
            if not _is_retry(present, record.idempotency_digest):
                raise IllegalTransition(f"Task {record.task_id} is already {present.status}.")
            return lifecycle.retry_launch(present, record)

        return await self.store.update(record.task_id, retry)

    async def _original_task(self, task_id: TaskId) -> TaskRecord:
        """Return the record of the task with this ID, as soon as it is stored.

        Raises:
            Busy: It is not stored in time.
        """
        try:
            async with asyncio.timeout(self.creation_wait_seconds):
                while True:
                    try:
                        return await self.store.record(task_id)
                    except TaskNotFound:
                        await asyncio.sleep(CREATION_POLL_SECONDS)
        except TimeoutError:
            raise Busy(
                "An earlier request with this task ID or Idempotency-Key is still being processed.",
                retry_after=INCOMPLETE_TASK_RETRY_SECONDS,
            ) from None

    async def _launch(self, record: TaskRecord) -> TaskRecord:
        try:
            execution_name = await self.jobs.launch(record.task_id)
        except (LaunchFailed, Busy) as error:
            present = await self._mark_launch_failed(record, error)
            if present.reason is Reason.LAUNCH_FAILED:
                raise
            # Only the response was lost: a worker has started the task.
            return present
        log.info("task_launched", message="Task launched", taskId=record.task_id, type=record.type)
        return attrs.evolve(record, execution_name=execution_name)

    async def _mark_launch_failed(self, record: TaskRecord, error: CcrunError) -> TaskRecord:
        """Record that the task has failed, unless a worker has started it."""

        def fail(present: TaskRecord) -> TaskRecord:
            if present.status is not Status.PENDING:
                return present
            return lifecycle.reject(present, error.message, at=dt.datetime.now(dt.UTC))

        return await self.store.update(record.task_id, fail)


def _is_retry(original: TaskRecord, digest: str | None) -> bool:
    """Return whether a request with this digest is a retry of the one that created the task."""
    return (
        digest is not None
        and original.idempotency_digest is not None
        and hmac.compare_digest(original.idempotency_digest, digest)
    )


def _replayed(original: TaskRecord, digest: str) -> TaskRecord:
    """Return the record of a task for a retry of its request.

    Raises:
        TaskExists: It was created by another request.
        LaunchFailed: The first request failed with this error, and a retry is still being stored.
    """
    if not _is_retry(original, digest):
        raise TaskExists("This Idempotency-Key was used with another request.")
    if original.launch_rejected:
        raise LaunchFailed(original.error)
    return original


def redacted_url(url: str) -> str:
    """Return a callback URL without the parts that may be secret: user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _in_milliseconds(at: dt.datetime) -> dt.datetime:
    return at.replace(microsecond=at.microsecond // 1000 * 1000)

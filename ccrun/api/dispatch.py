"""The operations of the API, without HTTP: submit, cancel, redeliver a callback, read a current record.

Never opens a payload and never calls a receiver. A submission writes mark, payload and record, then launches the worker. A
response never reports a state that is not stored yet.
"""

from __future__ import annotations

import asyncio
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
from ccrun.errors import Busy, CcrunError, LaunchFailed, NotRedeliverable, TaskAlreadyFinished, TaskExists, TaskNotFound
from ccrun.jobs import Jobs
from ccrun.seal import KeyWrapper, Purpose, Sealed, new_data_key
from ccrun.settle import settle
from ccrun.store import Store
from ccrun.task import CallbackInfo, Reason, Status, TaskId, TaskRecord, TaskSpec

log = structlog.get_logger()

#: Seconds for which a retry of a request waits for the record of the first one.
CREATION_WAIT_SECONDS: Final = 5.0
CREATION_POLL_SECONDS: Final = 0.05
#: Tasks whose last check is remembered.
MAX_REMEMBERED_CHECKS: Final = 10_000
#: Seconds after which a sweep has removed an incomplete task of a process that was killed.
INCOMPLETE_TASK_RETRY_SECONDS: Final = 300


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
            Busy: There is no capacity, or the first request with this key is not stored yet.
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
            await self._store_new_task(record, payload)
        except TaskExists:
            if idempotency_digest is None:
                raise
            return Submitted(record=await self._original_task(spec.task_id, idempotency_digest), is_replay=True)
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

    async def _store_new_task(self, record: TaskRecord, payload: Sealed) -> None:
        """Store all parts of a task, or none."""
        # The mark comes first: without it, no sweep would remove an incomplete task.
        await self.store.mark_active(record.task_id)
        await self.store.add_payload(record.task_id, payload)
        try:
            await self.store.add(record)
        except CcrunError:
            await self.store.delete_payload(record.task_id)
            raise

    async def _original_task(self, task_id: TaskId, digest: str) -> TaskRecord:
        """Return the record of the first request with this Idempotency-Key, as soon as it is stored."""
        try:
            async with asyncio.timeout(self.creation_wait_seconds):
                while True:
                    try:
                        record = await self.store.record(task_id)
                        break
                    except TaskNotFound:
                        await asyncio.sleep(CREATION_POLL_SECONDS)
        except TimeoutError:
            raise Busy(
                "An earlier request with this Idempotency-Key is still being processed.",
                retry_after=INCOMPLETE_TASK_RETRY_SECONDS,
            ) from None
        if record.idempotency_digest is None or not hmac.compare_digest(record.idempotency_digest, digest):
            raise TaskExists("This Idempotency-Key was used with another request.")
        return record

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
        """Record that the task has failed, unless a worker has started it. The client gets the error, so no callback is owed."""
        outcome = lifecycle.failed_outcome(Reason.LAUNCH_FAILED, error.message)

        def fail(present: TaskRecord) -> TaskRecord:
            if present.status is not Status.PENDING:
                return present
            failed = lifecycle.finish(present, outcome, at=dt.datetime.now(dt.UTC))
            return attrs.evolve(failed, webhook=None)

        return await self.store.update(record.task_id, fail)


def redacted_url(url: str) -> str:
    """Return a callback URL without the parts that may be secret: user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _in_milliseconds(at: dt.datetime) -> dt.datetime:
    return at.replace(microsecond=at.microsecond // 1000 * 1000)

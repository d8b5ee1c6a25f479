"""Submit, cancel, deliver again: the use cases of the API, without HTTP.

Never decrypts and never calls a receiver. The order of a birth: mark, payload, record, launch; what is told to a caller is
stored before.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import hmac
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import attrs
import structlog

from ccrun import codec, lifecycle
from ccrun.errors import Busy, CcrunError, LaunchFailed, NotRedeliverable, TaskAlreadyFinished, TaskExists, TaskNotFound
from ccrun.jobs import Jobs
from ccrun.seal import KeyWrapper, Purpose, Sealed, new_data_key
from ccrun.store import Store
from ccrun.task import CallbackInfo, Reason, Status, TaskId, TaskRecord, TaskSpec

log = structlog.get_logger()

#: Seconds for which a repeat of a request waits until the first one, still on its way, has its record.
CREATION_WAIT_SECONDS: Final = 5.0
CREATION_POLL_SECONDS: Final = 0.05
#: Seconds after which a half-born task, left by a process that died, will have been swept away.
INCOMPLETE_TASK_RETRY_SECONDS: Final = 300


@attrs.frozen(kw_only=True)
class Idempotency:
    """What makes a repeat of a request: the caller's key, told apart by who calls."""

    key: str
    caller: str

    @property
    def task_id(self) -> TaskId:
        """The task ID that every repeat has, unless the request brings one."""
        return TaskId(hashlib.sha256(f"{self.caller}\n{self.key}".encode()).hexdigest()[:32])

    def digest(self, body: bytes) -> str:
        """What only the same key with the same body gives; without the key it tells nothing about the body."""
        return hmac.new(f"{self.caller}\n{self.key}".encode(), body, hashlib.sha256).hexdigest()


@attrs.frozen(kw_only=True)
class Submitted:
    """A task that is stored; `is_replay` when an earlier request with the same Idempotency-Key made it."""

    record: TaskRecord
    is_replay: bool


@attrs.frozen(kw_only=True)
class Cancelled:
    """A task that is over or will be soon; `was_asked_before` when an earlier cancel did it."""

    record: TaskRecord
    was_already_requested: bool


@attrs.frozen(kw_only=True)
class Dispatcher:
    """The use cases. `callback_owed` is called when a callback became due by a caller's wish."""

    store: Store
    jobs: Jobs
    wrapper: KeyWrapper
    callback_owed: Callable[[], None]
    creation_wait_seconds: float = CREATION_WAIT_SECONDS

    async def submit(self, spec: TaskSpec, *, idempotency_digest: str | None = None) -> Submitted:
        """Store a task and launch its worker.

        Raises:
            TaskExists: The ID is in use, by another request.
            Busy: There is no room now, or a repeat came while the first is on its way.
            LaunchFailed: The worker cannot be started; the task is kept as failed.
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
        """End a task: at once when it has not begun, else by asking its worker.

        Raises:
            TaskNotFound: There is none.
            TaskOver: It has ended already.
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
            NotRedeliverable: It is not over, or has no callback.
        """

        def owe(record: TaskRecord) -> TaskRecord:
            if not record.status.is_final:
                raise NotRedeliverable(f"Task {task_id} is not over yet.")
            if record.webhook is None:
                raise NotRedeliverable(f"Task {task_id} has no callback.")
            return lifecycle.owe_callback(record, at=dt.datetime.now(dt.UTC))

        owe(await self.store.record(task_id))
        await self.store.mark_active(task_id)
        await self.store.update(task_id, owe)
        # Once more, since whoever saw the task before may have taken the first mark away meanwhile.
        await self.store.mark_active(task_id)
        self.callback_owed()

    def _first_record(self, spec: TaskSpec, idempotency_digest: str | None) -> TaskRecord:
        url = spec.callback_url
        return TaskRecord(
            task_id=spec.task_id,
            type=spec.type,
            status=Status.PENDING,
            # Kept in milliseconds, so that what is told now is what is read later.
            created_at=_in_milliseconds(dt.datetime.now(dt.UTC)),
            logs_path=self.store.logs_path(spec.task_id),
            callback_url=redacted_url(url.reveal()) if url else None,
            webhook=CallbackInfo() if url else None,
            metadata=spec.metadata,
            idempotency_digest=idempotency_digest,
        )

    async def _store_new_task(self, record: TaskRecord, payload: Sealed) -> None:
        """Store all that makes a task, or nothing of it."""
        # The mark comes first: what no sweep looks at could stay as it is for ever.
        await self.store.mark_active(record.task_id)
        await self.store.add_payload(record.task_id, payload)
        try:
            await self.store.add(record)
        except CcrunError:
            await self.store.delete_payload(record.task_id)
            raise

    async def _original_task(self, task_id: TaskId, digest: str) -> TaskRecord:
        """Return the task that an earlier request with this Idempotency-Key made, as soon as it is there."""
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
                "An earlier request with this Idempotency-Key is not through yet.",
                retry_after=INCOMPLETE_TASK_RETRY_SECONDS,
            ) from None
        if record.idempotency_digest is None or not hmac.compare_digest(record.idempotency_digest, digest):
            raise TaskExists("This Idempotency-Key was used with another request.")
        return record

    async def _launch(self, record: TaskRecord) -> TaskRecord:
        try:
            execution_name = await self.jobs.launch(record.task_id)
        except (LaunchFailed, Busy) as error:
            buried = await self._mark_launch_failed(record, error)
            if buried.reason is Reason.LAUNCH_FAILED:
                raise
            # Only the answer was lost: a worker has taken the task up.
            return buried
        log.info("task_launched", message="Task launched", taskId=record.task_id, type=record.type)
        return attrs.evolve(record, execution_name=execution_name)

    async def _mark_launch_failed(self, record: TaskRecord, error: CcrunError) -> TaskRecord:
        """Keep the task as failed, unless it has begun. Its caller is told at once, so no callback is owed."""
        outcome = lifecycle.failed_outcome(Reason.LAUNCH_FAILED, error.message)

        def fail(present: TaskRecord) -> TaskRecord:
            if present.status is not Status.PENDING:
                return present
            failed = lifecycle.finish(present, outcome, at=dt.datetime.now(dt.UTC))
            return attrs.evolve(failed, webhook=None)

        return await self.store.update(record.task_id, fail)


def redacted_url(url: str) -> str:
    """Return a callback URL without what may be secret in it: user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _in_milliseconds(at: dt.datetime) -> dt.datetime:
    return at.replace(microsecond=at.microsecond // 1000 * 1000)

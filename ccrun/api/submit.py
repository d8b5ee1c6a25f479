"""`POST /run` and `POST /run-async`."""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import Final

import attrs
from aiohttp import web

from ccrun import codec
from ccrun.api.abandoned import AbandonedTasks
from ccrun.api.background import BackgroundTasks
from ccrun.api.body import read_json_body
from ccrun.api.dependencies import ApiDependencies
from ccrun.api.dispatch import Idempotency, Submitted
from ccrun.api.middleware import Authorization
from ccrun.api.request import parse_request
from ccrun.api.responses import check_query, invalid, json_response
from ccrun.api.sse import Cursor
from ccrun.api.streams import StreamRoutes
from ccrun.errors import NotConfigured
from ccrun.task import TaskId, TaskType

#: An Idempotency-Key is a short opaque string (draft-ietf-httpapi-idempotency-key-header).
IDEMPOTENCY_KEY: Final = re.compile(r"[\x20-\x7e]{1,255}")


@attrs.frozen(kw_only=True)
class SubmitRoutes:
    """The handlers."""

    deps: ApiDependencies
    authorization: Authorization
    background: BackgroundTasks
    streams: StreamRoutes
    abandoned: AbandonedTasks

    async def run_async(self, request: web.Request) -> web.Response:
        """`POST /run-async`: store the task, start it and respond immediately."""
        check_query(request)
        submitted = await asyncio.shield(await self._submit(request, TaskType.ASYNC))
        record = submitted.record
        body = {
            "taskId": record.task_id,
            "status": record.status,
            "logsPath": record.logs_path,
            "createdAt": codec.record_to_public(record)["createdAt"],
        }
        if record.execution_name:
            body["executionName"] = record.execution_name
        return json_response(body, status=202, headers=_headers(submitted))

    async def run(self, request: web.Request) -> web.StreamResponse:
        """`POST /run`: store the task, start it and stream its events."""
        check_query(request, "lastEventId", "heartbeat", "maxLineBytes")
        self.streams.check_capacity()
        submission = await self._submit(request, TaskType.SYNC)
        try:
            submitted = await asyncio.shield(submission)
            return await self.streams.resume(
                request, submitted.record.task_id, start=Cursor(), headers=_headers(submitted)
            )
        except BaseException:
            # The client has not seen the task finish.
            if not self.streams.is_closing:
                self.background.spawn(self._abandon(submission))
            raise

    async def _submit(self, request: web.Request, task_type: TaskType) -> asyncio.Task[Submitted]:
        """Validate a request and submit its task. The submission continues when the client disconnects."""
        idempotency = self._idempotency(request)
        body = await read_json_body(request, seconds=self.deps.timeouts.body)
        # In a thread: 10 MiB of hostile input take seconds.
        spec = await asyncio.to_thread(
            parse_request,
            body,
            task_type=task_type,
            task_id=idempotency.task_id if idempotency else TaskId(str(uuid.uuid4())),
            defaults=self.deps.defaults,
        )
        if spec.callback_url is not None and self.deps.callbacks_unavailable:
            raise NotConfigured(self.deps.callbacks_unavailable)
        digest = idempotency.digest(body) if idempotency else None
        return self.background.spawn(self.deps.dispatcher.submit(spec, idempotency_digest=digest))

    def _idempotency(self, request: web.Request) -> Idempotency | None:
        key = request.headers.get("Idempotency-Key")
        if key is None:
            return None
        if not IDEMPOTENCY_KEY.fullmatch(key):
            raise invalid("Idempotency-Key", "Idempotency-Key must have 1 to 255 printable ASCII characters")
        return Idempotency(key=key, caller=self.authorization.caller(request) or "")

    async def _abandon(self, submission: asyncio.Task[Submitted]) -> None:
        """Tell that the client of a submission has left."""
        await asyncio.wait([submission])
        if not submission.cancelled() and submission.exception() is None:
            self.abandoned.submitter_left(submission.result().record.task_id)


def _headers(submitted: Submitted) -> dict[str, str]:
    headers = {"X-Task-Id": str(submitted.record.task_id)}
    if submitted.is_replay:
        headers["Idempotent-Replay"] = "true"
    return headers

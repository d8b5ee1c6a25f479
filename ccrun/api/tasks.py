"""The routes that read, cancel and redeliver tasks."""

from __future__ import annotations

from typing import Final

import attrs
from aiohttp import web

from ccrun import codec
from ccrun.api.background import BackgroundTasks
from ccrun.api.dependencies import ApiDependencies
from ccrun.api.responses import check_query, invalid, json_response, whole_number
from ccrun.errors import FieldError, InvalidRequest, TaskNotFound
from ccrun.task import TASK_ID_PATTERN, CallbackState, Status, TaskId, TaskRecord

#: Tasks on one page of `GET /tasks`.
MAX_PAGE: Final = 100
DEFAULT_PAGE: Final = 50


@attrs.frozen(kw_only=True)
class TaskRoutes:
    """The handlers."""

    deps: ApiDependencies
    background: BackgroundTasks

    async def tasks(self, request: web.Request) -> web.Response:
        """`GET /tasks`: one page of tasks, newest first."""
        check_query(request, "limit", "cursor", "status", "webhook")
        query = request.query
        errors = []
        limit = whole_number(query.get("limit", str(DEFAULT_PAGE)), 1, MAX_PAGE)
        if limit is None:
            errors.append(FieldError("limit", f"limit must be a whole number from 1 to {MAX_PAGE}"))
        status = query.get("status")
        if status is not None and status not in tuple(Status):
            errors.append(FieldError("status", f"status must be one of {', '.join(Status)}"))
        webhook = query.get("webhook")
        if webhook is not None and webhook not in tuple(CallbackState):
            errors.append(FieldError("webhook", f"webhook must be one of {', '.join(CallbackState)}"))
        if errors or limit is None:
            raise InvalidRequest(errors)

        def is_wanted(record: TaskRecord) -> bool:
            state = record.webhook.state if record.webhook is not None else None
            return status in (None, record.status) and webhook in (None, state)

        try:
            page = await self.deps.store.page(limit=limit, cursor=query.get("cursor"), wanted=is_wanted)
        except ValueError as error:
            raise invalid("cursor", str(error)) from None
        return json_response(
            {"tasks": [codec.record_to_public(record) for record in page.tasks], "nextCursor": page.next_cursor}
        )

    async def tasks_status(self, request: web.Request) -> web.Response:
        """`GET /tasks/status`: the running tasks, and how many wait."""
        check_query(request)
        marks = await self.deps.store.active()
        records = [record for record in await self.deps.store.records([mark.task_id for mark in marks]) if record]
        running = [codec.record_to_public(record) for record in records if record.status is Status.RUNNING]
        cancelling = {record.task_id for record in records if record.is_cancelling}
        return json_response(
            {
                "active": len(running),
                "max": self.deps.jobs.max_running,
                "queued": sum(record.status is Status.PENDING for record in records),
                "tasks": [
                    {
                        "taskId": record["taskId"],
                        "type": record["type"],
                        "startedAt": record["startedAt"],
                        "cancelling": record["taskId"] in cancelling,
                    }
                    for record in running
                ],
            }
        )

    async def task(self, request: web.Request) -> web.Response:
        """`GET /tasks/{taskId}`: the record of a task."""
        check_query(request)
        record = await self.deps.dispatcher.current_record(
            task_id_of(request), background=self.background, timeout_seconds=self.deps.timeouts.settle
        )
        return json_response(codec.record_to_public(record))

    async def cancel(self, request: web.Request) -> web.Response:
        """`POST /cancel/{taskId}`: cancel a task."""
        check_query(request)
        task_id = task_id_of(request)
        cancelled = await self.background.finish(self.deps.dispatcher.cancel(task_id))
        message = "The task is being cancelled already" if cancelled.was_already_requested else "The task was cancelled"
        status = "cancelling" if cancelled.was_already_requested else "cancelled"
        return json_response({"message": message, "taskId": task_id, "status": status})

    async def redeliver(self, request: web.Request) -> web.Response:
        """`POST /tasks/{taskId}/webhook`: deliver the callback again."""
        check_query(request)
        task_id = task_id_of(request)
        await self.background.finish(self.deps.dispatcher.redeliver(task_id))
        return json_response({"message": "The callback will be delivered again", "taskId": task_id}, status=202)


def task_id_of(request: web.Request) -> TaskId:
    """Return the task ID in the path of a request.

    Raises:
        TaskNotFound: It is not a valid ID.
    """
    task_id = request.match_info["task_id"]
    if not TASK_ID_PATTERN.fullmatch(task_id):
        raise TaskNotFound("There is no task with this ID: an ID has letters, digits, underscores and hyphens only.")
    return TaskId(task_id)

"""The aiohttp application: its routes, its middlewares and its lifetime."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from aiohttp import web

from ccrun.api.abandoned import AbandonedTasks
from ccrun.api.background import BackgroundTasks
from ccrun.api.dependencies import ApiDependencies, Companion
from ccrun.api.health import HealthRoutes
from ccrun.api.logs import LogRoutes
from ccrun.api.middleware import Authorization, add_security_headers, bind_trace, handle_errors
from ccrun.api.streams import StreamRoutes
from ccrun.api.submit import SubmitRoutes
from ccrun.api.tasks import TaskRoutes

#: Options of `web.AppRunner` that the app needs: handlers stop when their client disconnects, and decompress bodies themselves.
RUNNER_OPTIONS: Final[dict[str, Any]] = {"handler_cancellation": True, "auto_decompress": False}


def make_app(deps: ApiDependencies) -> web.Application:
    """Return the application. Run it with `RUNNER_OPTIONS`."""
    authorization = Authorization(deps.tokens, loopback_only=deps.loopback_only, unavailable=deps.unavailable)
    background = BackgroundTasks()
    health = HealthRoutes(deps)
    abandoned = AbandonedTasks(deps=deps, background=background)
    streams = StreamRoutes(deps, abandoned)
    submit = SubmitRoutes(
        deps=deps, authorization=authorization, background=background, streams=streams, abandoned=abandoned
    )
    tasks = TaskRoutes(deps=deps, background=background)
    app = web.Application(
        client_max_size=deps.max_request_bytes,
        middlewares=[bind_trace(deps.project_id), handle_errors(deps.max_request_bytes), authorization.middleware],
    )
    app.add_routes(
        [
            web.get("/", health.index),
            web.get("/health", health.health),
            web.get("/healthz", health.health),
            web.get("/ready", health.ready),
            web.post("/run", submit.run),
            web.post("/run-async", submit.run_async),
            web.get("/tasks", tasks.tasks),
            web.get("/tasks/status", tasks.tasks_status),
            web.get("/tasks/{task_id}", tasks.task),
            web.get("/tasks/{task_id}/events", streams.events),
            web.get("/tasks/{task_id}/logs", LogRoutes(deps=deps).logs),
            web.post("/tasks/{task_id}/webhook", tasks.redeliver),
            web.post("/cancel/{task_id}", tasks.cancel),
        ]
    )
    app.on_response_prepare.append(add_security_headers)
    app.cleanup_ctx.extend(_running(companion) for companion in deps.companions)
    app.cleanup_ctx.append(_closing(background))
    app.on_shutdown.append(streams.close)
    return app


def _running(companion: Companion) -> Callable[[web.Application], AsyncIterator[None]]:
    async def context(_: web.Application) -> AsyncIterator[None]:
        async with companion():
            yield

    return context


def _closing(background: BackgroundTasks) -> Callable[[web.Application], AsyncIterator[None]]:
    async def context(_: web.Application) -> AsyncIterator[None]:
        yield
        await background.close()

    return context

"""`GET /`, `GET /health` and `GET /ready`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final

import attrs
from aiohttp import web

from ccrun import __version__
from ccrun.api.dependencies import ApiDependencies
from ccrun.api.responses import RETRY_AFTER_SECONDS, json_response
from ccrun.codec import isolation_to_public
from ccrun.errors import CcrunError

ENDPOINTS: Final = (
    "POST /run",
    "POST /run-async",
    "GET /tasks",
    "GET /tasks/status",
    "GET /tasks/{taskId}",
    "GET /tasks/{taskId}/events",
    "GET /tasks/{taskId}/logs",
    "POST /tasks/{taskId}/webhook",
    "POST /cancel/{taskId}",
    "GET /health",
    "GET /ready",
)


@attrs.frozen
class HealthRoutes:
    """The handlers."""

    deps: ApiDependencies

    async def index(self, _: web.Request) -> web.Response:
        """`GET /`: name, version and endpoints."""
        return json_response({"name": "ccrun", "version": __version__, "endpoints": ENDPOINTS})

    async def health(self, request: web.Request) -> web.Response:
        """`GET /health`: the process is alive. `?verbose=true` adds the state of what it depends on."""
        if request.query.get("verbose") != "true":
            return json_response({"status": "ok"})
        unavailable = self.deps.unavailable
        isolation = self.deps.isolation
        checks = {"configuration": unavailable} if unavailable else await self._checks()
        return json_response(
            {
                "status": "ok",
                "version": __version__,
                "backend": self.deps.backend,
                "checks": {name: error or "ok" for name, error in checks.items()},
                "callbacks": self.deps.callbacks_unavailable or "ok",
                **({"isolation": isolation_to_public(isolation)} if isolation is not None else {}),
            }
        )

    async def ready(self, _: web.Request) -> web.Response:
        """`GET /ready`: the service can accept tasks."""
        if self.deps.unavailable:
            errors = {"configuration": self.deps.unavailable}
        else:
            errors = {name: error for name, error in (await self._checks()).items() if error is not None}
        if not errors:
            return json_response({"status": "ready"})
        body = {"error": " ".join(errors.values()), "failing": sorted(errors)}
        return json_response(body, status=503, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})

    async def _checks(self) -> dict[str, str | None]:
        """Return the error of each service that ccrun depends on, None for one that works."""

        async def error_of(check: Awaitable[None], timeout_message: str) -> str | None:
            try:
                async with asyncio.timeout(self.deps.timeouts.ready):
                    await check
            except CcrunError as error:
                return error.message
            except TimeoutError:
                return timeout_message
            return None

        storage, keys = await asyncio.gather(
            error_of(self.deps.store.check(), "The storage does not answer."),
            error_of(self.deps.wrapper.check(), "The key service does not answer."),
        )
        return {"storage": storage, "keyService": keys}

"""Google Cloud with a door for each side: the API, the worker and the sweep, so that a test can tell who calls what.

A door is an address of its own for each stand-in. It notes each call, by method and resource, and passes it on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Final

import aiohttp
import attrs
import grpc
import grpc.aio
from aiohttp import web
from standins.cloudrun import JOB, CloudRun
from standins.gcs import BUCKET, HOP_BY_HOP, Gcs
from standins.kms import KEY_NAME, PROJECT, Kms
from yarl import URL

from ccrun import config
from ccrun.backends.gcp.blobs import open_blobs
from ccrun.server import serving
from ccrun.store import Store
from ccrun.testing.model import Script, ScriptedModel
from helpers.service import CALLBACK_SECRET, CloudPlace, Service

POLL_SECONDS: Final = 0.2
#: From an object's name, or the prefix of a listing, to what stands for it in the documentation.
RESOURCES: Final = (
    (re.compile(r"(sessions)/[^/]+/[0-9]{3,}-[0-9]{8}-[0-9]{6}\.jsonl"), r"\1/{taskId}/NNN-YYYYMMDD-HHMMSS.jsonl"),
    (re.compile(r"(sessions)/[^/]+/uploads/.+"), r"\1/{taskId}/uploads/{path}"),
    (re.compile(r"(sessions)/[^/]+/(.*)"), r"\1/{taskId}/\2"),
    (re.compile(r"(active)/.+"), r"\1/{taskId}"),
    (re.compile(r"(index)/.+"), r"\1/{time}-{taskId}"),
)


@attrs.frozen(order=True)
class Call:
    """A method of Google's and what it is used on."""

    method: str
    resource: str


@attrs.frozen(kw_only=True)
class Door:
    """Where one side finds Google Cloud; `calls` is what it did there."""

    calls: Counter[Call]
    environment: dict[str, str]

    def count(self, method: str) -> int:
        """Return how often a method was called, or all methods whose names begin so."""
        return sum(timeouts for call, timeouts in self.calls.items() if call.method.startswith(method))


@attrs.frozen(kw_only=True)
class Sides:
    """A service, the doors that it and its workers go through, and what is behind them."""

    api: Door
    worker: Door
    sweep: Door
    place: CloudPlace
    service: Service


@contextlib.asynccontextmanager
async def open_sides(script: Script) -> AsyncIterator[Sides]:
    """Start the stand-ins with their doors, and a service with real workers and a scripted model on them."""
    async with contextlib.AsyncExitStack() as stack:
        model = await stack.enter_async_context(ScriptedModel(script))
        gcs, kms = await stack.enter_async_context(Gcs()), await stack.enter_async_context(Kms())
        settings = {
            **os.environ,
            "CCRUN_BACKEND": "gcp",
            "PROJECT_ID": PROJECT,
            "GCS_LOGS_BUCKET": BUCKET,
            "CLOUDRUN_CALLBACK_SECRET": CALLBACK_SECRET,
            "CALLBACK_ALLOWED_HOSTS": "127.0.0.1",
            "ANTHROPIC_BASE_URL": model.url,
            "LOG_LEVEL": "ERROR",
            "PORT": "0",
            "POLL_SECONDS": str(POLL_SECONDS),
        }
        worker = await stack.enter_async_context(open_door(gcs, kms))
        command = (sys.executable, "-P", "-m", "ccrun.worker")
        cloud_run = await stack.enter_async_context(
            CloudRun(command=command, environment={**settings, **worker.environment})
        )
        api = await stack.enter_async_context(open_door(gcs, kms, cloud_run))
        sweep = await stack.enter_async_context(open_door(gcs, kms, cloud_run))
        place = CloudPlace(
            environment={**settings, **api.environment},
            store=Store(await stack.enter_async_context(open_blobs(BUCKET, emulator=gcs.direct))),
            cloud_run=cloud_run,
            gcs=gcs,
            kms=kms,
            sweep_environment={**settings, **sweep.environment},
        )
        http = await stack.enter_async_context(aiohttp.ClientSession())
        loaded = await asyncio.to_thread(config.load, place.environment)
        url = await stack.enter_async_context(serving(loaded, place.environment))
        service = Service(url=url, http=http, model=model, place=place, store=place.store)
        yield Sides(api=api, worker=worker, sweep=sweep, place=place, service=service)


@contextlib.asynccontextmanager
async def open_door(gcs: Gcs, kms: Kms, cloud_run: CloudRun | None = None) -> AsyncIterator[Door]:
    """Open addresses of their own for these servers."""
    calls: Counter[Call] = Counter()
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
        storage = await stack.enter_async_context(_http_door(http, gcs.url, calls))
        keys = await stack.enter_async_context(_http_door(http, f"http://{kms.host}", calls))
        environment = {"STORAGE_EMULATOR_HOST": storage, "KMS_EMULATOR_HOST": keys.removeprefix("http://")}
        if cloud_run is not None:
            jobs = await stack.enter_async_context(_grpc_door(cloud_run.host, calls))
            environment["CLOUD_RUN_EMULATOR_HOST"] = jobs
        yield Door(calls=calls, environment=environment)


@contextlib.asynccontextmanager
async def _http_door(http: aiohttp.ClientSession, behind: str, calls: Counter[Call]) -> AsyncIterator[str]:
    async def answer(request: web.BaseRequest) -> web.Response:
        # Not `request.read()`, which has a limit.
        body = await request.content.read()
        calls[_http_call(request, body)] += 1
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        url = URL(behind + request.raw_path, encoded=True)
        try:
            async with http.request(request.method, url, headers=headers, data=body) as response:
                kept = {name: value for name, value in response.headers.items() if name.lower() not in HOP_BY_HOP}
                return web.Response(status=response.status, headers=kept, body=await response.read())
        except aiohttp.ClientError:
            return web.Response(status=503)

    runner = web.ServerRunner(web.Server(answer, access_log=None), shutdown_timeout=0.05)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def _http_call(request: web.BaseRequest, body: bytes) -> Call:
    if ":" in request.path:
        return Call(f"cryptoKeys.{request.path.rpartition(':')[2]}", KEY_NAME)
    name = request.path.partition("/o/")[2]
    match request.method:
        case "POST":
            # The first part of the body describes the object.
            found = re.search(rb'"name": ("(?:[^"\\]|\\.)*")', body)
            assert found is not None
            is_new = request.query["ifGenerationMatch"] == "0"
            return Call("objects.insert" if is_new else "objects.insert over", _resource(json.loads(found[1])))
        case "DELETE":
            return Call("objects.delete", _resource(name))
        case _ if name:
            return Call("objects.get", _resource(name))
        case _:
            return Call("objects.list", _resource(request.query["prefix"]))


def _resource(name: str) -> str:
    return next((pattern.sub(shown, name) for pattern, shown in RESOURCES if pattern.fullmatch(name)), name)


@contextlib.asynccontextmanager
async def _grpc_door(behind: str, calls: Counter[Call]) -> AsyncIterator[str]:
    async with grpc.aio.insecure_channel(behind) as channel:

        class Everything(grpc.GenericRpcHandler):
            def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
                path = handler_call_details.method
                service, _, method = path.rpartition("/")
                # Without serializers, bytes go through as they are.
                forward: Any = channel.unary_unary(path)

                async def answer(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
                    calls[Call(f"{service.rpartition('.')[2]}.{method}", JOB)] += 1
                    try:
                        return bytes(await forward(request))
                    except grpc.aio.AioRpcError as error:
                        await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata()))
                        raise AssertionError from error

                return grpc.unary_unary_rpc_method_handler(answer)

        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Everything(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)
            await server.wait_for_termination()

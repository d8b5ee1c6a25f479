"""Recording proxies between Google Cloud and the API, the worker and the sweep: which process calls which method.

Each process has its own set of proxies. A proxy counts each call, by method and resource, and forwards it.
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
from standins.cloudrun import CloudRun
from standins.execution import JOB
from standins.gcs import BUCKET, HOP_BY_HOP, Gcs
from standins.kms import KEY_NAME, PROJECT, Kms
from yarl import URL

from ccrun import config
from ccrun.backends.gcp.blobs import open_blobs
from ccrun.server import serving
from ccrun.store import Store
from ccrun.testing.model import Script, ScriptedModel
from helpers.service import CALLBACK_SECRET, CloudDeployment, Service

POLL_SECONDS: Final = 0.2
#: Patterns of object names and list prefixes, and how the documentation writes them.
RESOURCES: Final = (
    (re.compile(r"(sessions)/[^/]+/[0-9]{3,}-[0-9]{8}-[0-9]{6}\.jsonl"), r"\1/{taskId}/NNN-YYYYMMDD-HHMMSS.jsonl"),
    (re.compile(r"(sessions)/[^/]+/uploads/.+"), r"\1/{taskId}/uploads/{path}"),
    (re.compile(r"(sessions)/[^/]+/(.*)"), r"\1/{taskId}/\2"),
    (re.compile(r"(active)/.+"), r"\1/{taskId}"),
    (re.compile(r"(index)/.+"), r"\1/{time}-{taskId}"),
)


@attrs.frozen(order=True)
class Call:
    """A method of a Google API and the resource that it is called on."""

    method: str
    resource: str


@attrs.frozen(kw_only=True)
class RecordingProxy:
    """The addresses through which one process reaches Google Cloud, and the calls that it made."""

    calls: Counter[Call]
    environment: dict[str, str]

    def count(self, method: str) -> int:
        """Return the number of calls of methods whose names start with `method`."""
        return sum(number for call, number in self.calls.items() if call.method.startswith(method))


@attrs.frozen(kw_only=True)
class RecordedService:
    """A service, and the recording proxies of the API, the workers and the sweep."""

    api: RecordingProxy
    worker: RecordingProxy
    sweep: RecordingProxy
    deployment: CloudDeployment
    service: Service


@contextlib.asynccontextmanager
async def recorded_service(script: Script) -> AsyncIterator[RecordedService]:
    """Start the stand-ins target recording proxies, and a service with real workers and a scripted model."""
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
        worker = await stack.enter_async_context(recording_proxy(gcs, kms))
        command = (sys.executable, "-P", "-m", "ccrun.worker")
        cloud_run = await stack.enter_async_context(
            CloudRun(command=command, environment={**settings, **worker.environment})
        )
        api = await stack.enter_async_context(recording_proxy(gcs, kms, cloud_run))
        sweep = await stack.enter_async_context(recording_proxy(gcs, kms, cloud_run))
        deployment = CloudDeployment(
            environment={**settings, **api.environment},
            store=Store(await stack.enter_async_context(open_blobs(BUCKET, emulator=gcs.direct))),
            cloud_run=cloud_run,
            gcs=gcs,
            kms=kms,
            sweep_environment={**settings, **sweep.environment},
        )
        http = await stack.enter_async_context(aiohttp.ClientSession())
        loaded = await asyncio.to_thread(config.load, deployment.environment)
        url = await stack.enter_async_context(serving(loaded, deployment.environment))
        service = Service(url=url, http=http, model=model, deployment=deployment, store=deployment.store)
        yield RecordedService(api=api, worker=worker, sweep=sweep, deployment=deployment, service=service)


@contextlib.asynccontextmanager
async def recording_proxy(gcs: Gcs, kms: Kms, cloud_run: CloudRun | None = None) -> AsyncIterator[RecordingProxy]:
    """Start recording proxies in front of these servers."""
    calls: Counter[Call] = Counter()
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
        storage = await stack.enter_async_context(_http_proxy(http, gcs.url, calls))
        keys = await stack.enter_async_context(_http_proxy(http, f"http://{kms.host}", calls))
        environment = {"STORAGE_EMULATOR_HOST": storage, "KMS_EMULATOR_HOST": keys.removeprefix("http://")}
        if cloud_run is not None:
            jobs = await stack.enter_async_context(_grpc_proxy(cloud_run.host, calls))
            environment["CLOUD_RUN_EMULATOR_HOST"] = jobs
        yield RecordingProxy(calls=calls, environment=environment)


@contextlib.asynccontextmanager
async def _http_proxy(http: aiohttp.ClientSession, target: str, calls: Counter[Call]) -> AsyncIterator[str]:
    async def answer(request: web.BaseRequest) -> web.Response:
        # Not `request.read()`, which has a limit.
        body = await request.content.read()
        calls[_http_call(request, body)] += 1
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        url = URL(target + request.raw_path, encoded=True)
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
async def _grpc_proxy(target: str, calls: Counter[Call]) -> AsyncIterator[str]:
    async with grpc.aio.insecure_channel(target) as channel:

        class Everything(grpc.GenericRpcHandler):
            def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
                path = handler_call_details.method
                service, _, method = path.rpartition("/")
                # Without serializers, messages are forwarded as bytes.
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
